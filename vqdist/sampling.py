"""Drawing from categorical distributions: pure functions of logits and noise.

Shapes: logits and noise are (..., v), codes last; everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gumbel_noise(
    shape: tuple[int, ...], device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Standard Gumbel noise: -log(-log(u)), u uniform in (0, 1); float32."""
    uniform = torch.rand(shape, device=device, generator=generator)
    return _gumbel_of_(uniform)


def gumbel_noise_per_image(shape: tuple[int, ...], seeds: Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """Gumbel noise whose every item depends on its own seed only, not on what else is in the batch.

    Args:
        shape: of one item.
        seeds: one for each item.
        device: where to draw; another kind of device gives other noise for the same seeds.

    Returns:
        (number of seeds, *shape), float32.
    """
    seeds = list(seeds)
    uniform = torch.empty((len(seeds), *shape), device=device)
    generator = torch.Generator(device)
    for item, seed in zip(uniform, seeds, strict=True):
        item.uniform_(generator=generator.manual_seed(seed))
    return _gumbel_of_(uniform)


def _gumbel_of_(uniform: Tensor) -> Tensor:
    return uniform.clamp_(min=torch.finfo(uniform.dtype).tiny).log_().neg_().log_().neg_()


def gumbel_softmax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """softmax((logits + noise) / temperature): a soft draw from softmax(logits) (arXiv 1611.00712, 1611.01144)."""
    return ((_at_least_float32(logits) + noise) / temperature).softmax(dim=-1)


def straight_through(soft: Tensor) -> Tensor:
    """One-hot at the maximum of `soft`, with the gradient of `soft` (arXiv 1308.3432)."""
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def reinmax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """A one-hot draw from softmax(logits) with ReinMax's second-order gradient (arXiv 2304.08612, algorithm 2).

    With the draw d and p0 = softmax(logits), Heun's method takes the gradient half at p0 and half at d: that of
    2 * p1 - p0 / 2, where p1 is the mean of d and softmax(logits / temperature), reached by a constant shift of the
    logits.
    """
    logits = _at_least_float32(logits)
    draw = torch.zeros_like(logits).scatter_(-1, (logits + noise).argmax(dim=-1, keepdim=True), 1.0)
    with torch.no_grad():
        mean = (draw + (logits / temperature).softmax(dim=-1)) / 2
        log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    # zero plus `log_mean`: the shift itself, `log_mean - logits`, would round away what large logits leave of the mean
    p0, p1 = logits.softmax(dim=-1), (logits - logits.detach() + log_mean).softmax(dim=-1)
    gradient = 2 * p1 - p0 / 2
    return gradient - gradient.detach() + draw


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
