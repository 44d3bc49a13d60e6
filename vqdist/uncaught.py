"""Errors that nobody catches: exit codes of a script, one line for lost ranks, word to the other ranks.

The `vqdist` command catches them itself. A script of a user gets the same by `listen`. An interactive session stays
alive, whatever it is.
"""

from __future__ import annotations

import _thread
import atexit
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from vqdist.errors import PeerLost
from vqdist.stopping import Stopped

_before: Callable[..., Any] | None = None  # `sys.excepthook` from before `listen`
_to_raise: BaseException | None = None  # of `raise_after_this`, until it is raised


def listen() -> None:
    """Account for errors that end this process from here on.

    Call it after the process group has started: torch puts a function of its own in the place of `sys.excepthook`
    there, which calls the one before and holds back what that prints.
    """
    global _before
    if _before is None:  # once: a later group wraps this one
        _before, sys.excepthook = sys.excepthook, _end
        atexit.register(_end_late)


def is_interactive() -> bool:
    """Return whether Python goes on after an error, at its prompt."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Take the place of `sys.excepthook`."""
    # imports torch, and is there if this process knows of other ranks
    peers = sys.modules.get("vqdist.backends.peers")
    if peers is not None and peers.is_lost_peer(error):
        try:
            peers.account_for(error)
        except PeerLost as lost:
            kind, error = PeerLost, lost
    if is_interactive() or not isinstance(error, Stopped | PeerLost):
        (_before or sys.__excepthook__)(kind, error, traceback)
    if peers is not None:
        peers.account_for(error)
    if is_interactive():
        return
    if isinstance(error, Stopped):  # rank 0 has said it
        raise SystemExit(error.code)
    if isinstance(error, PeerLost):
        print(f"vqdist: error: {error}", file=sys.__stderr__, flush=True)
        if peers is not None:
            peers.leave(error.code)


# ------------------------------------------------------------------------------------- out of a finalizer


def raise_after_this(error: BaseException) -> object:
    """Return an object at whose end the error is on its way to the main thread, which raises it a little later.

    It is for finalizers, out of which no error comes: keep the object where it ends last. Where this is not the main
    thread, raise the error, which Python prints.
    """
    global _to_raise
    if threading.current_thread() is not threading.main_thread():
        raise error
    _to_raise = error
    before = signal.getsignal(signal.SIGINT)

    def deliver(_number: int, frame: FrameType | None) -> None:
        global _to_raise
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
        if _script_has_ended(frame):  # nobody would get it: `_end_late` is next
            return
        _to_raise = None
        raise error

    signal.signal(signal.SIGINT, deliver)
    # of C only: a handler runs before the next instruction of Python
    interrupt = staticmethod(functools.partial(_thread.interrupt_main, signal.SIGINT))
    return type("Interrupt", (), {"__del__": interrupt})()


def _script_has_ended(frame: FrameType | None) -> bool:
    """Return whether the interpreter itself has called this frame, which waits for threads at its end."""
    return frame is None or (frame.f_back is None and frame.f_globals.get("__name__") == "threading")


def _end_late() -> None:
    """At the end of the process: give it the exit code of an error that came after the last line of the script."""
    if not isinstance(_to_raise, Stopped) or is_interactive():
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(_to_raise.code)
