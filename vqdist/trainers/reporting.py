"""What a trainer says on its way: lines of numbers, the progress bar, validations and pictures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vqdist.backends import Backend
from vqdist.checkpoint import CheckpointStore
from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import Split, valid_loader
from vqdist.metrics import RunningMeans
from vqdist.stopping import BrokenOff, StopSignals
from vqdist.tracking import Tracker, memory_gb
from vqdist.trainers.config import TrainerConfig
from vqdist.trainers.finite import FiniteGuard


class Reporting:
    """The part of `Trainer` that measures, logs and draws; see there for the attributes."""

    config: TrainerConfig
    backend: Backend
    checkpoints: CheckpointStore
    valid_dataset: ImageDataset
    split: Split
    means: RunningMeans
    guard: FiniteGuard
    tracker: Tracker | None
    signals: StopSignals | None
    bar: tqdm | None
    log_fn: Callable[[dict[str, float]], Any] | None
    run_folder: Path
    step: int
    num_train_steps: int
    global_batch: int

    def _nothing_reported(self) -> None:
        """As it is when a run begins or goes on; `load` restores the rest."""
        self.bar = self.log_fn = None
        self.means = RunningMeans()
        self.last_evaluation: tuple[int, dict[str, float]] = (-1, {})
        self._bad_images: set[str] = set()
        self._pictured = -1
        self._undrawn = 0  # the signal that kept this rank from a picture
        self._validation_broken_off = False
        self._restart_clock()

    # ------------------------------------------------------------------------------------- lines of numbers

    def _log_when_due(self) -> None:
        config = self.config
        if self.step % config.log_every and self.step != self.num_train_steps and self.step != 1:
            return
        numbers = {**self.backend.mean(self.means.means()), **self.numbers_over_ranks()}
        self.means.reset()
        elapsed = time.perf_counter() - self._clock
        numbers["images_per_second"] = self.global_batch * (self.step - self._clock_step) / max(elapsed, 1e-9)
        numbers["data_wait"] = self._waited / max(elapsed, 1e-9)
        numbers["memory_gb"] = memory_gb(self.device)
        if self.guard.skip:
            numbers["skipped_steps"] = self.guard.skipped_steps
        self._restart_clock()
        if self.is_main:
            self._log(numbers)
        self._end_if(self.guard.numbers())

    def _log(self, numbers: dict[str, float]) -> None:
        self.tracker.log(self.step, numbers)
        if self.bar is not None:
            shown = {name: f"{value:.3g}" for name, value in numbers.items() if name.endswith("loss")}
            self.bar.set_postfix({**shown, "img/s": f"{numbers['images_per_second']:.0f}"}, refresh=False)
        if self.log_fn is not None:
            self.log_fn({"step": self.step, **numbers})

    def _restart_clock(self) -> None:
        self._clock, self._clock_step, self._waited = time.perf_counter(), self.step, 0.0

    def _progress_bar(self):
        return tqdm(
            total=self.num_train_steps,
            initial=self.step,
            desc=f"{self.backend.title} x{self.backend.world_size}",
            unit="step",
            dynamic_ncols=True,
            disable=not self.is_main,
            # into a file or a log: a line now and then, not ten a second
            mininterval=0.1 if os.isatty(2) else 10.0,
        )

    def _note_bad(self, names: list[str]) -> None:
        for name in names:
            if name not in self._bad_images:
                self._bad_images.add(name)
                tqdm.write(
                    f"rank {self.backend.rank}: skipped an image that cannot be decoded: {name}", file=sys.stderr
                )

    def print(self, message: str) -> None:
        """Say something once: on rank 0, on standard error, above the progress bar."""
        if self.is_main:
            tqdm.write(message, file=sys.stderr)

    # ------------------------------------------------------------------------------------- validation and pictures

    def _evaluate_when_due(self) -> None:
        config = self.config
        if config.validate_every and self.step % config.validate_every == 0:
            self.run_evaluation()
        if config.save_results_every and self.step % config.save_results_every == 0:
            self._draw()

    def run_evaluation(self) -> dict[str, float]:
        """Validate, log the numbers as `valid/NAME`, and give them back.

        Nothing without a validation split, or where a signal breaks the validation off, on every rank at the same
        batch.
        """
        if len(self.split.valid) == 0:
            return {}
        paused = time.perf_counter()
        self._validation_broken_off = True
        try:
            numbers = self.evaluate()
        except BrokenOff:
            return {}
        self._validation_broken_off = False
        self.last_evaluation = (self.step, numbers)
        if self.tracker is not None:
            self.tracker.log(self.step, {f"valid/{name}": value for name, value in numbers.items()})
        self._clock += time.perf_counter() - paused
        return numbers

    def _draw(self) -> None:
        paused = time.perf_counter()
        self._pictured = self.step
        self._undrawn = self._asked_to_stop()
        if not self._undrawn:
            self.save_pictures(self.picture_path)
        self._clock += time.perf_counter() - paused

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Context of what rank 0 draws while no other rank waits for it: a signal breaks that off at once."""
        try:
            with nullcontext() if self.signals is None else self.signals.breaking_off():
                yield
        except BrokenOff:
            self._undrawn = self.signals.received

    def picture_images(self) -> Tensor:
        """The images (n, c, h, w) that pictures show, the same at every step, on this rank's device."""
        indices = self.split.valid if len(self.split.valid) else self.split.train
        shown = indices[: self.config.num_images_save]
        images = [self.valid_dataset.fetch(0, int(index), among=indices)[0] for index in shown]
        return self.to_device(torch.stack(images))

    @property
    def picture_path(self) -> Path:
        """Where the picture of this step is or will be."""
        return self.run_folder / "results" / f"step_{self.step:08d}.png"

    def valid_batches(self) -> Iterable[Any]:
        """This rank's share of the validation images, as `take` gives them.

        Raises:
            BrokenOff: a rank got a signal; raised on every rank at the same batch, and so only where all are taken.
        """
        config = self.config
        loader = valid_loader(
            self.valid_dataset,
            self.split.valid,
            batch_size=config.batch_size,
            rank=self.backend.rank,
            world_size=self.backend.world_size,
            num_workers=self.num_workers if len(self.split.valid) > 512 else 0,
            pin_memory=self.pin_memory,
            prefetch_factor=config.prefetch_factor,
            labels=self.with_labels,
        )
        for _ in range(0, len(self.split.valid), config.batch_size * self.backend.world_size):
            self._break_off_if_asked()
            batch = next(loader, None)
            if batch is not None:
                self._note_bad(batch.bad)
                yield self.take(batch)

    def _break_off_if_asked(self) -> None:
        if self._asked_to_stop():
            raise BrokenOff
