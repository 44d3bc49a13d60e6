"""Acts of all ranks as one: fail together with one line, let rank 0 act for all, check that weights are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vqdist.backends.base import Backend
from vqdist.errors import PeerLost, RanksDiverged, UserError
from vqdist.files import WRITE_ERRORS, reason_of

MOST_BYTES = 1000  # of a line of one rank that others repeat


@contextmanager
def everywhere(backend: Backend, message: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Let all ranks fail with one line if one of them fails within this context; every rank waits for the others.

    Args:
        backend: every rank of it enters this context.
        message: what cannot be done; the reason is added.
        kind: of the error that is raised; a `UserError` of this rank passes as it is.

    Raises:
        UserError: on every rank, if one could not read or write or raised a `UserError`.
    """
    problem = None
    try:
        yield
    except PeerLost:
        raise
    except UserError as error:
        problem = error
    except WRITE_ERRORS as error:
        problem = kind(f"{message}: {reason_of(error)}")
        problem.__cause__ = error
    if backend.any(problem is not None):
        rank, reason = first_to_say(backend, None if problem is None else str(problem))
        raise problem or kind(f"{message}: {reason.removeprefix(f'{message}: ')} (on rank {rank})")


def first_to_say(backend: Backend, text: str | None) -> tuple[int, str]:
    """Return the first rank that says something, and the beginning of it; every rank calls this, and one has a text.

    Args:
        backend: of the ranks.
        text: of this rank, or None.
    """
    said = (text or "").encode()[:MOST_BYTES]
    row = torch.zeros(MOST_BYTES, dtype=torch.uint8)
    row[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
    table = backend.gather(row.to(backend.device)).cpu()
    rank = int((table != 0).any(dim=1).int().argmax())
    return rank, bytes(table[rank].tolist()).rstrip(b"\0").decode(errors="ignore")


def on_main(backend: Backend, action: Callable[[], object], message: str, kind: type[UserError] = UserError) -> None:
    """Let rank 0 act; every rank calls this, waits for it, and fails if it does, see `everywhere`."""
    with everywhere(backend, message, kind):
        if backend.is_main:
            action()


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
