"""Run by the campaign: the command line, in a process that gets a signal at a moment after its last step.

usage: signalled_at_end.py MOMENT SIGNAL ARGUMENTS
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
from typing import Any

from vqdist.checkpoint import CheckpointStore
from vqdist.cli import main, train
from vqdist.stopping import StopSignals, UntilTheEnd
from vqdist.trainers import resume
from vqdist.trainers.best import Best
from vqdist.trainers.owner import RunOwner
from vqdist.trainers.report import Report

MOMENTS: dict[str, tuple[Any, str]] = {
    "export": (resume, "write_export"),
    "settling": (CheckpointStore, "settle"),
    "best": (Best, "finish"),
    "sinks": (Report, "close"),
    "handlers": (StopSignals, "__exit__"),
    "summary": (train, "_print_summary"),
    "closing": (RunOwner, "close"),
    "end": (UntilTheEnd, "__exit__"),
}


def signal_in(owner: Any, name: str, number: int) -> None:
    """Let a function begin with a signal to this process, once, after the last step."""
    function = getattr(owner, name)
    sent = False

    @functools.wraps(function)
    def signalled(*args: Any, **options: Any) -> Any:
        nonlocal sent
        if ended() and not sent:
            sent = True
            os.kill(os.getpid(), number)
        return function(*args, **options)

    setattr(owner, name, signalled)


def ended() -> bool:
    """Return whether the run of the command has logged its last step."""
    log = os.path.join(sys.argv[sys.argv.index("--out") + 1], "metrics.jsonl")
    steps = sys.argv[sys.argv.index("--trainer.num_train_steps") + 1]
    return os.path.exists(log) and f'"step": {steps},' in open(log).read()


if __name__ == "__main__":
    moment, number = sys.argv[1], int(sys.argv[2])
    del sys.argv[1:3]
    if moment == "exit":
        atexit.register(os.kill, os.getpid(), number)
    else:
        signal_in(*MOMENTS[moment], number)
    sys.exit(main())
