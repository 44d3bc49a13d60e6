"""A step of `make demo`'s tokenizer while other programs keep every core busy, against the same on an idle machine.

A program beside as many others as there are cores has half of each core, so twice the time is its fair share. More
than that is threads that wait for one another. Run it alone: what else the machine does counts as busy on both sides.

usage of a process: python -m benchmarks.busy FOLDER   (each line of its standard input is a number of steps)
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Row, environment
from benchmarks.worker import timed
from vqdist.data.cores import cores_of_process

TARGET = 2.0  # times the idle machine's step


def process(folder: Path) -> None:
    """Train the demo's tokenizer as `vqdist train` does, so many steps as each line of standard input says."""
    from vqdist.cli.models import MODELS
    from vqdist.cli.train import make_trainer, train_options

    recipe = ROOT / "launch" / "recipes" / "digits_vqgan.yaml"
    often = {"save_model_every": 0, "save_results_every": 0, "validate_every": 0}
    options = [word for name, value in often.items() for word in (f"--trainer.{name}", str(value))]
    said = ["--config", str(recipe), "--out", str(folder), "--backend", "local", *options]
    turn = timed(make_trainer(MODELS["vqgan"], train_options("vqgan", said)).train_step)
    turn(5)  # loader processes have started, memory is there
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(int(line))), flush=True)
    os._exit(0)  # loader processes need no goodbye


class Demo:
    """The process that trains, as a user starts it: with the threads that it takes by itself.

    Args:
        folder: of its run.
        **variables: of its environment.
    """

    def __init__(self, folder: Path, **variables: str):
        inherited = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"}
        command = [sys.executable, "-m", "benchmarks.busy", str(folder)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, cwd=ROOT, env={**inherited, **variables}, text=True, **pipes)
        self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the demo's training ended with exit code {self._process.wait()}")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        """Return the time of a step on the clock, over so many."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()["wall"] / steps

    def end(self) -> None:
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


def slowdown(demo: Demo, *, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the times of a step by turns, on the machine as it is and with every core busy."""
    idle, loaded = [], []
    for _ in range(rounds):
        idle.append(demo.seconds(steps))
        with busy(cores_of_process()):
            loaded.append(demo.seconds(steps))
    return idle, loaded


def run(quick: bool = False) -> list[Row]:
    """Rows of the table: as the demo is started, and with one thread."""
    rounds, steps = (2, 20) if quick else (5, 60)
    rows = []
    for label, variables in (("as it starts", {}), ("one thread", {"OMP_NUM_THREADS": "1"})):
        with tempfile.TemporaryDirectory() as folder:
            demo = Demo(Path(folder), **variables)
            idle, loaded = slowdown(demo, rounds=rounds, steps=steps)
            demo.end()
        value = statistics.median(b / a for a, b in zip(idle, loaded, strict=True))
        detail = f"{1000 * statistics.median(loaded):.0f} against {1000 * statistics.median(idle):.0f} ms"
        what = f"demo's tokenizer, {label}: every core busy / idle, time of a step"
        rows.append(Row(what, value, at_most=None if variables else TARGET, detail=detail))
    return rows


if __name__ == "__main__":
    process(Path(sys.argv[1]))
