"""Everything that a trainer owns, and the facts that are read from it: `Trainer` is the loop over it."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqdist.backends import Backend, Engine
from vqdist.backends.peers import account_for
from vqdist.checkpoint import CheckpointStore
from vqdist.data.loader import Split
from vqdist.errors import PeerLost
from vqdist.models.pretrained import PretrainedModel
from vqdist.schedules import learning_rate
from vqdist.seeding import OwnGenerators
from vqdist.tracking import Tracker
from vqdist.trainers.average import MovingAverage
from vqdist.trainers.best import Best
from vqdist.trainers.config import TrainerConfig
from vqdist.trainers.data import Images, RunData
from vqdist.trainers.early_end import EarlyEnd
from vqdist.trainers.feed import Feed
from vqdist.trainers.finite import FiniteGuard
from vqdist.trainers.further_measures import FurtherMeasures
from vqdist.trainers.measure import Measure
from vqdist.trainers.networks import Networks
from vqdist.trainers.optimizers import OptimizerOptions, make_optimizer
from vqdist.trainers.progress import Progress
from vqdist.trainers.report import Report
from vqdist.trainers.resume import Resume
from vqdist.trainers.run import Run
from vqdist.trainers.stop_request import StopRequest

OwnerT = TypeVar("OwnerT", bound="RunOwner")


class RunOwner(ABC):
    """A run with its data, networks, report and checkpoints; the constructor of `Trainer` makes them, in this order.

    Attributes:
        config: the resolved options; nothing changes them later.
        model: what is trained.
        run: the folder of the run.
        progress: step and position.
        data: images to train and to validate on.
        backend: the runtime of this rank.
        memory_format: layout of images on the device.
        networks: the engines and the average.
        guard: keeps values that are not finite out of checkpoints.
        generators: the state of the random number generators, which is the run's own.
        stop: signals.
        report: log lines, validations and pictures.
        feed: training batches.
        resume: checkpoints.
        best: the best validation so far.
        early_end: a stop before the last step.
        compared: the number by which validations are compared: the trainer's `measure`, or that of keep_best.
        further: the measures that validate_with adds to a validation.
    """

    config: TrainerConfig
    model: PretrainedModel
    run: Run
    progress: Progress
    data: RunData
    backend: Backend
    memory_format: torch.memory_format
    networks: Networks
    guard: FiniteGuard
    generators: OwnGenerators
    stop: StopRequest
    report: Report
    feed: Feed
    resume: Resume
    best: Best
    early_end: EarlyEnd
    further: FurtherMeasures
    compared: Measure | None
    _in_step: bool  # also after an error that broke a step off

    def __repr__(self) -> str:
        """Return one line, for a prompt or a notebook: what is trained, how far it is, on what and where."""
        how_far = f"step {self.step} of {self.num_train_steps}, {len(self.split.train)} images"
        where = f"{self.backend.title} x{self.backend.world_size}, {self.run.folder}"
        return f"{type(self).__name__}({type(self.model).__name__}, {how_far}, {where})"

    # ------------------------------------------------------------------------------------- save and load

    def save(self, path: str | Path) -> None:
        """Write the whole state of the run as one folder; every rank calls this.

        Raises:
            UserError: it cannot be written, or has a value that is not finite.
        """
        self.resume.save(Path(path))

    def load(self, path: str | Path) -> None:
        """Restore all that `save` wrote: weights, optimizers, average, codebooks, step, random state, position."""
        self.resume.load(Path(path))
        self.best.restore()
        self.feed.forget()
        self._in_step = False
        self.report.close()  # until training goes on from there

    def export(self, folder: Path) -> None:
        """Write the averaged model, see `Resume.export`."""
        self.resume.export(folder)

    def close(self) -> None:
        """Leave the process group and the run folder, when every rank is done; call it at the end of a script.

        `with Trainer(...) as trainer:` does so at the end of its block.
        """
        self.report.close()
        self.feed.forget()
        self.backend.close()
        self.checkpoints.latest()  # waits for what is being completed
        self.run.lock = self.checkpoints.lock = None

    def __enter__(self: OwnerT) -> OwnerT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the trainer; tell the other ranks of an error that leaves the block, which ends their training."""
        if error is not None:
            account_for(error)
        if isinstance(error, PeerLost):  # to leave the group could wait for those who are gone
            return
        try:
            if error is None:
                self.early_end.if_put_off()
        finally:
            self.close()

    # ------------------------------------------------------------------------------------- for one update

    def learning_rate(
        self, peak: float, *, schedule: Any = None, warmup_steps: int | None = None, start: int = 0
    ) -> float:
        """Return the rate of the coming update.

        Args:
            peak: the highest rate.
            schedule: by default the run's.
            warmup_steps: by default the run's.
            start: step from which both count.
        """
        return learning_rate(
            self.step - start,
            peak=peak,
            schedule=self.config.schedule if schedule is None else schedule,
            warmup_steps=self.config.warmup_steps if warmup_steps is None else warmup_steps,
            total_steps=self.num_train_steps - start,
            epoch=self.position // len(self.split.train),
        )

    def make_optimizer(self, module: nn.Module, options: OptimizerOptions | None = None) -> Optimizer:
        """Return the optimizer of a network's trainable weights, by default as the run's options say it."""
        return make_optimizer(module, options or self.config.optimizer_options, self.device)

    def to_device(self, images: Tensor) -> Tensor:
        """Return images (in the run's memory format) or codes on this rank's device, without waiting."""
        layout: dict[str, Any] = {"memory_format": self.memory_format} if images.ndim == 4 else {}
        return images.to(self.device, non_blocking=True, **layout)

    # ------------------------------------------------------------------------------------- facts

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.progress.step

    @property
    def position(self) -> int:
        """Images of the data order that were used, over all ranks."""
        return self.progress.position

    @property
    def dataset(self) -> Images:
        """The images to train on."""
        return self.data.train

    @property
    def valid_dataset(self) -> Images:
        """The images to validate on."""
        return self.data.valid

    @property
    def split(self) -> Split:
        """Indices of the images to train on in `dataset`, and of those to validate on in `valid_dataset`."""
        return self.data.split

    @property
    def engines(self) -> dict[str, Engine]:
        """The networks that are trained, by name."""
        return self.networks.engines

    @property
    def ema(self) -> MovingAverage | None:
        """Moving average of the network that is evaluated and exported, or None."""
        return self.networks.average

    @property
    def main_engine(self) -> Engine:
        """The engine whose network is averaged, evaluated and exported."""
        return self.networks.main

    def averaged_network(self) -> AbstractContextManager[nn.Module]:
        """Return the context of the network to evaluate, see `Networks.averaged`."""
        return self.networks.averaged()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights, see `Networks.named_tensors`."""
        return self.networks.named_tensors()

    @property
    def checkpoints(self) -> CheckpointStore:
        """The checkpoints of the run."""
        return self.resume.checkpoints

    @property
    def tracker(self) -> Tracker | None:
        """The sinks, on rank 0."""
        return self.report.tracker

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return self.run.folder

    @property
    def picture_path(self) -> Path:
        """The path of this step's picture, there or to come."""
        return self.report.picture_path

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors."""
        return self.backend.device

    @property
    def is_distributed(self) -> bool:
        """True if more than one process trains."""
        return self.backend.world_size > 1

    @property
    def is_main(self) -> bool:
        """True if this is rank 0 of the whole run."""
        return self.backend.is_main

    @property
    def is_local_main(self) -> bool:
        """True if this is the first rank of its node."""
        return self.backend.is_local_main

    @property
    def global_batch(self) -> int:
        """Images of one optimizer step over all ranks."""
        return self.config.batch_size * self.config.grad_accum_every * self.backend.world_size

    @property
    def num_train_steps(self) -> int:
        """Optimizer steps of the whole run; `epochs` are counted in images, so they hold for any number of ranks."""
        if self.config.epochs is None:
            return cast(int, self.config.num_train_steps)  # one of the two is given
        images_left = max(0, round(self.config.epochs * len(self.split.train)) - self.position)
        return self.step + math.ceil(images_left / self.global_batch)

    @property
    def has_ended_early(self) -> bool:
        """True if the run has ended before `num_train_steps`, as `patience` says."""
        return self.best.has_given_up and self.step < self.num_train_steps

    @property
    def last_step(self) -> int:
        """The step at which the run ends, as far as it is known."""
        return self.step if self.has_ended_early else self.num_train_steps

    def end_passed(self) -> str | None:
        """Return which end of training this run is past already, for a message, or None."""
        epochs, images = self.config.epochs, len(self.split.train)
        if epochs is None:
            return f"num_train_steps {self.num_train_steps}" if self.step > self.num_train_steps else None
        # the last batch of a finished run may have gone past its end
        if self.position - round(epochs * images) < self.global_batch:
            return None
        return f"epochs {epochs:g}, at {self.position / images:.4g} of them"

    @property
    def num_workers(self) -> int:
        """Loader processes of this rank."""
        return self.data.num_workers

    @property
    def pin_memory(self) -> bool:
        """True if batches are loaded into page-locked memory."""
        return self.data.pin_memory(self.device)
