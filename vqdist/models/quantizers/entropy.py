"""The entropy loss of a codebook: each feature should be sure of its code, and all codes should be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqdist.models.quantizers.base import mean_over_ranks

CHUNK = 2**24
"""Most logits that are held at a time: of 262,144 codes those of 64 positions."""
LOG_EPS = 1e-5


class CodeEntropy(NamedTuple):
    """Two entropies of the codes' distribution, in nats; 0-d.

    Attributes:
        sample: mean entropy of one position's distribution.
        batch: entropy of the mean distribution over all positions of all ranks.
    """

    sample: Tensor
    batch: Tensor


def in_chunks(rows: Tensor, codebook: Tensor, function: Callable[..., tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Return `function(rows, codebook)` of some rows (m, d) at a time, so that m x v numbers fit into memory.

    Where there are several chunks, what is inside the function is computed anew in the backward pass.

    Args:
        rows: (n, d).
        codebook: (v, d).
        function: takes (m, d) and (v, d), and gives a tuple of tensors.
    """
    size = max(1, CHUNK // codebook.shape[0])
    chunks = rows.split(size)
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return [function(chunk, codebook) for chunk in chunks]
    return [checkpoint(function, chunk, codebook, use_reentrant=False) for chunk in chunks]


def code_entropy(
    rows: Tensor, codebook: Tensor, logits_of: Callable[[Tensor, Tensor], Tensor], temperature: float
) -> CodeEntropy:
    """Return the entropies of softmax(logits / temperature) over the codes; every rank calls it in training.

    Args:
        rows: (n, d).
        codebook: (v, d).
        logits_of: rows (m, d) and codebook (v, d) -> logits (m, v).
        temperature: of the softmax.
    """

    def sums(some: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = (logits_of(some, codes) / temperature).log_softmax(dim=-1)
        probs = log_probs.exp()
        return -(probs * log_probs).sum(), probs.sum(dim=0)

    parts = in_chunks(rows, codebook, sums)
    entropies, probabilities = zip(*parts, strict=True)
    sample = torch.stack(list(entropies)).sum() / len(rows)
    mean = mean_over_ranks(torch.stack(list(probabilities)).sum(dim=0) / len(rows))
    return CodeEntropy(sample, -(mean * (mean + LOG_EPS).log()).sum())
