"""Drawing from categorical distributions: pure functions of logits and noise.

Shapes: logits and noise are (..., v), codes last; everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vqdist.draw_options import DrawOptions
from vqdist.losses import at_least_float32

DRAWN_AT_ONCE = 2**23
"""Numbers that a draw looks at together: it holds several copies of them in float64."""


def draw(logits: Tensor, uniform: Tensor, options: DrawOptions) -> Tensor:
    """Draw one code from each distribution, by inverting its cumulative sum at a uniform number.

    One number a code, not one a class: so a whole image's randomness is as small as its codes, may be drawn on any
    device, and the same numbers give the same picture whatever else is in the batch.

    Args:
        logits: (..., v).
        uniform: (...) in [0, 1).
        options: what to cut off, and the temperature; guidance is applied before, see `guide`.

    Returns:
        Codes (...) int64.
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    rows, codes = logits.flatten(0, -2), uniform.flatten()
    at_once = max(1, DRAWN_AT_ONCE // logits.shape[-1])
    parts = zip(rows.split(at_once), codes.split(at_once), strict=True)
    return torch.cat([_draw(part, chance, options) for part, chance in parts]).view(uniform.shape)


def _draw(logits: Tensor, uniform: Tensor, options: DrawOptions) -> Tensor:
    """Return `draw` of (m, v), all at once."""
    kept = keep_likely(logits, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p)
    probabilities = (kept.double() / options.temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform.to(cumulative)[..., None] * cumulative[..., -1:]
    codes = torch.searchsorted(cumulative, target, right=True)
    # where rounding reaches the very end, the last code that is possible at all
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    return torch.minimum(codes, last).squeeze(-1)


def keep_likely(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Return the logits, those of unlikely codes at -inf; see `DrawOptions`. The most probable code stays."""
    (kept,) = at_least_float32(logits)
    probabilities = kept.softmax(dim=-1)
    drop = torch.zeros_like(kept, dtype=torch.bool)
    if top_k is not None and top_k < kept.shape[-1]:
        drop |= kept < kept.topk(top_k, dim=-1).values[..., -1:]
    if top_p is not None:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what more probable codes hold already
        drop |= torch.zeros_like(drop).scatter_(-1, places, before >= top_p)
    if min_p is not None:
        drop |= probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
    return kept.masked_fill(drop, -torch.inf)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of logits (arXiv 2207.12598); a scale of 1 gives the conditional ones."""
    conditional, unconditional = at_least_float32(conditional, unconditional)
    return unconditional + scale * (conditional - unconditional)


def uniform_per_image(num_draws: int, seeds: Iterable[int]) -> Tensor:
    """Uniform numbers in [0, 1), (number of seeds, num_draws) on the CPU; each row depends on its own seed only."""
    generator = torch.Generator()
    return torch.stack([torch.rand(num_draws, generator=generator.manual_seed(seed)) for seed in seeds])


def gumbel_noise(
    shape: tuple[int, ...], device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Return standard Gumbel noise: -log(-log(u)), u uniform in (0, 1); float32."""
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
    (logits,) = at_least_float32(logits)
    return ((logits + noise) / temperature).softmax(dim=-1)


def straight_through(soft: Tensor) -> Tensor:
    """One-hot at the maximum of `soft`, with the gradient of `soft` (arXiv 1308.3432)."""
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def reinmax(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Return a one-hot draw from softmax(logits) with ReinMax's second-order gradient (arXiv 2304.08612, algorithm 2).

    With the draw d and p0 = softmax(logits), Heun's method takes the gradient half at p0 and half at d: that of
    2 * p1 - p0 / 2, where p1 is the mean of d and softmax(logits / temperature), reached by a constant shift of the
    logits.
    """
    (logits,) = at_least_float32(logits)
    draw = torch.zeros_like(logits).scatter_(-1, (logits + noise).argmax(dim=-1, keepdim=True), 1.0)
    with torch.no_grad():
        mean = (draw + (logits / temperature).softmax(dim=-1)) / 2
        log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    # zero plus `log_mean`: the shift itself, `log_mean - logits`, would round away what large logits leave of the mean
    p0, p1 = logits.softmax(dim=-1), (logits - logits.detach() + log_mean).softmax(dim=-1)
    gradient = 2 * p1 - p0 / 2
    return gradient - gradient.detach() + draw
