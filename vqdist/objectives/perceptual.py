"""The perceptual loss: mean squared error of VGG16 features (arXiv 1603.08155).

The features are the last ReLU before each of the five poolings (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3), so that
edges, texture and parts all count; the classifier behind them is not needed and not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.objectives.base import Term
from vqdist.objectives.frozen import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    HoldsFrozen,
    Scaling,
    check_pair,
    download_weights,
    read_weights,
)
from vqdist.schedules import Weight

# Where the five blocks end in `vgg16().features`: behind the last ReLU, before the pooling.
_BLOCK_ENDS = (4, 9, 16, 23, 30)

MIN_IMAGE_SIZE = 16  # pixels: four poolings come before the last block

# of the option `perceptual`, behind which most take :FILE
SPECS = ("vgg16", "lpips", "lpips-alex", "lpips-squeeze", "convnext_s", "lpips-convnext_s-A-B", "none")


class VGG16Features(nn.Module):
    """ImageNet-normalised images (b, 3, h, w) -> five feature maps, (b, 64, h, w) to (b, 512, h / 16, w / 16).

    Args:
        layers: torchvision's `vgg16().features`, or as much of it as the blocks need.
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        starts = (0, *_BLOCK_ENDS[:-1])
        self.blocks = nn.ModuleList(layers[start:end] for start, end in zip(starts, _BLOCK_ENDS))

    def forward(self, image: Tensor) -> list[Tensor]:
        if min(image.shape[-2:]) < MIN_IMAGE_SIZE:
            raise UserError(
                f"the perceptual loss got images of {image.shape[-2]} x {image.shape[-1]} pixels; VGG16 needs "
                f"at least {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE}: use larger images or --model.perceptual none"
            )
        features = []
        for block in self.blocks:
            image = block(image)
            features.append(image)
        return features


class PerceptualLoss(HoldsFrozen):
    """Mean over feature maps of the mean squared error between those of a reconstruction and of its image.

    The feature network is frozen, always in eval mode, and hidden: see `HoldsFrozen`. Convolutions run in the ambient
    precision (autocast), the loss is float32.

    Args:
        features: ImageNet-normalised images (b, 3, h, w) -> a tensor or a sequence of tensors. Frozen and put into
            eval mode in place.
    """

    def __init__(self, features: nn.Module):
        super().__init__()
        self.hide(_Normalised(features))

    @classmethod
    def build(cls, spec: str | Path | nn.Module | None) -> PerceptualLoss | None:
        """Return the perceptual loss that a user asks for.

        Args:
            spec: `vgg16` (torchvision's ImageNet weights, downloaded once), a file with VGG16 weights (a state dict in
                .pth or .safetensors), a feature network, or None or `none` for no perceptual loss.

        Raises:
            UserError: if the weights cannot be downloaded, found, read, or do not fit.
        """
        if spec is None or spec == "none":
            return None
        if isinstance(spec, nn.Module):
            return cls(spec)
        if not isinstance(spec, (str, Path)):
            raise UserError(f"perceptual {spec!r:.80} is not possible; give vgg16, a file with its weights, or none")
        weights = _download_vgg16() if spec == "vgg16" else _read_vgg16(Path(spec).expanduser())
        return cls(VGG16Features(_vgg16_layers(weights, source=str(spec))))

    def forward(self, recon: Tensor, image: Tensor) -> Tensor:
        """Return the loss, 0-d float32; its gradient reaches `recon` only.

        Args:
            recon: (b, c, h, w), nominally in [0, 1]; c is 1 (repeated to three), 3, or 4 (alpha is left out).
            image: the same shape, in [0, 1].
        """
        check_pair(recon, image)
        features = self._hidden[0]
        with torch.no_grad():
            targets = features(image)
        pairs = list(zip(features(recon), targets))
        return torch.stack([F.mse_loss(feature.float(), target.float()) for feature, target in pairs]).mean()


class Perceptual(Term):
    """The perceptual loss as a term.

    Args:
        features: `vgg16` (torchvision's weights, downloaded once), or a file with VGG16 weights (.pth, .safetensors);
            in Python also a network: ImageNet-normalised images (b, 3, h, w) -> a tensor or a sequence of tensors.
        weight, reference, name: see `Term`.
    """

    def __init__(
        self,
        features: str | nn.Module = "vgg16",
        weight: Weight = 1.0,
        *,
        reference: bool = False,
        name: str = "perceptual",
    ):
        super().__init__(weight, reference=reference, name=name)
        loss = features if isinstance(features, PerceptualLoss) else PerceptualLoss.build(features)
        if loss is None:
            raise UserError("the perceptual term has no features; give `vgg16` or a file, or leave the term out")
        self.loss = loss
        self.min_image_size = MIN_IMAGE_SIZE if isinstance(features, str) else 0

    def check_image_size(self, size: int) -> None:
        if size < self.min_image_size:
            raise too_small_for_vgg16(size)

    def forward(self, recon: Tensor, image: Tensor, out: Any = None) -> Tensor:
        return self.loss(recon, image)


def too_small_for_vgg16(size: int) -> UserError:
    """Return the error for square images of this side (in pixels)."""
    return UserError(
        f"image_size {size} is too small for the perceptual loss, whose VGG16 needs {MIN_IMAGE_SIZE}; use perceptual "
        "none"
    )


class _Normalised(nn.Module):
    """Images (b, 1 | 3 | 4, h, w) in [0, 1] -> list of the features of their ImageNet-normalised colours."""

    def __init__(self, features: nn.Module):
        super().__init__()
        self.scaling = Scaling(IMAGENET_MEAN, IMAGENET_STD)
        self.features = features

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.features(self.scaling(image))
        return list(features) if isinstance(features, Sequence) else [features]


def _vgg16_layers(weights: dict[str, Tensor], source: str) -> nn.Sequential:
    """Return VGG16's convolutions with these weights, whose names are torchvision's, also without `features.`."""
    from torchvision.models import vgg16  # takes a second to import, and only this needs it

    with torch.device("meta"):  # neither memory nor random numbers for layers that are filled or dropped
        layers = vgg16(weights=None).features[: _BLOCK_ENDS[-1]]
    wanted = layers.state_dict()
    found = {key.removeprefix("features."): tensor for key, tensor in weights.items()}
    missing = [f"features.{key}" for key, tensor in wanted.items() if not _fits(found.get(key), tensor)]
    if missing:
        raise UserError(
            f"{source} does not hold the weights of VGG16: {', '.join(missing[:3])} and {max(len(missing) - 3, 0)} "
            f"more are missing or of another shape; expected the state dict of torchvision.models.vgg16"
        )
    layers.load_state_dict({key: found[key].float() for key in wanted}, assign=True)
    return layers


def _fits(found: Tensor | None, wanted: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == wanted.shape


def _download_vgg16() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights

    return download_weights(VGG16_Weights.IMAGENET1K_V1, "VGG16", "--model.perceptual ")


def _read_vgg16(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"--model.perceptual {path} is neither {', '.join(SPECS)} nor a file; give one of them, or the path of "
            f"VGG16's weights (.pth or .safetensors)"
        )
    return read_weights(path, f"--model.perceptual {path}", "VGG16")
