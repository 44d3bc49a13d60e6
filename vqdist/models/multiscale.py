"""Multi-scale residual quantization, the codes of VAR (arXiv 2404.02905, algorithms 1 and 2).

A feature map is coded at growing resolutions: each scale codes, at its own, what the scales before it left over. One
codebook serves all of them.

Shapes: `b` batch, `d` feature channels, `h w` positions, `v` codebook size, `K` scales, `p` the side of a scale's map,
`L` the sum of p * p over the scales. The codes of an image are one row, the coarsest scale first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist.errors import UserError

V_PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of VAR, for 256x256 pixels at a stride of 16
MOST_PHIS = 4  # as VAR has for its ten scales
PHI_RULES = ("ticks", "proportional")
"""Which of fewer convolutions serves a scale: VAR's rule, and the one of vqdist before it had that."""


class SharedCodebook(Protocol):
    """The codebook of a `MultiScaleResidual`."""

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        ...

    @property
    def has_codes(self) -> bool:
        """True if the codes have values; if not, `start` gives them some."""
        ...

    def nearest(self, vectors: Tensor) -> Tensor:
        """Vectors (..., d) -> the nearest codes (...) int64."""

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (...) -> their vectors (..., d)."""

    def start(self, vectors: Tensor) -> None:
        """Make the first codes from vectors (b, n, d)."""

    def follow(self, vectors: Tensor, indices: Tensor) -> None:
        """After a training step: vectors (b, n, d) and the codes (b, n) that they were given."""


class VectorQuantizer(nn.Module):
    """The nearest of v vectors that are learned by gradient (VQ-VAE, arXiv 1711.00937).

    Args:
        num_embeddings: number of codes, v.
        embedding_dim: dimension of a code's vector, d.
        beta: weight of the commitment loss.
        use_cosine_sim: nearest by angle instead of by distance; the codes themselves keep their lengths.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, beta: float = 0.25, *, use_cosine_sim: bool = False):
        super().__init__()
        self.codebook_size = num_embeddings
        self.has_codes = True
        self.beta = beta
        self.use_cosine_sim = use_cosine_sim
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (b, d, h, w) -> (quantized, loss, indices).

        Returns:
            The codes' vectors (b, d, h, w) with the gradient passed straight through, `codebook_loss` (0-d) and the
            codes (b, h, w) int64.
        """
        indices = self.nearest(rearrange(z, "b d h w -> b h w d"))
        quantized = rearrange(self.lookup(indices), "b h w d -> b d h w")
        return straight_through(quantized, z), codebook_loss(quantized, z, self.beta), indices

    def get_codebook(self) -> Tensor:
        """Return the codes' vectors, (v, d)."""
        return self.embedding.weight

    def nearest(self, vectors: Tensor) -> Tensor:
        """See `SharedCodebook`."""
        return nearest_code(vectors, self.get_codebook(), cosine=self.use_cosine_sim)

    def lookup(self, indices: Tensor) -> Tensor:
        """See `SharedCodebook`."""
        return self.embedding(indices)

    def start(self, vectors: Tensor) -> None:
        """Do nothing: the codes have values from the beginning."""

    def follow(self, vectors: Tensor, indices: Tensor) -> None:
        """Nothing: the optimizer moves the codes."""


