"""Optimizer steps per second against muse-maskgit-pytorch 0.3.5, each trainer in its own environment.

Both train the same networks (LFQ, 64x64 colour, equal parameter counts) on the same PNG files, each with its own
loader, EMA and defaults; one step is one update of each player. What is saved when is excluded on both sides.

The perceptual network is measured twice:
- `no VGG`: the identity stands for VGG16 in both, so that the perceptual loss costs next to nothing. The ancestor
  cannot train a GAN without a perceptual loss; this is as near as its interface comes, and favours neither.
- `VGG16`: torchvision's, with random weights (nothing to download, the same arithmetic). The ancestor makes it as it
  would by default: in train mode with dropout and with gradients of its weights, which no optimizer takes. vqdist
  takes the same module frozen.

The ancestor puts the gradient penalty on every step: its trainer passes `add_gradient_penalty` to the generator's
loss, which does not read it, and the discriminator's loss applies one by default. So its `apply_grad_penalty_every=4`
means a penalty each step; vqdist is measured with its default of every fourth step, and with one on every step.

On a CPU, glibc gives freed memory back to the system and takes it again, page by page, within one step. How often
differs from one process to the next, on both sides alike, and moves the ratio by a tenth either way. So each pair is
started several times; and measured once more with `steady memory`: an allocator that keeps what it has, in both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.common import BATCH_SIZE, IMAGE_SIZE, ROOT, Row, Timing, environment, ratio
from vqdist.data.sources import SyntheticSource

VERSION = "0.3.5"
FOLDER = ROOT / ".venv-ancestor"
MODEL = {"dim": 32, "layers": 4, "codebook_size": 1024}
# for steady memory: glibc keeps freed memory up to 4 GiB, and takes none from outside its heap below 1 GiB
STEADY = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
TARGETS = {"default": 1.3, "penalty on every step": 1.15}


def ancestor_python(given: str | None) -> str:
    """The interpreter of an environment with the ancestor; made beside the repository's own if none is given."""
    python = Path(given) if given else FOLDER / "bin" / "python"
    if not given and not python.is_file():
        print(f"making {FOLDER.name} with muse-maskgit-pytorch {VERSION}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        (FOLDER / ".gitignore").write_text("*\n")
        # the same torch on both sides: its speed is not what is compared
        versions = [f"torch=={_release(torch)}", f"torchvision=={_release(torchvision)}"]
        packages = [f"muse-maskgit-pytorch=={VERSION}", *versions]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python)


def _release(package: Any) -> str:
    return package.__version__.partition("+")[0]


def write_images(folder: Path, count: int) -> None:
    """The synthetic source as PNG files, which both trainers read."""
    source = SyntheticSource(f"synthetic:{count}")
    for index in range(count):
        source.image(index).save(folder / f"{index:05d}.png")


class Side:
    """One trainer in a process of its own, which rests while it is not told to train."""

    def __init__(self, python: str, options: dict[str, Any]):
        self.timing = Timing()
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "ancestor_worker.py"), json.dumps(options)],
            cwd=options["runs"],
            env={**environment(options["threads"]), **options["environment"]},
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

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
        self.errors.close()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(timeout=60)
            self.errors.seek(0)
            raise RuntimeError(f"{' '.join(self.process.args[:2])} ended early\n{self.errors.read()[-4000:]}")
        return json.loads(line)


def measure(
    python: str, vgg: str, *, steady: bool = False, steps: int = 4, rounds: int = 4, threads: int = 1
) -> tuple[dict[str, Timing], dict]:
    """Time of a step of the ancestor and of vqdist's two settings, by turns; and the players' parameter counts."""
    shared = {"num_train_steps": 10**6, "batch_size": BATCH_SIZE, "image_size": IMAGE_SIZE}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        write_images(images, 512)

        def start(side: str, name: str, **trainer: Any) -> Side:
            runs = Path(folder) / name
            runs.mkdir()
            options = {
                "side": side,
                "images": str(images),
                "runs": str(runs),
                "vgg": vgg,
                "threads": threads,
                "model": MODEL,
                "trainer": {**shared, **trainer},
                "environment": STEADY if steady else {},
            }
            return Side(python if side == "ancestor" else sys.executable, options)

        sides = {
            "ancestor": start("ancestor", "ancestor"),
            "default": start("vqdist", "default", backend="local"),
            "penalty on every step": start("vqdist", "penalty", backend="local", apply_grad_penalty_every=1),
        }
        try:
            _check_same_networks(sides)
            _take_turns(sides, steps=steps, rounds=rounds)
        finally:
            for side in sides.values():
                side.process.kill() if sys.exc_info()[0] else side.close()
    return {name: side.timing for name, side in sides.items()}, sides["ancestor"].sizes


def _check_same_networks(sides: dict[str, Side]) -> None:
    sizes = {name: side.sizes for name, side in sides.items()}
    if len({json.dumps(size) for size in sizes.values()}) > 1:
        raise RuntimeError(f"the networks differ in their parameter counts: {sizes}")


def _take_turns(sides: dict[str, Side], *, steps: int, rounds: int) -> None:
    for side in sides.values():
        side.train(2)
    for number in range(rounds):
        order = list(sides.values())
        for side in order if number % 2 == 0 else reversed(order):
            answer = side.train(steps)
            side.timing.wall.append(answer["wall"] / steps)
            side.timing.cpu.append(answer["cpu"] / steps)


def run(quick: bool = False, python: str | None = None) -> list[Row]:
    """Rows of the table. A turn is four steps, so that the default's penalty is in every turn."""
    python = ancestor_python(python)
    rows = []
    for vgg, steady in (("none", True),) if quick else (("none", False), ("none", True), ("vgg16", False)):
        launches = [measure(python, vgg, steady=steady) for _ in range(1 if quick else 2 if vgg == "vgg16" else 4)]
        label = ("VGG16" if vgg == "vgg16" else "no VGG") + (", steady memory" if steady else "")
        rows += [_row(label, name, target, launches) for name, target in TARGETS.items()]
    return rows


def _row(label: str, name: str, target: float, launches: list[tuple[dict[str, Timing], dict]]) -> Row:
    """The median over launches of each one's median over turns."""
    ratios = sorted(ratio(timings["ancestor"].wall, timings[name].wall) for timings, _ in launches)
    cpu = statistics.median(ratio(timings["ancestor"].cpu, timings[name].cpu) for timings, _ in launches)
    ours, theirs = (
        1000 / statistics.median(timings[side].milliseconds for timings, _ in launches) for side in (name, "ancestor")
    )
    sizes = launches[0][1]
    detail = (
        f"{ours:.2f} against {theirs:.2f} steps/s; by launch {', '.join(f'{value:.2f}' for value in ratios)}; CPU "
        f"time {cpu:.2f}; parameters {sizes['generator']:,} + {sizes['discriminator']:,} on both sides"
    )
    what = f"{label}, {name}: vqdist / ancestor, steps per second"
    return Row(what, statistics.median(ratios), at_least=target, detail=detail)
