"""Common code of the comparisons with other packages: their environments, and trainers in processes that take turns.

usage: python -m benchmarks.ancestors muse|dalle makes the environment if it is not there, and prints its interpreter

On a CPU, glibc by default gives freed memory back to the system and takes it again, page by page, within one step. It
does so more often in one process than in the next, which moves a ratio by a tenth either way: so each comparison is
started several times. vqdist's trainers tell glibc to keep it (`keep_freed_memory`), which is part of their speed;
`steady memory` gives the ancestor the same, and shows what is left.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.common import ROOT, Row, Timing, environment, peak_mb, ratio, take_turns
from vqdist.data.sources import SyntheticSource

# for steady memory: glibc keeps freed memory up to 2 GiB, and takes none from outside its heap below 1 GiB
STEADY = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


# --------------------------------------------------------------------------------------- environments


@dataclass(frozen=True)
class Ancestor:
    """A package to compare with.

    Attributes:
        package: name and version.
        tools: what it needs and does not ask for, to be built or to be imported.
        built_here: a dependency that is built with the tools; empty if there is none.
    """

    package: str
    tools: tuple[str, ...] = ()
    built_here: str = ""


ANCESTORS = {
    "muse": Ancestor("muse-maskgit-pytorch==0.3.5"),
    "dalle": Ancestor(
        "dalle-pytorch==1.6.6",
        tools=("Cython", "setuptools<81", "wheel"),  # it imports pkg_resources, which newer setuptools lack
        built_here="youtokentome",
    ),
}


def interpreter(name: str, given: str | None = None) -> str:
    """Return the interpreter of an environment with an ancestor; made beside the repository's own if none is given."""
    folder = ROOT / f".venv-{name}"
    python, complete = folder / "bin" / "python", folder / ".complete"
    if given is None and not complete.exists():
        print(f"making {folder.name} with {ANCESTORS[name].package}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        (folder / ".gitignore").write_text("*\n")
        _install(ANCESTORS[name], str(python))
        complete.touch()
    return str(python) if given is None else given


def _install(ancestor: Ancestor, python: str) -> None:
    # the same torch on both sides: its speed is not what is compared
    versions = [f"{package.__name__}=={package.__version__.partition('+')[0]}" for package in (torch, torchvision)]
    if importlib.util.find_spec("uv"):
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python]
    else:
        install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *versions, *ancestor.tools], check=True)
    if ancestor.built_here:
        subprocess.run([*install, "--no-build-isolation", ancestor.built_here], check=True)
    subprocess.run([*install, *versions, *ancestor.tools, ancestor.package], check=True)


# --------------------------------------------------------------------------------------- trainers that take turns


class Side:
    """One trainer in a process of its own, which rests while it is not told to train.

    Args:
        python: interpreter of its environment.
        worker: module of its process, see `benchmarks.worker`.
        options: of the worker.
        steady: keep freed memory.

    Attributes:
        sizes: parameter counts of its networks, by name.
    """

    def __init__(self, python: str, worker: str, options: dict[str, Any], *, steady: bool):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, "-m", worker, json.dumps(options)],
            cwd=options["runs"],
            env={**environment(options["threads"]), **(STEADY if steady else {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.sizes = self._answer()

    def train(self, steps: int) -> dict[str, float]:
        """So many steps; seconds on the clock and of CPU time."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def peak(self) -> float:
        """Return the largest resident memory of the process so far, in MiB."""
        return peak_mb(self.process.pid)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_details: Any) -> None:
        if kind is not None:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self.errors.close()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(timeout=60)
            self.errors.seek(0)
            raise RuntimeError(f"{' '.join(self.process.args[:3])} ended early\n{self.errors.read()[-4000:]}")
        return json.loads(line)


@dataclass
class Launch:
    """The numbers of one start of all sides.

    Attributes:
        timings: of a step, by side.
        sizes: parameter counts of the networks, the same on all sides.
        peaks: largest resident memory of each side's process in MiB; that of its loader processes is not in it.
    """

    timings: dict[str, Timing]
    sizes: dict[str, int]
    peaks: dict[str, float]


def launch(
    sides: dict[str, tuple[str, dict[str, Any]]], worker: str, *, steady: bool, steps: int, rounds: int
) -> Launch:
    """Start a process for each side on the same PNG files, and let them train by turns.

    Args:
        sides: by name: interpreter, and options of the worker but for its folders and threads.
        worker: module of their processes.
        steady: keep freed memory, on all sides.
        steps: of a turn.
        rounds: turns of each side.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        images = Path(folder) / "images"
        write_images(images / "all", 512)
        running = {}
        for name, (python, options) in sides.items():
            runs = Path(folder) / name
            runs.mkdir()
            options = {**options, "images": str(images), "runs": str(runs), "threads": 1}
            running[name] = stack.enter_context(Side(python, worker, options, steady=steady))
        sizes = {name: side.sizes for name, side in running.items()}
        if len({json.dumps(size) for size in sizes.values()}) > 1:
            raise RuntimeError(f"the networks differ in their parameter counts: {sizes}")
        turns = {name: side.train for name, side in running.items()}
        timings = take_turns(turns, steps=steps, rounds=rounds, warmup=2)
        return Launch(timings, next(iter(sizes.values())), {name: side.peak() for name, side in running.items()})


def write_images(folder: Path, count: int) -> None:
    """Write the synthetic source as PNG files, which both trainers read."""
    folder.mkdir(parents=True)
    source = SyntheticSource(f"synthetic:{count}")
    for index in range(count):
        source.image(index).save(folder / f"{index:05d}.png")


def compare(what: str, launches: list[Launch], side: str, ancestor: str, *, images: int, target: float | None) -> Row:
    """Return the row of one of vqdist's sides against an ancestor: the median over launches of each median over turns.

    Args:
        what: was measured, in words.
        launches: of the same sides.
        side, ancestor: names of the two sides.
        images: of a step.
        target: lowest ratio of their speeds.
    """
    ratios = sorted(ratio(each.timings[ancestor].wall, each.timings[side].wall) for each in launches)
    cpu = statistics.median(ratio(each.timings[ancestor].cpu, each.timings[side].cpu) for each in launches)
    ours, theirs = (
        1000 * images / statistics.median(each.timings[name].milliseconds for each in launches)
        for name in (side, ancestor)
    )
    sizes = " + ".join(f"{size:,}" for size in launches[0].sizes.values())
    detail = (
        f"{ours:.1f} against {theirs:.1f} images/s; by launch {', '.join(f'{value:.2f}' for value in ratios)}; CPU "
        f"time {cpu:.2f}; parameters {sizes} on all sides"
    )
    what = f"{what}, {side}: vqdist / ancestor, images per second"
    return Row(what, statistics.median(ratios), at_least=target, detail=detail)


if __name__ == "__main__":
    print(interpreter(sys.argv[1]))
