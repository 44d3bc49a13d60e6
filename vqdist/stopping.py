"""Ending a run early without losing it: signals are noted when they come and acted upon between two steps.

Schedulers say with SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU that a job has to go, a terminal that closes with SIGHUP;
people say it with Ctrl-C (SIGINT). A validation is broken off between two batches, a picture at once; a checkpoint
that is being written is finished. This file imports torch only where it is needed, so that the command line can listen
before that.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from vqdist.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

REQUEUE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)
NOTED = (*REQUEUE, signal.SIGINT)
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command may be started again
EXIT_INTERRUPTED = 130  # what shells make of SIGINT


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal stopped: 75 if it should be started again, 130 after Ctrl-C."""
    return EXIT_REQUEUE if number in REQUEUE else EXIT_INTERRUPTED


def heeded() -> tuple[signal.Signals, ...]:
    """Return the signals of `NOTED`, but for a SIGHUP that is ignored, as `nohup` has it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in NOTED if number != signal.SIGHUP or not ignored)


# torch's own name first: a launcher within `mpirun` or `srun` sets it
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def rank_of_process() -> int:
    """Return the rank that a launcher gave this process, and 0 without one."""
    return next((int(rank) for name in RANKS if (rank := os.environ.get(name, "")).isdecimal()), 0)


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
        "rank": (rank := rank_of_process()),
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


class Stopped(KeyboardInterrupt):
    """Training ended early and completely saved, since a signal asked for it.

    It is raised on every rank, whichever got the signal. A notebook or a prompt stays alive, as after any
    KeyboardInterrupt: `train` or `steps` of the same trainer goes on. A script that lets it pass ends with `code`.

    Attributes:
        code: the exit code: 130 after SIGINT, and 75 after the others of `NOTED`, where the job should be started
            again.
        message: one line.
    """

    def __init__(self, number: int, step: int, folder: str):
        self.code = exit_code(number)
        self.message = (
            f"stopped by {signal.Signals(number).name} after step {step}, which is saved; the same command goes on "
            f"from there ({folder})"
        )
        super().__init__(self.message)


class InNoFinalizer:
    """Within this context an exception of a signal that came while Python ran a finalizer is acted upon.

    Python would print it as ignored, and go on.

    Args:
        kind: of the exception.
        act: is called with it.
    """

    def __init__(self, kind: type[BaseException], act: Callable[[BaseException], None]):
        self._kind, self._act = kind, act

    def __enter__(self) -> None:
        self._before = sys.unraisablehook
        sys.unraisablehook = self._hook

    def __exit__(self, *_exception) -> None:
        sys.unraisablehook = self._before

    def _hook(self, found: Any) -> None:
        if isinstance(found.exc_value, self._kind):
            self._act(found.exc_value)
        else:
            self._before(found)


class UntilTheEnd:
    """Within this context of a whole command the signals of `NOTED` that come between its parts are kept.

    One that comes before the training is the training's first. One that comes after it changes nothing, since all is
    saved; of a process that is the command, until its end, when Ctrl-C ends it without a word of Python's.
    """

    kept: int = 0  # the signal that `StopSignals` is to begin with
    of_process = False  # whether this process ends with the command

    def __enter__(self) -> UntilTheEnd:
        self._before: dict[signal.Signals, Any] = {}
        type(self).kept = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._keep) for number in heeded()}
        return self

    def __exit__(self, *_exception) -> None:
        type(self).kept = 0
        for number, handler in self._before.items():
            at_end = signal.SIG_IGN if number in REQUEUE else signal.SIG_DFL
            signal.signal(number, at_end if self.of_process else handler)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        type(self).kept = number


class StopSignals:
    """Within this context the signals of `NOTED` are only noted; a second SIGINT interrupts at once.

    Outside of the main thread Python cannot change what signals do, and nothing is noted.

    Attributes:
        received: the last signal, or 0.
    """

    # launchers pass a Ctrl-C on to processes that the terminal has told already: within a second it is the same one
    SAME_INTERRUPT = 1.0

    # of several trainings at once, the handlers are there from the first to the last
    _training: ClassVar[list[StopSignals]] = []
    _noting: ClassVar[list[StopSignals]] = []  # those of the main thread
    _before: ClassVar[dict[signal.Signals, Any]] = {}
    _finalizers: ClassVar[InNoFinalizer]

    def __init__(self):
        self.received = 0
        self._interrupted_at: float | None = None
        self._breaks_off = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._noting.append(self)  # first: a signal may come as soon as the handlers are there
            if len(self._noting) == 1:
                self._take_over()
        self._training.append(self)
        training_flag().fill_(1)
        self.received, UntilTheEnd.kept = UntilTheEnd.kept or self.received, 0
        return self

    def __exit__(self, *_exception) -> None:
        self._training.remove(self)
        if not self._training:
            training_flag().fill_(0)
        if self in self._noting:
            self._noting.remove(self)
            if not self._noting:
                self._give_back()

    @classmethod
    def _take_over(cls) -> None:
        cls._before = {number: signal.signal(number, cls._note_all) for number in heeded()}
        # it is noted, and what was begun ends soon
        cls._finalizers = InNoFinalizer(BrokenOff, lambda _: None)
        cls._finalizers.__enter__()

    @classmethod
    def _give_back(cls) -> None:
        cls._finalizers.__exit__()
        for number, handler in cls._before.items():
            signal.signal(number, handler)

    @classmethod
    def _note_all(cls, number: int, _frame: FrameType | None) -> None:
        errors = [signals._note(number) for signals in list(cls._noting)]
        for error in errors:
            if error is not None:
                raise error

    def _note(self, number: int) -> BaseException | None:
        """Note a signal; return an exception that is to be raised at once, or None."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > self.SAME_INTERRUPT:
                self._interrupted_at, self.received = None, 0  # this ends it: nothing is left to be done
                return KeyboardInterrupt()
            self._interrupted_at = now
        self.received = number
        if self._breaks_off:
            self._breaks_off = False
            return BrokenOff()
        return None

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

    def pass_on_while_training(number: int, _frame: FrameType | None) -> None:
        trainer = multiprocessing.parent_process()
        if training.item() and trainer is not None and trainer.pid is not None:
            os.kill(trainer.pid, number)  # time is counted for each process: the end of this one is soon

    for number in NOTED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_unless_training)
    signal.signal(signal.SIGXCPU, pass_on_while_training)


@functools.cache
def training_flag() -> Tensor:
    """In memory that worker processes share: 1 while this process is inside `StopSignals`, else 0."""
    import torch

    return torch.zeros(1, dtype=torch.uint8).share_memory_()
