"""A step of `make demo`'s tokenizer while other programs keep every core busy, against the same on an idle machine.

A program beside as many others as there are cores has half of each core, so twice the time is its fair share. More
than that is threads that wait for one another. Run it alone: what else the machine does counts as busy on both sides.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Row, environment
from vqdist.data.cores import WAITING, cores_of_process

TARGET = 2.0  # times the idle machine's step
COST = 1.05  # of threads that sleep while they wait, times a step of those that spin
AS_STARTED, SPINNING = "as it starts", "threads that spin"
VARIANTS = {
    AS_STARTED: {},
    SPINNING: {"GOMP_SPINCOUNT": "300000"},  # which GNU's OpenMP has where nothing says otherwise
    "one thread": {"OMP_NUM_THREADS": "1"},
}
Seconds = dict[str, float]
"""Of a step: `wall` on the clock, `cpu` of all threads."""


class Demo:
    """The process that trains, as a user starts it: with the threads that it takes by itself.

    Args:
        folder: of its run.
        **variables: of its environment.
    """

    def __init__(self, folder: Path, **variables: str):
        ours = ("OMP_NUM_THREADS", *WAITING)
        inherited = {name: value for name, value in environment().items() if name not in ours}
        command = [sys.executable, "-m", "benchmarks.busy_worker", str(folder)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, cwd=ROOT, env={**inherited, **variables}, text=True, **pipes)
        self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the demo's training ended with exit code {self._process.wait()}")
        return json.loads(line)

    def seconds(self, steps: int) -> Seconds:
        """Return the time of a step, over so many."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return {name: seconds / steps for name, seconds in self._answer().items()}

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(30)


@contextlib.contextmanager
def busy(cores: int) -> Iterator[None]:
    """Keep so many cores busy within this context."""
    burners = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def turns(demos: dict[str, Demo], *, rounds: int, steps: int) -> dict[str, list[tuple[Seconds, Seconds]]]:
    """Return the times of a step, a pair each round: on the machine as it is, and with every core busy."""
    times: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in demos}
    for _ in range(rounds):
        for name, demo in demos.items():
            idle = demo.seconds(steps)
            with busy(cores_of_process()):
                times[name].append((idle, demo.seconds(steps)))
    return times


def run(quick: bool = False) -> list[Row]:
    """Rows of the table: as the command starts the demo, and otherwise."""
    rounds, steps = (2, 20) if quick else (5, 60)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as demos:
        started = {
            name: demos.enter_context(contextlib.closing(Demo(Path(folder) / str(number), **variables)))
            for number, (name, variables) in enumerate(VARIANTS.items())
        }
        times = turns(started, rounds=rounds, steps=steps)
    return [*_slowdowns(times), _cost_of_sleep(times)]


def _slowdowns(times: dict[str, list[tuple[Seconds, Seconds]]]) -> Iterator[Row]:
    for name, pairs in times.items():
        idle, loaded = ({key: statistics.median(s[key] for s in side) for key in side[0]} for side in zip(*pairs))
        detail = (
            f"{1000 * loaded['wall']:.0f} against {1000 * idle['wall']:.0f} ms; CPU time "
            f"{1000 * loaded['cpu']:.0f} against {1000 * idle['cpu']:.0f} ms"
        )
        value = statistics.median(b["wall"] / a["wall"] for a, b in pairs)
        what = f"demo's tokenizer, {name}: every core busy / idle, time of a step"
        yield Row(what, value, at_most=TARGET if name == AS_STARTED else None, detail=detail)


def _cost_of_sleep(times: dict[str, list[tuple[Seconds, Seconds]]]) -> Row:
    pairs = zip(times[AS_STARTED], times[SPINNING], strict=True)
    value = statistics.median(ours["wall"] / theirs["wall"] for (ours, _), (theirs, _) in pairs)
    what = f"demo's tokenizer, idle: {AS_STARTED} / {SPINNING}, time of a step"
    return Row(what, value, at_most=COST, detail="means something on an idle machine only")
