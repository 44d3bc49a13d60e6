"""Networks whose features of images are compared: FID's Inception, VGG16, and programs of the user's.

Features are what a network that was trained for something else says of an image; two sets are as alike as their
features are. Which network that is decides what the numbers mean: only numbers of the same network can be compared,
and only between sets of the same sizes.

Shapes: b batch, c channel, h w image, f features, s spatial features, k classes.
"""

from __future__ import annotations

import hashlib
import tempfile
import urllib.error
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vqdist.errors import UserError, an
from vqdist.files import sha256_of
from vqdist.objectives.frozen import IMAGENET_MEAN, IMAGENET_STD, download_weights
from vqdist.sizes import ImageSize, sides_of

INCEPTION, VGG16 = "inception", "vgg16"
# networks that are known here, each with one of its weights by which a file is recognised
KNOWN = {INCEPTION: "Conv2d_1a_3x3.conv.weight", VGG16: "features.0.weight"}
SPATIAL_CHANNELS = 7  # of the layer that sFID looks at, as the ADM evaluator has it


class KnownNetwork(nn.Module):
    """Images (b, 1 | 3, h, w) in [0, 1] -> features (b, f); perhaps more that some measures need."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return `features` (b, f); where there are any, `spatial` (b, s) for sFID and `logits` (b, k) for IS."""
        return {"features": self(images)}


class FeatureExtractor(nn.Module):
    """Images (b, c, h, w) float32 in [0, 1] -> features (b, f) float32, in eval mode and without gradients.

    Args:
        network: does just that.
        name: of the network, for messages.
        channels, image_size: of the images; two black ones are put through to see that the network takes them.
        digest: 16 digits that tell networks apart; by default of the weights.

    Attributes:
        width: number of features, f.
        widths: of all that it sees, by name, see `KnownNetwork.outputs`.

    Raises:
        UserError: the network does not take such images, or does not give (b, f) with f of at least 2.
    """

    def __init__(
        self, network: nn.Module, name: str, *, channels: int, image_size: ImageSize, digest: str | None = None
    ):
        super().__init__()
        self.network, self.name = network.eval(), name
        self.digest = digest or digest_of_weights(network)
        height, width = sides_of(image_size)
        images = torch.zeros(2, channels, height, width)
        try:
            features = self(images)
        except RuntimeError as error:  # TorchScript puts what is wrong at the end
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UserError(
                f"{name} does not take images of shape (batch, {channels}, {height}, {width}) ({reason}); "
                "give an extractor for the images of this run"
            ) from error
        _check_features(features, len(images), name)
        self.width = features.shape[1]
        self.widths = {name: value.shape[1] for name, value in self.outputs(images).items()}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> features (b, f)."""
        features = self.network(images.to(torch.float32))
        return features.to(torch.float32) if isinstance(features, Tensor) else features

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return all that the network sees of images (b, c, h, w) in [0, 1], see `KnownNetwork.outputs`."""
        if isinstance(self.network, KnownNetwork):
            return {name: value.to(torch.float32) for name, value in self.network.outputs(images.float()).items()}
        features = self(images)
        _check_features(features, len(images), self.name)
        return {"features": features}


def digest_of_weights(network: nn.Module) -> str:
    """Return the first 16 digits of the SHA-256 of a network's weights, with their names."""
    sums = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sums.update(name.encode())
        sums.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sums.hexdigest()[:16]


def load_extractor(spec: str, *, channels: int, image_size: ImageSize, trust_code: bool = False) -> FeatureExtractor:
    """Return the extractor that a user asks for, on the CPU.

    Args:
        spec: `inception`, the network of the published FIDs, or `vgg16`, that of the published precision and recall
            (their weights are downloaded once, into torch's folder); a file with the weights of one of them (.pth);
            or a TorchScript file: images (b, c, h, w) float32 in [0, 1] -> features (b, f).
        channels, image_size: of the images that it will see.
        trust_code: whether it may be a TorchScript file. That is a program, and can write any file of the user's.

    Raises:
        UserError: there is no such file, it holds no weights of a known network and no program that may be run, or the
            extractor does not do that; or the weights can neither be found nor downloaded.
    """
    path = Path(spec).expanduser()
    if spec not in KNOWN and not path.is_file():
        raise UserError(f"--features {spec} is neither {' nor '.join(f'`{name}`' for name in KNOWN)} nor a file")
    if spec not in KNOWN and _is_program(path):
        network = _load_torchscript(path, trust_code)
        digest = sha256_of(path)[:16]  # of a program, as frozen weights are part of its code
        return FeatureExtractor(network, spec, channels=channels, image_size=image_size, digest=digest)
    if channels not in (1, 3):
        raise UserError(f"the images have {channels} channels; {spec} sees 1 (repeated) or 3")
    return FeatureExtractor(_known_network(spec, path), spec, channels=channels, image_size=image_size)


