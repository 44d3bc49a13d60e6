"""Training speed against DALLE-pytorch 1.6.6, each trainer in its own environment.

Both train the same discrete VAE (equal parameter counts, train_vae's depth) on the same PNG files with the same batch,
each with its own loader and defaults: the ancestor's loop is its model, Adam, and a loader without workers; vqdist's
trainer adds its EMA, numbers of the codebook and log lines. The time of pictures and checkpoints is excluded on both
sides.

vqdist is measured
- as it is by default: where there is a second core, a loader process has it, while the ancestor's loop decodes images
  between its steps;
- without loader processes, so that each has one core: what is compute;
- without EMA either: the ancestor's work and no more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.ancestors import Launch, compare, interpreter, launch
from benchmarks.common import Row

BATCH_SIZE = 8
SHARED = {"num_layers": 3, "num_resnet_blocks": 2}
TRAINER = {"batch_size": BATCH_SIZE, "lr": 1e-3, "starting_temp": 1.0}


@dataclass(frozen=True)
class Case:
    """One size of the model.

    Attributes:
        label: what it is, in words.
        model: its arguments.
        steps: of a turn.
        launches: starts of all sides with the allocator as it is, and with steady memory.
    """

    label: str
    model: dict[str, int]
    steps: int
    launches: tuple[int, int]


CASES = (
    Case(
        "64x64, 1,024 codes", {"image_size": 64, "num_tokens": 1024, "hidden_dim": 64, "codebook_dim": 256}, 8, (4, 2)
    ),
    Case(
        "64x64, 8,192 codes", {"image_size": 64, "num_tokens": 8192, "hidden_dim": 128, "codebook_dim": 256}, 2, (3, 2)
    ),
    Case(
        "train_vae's default",
        {"image_size": 128, "num_tokens": 8192, "hidden_dim": 256, "codebook_dim": 512},
        1,
        (2, 0),
    ),
)
SIDES = {
    "default": {},
    "no loader processes": {"num_workers": 0},
    "no loader processes, no EMA": {"num_workers": 0, "use_ema": False},
}
TARGET = 1.1  # of the default


def measure(python: str, case: Case, *, steady: bool) -> Launch:
    """Time of a step of the ancestor's loop and of vqdist's settings, by turns."""

    def options(side: str, **trainer: Any) -> dict[str, Any]:
        return {"side": side, "model": {**SHARED, **case.model}, "trainer": {**TRAINER, **trainer}}

    sides = {"dalle": (python, options("dalle"))}
    for name, trainer in SIDES.items():
        sides[name] = (sys.executable, options("vqdist", backend="local", **trainer))
    return launch(sides, "benchmarks.dalle_worker", steady=steady, steps=case.steps, rounds=6)


def run(quick: bool = False, python: str | None = None) -> list[Row]:
    """Rows of the table."""
    python = interpreter("dalle", python)
    rows = []
    for case in CASES[:2] if quick else CASES:
        for steady, count in zip((False, True), (0, 1) if quick else case.launches, strict=True):
            launches = [measure(python, case, steady=steady) for _ in range(count)]
            label = case.label + (", steady memory" if steady else "")
            for side in SIDES if launches else ():
                target = TARGET if side == "default" else None
                rows.append(compare(label, launches, side, "dalle", images=BATCH_SIZE, target=target))
    return rows
