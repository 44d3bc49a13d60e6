"""Extractors: networks whose features of images are compared, by name, by their weights, or as programs of the user's.

Features are what a network that was trained for something else says of an image; two sets are as alike as their
features are. Which network that is decides what the numbers mean: only numbers of the same network can be compared,
and only between sets of the same sizes.

Shapes: b batch, c channel, h w image, f features.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vqdist.errors import UserError, an
from vqdist.evaluation.networks import KNOWN, KnownNetwork, kind_of
from vqdist.extractor_names import DINOV2, INCEPTION, LISTED, VGG16, name_and_file
from vqdist.files import sha256_of
from vqdist.sizes import ImageSize, sides_of


class FeatureExtractor(nn.Module):
    """Images (b, c, h, w) float32 in [0, 1] -> features (b, f) float32, in eval mode and without gradients.

    Args:
        network: does just that.
        name: of the network, for messages.
        channels, image_size: of the images; two black ones are put through to see that the network takes them.
        digest: 16 digits that tell networks apart; by default of the weights.

    Attributes:
        kind: name of the network, where it is known, and else that of the file.
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
        self.kind: str = network.kind if isinstance(network, KnownNetwork) and network.kind else Path(name).name
        self.digest = digest or digest_of(network)
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


def digest_of(network: nn.Module) -> str:
    """Return 16 digits that tell an extractor apart: of its weights, and of the way that it looks at images."""
    digest, kind = digest_of_weights(network), getattr(network, "kind", "")
    if kind in ("", INCEPTION, VGG16):  # of the weights alone, in files from before there were others
        return digest
    # the size of DINOv2 is in its weights, and no network is known by two names otherwise
    name = DINOV2 if kind.startswith(DINOV2) else kind
    return hashlib.sha256(f"{name} {digest}".encode()).hexdigest()[:16]


def load_extractor(spec: str, *, channels: int, image_size: ImageSize, trust_code: bool = False) -> FeatureExtractor:
    """Return the extractor that a user asks for, on the CPU.

    Args:
        spec: the name of a network of `KNOWN`, whose weights are downloaded once, into torch's folder; its name and a
            file with them, as in `dinov2:model.safetensors`; a file (.pth, .safetensors) alone, which is recognised if
            it is Inception's, VGG16's or DINOv2's; or a TorchScript file: images (b, c, h, w) float32 in [0, 1] ->
            features (b, f).
        channels, image_size: of the images that it will see.
        trust_code: whether it may be a TorchScript file. That is a program, and can write any file of the user's.

    Raises:
        UserError: there is no such file, it holds no weights of a known network and no program that may be run, or the
            extractor does not do that; or the weights can neither be found nor downloaded.
    """
    name, path = name_and_file(spec)
    if name is None and path is not None and _is_program(path):
        network: nn.Module = _load_torchscript(path, trust_code)
        digest = sha256_of(path)[:16]  # of a program, as frozen weights are part of its code
        return FeatureExtractor(network, spec, channels=channels, image_size=image_size, digest=digest)
    if channels not in (1, 3):
        raise UserError(f"the images have {channels} channels; {spec} sees 1 (repeated) or 3")
    return FeatureExtractor(_known_network(spec, name, path), spec, channels=channels, image_size=image_size)


def _known_network(spec: str, name: str | None, path: Path | None) -> KnownNetwork:
    if path is None:
        assert name is not None
        return KNOWN[name].build(name, KNOWN[name].download(name), f"torch's file of {name}")
    if _is_program(path):
        raise UserError(f"{spec}: {path} is a program and no weights; give {path} alone, with --trust_features true")
    weights = _read_weights(path)
    kind = name or kind_of(weights)
    if kind is None:
        raise UserError(
            f"{path} holds weights of no network that can be told; give its name too, as in NAME:{path} ({LISTED}), "
            "or a TorchScript file with --trust_features true"
        )
    build = KNOWN[kind if kind in KNOWN else DINOV2].build
    return build(kind, weights, str(path))


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
            f"network ({LISTED}) or torch.jit.script(network).save(...): pickled models are not read"
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
            f"({LISTED})"
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
