"""One line for who waits while torch is imported."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vqdist.errors import UserError

SILENCE = 2.0  # seconds


@contextmanager
def loading(what: str, after: float = SILENCE) -> Iterator[None]:
    """Within this context, say on standard error what is loaded if it takes long; rank 0 alone says it.

    Nothing is said where torch is imported already: what takes long is its import.

    Args:
        what: is loaded, as "torch and the run".
        after: seconds of silence.
    """
    if "torch" in sys.modules or rank_of_command() != 0:
        yield
        return
    line = f"vqdist: loading {what} ..."
    timer = threading.Timer(after, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def rank_of_command() -> int:
    """Return this process's rank, as a launcher says it, and 0 in a broken environment: that is another error."""
    from vqdist.backends.environment import rank_of_launcher

    try:
        return rank_of_launcher()
    except UserError:
        return 0
