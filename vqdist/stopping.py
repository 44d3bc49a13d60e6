"""Ending a run early without losing it: signals are noted when they come and acted upon between two steps.

Schedulers say with SIGTERM or SIGUSR1 that a job has to go; people say it with Ctrl-C (SIGINT). A validation is broken
off between two batches, a picture at once; a checkpoint that is being written is finished. This file imports torch
only where it is needed, so that the command line can listen before that.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vqdist.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

REQUEUE = (signal.SIGTERM, signal.SIGUSR1)
NOTED = (*REQUEUE, signal.SIGINT)
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command may be started again
EXIT_INTERRUPTED = 130  # what shells make of SIGINT


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal stopped: 75 if it should be started again, 130 after Ctrl-C."""
    return EXIT_REQUEUE if number in REQUEUE else EXIT_INTERRUPTED


def record_stop(number: int, *, step: int | None = None, run: str | None = None) -> None:
    """Write the record of this rank's end, stopped_rank_00000.json, into the folder that VQDIST_STOP_DIR names.

    Launchers return their own exit code, so a script that starts them reads these records (launch/slurm/functions.sh).
    Without the variable nothing is written. A folder that cannot be written costs a warning, not the run.

    The fields, one a line: `signal`, `exit_code`, `saved` (whether a checkpoint holds every step made), `step`, `rank`
    and `run`, the run folder. Before training began, `saved` is false, and `step` and `run` are null.

    Args:
        number: the signal.
        step: the last step, which is saved; None before training began.
        run: the run folder.
    """
    folder = os.environ.get("VQDIST_STOP_DIR")
    if not folder:
        return
    record = {
        "signal": signal.Signals(number).name,
        "exit_code": exit_code(number),
        "saved": step is not None,
        "step": step,
        "rank": (rank := int(os.environ.get("RANK") or 0)),
        "run": run,
    }
    path = Path(folder) / f"stopped_rank_{rank:05d}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError as error:
        print(f"vqdist: warning: {path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


class BrokenOff(BaseException):
    """The end of a validation or a picture by a signal; the caller that began it catches this.

    Like KeyboardInterrupt it is no `Exception`, which a library might catch.
    """


class Stopped(SystemExit):
    """Training ended early and completely saved, since a signal asked for it; `code` is the exit code.

    A script that lets it pass ends with that code: 75 after SIGTERM and SIGUSR1, where a scheduler should start the
    job again, 130 after SIGINT. It is raised on every rank, whichever got the signal.
    """

    def __init__(self, number: int, step: int, folder: str):
        super().__init__(exit_code(number))
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
        self._breaks_off = False

    def __enter__(self) -> StopSignals:
        self._before: dict[signal.Signals, Any] = {}
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
        if self._breaks_off:
            self._breaks_off = False
            raise BrokenOff

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Within this context a signal raises `BrokenOff` at once, also one that came before.

        Only for what no other rank waits for and what may stay half done.
        """
        try:
            self._breaks_off = True
            if self.received:
                raise BrokenOff
            yield
            self._breaks_off = False
        finally:
            self._breaks_off = False


class LeaveAtOnce:
    """Within this context SIGTERM, SIGUSR1 and SIGINT end the process with their code and one line.

    It is for a start-up, when there is nothing to save.

    Python runs its handlers between two of its own instructions only. A process that waits in a library for a peer, or
    compiles, comes to none: then a thread ends it, `PATIENCE` seconds after the signal.
    """

    PATIENCE = 3.0

    def __enter__(self) -> LeaveAtOnce:
        self._before: dict[signal.Signals, Any] = {}
        self._said, self._over = False, threading.Event()
        if threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def _listen(self) -> None:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write)
        self._before = {number: signal.signal(number, self._leave) for number in NOTED}
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def __exit__(self, *_exception) -> None:
        self._over.set()
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)

    def _leave(self, number: int, _frame: FrameType | None) -> None:
        self._say(number)
        raise SystemExit(exit_code(number))

    def _watch(self, read: int) -> None:
        """In a thread: what the system itself writes into the pipe, a byte per signal, until it is closed."""
        with open(read, "rb", buffering=0) as signals:
            while (told := signals.read(1)) and told[0] not in NOTED:
                pass
        if told and not self._over.wait(self.PATIENCE):
            self._say(told[0])
            os._exit(exit_code(told[0]))

    def _say(self, number: int) -> None:
        if self._said:
            return
        self._said = True
        record_stop(number)
        ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
        name = signal.Signals(number).name + ("" if ranks == "1" else f" (rank {rank})")
        print(
            f"vqdist: stopped by {name} before training began; the same command starts again",
            file=sys.stderr,
            flush=True,
        )


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
    import torch

    return torch.zeros(1, dtype=torch.uint8).share_memory_()
