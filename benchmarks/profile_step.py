"""The parts of a step's time: exclusive wall time of the parts of `VQGanVAETrainer.train_step`, on a CPU."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import Row, build_trainer, build_vae
from vqdist import VQGanVAETrainer, losses


class Stopwatch:
    """Adds up time by part; a part within a part is counted once, as the inner one."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.perf_counter()

    def timed(self, part: str, function: Callable) -> Callable:
        """Return the function, its time put down to this part."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        return wrapper

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1] if self._open else "between steps"] += now - self._since
        self._since = now


def profile(trainer: VQGanVAETrainer, *, steps: int, warmup: int = 2) -> dict[str, float]:
    """Milliseconds of a step by part, and of the whole; for the local backend on a CPU, where nothing is queued."""
    watch = Stopwatch()
    generator, discriminator = trainer.generator, trainer.discriminator
    quantizer = generator.module.quantizer
    quantizer.forward = watch.timed("quantizer forward", quantizer.forward)
    generator.wrapped = watch.timed("autoencoder forward", generator.wrapped)
    discriminator.wrapped = watch.timed("discriminator forward, real and fake", discriminator.wrapped)
    generator.backward = watch.timed("autoencoder backward", generator.backward)
    discriminator.backward = watch.timed("discriminator backward", discriminator.backward)
    generator.step = watch.timed("generator clip and Adam", generator.step)
    discriminator.step = watch.timed("discriminator clip and Adam", discriminator.step)
    discriminator.frozen = watch.timed("frozen discriminator forward", discriminator.frozen)
    trainer.next_micro_batches = watch.timed("waiting for images", trainer.next_micro_batches)
    trainer.networks.update_average = watch.timed("EMA", trainer.networks.update_average)
    for term in trainer.objective:
        term.forward = watch.timed(f"{term.name} loss forward", term.forward)
    trainer.adaptive_weight = watch.timed("adaptive weight", trainer.adaptive_weight)
    trainer.generator_loss = watch.timed("generator's losses at the reconstruction", trainer.generator_loss)
    trainer._log_when_due = watch.timed("logging", trainer._log_when_due)
    step = watch.timed("everything else of the trainer", trainer.train_step)
    penalty, grad = losses.gradient_penalty, torch.autograd.grad
    for _ in range(warmup):
        step()
    watch.seconds.clear()
    losses.gradient_penalty = watch.timed("gradient penalty forward", penalty)
    torch.autograd.grad = watch.timed("autograd.grad: loss networks' backward", grad)
    try:
        for _ in range(steps):
            step()
    finally:
        losses.gradient_penalty, torch.autograd.grad = penalty, grad
    watch.seconds.pop("between steps", None)
    parts = {part: 1000 * seconds / steps for part, seconds in watch.seconds.items()}
    return {"step": sum(parts.values()), **dict(sorted(parts.items(), key=lambda item: -item[1]))}


def run(quick: bool = False) -> list[Row]:
    """Rows of the table: the ancestor's comparison without VGG, with no penalty and with one on every step."""
    rows = []
    for every, label in ((0, "no penalty"), (1, "penalty on every step")):
        with tempfile.TemporaryDirectory() as folder:
            vae = build_vae(layers=4, vgg=nn.Identity())
            trainer = build_trainer(vae, Path(folder), backend="local", apply_grad_penalty_every=every)
            parts = profile(trainer, steps=5 if quick else 20)
        step = parts.pop("step")
        rows.append(Row(f"{label}: a step", step, unit="ms"))
        rows += [Row(f"{label}: {part}", value, unit="ms") for part, value in parts.items()]
    return rows
