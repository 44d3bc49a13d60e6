"""The end of a process before its training has begun: by a signal, or because its launcher has been killed.

This file imports no torch, so that the command line can listen while that is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, cast

from vqdist.stopping import NOTED, InNoFinalizer, StopSignals, exit_code, heeded, rank_of_process, record_stop


def _end_now(error: BaseException) -> None:
    """End the process with the code of a SystemExit that was lost."""
    os._exit(cast(SystemExit, error).code)  # type: ignore[arg-type]  # of ours, which have a number


class LeaveAtOnce:
    """Within this context the signals of `NOTED` end the process with their code and one line.

    It is for a start-up, when there is nothing to save.

    Python runs its handlers between two of its own instructions only. A process that waits in a library for a peer, or
    compiles, comes to none: then a thread ends it, `PATIENCE` seconds after the signal.

    Among several ranks the thread tells the others first, so that they leave with the same code. It waits until this
    process has imported what that takes; a second SIGINT ends it at once.
    """

    PATIENCE = 3.0
    IMPORTS = 60.0

    def __enter__(self) -> LeaveAtOnce:
        self._before: dict[signal.Signals, Any] = {}
        self._said, self._over = 0.0, threading.Event()
        self._in_company = _may_have_company()
        self._finalizers = InNoFinalizer(SystemExit, _end_now)
        self._finalizers.__enter__()
        if threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def _listen(self) -> None:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write)
        self._before = {number: signal.signal(number, self._leave) for number in heeded()}
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def __exit__(self, *_exception) -> None:
        hold_if_leaving()
        self._finalizers.__exit__()
        self._over.set()
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)

    def _leave(self, number: int, _frame: FrameType | None) -> None:
        again = self._said and time.monotonic() - self._said > StopSignals.SAME_INTERRUPT
        self._say(number)
        if not self._in_company:
            raise SystemExit(exit_code(number))
        if again and number == signal.SIGINT:
            os._exit(exit_code(number))

    def _watch(self, read: int) -> None:
        """In a thread: what the system itself writes into the pipe, a byte per signal, until it is closed."""
        with open(read, "rb", buffering=0) as signals:
            while (told := signals.read(1)) and (told[0] not in NOTED or self._ignored(told[0])):
                pass
        if not told:
            return
        if self._in_company:
            _leaving.set()
            self._say(told[0])
            self._tell_others(told[0])
        if self._in_company or not self._over.wait(self.PATIENCE):
            self._say(told[0])
            os._exit(exit_code(told[0]))

    def _ignored(self, number: int) -> bool:
        return number not in self._before

    def _tell_others(self, number: int) -> None:
        """Say that this rank leaves, once the main thread has imported what it takes, which it does anyway."""
        deadline = time.monotonic() + self.IMPORTS
        while (peers := _whole_module("vqdist.backends.peers")) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if peers is not None:
            peers.say_leaving(f"stopped by {signal.Signals(number).name} before training began", exit_code(number))

    def _say(self, number: int) -> None:
        if self._said:
            return
        self._said = time.monotonic()
        record_stop(number)
        name = signal.Signals(number).name + (f" (rank {rank_of_process()})" if self._in_company else "")
        print(
            f"vqdist: stopped by {name} before training began; the same command starts again",
            file=sys.stderr,
            flush=True,
        )


_leaving = threading.Event()  # this rank tells the others that it leaves, in a thread that then ends the process
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def _may_have_company() -> bool:
    """Return whether a launcher seems to have started several processes; `environment.py` knows it exactly."""
    return any(os.environ.get(name, "1") not in ("", "0", "1") for name in SIZES)


def _whole_module(name: str) -> Any:
    """Return a module that is imported, or None if it is not, or not yet to its end."""
    module = sys.modules.get(name)
    return None if module is None or getattr(module.__spec__, "_initializing", False) else module


def hold_if_leaving() -> None:
    """Wait for the end of this process, if a signal asked for it while it started: it meets no other rank now."""
    while _leaving.is_set():
        time.sleep(1.0)


def end_with_launcher(every: float = 1.0) -> None:
    """Send this process a SIGTERM soon after torchrun, which started it, has been killed.

    Nobody would collect what it does. Of other launchers a process cannot know whether they are to outlive it.
    """
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ or launcher == 1:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(every)
        print(f"vqdist: the launcher (process {launcher}) is gone", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
