"""The images that a run skipped because they cannot be decoded: named, counted over ranks, and limited in number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from vqdist.backends import Backend
from vqdist.data.dataset import most_bad, too_many_bad


class BadImages:
    """The broken images of a run, each counted once, however often and on however many ranks it is met.

    Args:
        backend: its ranks count together.
        total: images of the data.
        max_bad_frac: the largest share of them that may be skipped.

    Attributes:
        names: of those that this rank has met.
        of_valid: those among the images to validate on; the same object, unless these are images of their own.
    """

    def __init__(self, backend: Backend, total: int, max_bad_frac: float):
        self.backend = backend
        self.total = total
        self.max_bad_frac = max_bad_frac
        self.names: set[str] = set()
        self._told: set[str] = set()
        self._known: set[int] = set()  # a number for each name that any rank has met
        self.of_valid: BadImages = self

    def add(self, names: Iterable[str]) -> list[str]:
        """Take in names of skipped images; return those that are new to this rank."""
        new = [name for name in dict.fromkeys(names) if name not in self.names]
        self.names.update(new)
        return new

    def all_names(self) -> set[str]:
        """Return the names that this rank has met, of images to train on and to validate on."""
        return self.names | self.of_valid.names

    def count_over_ranks(self) -> int:
        """Return how many images all ranks have skipped, to train on and to validate on; every rank calls this."""
        return self._over_ranks() + (0 if self.of_valid is self else self.of_valid._over_ranks())

    def _over_ranks(self) -> int:
        new = [_number_of(name) for name in sorted(self.names - self._told)]
        self._told |= self.names
        device = self.backend.device
        longest = int(self.backend.gather(torch.tensor([len(new)], device=device)).max())
        if longest:
            padded = torch.tensor(new + [-1] * (longest - len(new)), device=device)
            self._known |= set(self.backend.gather(padded).flatten().tolist()) - {-1}
        return len(self._known)

    def restore(self, names: Iterable[str]) -> None:
        """Go on from the names of a checkpoint."""
        self.names, self._told, self._known = set(names), set(), set()

    def check(self) -> None:
        """Raise `UserError` once more images were skipped than may be, of either kind, as far as this rank knows."""
        count = max(len(self.names), len(self._known))
        if count > most_bad(self.total, self.max_bad_frac):
            raise too_many_bad(count, self.total, self.max_bad_frac, sorted(self.names))
        if self.of_valid is not self:
            self.of_valid.check()


def _number_of(name: str) -> int:
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:15], 16)
