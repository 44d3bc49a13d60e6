"""Likeness of two sets of images: FID, KID, precision and recall between the features of both.

Features are what a network that was trained for something else says of an image; two sets are as alike as their
features are. Which network that is decides what the numbers mean: only numbers of the same network can be compared,
and only between sets of the same sizes.

Shapes: b batch, c channel, h w image, f features.
"""

from __future__ import annotations

import urllib.error
import warnings
import zipfile
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from vqdist.backends.base import Backend
from vqdist.errors import UserError, an
from vqdist.objectives.frozen import IMAGENET_MEAN, IMAGENET_STD, download_weights
from vqdist.sizes import ImageSize, sides_of

INCEPTION, VGG16 = "inception", "vgg16"
# networks that are known here, each with one of its weights by which a file is recognised
KNOWN = {INCEPTION: "Conv2d_1a_3x3.conv.weight", VGG16: "features.0.weight"}
NEIGHBOURS = 3  # of precision and recall, as their paper has it
MIN_IMAGES = NEIGHBOURS + 1
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as the paper's authors have it; subsets are smaller where images are fewer


# --------------------------------------------------------------------------------------------- extractors


class FeatureExtractor(nn.Module):
    """Images (b, c, h, w) float32 in [0, 1] -> features (b, f) float32, in eval mode and without gradients.

    Args:
        network: does just that.
        name: of the network, for messages.
        channels, image_size: of the images; two black ones are put through to see that the network takes them.

    Attributes:
        width: number of features, f.

    Raises:
        UserError: the network does not take such images, or does not give (b, f) with f of at least 2.
    """

    def __init__(self, network: nn.Module, name: str, *, channels: int, image_size: ImageSize):
        super().__init__()
        self.network, self.name = network.eval(), name
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

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> features (b, f)."""
        features = self.network(images.to(torch.float32))
        return features.to(torch.float32) if isinstance(features, Tensor) else features


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
        return FeatureExtractor(network, spec, channels=channels, image_size=image_size)
    if channels not in (1, 3):
        raise UserError(f"the images have {channels} channels; {spec} sees 1 (repeated) or 3")
    return FeatureExtractor(_known_network(spec, path), spec, channels=channels, image_size=image_size)


def _known_network(spec: str, path: Path) -> nn.Module:
    if spec == INCEPTION:
        return _Inception(_inception_weights())
    if spec == VGG16:
        from torchvision.models import VGG16_Weights

        return _VGG16(VGG16, download_weights(VGG16_Weights.IMAGENET1K_V1, "VGG16", "--features ", ""))
    weights = _read_weights(path)
    if KNOWN[VGG16] in weights:
        return _VGG16(spec, weights)
    if KNOWN[INCEPTION] in weights:
        return _Inception(path)
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


class _Inception(nn.Module):
    """Images (b, 1 | 3, h, w) in [0, 1] -> the (b, 2048) pooled features of FID's Inception, from 8-bit pixels."""

    def __init__(self, weights: Path):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            # torch-fidelity unpickles whatever the file holds, so it gets only one that is seen to hold tensors
            torch.load(weights, map_location="cpu", weights_only=True)
            path = str(weights)
            self.network = FeatureExtractorInceptionV3(INCEPTION, ["2048"], feature_extractor_weights_path=path)
        except Exception as error:  # a damaged file raises almost anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{weights} does not hold the weights of FID's Inception ({reason}); remove it, so that it is "
                "downloaded again"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        return self.network(pixels.expand(-1, 3, -1, -1))[0]


class _VGG16(nn.Module):
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


# --------------------------------------------------------------------------------------------- features over ranks


class FeatureSet:
    """The features of a set of images that is spread over ranks in blocks: block i belongs to rank i % world_size.

    Args:
        extractor: on the backend's device.
        backend: gathers the ranks' features.
        total: number of images over all ranks.
        block: images of a block; the last one may have fewer.
    """

    def __init__(self, extractor: FeatureExtractor, backend: Backend, total: int, *, block: int = 1):
        self.extractor, self.backend, self.total, self.block = extractor, backend, total, block
        self._features: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Look at this rank's next images, (b, c, h, w) in [0, 1]."""
        features = self.extractor(images)
        _check_features(features, len(images), self.extractor.name)
        self._features.append(features)

    def over_ranks(self) -> Tensor:
        """Return the features (total, f) of all images in their order; every rank calls this and gets the same."""
        mine = torch.cat([torch.zeros(0, self.extractor.width, device=self.backend.device), *self._features])
        blocks = -(-self.total // self.block)
        rows = -(-blocks // self.backend.world_size) * self.block  # of the rank that has most
        shares = self.backend.gather(pad(mine, (0, 0, 0, rows - len(mine))))
        return rearrange(shares, "rank (i block) f -> (i rank block) f", block=self.block)[: self.total]


# --------------------------------------------------------------------------------------------- numbers


def fidelity(generated: Tensor, real: Tensor, *, coverage: bool = True) -> dict[str, float]:
    """FID, KID, precision and recall of generated images, by torch-fidelity in float64; the same on every rank.

    Args:
        generated, real: features (N, f) and (M, f); at least `MIN_IMAGES` rows each.
        coverage: also precision and recall, which take N * M distances.

    Returns:
        `fid`: Frechet distance of the Gaussians fitted to the two sets (arXiv 1706.08500); as few rows as features, or
        fewer, make it too large. `kid`, `kid_std`: squared maximum mean discrepancy with a cubic kernel, mean and
        standard deviation over 100 subsets of 1000, or of the smaller set's size (arXiv 1801.01401); the mean may be a
        little below 0, the deviation says nothing where a subset is nearly the whole. `precision`: share of the
        generated images that lie within the real ones, nearer to one of them than its third neighbour is; `recall`:
        share of the real ones within the generated (arXiv 1904.06991).
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    check_count(len(generated), "samples")
    check_count(len(real), "images")
    generated, real = _finite(generated).double(), _finite(real).double()
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    subsets = 1 if len(generated) == len(real) == size else KID_SUBSETS  # there is one subset: the whole
    kid = kid_features_to_metric(generated, real, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return {
        "fid": frechet_distance(generated, real),
        "kid": kid[KEY_METRIC_KID_MEAN],
        "kid_std": kid[KEY_METRIC_KID_STD],
        **(_precision_and_recall(generated, real) if coverage else {}),
    }


def _precision_and_recall(generated: Tensor, real: Tensor) -> dict[str, float]:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # in parts: all distances at once are 20 GB for 50,000 images
    prc = prc_features_to_metric(
        generated, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=512, save_cpu_ram=True, verbose=False
    )
    return {"precision": prc[KEY_METRIC_PRECISION], "recall": prc[KEY_METRIC_RECALL]}


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), m and C the means and covariances of features (N, f) and (M, f)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features.double().cpu()) for features in (first, second)]
    # below 0 only by rounding, of nearly equal sets
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def check_count(count: int, what: str) -> None:
    """Raise `UserError` if there are too few images of a set to measure its fidelity."""
    if count < MIN_IMAGES:
        raise UserError(
            f"there are {count} {what} but precision and recall look at the third neighbour of each; give at least "
            f"{MIN_IMAGES}"
        )


def _finite(features: Tensor) -> Tensor:
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise UserError(
            f"the features of {broken} of {len(features)} images are not finite; look at the feature extractor, and "
            "at the run's weights"
        )
    return features
