"""Attention of VAR: each token sees its own scale and those before, without a matrix of all tokens by all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdist.models.attention import Intermediates

FEW = 64
"""Tokens of a scale below which it shares a call, and a small mask, with the scales before it."""


class ScaleAttention(nn.Module):
    """Takes the place of x-transformers' `Attend` where tokens are codes of several scales, from coarse to fine.

    A mask of all scales would become a bias of (b, heads, L, L), kept for the backward pass, and no fused kernel takes
    one. Each large scale is a call of its own instead: its queries see all keys up to its end, so it needs no mask.
    The small scales at the beginning share one call with a mask of their own few tokens.

    Args:
        lengths: codes of each scale, L in all.
        dropout: of the attention weights, in training.
    """

    sees: Tensor

    def __init__(self, lengths: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        few = next((index for index, length in enumerate(lengths) if length >= FEW), len(lengths))
        ends = list(accumulate(lengths))
        together = ends[few - 1] if few else 0
        self.bounds = [0, *([together] if together else []), *ends[few:]]
        self.first = lengths[0]
        level = torch.arange(few).repeat_interleave(torch.tensor(lengths[:few], dtype=torch.long))
        self.register_buffer("sees", level[:, None] >= level[None, :], persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **unused: Any) -> tuple[Tensor, Any]:
        """Return what the queries see.

        Args:
            q: (b, heads, n, d), of the first scales, or of the one scale after those whose keys are cached.
            k: (b, heads, m, d), of the same scales and of those before.
            v: (b, heads, m, d).
            **unused: options of `Attend` that VAR does not set.

        Returns:
            (b, heads, n, d), and the library's record of intermediate values, which is empty.
        """
        number = q.shape[-2]
        if number < k.shape[-2] or number == self.first:  # one scale alone
            return self._attend(q, k, v, None), Intermediates()
        parts = []
        for begin, end in pairwise(min(bound, number) for bound in self.bounds):
            if begin < end:
                mask = self.sees[:end, :end] if begin < len(self.sees) else None
                parts.append(self._attend(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], mask))
        return torch.cat(parts, dim=-2), Intermediates()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attend_by_scale(transformer: nn.Module, lengths: Sequence[int], dropout: float) -> None:
    """Give every attention of a transformer of x-transformers a `ScaleAttention`."""
    for module in transformer.modules():
        if isinstance(getattr(module, "attend", None), nn.Module):
            module.attend = ScaleAttention(lengths, dropout)
