"""Whether all ranks hold the same weights: the check that turns a silent divergence into one line."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vqdist.backends.base import Backend
from vqdist.errors import RanksDiverged


def checksum(tensor: Tensor) -> Tensor:
    """Return a 0-d int64 number that depends on every bit of the tensor."""
    bits = (
        tensor.detach()
        .contiguous()
        .flatten()
        .view(torch.uint8 if tensor.numel() * tensor.element_size() % 4 else torch.int32)
    )
    weights = torch.arange(bits.numel(), device=bits.device) % 8191 + 1
    return (bits.to(torch.int64) * weights).sum()


def check_ranks_agree(backend: Backend, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Compare a checksum of every tensor over ranks; every rank calls this with the same names.

    Raises:
        RanksDiverged: on every rank, naming the first tensor that differs and the first rank that differs from rank 0.
    """
    if backend.world_size == 1:
        return
    names, values = zip(*((name, checksum(tensor)) for name, tensor in tensors), strict=True)
    table = backend.gather(torch.stack(values))
    differs = table != table[0]
    if not bool(differs.any()):
        return
    column = int(differs.any(dim=0).nonzero()[0])
    rank = int(differs[:, column].nonzero()[0])
    count = int(differs.any(dim=0).sum())
    raise RanksDiverged(
        f"after step {step} rank {rank} and rank 0 hold different weights: {names[column]} is the first of {count} "
        f"tensors of {len(names)} that differ; resume from a checkpoint before it diverged"
    )
