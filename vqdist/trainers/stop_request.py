"""A request of a signal that a run end: noted when it comes, agreed on by all ranks between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from vqdist.backends import Backend
from vqdist.stopping import BrokenOff, StopSignals

FAULT = 255  # above every signal: a rank that cannot go on, and has said why


class StopRequest:
    """The signals of one call of `train`, and what all ranks know of them.

    Args:
        backend: its ranks tell one another.

    Attributes:
        number: the signal that all ranks know of, or 0; `FAULT` where a rank cannot read its images.
        fault: whether this rank cannot.
    """

    def __init__(self, backend: Backend):
        self.backend = backend
        self.number = 0
        self.fault = False
        self._signals: StopSignals | None = None  # within `listening`
        self._put_off = 0  # a signal that a loop noted before an error of its body left it

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context signals are noted; every rank enters it.

        The signals of an earlier one are forgotten, but for one that was put off.
        """
        self.number, self.fault = 0, False
        self.backend.largest_lately(0)  # gives what the ranks exchanged last in an earlier one
        try:
            with StopSignals() as self._signals:
                yield
        finally:
            self._signals = None

    @property
    def received(self) -> int:
        """The last signal of this rank, or 0."""
        return 0 if self._signals is None else self._signals.received

    def asked(self) -> int:
        """Return the signal that a rank received lately, or 0: the same on every rank, which call this as often."""
        if self._signals is not None and not self.number:
            self.number = self.backend.largest_lately(FAULT if self.fault else self._signals.received)
        return self.number

    def agree(self, number: int) -> int:
        """Return the largest of the ranks' numbers of signals, here and from `asked`; every rank waits for all."""
        found = torch.tensor([number], device=self.backend.device)
        self.number = self.number or int(self.backend.gather(found).max())
        return self.number

    def asked_now(self) -> int:
        """Return what `asked` does, of this very moment: every rank waits for the others."""
        return self.asked() or self.asked()

    def put_off(self) -> None:
        """Let the next loop act on the signal that this rank received: the others cannot be asked now."""
        self._put_off = self.received

    def agree_on_put_off(self) -> int:
        """Return a signal that a rank has put off, or 0, and forget it; every rank waits for all."""
        number, self._put_off = self._put_off, 0
        self.number = 0  # of a loop that has ended
        return self.agree(number)

    def break_off_if_asked(self) -> None:
        """Raise `BrokenOff` on every rank alike once one of them received a signal."""
        if self.asked():
            raise BrokenOff

    @property
    def is_listening(self) -> bool:
        """True if a loop is there that acts on signals and faults."""
        return self._signals is not None

    def break_off_if_faulty(self) -> None:
        """Raise `BrokenOff` on every rank alike if one of them has a `fault`; every rank waits for all."""
        if self.is_listening and self.backend.any(self.fault):
            self.number = self.number or FAULT
            raise BrokenOff

    def breaking_off(self) -> AbstractContextManager[None]:
        """Return a context of what no other rank waits for: a signal breaks it off at once with `BrokenOff`."""
        return nullcontext() if self._signals is None else self._signals.breaking_off()
