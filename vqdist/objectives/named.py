"""The perceptual terms that the option `perceptual` of a model names."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vqdist.errors import UserError
from vqdist.objectives.convnext import ConvNeXtLogits
from vqdist.objectives.lpips import LPIPS, NETS, too_small
from vqdist.objectives.perceptual import MIN_IMAGE_SIZE, Perceptual, too_small_for_vgg16

_LPIPS = re.compile(r"lpips(?:-(vgg|alex|squeeze))?(?::(.+))?")
_CONVNEXT = re.compile(r"convnext_s(?::(.+))?")
_BOTH = re.compile(r"lpips-convnext_s-(\d*\.?\d+)-(\d*\.?\d+)")


def perceptual_terms(spec: str | nn.Module) -> list[Any]:
    """Return the terms that a user asks for in one word.

    Args:
        spec: `vgg16`, or a file with its weights: the mean squared error of its features, and the reference of the
            adaptive weight, as in muse; `lpips`, `lpips-alex`, `lpips-squeeze`, `convnext_s`, each with `:FILE` for
            weights that are not downloaded; `lpips-convnext_s-A-B`, both, weighted by A / (A + B) and B / (A + B), as
            1d-tokenizer writes it; `none`; or a feature network.

    Raises:
        UserError: there is no such loss, or its weights cannot be had.
    """
    if isinstance(spec, str):
        if spec == "none":
            return []
        if match := _LPIPS.fullmatch(spec):
            return [LPIPS(match[2], net=match[1] or "vgg", name="perceptual")]
        if match := _CONVNEXT.fullmatch(spec):
            return [ConvNeXtLogits(match[1], name="perceptual")]
        if match := _BOTH.fullmatch(spec):
            return _weighted(float(match[1]), float(match[2]), spec)
    return [Perceptual(spec, reference=True)]


def _weighted(of_lpips: float, of_logits: float, spec: str) -> list[Any]:
    total = of_lpips + of_logits
    if not total:
        raise UserError(f"perceptual {spec} has two weights of 0; give one that is larger, or `none`")
    return [LPIPS(weight=of_lpips / total), ConvNeXtLogits(weight=of_logits / total)]


def check_image_size(spec: str, size: int) -> None:
    """Raise `UserError` if square images of this side are too small for `perceptual`; nothing is downloaded."""
    match = _LPIPS.fullmatch(spec)
    if match or _BOTH.fullmatch(spec):
        net = match[1] if match and match[1] else "vgg"
        if size < NETS[net].smallest:
            raise too_small(size, net)
    elif spec != "none" and not _CONVNEXT.fullmatch(spec) and size < MIN_IMAGE_SIZE:
        raise too_small_for_vgg16(size)
