"""A trainer in a process of its own, which trains when it is told to, and says how long it took.

usage of a worker's module: python -m benchmarks.NAME_worker OPTIONS, where OPTIONS is JSON with at least {"side":
NAME, "threads": N}

Each line of standard input is a number of steps; each is answered by one line of JSON. Workers run in the ancestors'
environments too, so neither this module nor theirs imports vqdist before it knows its side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Step = Callable[[], Any]
Turn = Callable[[int], dict[str, float]]


def timed(step: Step) -> Turn:
    """Return a function that takes a number of steps and gives the seconds that they took: `wall` and `cpu`."""

    def turn(steps: int) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    return turn


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Numbers that these networks learn."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def serve(sides: dict[str, Callable[[dict], tuple[Step, dict[str, int]]]]) -> None:
    """Build this process's side and train when told to, until standard input ends.

    Args:
        sides: by name: options -> a step, and the networks' parameter counts by name, which are the first answer.
    """
    answers = os.fdopen(os.dup(1), "w")  # trainers print as they go: the real standard output is for answers alone
    sys.stdout = open(os.devnull, "w")
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    step, sizes = sides[options["side"]](options)
    turn = timed(step)
    print(json.dumps(sizes), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(int(line))), file=answers, flush=True)
    os._exit(0)  # loader workers need no goodbye
