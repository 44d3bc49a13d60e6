"""The logits loss of TiTok's second stage (arXiv 2406.07550): ConvNeXt-S sees both images and should say the same."""

from __future__ import annotations

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

SIDE = 224  # pixels, of the images that ConvNeXt-S sees


class ConvNeXtLogits(HoldsFrozen, Term):
    """Mean squared error of ConvNeXt-S' 1,000 logits of a reconstruction and of its image.

    Images in [0, 1] are resized to 224 x 224 (bilinear, with antialiasing) and normalised as ImageNet's.

    Args:
        weights: a file with torchvision's weights of convnext_small (.pth, .safetensors); null downloads them, once;
            in Python also a network: normalised images (b, 3, 224, 224) -> logits (b, classes).
        weight, reference, name: see `Term`.
    """

    def __init__(
        self,
        weights: str | Path | nn.Module | None = None,
        *,
        weight: Weight = 1.0,
        reference: bool = False,
        name: str = "convnext_s",
    ):
        super().__init__(weight, reference=reference, name=name)
        network = weights if isinstance(weights, nn.Module) else _convnext_small(weights)
        self.hide(nn.Sequential(Scaling(IMAGENET_MEAN, IMAGENET_STD), network))

    def forward(self, recon: Tensor, image: Tensor, out: Any = None) -> Tensor:
        check_pair(recon, image)
        return F.mse_loss(self._logits(recon), self._logits(image))

    def _logits(self, image: Tensor) -> Tensor:
        resized = F.interpolate(image, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return self._hidden[0](resized).float()


def _convnext_small(weights: str | Path | None) -> nn.Module:
    """Return ConvNeXt-S with torchvision's weights, or those of a file."""
    from torchvision.models import ConvNeXt_Small_Weights, convnext_small  # takes seconds to import

    if weights is None:
        source = "torchvision"
        enumeration = ConvNeXt_Small_Weights.IMAGENET1K_V1
        tensors = download_weights(enumeration, "convnext_small", "--model.perceptual convnext_s:")
    else:
        source = str(weights)
        tensors = read_weights(Path(weights).expanduser(), f"convnext_s:{weights}", "convnext_small")
    with torch.device("meta"):
        network = convnext_small(weights=None)
    wanted = network.state_dict()
    missing = [name for name, tensor in wanted.items() if getattr(tensors.get(name), "shape", None) != tensor.shape]
    if missing:
        raise UserError(
            f"{source} does not hold the weights of convnext_small: {', '.join(missing[:3])} and "
            f"{max(len(missing) - 3, 0)} more are missing or of another shape; expected the state dict of "
            "torchvision.models.convnext_small"
        )
    network.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
    return network
