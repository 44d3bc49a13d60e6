"""A codebook whose unused codes move to where the features are (CVQ-VAE), as in TA-TiTok."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from vqdist.models.quantizers.base import Quantized, float32_arithmetic, is_distributed
from vqdist.models.quantizers.entropy import in_chunks
from vqdist.models.quantizers.gradient_vq import GradientVQ
from vqdist.models.quantizers.options import require


class CVQ(GradientVQ):
    """A `GradientVQ` whose codes also move towards their nearest feature, the less they are used (arXiv 2307.15139).

    Of a code that a share p of the features gets, by a running mean, the move covers exp(-10 p v / (1 - decay) - 1e-3)
    of the way to the nearest feature of all ranks' batches; v is the number of codes.

    The sum of all moves is a buffer beside the vectors that learn by gradient; a code is the sum of the two. So an
    optimizer that keeps copies of the weights, as that of ZeRO, loses no move.

    Args:
        dim: channels of the features.
        codebook_size: number of codes.
        decay: of the running mean.
        **options: see `GradientVQ`.
    """

    moved: Tensor  # (v, d)
    embed_prob: Tensor  # (v,)

    def __init__(self, dim: int, codebook_size: int = 1024, *, decay: float = 0.99, **options: Any):
        super().__init__(dim, codebook_size, **options)
        require(0 <= decay < 1, "cvq", f"decay {decay} is not possible; it must be at least 0 and below 1")
        self.decay = decay
        self.register_buffer("moved", torch.zeros(codebook_size, dim))
        self.register_buffer("embed_prob", torch.zeros(codebook_size))

    def vectors(self) -> Tensor:
        """Return the codes' vectors as they are, (v, d) float32."""
        return self.embedding.weight.float() + self.moved

    def codebook(self) -> Tensor:
        return self._normed(self.vectors())

    def forward(self, features: Tensor) -> Quantized:
        """Features (b, d, h, w) -> `Quantized`; in train mode codes move towards them afterwards."""
        out = super().forward(features)
        if self.training:
            with torch.no_grad(), float32_arithmetic(features.device):
                rows = self._normed(rearrange(features.float(), "b d h w -> (b h w) d"))
                self._move(rows, out.indices.flatten())
        return out

    def is_averaged(self, name: str, tensor: Tensor) -> bool:
        """Average both summands of a code, so that an average of models has the average of their codes."""
        return name == "moved" or super().is_averaged(name, tensor)

    def _move(self, rows: Tensor, indices: Tensor) -> None:
        counts = torch.bincount(indices, minlength=self.codebook_size).float()
        if is_distributed():
            dist.all_reduce(counts)
        self.embed_prob.lerp_(counts / counts.sum(), 1 - self.decay)
        way = (-10 * self.embed_prob * self.codebook_size / (1 - self.decay) - 1e-3).exp()
        self.moved += way[:, None] * (self._nearest(rows) - self.vectors())

    def _nearest(self, rows: Tensor) -> Tensor:
        """Return the feature next to each code, (v, d), among those of all ranks, (n, d) each."""
        parts = in_chunks(self.codebook(), rows, _nearest_of)
        distances, nearest = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        if not is_distributed():
            return nearest
        world = dist.get_world_size()
        of_ranks = [torch.empty_like(distances) for _ in range(world)]
        their_rows = [torch.empty_like(nearest) for _ in range(world)]
        dist.all_gather(of_ranks, distances.contiguous())
        dist.all_gather(their_rows, nearest.contiguous())
        best = torch.stack(of_ranks).argmin(dim=0)
        return torch.stack(their_rows)[best, torch.arange(len(best), device=best.device)]


def _nearest_of(codes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least squared distance (m,) of codes (m, d) to rows (n, d), and the row, (m, d)."""
    lengths = codes.square().sum(dim=-1, keepdim=True) + rows.square().sum(dim=-1)
    distances = lengths - 2 * codes @ rows.T
    least, places = distances.min(dim=-1)
    return least, rows[places]
