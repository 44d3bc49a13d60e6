"""The rotation trick alone: the gradient of a vector, turned onto its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqdist.models.quantizers.base import float32_arithmetic


def rotated_onto(source: Tensor, target: Tensor) -> Tensor:
    """`target` in value, with the gradient of `source` turned and scaled as `source` is onto it (arXiv 2410.06424).

    Args:
        source: (..., d).
        target: (..., d); gets no gradient.

    Returns:
        (..., d) float32: lambda * R source, where the rotation R in the plane of both and lambda = |target| / |source|
        are held fixed.
    """
    with float32_arithmetic(source.device):
        return _RotatedOnto.apply(source.float(), target.detach().float())


class _RotatedOnto(torch.autograd.Function):
    """The library computes lambda * R source to get `target`; only its gradient needs the arithmetic."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(source, target)
        return target.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """lambda * R^T gradient, with R = 1 - 2 r r^T + 2 q e^T for unit vectors: e source, q target, r between."""
        source, target = ctx.saved_tensors
        length, aim = (vector.norm(dim=-1, keepdim=True).clamp(min=1e-6) for vector in (source, target))
        e, q = source / length, target / aim
        r = nn.functional.normalize(e + q, dim=-1, eps=1e-6)
        along_r, along_q = ((gradient * axis).sum(dim=-1, keepdim=True) for axis in (r, q))
        return (gradient - 2 * along_r * r + 2 * along_q * e) * (aim / length), None
