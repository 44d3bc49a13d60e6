"""Ending a run early without losing it: signals are noted when they come and acted upon between two steps.

Schedulers say with SIGTERM or SIGUSR1 that a job has to go; people say it with Ctrl-C (SIGINT).
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from types import FrameType

import torch
from torch import Tensor

REQUEUE = (signal.SIGTERM, signal.SIGUSR1)
NOTED = (*REQUEUE, signal.SIGINT)
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command may be started again
EXIT_INTERRUPTED = 130  # what shells make of SIGINT


class Stopped(SystemExit):
    """Training ended early and completely saved, since a signal asked for it; `code` is the exit code.

    A script that lets it pass ends with that code: 75 after SIGTERM and SIGUSR1, where a scheduler should start the
    job again, 130 after SIGINT. It is raised on every rank, whichever got the signal.
    """

    def __init__(self, number: int, step: int, folder: str):
        super().__init__(EXIT_REQUEUE if number in REQUEUE else EXIT_INTERRUPTED)
        self.message = (
            f"stopped by {signal.Signals(number).name} after step {step}, which is saved; the same command goes on "
            f"from there ({folder})"
        )


class StopSignals:
    """Within this context SIGTERM, SIGUSR1 and SIGINT are only noted; a second SIGINT interrupts at once.

    Outside of the main thread Python cannot change what signals do, and nothing is noted.

    Attributes:
        received: the last signal, or 0.
    """

    # launchers pass a Ctrl-C on to processes that the terminal has told already: within a second it is the same one
    SAME_INTERRUPT = 1.0

    def __init__(self):
        self.received = 0
        self._interrupted_at: float | None = None

    def __enter__(self) -> StopSignals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in NOTED}
        training_flag().fill_(1)
        return self

    def __exit__(self, *_exception) -> None:
        training_flag().fill_(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > self.SAME_INTERRUPT:
                raise KeyboardInterrupt
            self._interrupted_at = now
        self.received = number


def protect_worker(training: Tensor) -> None:
    """For a loader's process: a signal to the whole process group must not end it before the trainer has stopped.

    Args:
        training: `training_flag()` of the trainer's process. While it is 0, SIGTERM ends this process, as
            multiprocessing expects when it cleans up.
    """

    def end_unless_training(number: int, _frame: FrameType | None) -> None:
        if not training.item():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end_unless_training)
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@functools.cache
def training_flag() -> Tensor:
    """In memory that worker processes share: 1 while this process is inside `StopSignals`, else 0."""
    return torch.zeros(1, dtype=torch.uint8).share_memory_()