class MultiScaleResidual(nn.Module):
    """Codes of every scale, and what they add up to.

    The codes of a scale are enlarged (bicubic) to the whole map, go through a small convolution that repairs what
    enlarging lost, and add to what the scales before them gave.

    Args:
        codebook: one for all scales.
        dim: channels of the features, d.
        v_patch_nums: sides of the scales' maps, growing; the last is the side of the feature map.
        beta: weight of the commitment loss.
        num_phis: convolutions, which neighbouring scales share; by default at most 4.
        phi_ratio: share of the convolution in what becomes of the codes; 0 leaves it out.
        phi_rule: which convolution serves a scale, see `phi_of_scale`.

    Attributes:
        scales: `v_patch_nums`, as a tuple.
        phi_of: number of the convolution that serves each scale.
    """

    def __init__(
        self,
        codebook: SharedCodebook,
        dim: int,
        *,
        v_patch_nums: Sequence[int] = V_PATCH_NUMS,
        beta: float = 0.25,
        num_phis: int | None = None,
        phi_ratio: float = 0.5,
        phi_rule: str = "ticks",
    ):
        super().__init__()
        self.scales = tuple(v_patch_nums)
        self.beta = beta
        self.phi_ratio = phi_ratio
        self.codebook = codebook
        number = min(MOST_PHIS, len(self.scales)) if num_phis is None else num_phis
        # without a share they would have no gradient, which DDP takes for a mistake
        self.phis = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(number if phi_ratio else 0))
        self.follow_rule(phi_rule)

    def follow_rule(self, phi_rule: str) -> None:
        """Let convolutions serve the scales by another rule; see `phi_of_scale`."""
        self.phi_rule = phi_rule
        self.phi_of = phi_of_scale(len(self.scales), len(self.phis), phi_rule)
        for number, phi in enumerate(self.phis):  # by VAR's rule some numbers of them have one that serves no scale
            phi.requires_grad_(number in self.phi_of)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.codebook.codebook_size

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (b, d, h, w) -> quantized (b, d, h, w), codes (b, L), the mean of the scales' losses (0-d).

        In train mode the gradient passes straight through, and the codebook follows what it coded.
        """
        target = features.detach()
        if self.training and not self.codebook.has_codes:
            self.codebook.start(self.pyramid(target))
        total, loss = torch.zeros_like(target), torch.zeros((), device=target.device)
        coded: list[Tensor] = []
        indices: list[Tensor] = []
        for scale, side in enumerate(self.scales):
            coded.append(to_rows(shrink(target - total.detach(), side)))
            indices.append(self.codebook.nearest(coded[-1]))
            total = total + self.contribution(scale, indices[-1])
            loss = loss + codebook_loss(total, features, self.beta) / len(self.scales)
        row = torch.cat(indices, dim=1)
        if not self.training:
            return total, row, loss
        self.codebook.follow(torch.cat(coded, dim=1), row)
        return straight_through(total, features), row, loss

    def contribution(self, scale: int, indices: Tensor) -> Tensor:
        """Return what the codes (b, p * p) of a scale add to the features, (b, d, h, w)."""
        side = self.scales[scale]
        vectors = rearrange(self.codebook.lookup(indices), "b (h w) d -> b d h w", h=side)
        enlarged = enlarge(vectors, self.scales[-1])
        if not self.phis:
            return enlarged
        phi = self.phis[self.phi_of[scale]]
        return (1 - self.phi_ratio) * enlarged + self.phi_ratio * phi(enlarged)

    def totals(self, indices: Tensor) -> Iterator[Tensor]:
        """Features (b, d, h, w) after each scale of codes (b, L), or of the first scales only."""
        total: Tensor | None = None
        for scale, part in enumerate(split_scales(indices, self.scales)):
            added = self.contribution(scale, part)
            total = added if total is None else total + added
            yield total

    def decode(self, indices: Tensor) -> Tensor:
        """Codes (b, L), or of the first scales only, -> features (b, d, h, w)."""
        *_, last = self.totals(indices)
        return last

    def next_scale_inputs(self, indices: Tensor) -> Tensor:
        """Codes (b, L), or of the first scales only, -> for each scale but the first that what they give, at its size.

        Returns:
            (b, n, d), n the sum of p * p over the second scale to the one after the last that is given.
        """
        parts = [to_rows(shrink(total, side)) for total, side in zip(self.totals(indices), self.scales[1:])]
        return torch.cat(parts, dim=1) if parts else self.codebook.lookup(indices[:, :0])

    def pyramid(self, features: Tensor) -> Tensor:
        """Return what each scale of (b, d, h, w) would have to code, were the scales before it exact; (b, L, d)."""
        rows, total = [], torch.zeros_like(features)
        for side in self.scales:
            left = shrink(features - total, side)
            rows.append(to_rows(left))
            total = total + enlarge(left, self.scales[-1])
        return torch.cat(rows, dim=1)


def phi_of_scale(num_scales: int, num_phis: int, rule: str = "ticks") -> tuple[int, ...]:
    """Return which of the convolutions serves each scale.

    By `ticks`, VAR's rule, that is the one whose tick is nearest to the scale's place between 0 and 1; two ties of its
    own ten scales are decided by the rounding of these very operations. `proportional` is the rule of vqdist before.
    """
    if rule not in PHI_RULES:
        raise UserError(f"phi_rule {rule!r} is not known; choose {' or '.join(PHI_RULES)}")
    if rule == "proportional" or num_phis == 0 or num_scales == 1:
        return tuple(scale * num_phis // num_scales for scale in range(num_scales))
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return tuple(int(np.argmin(np.abs(ticks - scale / (num_scales - 1)))) for scale in range(num_scales))


def codebook_loss(quantized: Tensor, features: Tensor, beta: float) -> Tensor:
    """MSE(quantized, sg(features)) + beta * MSE(sg(quantized), features), 0-d (arXiv 1711.00937, equation 3)."""
    return F.mse_loss(quantized, features.detach()) + beta * F.mse_loss(features, quantized.detach())


def straight_through(quantized: Tensor, features: Tensor) -> Tensor:
    """Return the value of `quantized` with the gradient of `features`."""
    return features + (quantized - features).detach()


@torch.no_grad()
def nearest_code(vectors: Tensor, codebook: Tensor, *, cosine: bool = False) -> Tensor:
    """Return the nearest rows (...) int64 of a codebook (v, d) to vectors (..., d): by distance, or by angle."""
    rows = vectors.flatten(0, -2)
    if cosine:
        nearest = (rows @ F.normalize(codebook, dim=-1).T).argmax(dim=-1)
    else:
        nearest = (rows @ codebook.T - codebook.square().sum(dim=-1) / 2).argmax(dim=-1)
    return nearest.view(vectors.shape[:-1])


def shrink(features: Tensor, side: int) -> Tensor:
    """Means over areas: (b, d, h, w) -> (b, d, side, side)."""
    return features if features.shape[-1] == side else F.interpolate(features, size=(side, side), mode="area")


def enlarge(features: Tensor, side: int) -> Tensor:
    """Bicubic: (b, d, p, p) -> (b, d, side, side)."""
    return features if features.shape[-1] == side else F.interpolate(features, size=(side, side), mode="bicubic")


def to_rows(features: Tensor) -> Tensor:
    """(b, d, p, p) -> (b, p * p, d)."""
    return rearrange(features, "b d h w -> b (h w) d")


def scale_lengths(scales: Sequence[int]) -> list[int]:
    """Codes of each scale: p * p."""
    return [side * side for side in scales]


def split_scales(indices: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Codes (b, L), or of the first scales only, -> one (b, p * p) for each scale that is there."""
    lengths = scale_lengths(scales)
    ends = list(accumulate(lengths))
    if indices.ndim != 2 or indices.shape[1] not in ends:
        raise UserError(
            f"codes of shape {tuple(indices.shape)} were given; (batch, n) is expected, n one of "
            f"{', '.join(map(str, ends))}: the first scales of v_patch_nums {list(scales)}"
        )
    return list(indices.split(lengths[: ends.index(indices.shape[1]) + 1], dim=1))


def hits_per_scale(indices: Tensor, scales: Sequence[int], codebook_size: int) -> Tensor:
    """Return how often each scale of codes (b, L) uses each code.

    Returns:
        (K, v) int64 on the device of the codes; adding is all it takes to join batches, or ranks.
    """
    parts = split_scales(indices, scales)
    counts = torch.zeros(len(scales), codebook_size, dtype=torch.int64, device=indices.device)
    for scale, part in enumerate(parts):
        codes = part.flatten()
        known = (codes >= 0) & (codes < codebook_size)
        counts[scale].scatter_add_(0, torch.where(known, codes, 0), known.to(torch.int64))
    return counts