def _known_network(spec: str, path: Path) -> nn.Module:
    if spec == INCEPTION:
        found = _inception_weights()
        problem = f"{found} does not hold the weights of FID's Inception"
        return _Inception(found, problem, "remove it, so that it is downloaded again")
    if spec == VGG16:
        from torchvision.models import VGG16_Weights

        return _VGG16(VGG16, download_weights(VGG16_Weights.IMAGENET1K_V1, "VGG16", "--features ", ""))
    weights = _read_weights(path)
    if KNOWN[VGG16] in weights:
        return _VGG16(spec, weights)
    if KNOWN[INCEPTION] in weights:
        with tempfile.TemporaryDirectory() as folder:  # torch-fidelity reads its own form of file only
            own = Path(folder) / "inception.pth"
            torch.save(weights, own)
            return _Inception(
                own, f"{path} does not hold the weights of FID's Inception", "give torch-fidelity's file"
            )
    raise UserError(
        f"{path} holds weights of no network that is known here ({', '.join(KNOWN)}); give theirs, or a TorchScript "
        "file with --trust_features true"
    )


def _is_program(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, which has code in it; of weights an archive has data only."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Return a state dict that unpickles nothing but tensors."""
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:160]
        raise UserError(
            f"{path} is neither a TorchScript file nor one of weights ({reason}); give the state dict of a known "
            f"network ({', '.join(KNOWN)}) or torch.jit.script(network).save(...): pickled models are not read"
        ) from error
    return weights if isinstance(weights, dict) else {}


def _check_features(features: Tensor, images: int, name: str) -> None:
    found = f"{an(type(features).__name__)}"
    if isinstance(features, Tensor):
        found = f"a tensor of shape {tuple(features.shape)}"
        if features.ndim == 2 and len(features) == images and features.shape[1] >= 2:
            return
    raise UserError(
        f"{name} gives {found} for {images} images; one row of at least 2 features an image, ({images}, features), is "
        "expected: flatten or pool them in the extractor"
    )


def _load_torchscript(path: Path, trusted: bool) -> nn.Module:
    """Load a program of torch's own operators, some of which read and write files."""
    if not trusted:
        raise UserError(
            f"{path} is a TorchScript program, which can read and write every file that you can; give "
            "--trust_features true if you trust whoever made it, or the weights of a known network "
            f"({', '.join(KNOWN)})"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch announces another format, which has no loader yet
            return torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise UserError(
            f"{path} is no whole TorchScript file ({reason}); write one with torch.jit.script(network).save(...)"
        ) from error


class _Inception(KnownNetwork):
    """Images (b, 1 | 3, h, w) in [0, 1] -> the (b, 2048) pooled features of FID's Inception, from 8-bit pixels.

    Spatial features are the first 7 channels of the first branch of the fourth 17x17 block, which the ADM evaluator
    knows as mixed_6/conv: (b, 2023). Logits (b, 1008) lack the bias, as in torch-fidelity and the ADM evaluator.
    """

    def __init__(self, weights: Path, problem: str, remedy: str):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            # torch-fidelity unpickles whatever the file holds, so it gets only one that is seen to hold tensors
            torch.load(weights, map_location="cpu", weights_only=True)
            path = str(weights)
            wanted = ["2048", "logits_unbiased"]
            self.network = FeatureExtractorInceptionV3(INCEPTION, wanted, feature_extractor_weights_path=path)
        except Exception as error:  # a damaged file raises almost anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{problem} ({reason}); {remedy}") from error

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)["features"]

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        seen: list[Tensor] = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _layer, _given, out: seen.append(out))
        try:
            features, logits = self.network(pixels)
        finally:
            hook.remove()
        return {"features": features, "spatial": seen[0][:, :SPATIAL_CHANNELS].flatten(1), "logits": logits}


class _VGG16(KnownNetwork):
    """Images (b, 1 | 3, h, w) in [0, 1] -> (b, 4096) features of VGG16's second dense layer, from 8-bit pixels.

    They are those of torch-fidelity's, which would unpickle whatever the file holds.
    """

    def __init__(self, name: str, weights: dict[str, Tensor]):
        super().__init__()
        from torchvision.models import vgg16

        with torch.device("meta"):  # neither memory nor random numbers for layers that are filled
            network = vgg16(weights=None)
        network.classifier = network.classifier[:5]  # without the classes
        wanted = network.state_dict()
        missing = [key for key, tensor in wanted.items() if getattr(weights.get(key), "shape", None) != tensor.shape]
        if missing:
            raise UserError(
                f"{name} does not hold the weights of VGG16 with its dense layers ({missing[0]} is missing or of "
                "another shape); expected the state dict of torchvision.models.vgg16"
            )
        network.load_state_dict({key: weights[key].float() for key in wanted}, assign=True)
        self.network = network.requires_grad_(False)
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

        pixels = (images.clamp(0, 1) * 255).round().expand(-1, 3, -1, -1)
        return self.network((resize(pixels, size=(224, 224), align_corners=False) - self.mean) / self.std)


def _inception_weights() -> Path:
    """Return the file in torch's folder of downloads, fetched if it is not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = Path(name).stem.rpartition("-")[2]  # the first digits of its SHA-256
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
        raise UserError(
            f"the weights of {INCEPTION} could not be downloaded from {url} ({error}); put that file at {path}, or "
            "give --features FILE with these weights"
        ) from error
    return path
