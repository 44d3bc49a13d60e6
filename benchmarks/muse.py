"""Training speed against muse-maskgit-pytorch 0.3.5, each trainer in its own environment.

Both train the same networks (LFQ, 64x64 colour, equal parameter counts) on the same PNG files, each with its own
loader, EMA and defaults; one step is one update of each player. The time of checkpoints is excluded on both sides.

The perceptual network is measured twice:
- `no VGG`: the identity stands for VGG16 in both, so that the perceptual loss costs next to nothing. The ancestor
  cannot train a GAN without a perceptual loss; this is as near as its interface comes, and favours neither.
- `VGG16`: torchvision's, with random weights (nothing to download, the same arithmetic). The ancestor makes it as it
  would by default: in train mode with dropout and with gradients of its weights, which no optimizer takes. vqdist
  takes the same module frozen.

The ancestor puts the gradient penalty on every step: its trainer passes `add_gradient_penalty` to the generator's
loss, which does not read it, and the discriminator's loss applies one by default. So its `apply_grad_penalty_every=4`
means a penalty each step; vqdist is measured with its default of every fourth step, and with one on every step.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.ancestors import Launch, compare, interpreter, launch
from benchmarks.common import BATCH_SIZE, IMAGE_SIZE, Row

MODEL = {"dim": 32, "layers": 4, "codebook_size": 1024}
TRAINER = {"num_train_steps": 10**6, "batch_size": BATCH_SIZE, "image_size": IMAGE_SIZE}
TARGETS = {"default": 1.3, "penalty on every step": 1.15}


def measure(python: str, vgg: str, *, steady: bool = False) -> Launch:
    """Time of a step of the ancestor and of vqdist's two settings, by turns."""

    def options(side: str, **trainer: Any) -> dict[str, Any]:
        return {"side": side, "vgg": vgg, "model": MODEL, "trainer": {**TRAINER, **trainer}}

    sides = {
        "muse": (python, options("muse")),
        "default": (sys.executable, options("vqdist", backend="local")),
        "penalty on every step": (sys.executable, options("vqdist", backend="local", apply_grad_penalty_every=1)),
    }
    # a turn is four steps, so that the default's penalty is in every turn
    return launch(sides, "benchmarks.muse_worker", steady=steady, steps=4, rounds=4)


def run(quick: bool = False, python: str | None = None) -> list[Row]:
    """Rows of the table."""
    python = interpreter("muse", python)
    rows = []
    for vgg, steady in (("none", True),) if quick else (("none", False), ("none", True), ("vgg16", False)):
        launches = [measure(python, vgg, steady=steady) for _ in range(1 if quick else 2 if vgg == "vgg16" else 4)]
        label = ("VGG16" if vgg == "vgg16" else "no VGG") + (", steady memory" if steady else "")
        rows += [
            compare(label, launches, name, "muse", images=BATCH_SIZE, target=target)
            for name, target in TARGETS.items()
        ]
    return rows
