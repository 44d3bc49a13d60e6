"""The loop of a trainer as an iterator, and the ways in which a for-loop leaves it."""

from __future__ import annotations

import dis
import gc
import inspect
import sys
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor

from vqdist.uncaught import raise_after_this

# instructions at which the interpreter drops an iterator that has ended, or that `break` or `return` leaves
DROPPING = frozenset({"POP_TOP", "POP_ITER", "FOR_ITER", "END_FOR"})
WAITING = frozenset({"YIELD_VALUE", "RESUME"})  # of a generator that is dropped itself


class Left(BaseException):
    """Thrown into the loop of a trainer where the body has left it.

    Attributes:
        by_all: whether every rank has left it after this step, as by `break`. An error may be one rank's own.
    """

    def __init__(self, *, by_all: bool):
        super().__init__()
        self.by_all = by_all


class Steps(Iterator[tuple[int, dict[str, Tensor]]]):
    """The steps of a training, for one for-loop.

    Python only drops an iterator that a loop leaves: it is told of no `break` and of no error, and can raise nothing
    there. So the way in which it was left is read from the frame that drops it. An error that comes of leaving, such
    as `Stopped`, is raised in the main thread when that frame goes on, as a KeyboardInterrupt would be.

    Args:
        loop: takes a `Left` at its yield.
        within: a context for what runs in the loop, which may be entered often; the body is outside of it.
    """

    def __init__(
        self, loop: Generator[tuple[int, dict[str, Tensor]], None, None], *, within: AbstractContextManager[Any]
    ):
        self._loop = loop
        self._within = within

    def __next__(self) -> tuple[int, dict[str, Tensor]]:
        with self._within:
            return next(self._loop)

    def close(self) -> None:
        """Leave the loop as `break` does; every rank calls this, and gets the errors of it here."""
        self._leave(by_all=True)

    def abandon(self) -> None:
        """Leave the loop without an exchange with other ranks."""
        self._leave(by_all=False)

    def __del__(self) -> None:
        try:
            self._leave(by_all=not self._is_left_by_error())
        except BaseException as error:  # of leaving: here it could only be printed
            # nothing may run between the end of this and the caller, so that the error is raised there; the frames of
            # the error hold this object, which has to go now
            self._raised_later = raise_after_this(error.with_traceback(None))

    def _leave(self, *, by_all: bool) -> None:
        if inspect.getgeneratorstate(self._loop) == inspect.GEN_SUSPENDED:
            try:
                with self._within:
                    self._loop.throw(Left(by_all=by_all))
            except (StopIteration, Left):
                pass
        self._loop.close()

    def _is_left_by_error(self) -> bool:
        try:
            return left_by_error(sys._getframe(2))  # whoever drops it
        except ValueError:  # the interpreter itself, at its end
            return True


def left_by_error(frame: FrameType | None) -> bool:
    """Return whether an error is on its way through the frame that drops an iterator; in doubt it is."""
    while frame is not None:
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if name not in WAITING:
            return name not in DROPPING or (name == "FOR_ITER" and _has_raised(frame))
        frame = frame.f_back
    return True


def _has_raised(frame: FrameType) -> bool:
    """Return whether an error came out of the instruction at which a frame is, as a traceback still says.

    The iterator of a loop within the body may raise; `FOR_ITER` also drops an iterator when another one ends, as of
    `zip`. To find the traceback takes a tenth of a second, once.
    """
    return any(
        isinstance(found, TracebackType) and found.tb_frame is frame and found.tb_lasti == frame.f_lasti
        for found in gc.get_referrers(frame)
    )
