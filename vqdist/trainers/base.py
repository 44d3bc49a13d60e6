"""The loop that every trainer shares. A subclass says what one optimizer step is: see `VQGanVAETrainer.update`."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from vqdist import seeding
from vqdist.allocator import keep_freed_memory
from vqdist.backends import Engine, create_backend
from vqdist.backends.environment import world_size_of_launcher
from vqdist.backends.peers import naming_lost_peers
from vqdist.checkpoint import PATIENCE
from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import Batch, Split, default_workers, split_indices, train_loader
from vqdist.errors import UserError
from vqdist.ranks import check_ranks_agree
from vqdist.schedules import learning_rate
from vqdist.stopping import Stopped, StopSignals, record_stop
from vqdist.tracking import Tracker, check_trackers
from vqdist.trainers.average import MovingAverage
from vqdist.trainers.config import TrainerConfig, build_config, signature_of
from vqdist.trainers.finite import FiniteGuard, held_tensors
from vqdist.trainers.optimizers import OptimizerOptions, make_optimizer
from vqdist.trainers.reporting import Reporting
from vqdist.trainers.run_folder import RunFolder

T = TypeVar("T")


def mark_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item with whether it is the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def allow_tf32(device: torch.device, allowed: bool) -> None:
    """Whether matrix products and convolutions on a CUDA device may round to TensorFloat-32; nothing elsewhere."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed  # torch allows it from the start: false must be said, too


class Trainer(Reporting, RunFolder):
    """Trains one model on one source of images, on any backend.

    Everything that a user can get wrong is checked before a process group starts. Every method but the properties is
    called by every rank.

    Args:
        model: what to train; moved to this rank's device.
        dataset: images to train on in place of `folder`: a map-style dataset whose items are tensors (c, h, w) in
            [0, 1], or tuples that begin with one.
        **options: the fields of `config_class`.

    Attributes:
        model_argument: what the constructor calls the model.
        picture_name: what the pictures show.
        with_labels: whether batches come with the classes of their images.
        step: finished optimizer steps.
        position: images of the data order that were used, over all ranks.
        engines: the networks that are trained, by name.
        ema: moving average of the network that is evaluated and exported, or None.
        guard: keeps values that are not finite out of checkpoints.
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    model_argument: ClassVar[str] = "vae"
    picture_name: ClassVar[str] = "reconstructions"
    with_labels: bool = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature_of(cls.config_class, cls.model_argument)

    def __init__(self, model: nn.Module, *, dataset: Dataset | None = None, **options: Any):
        self.config = build_config(self.config_class, options)
        self.model = model
        self.step = 0
        self.position = 0
        self.check_model()
        self.run_folder = self._run_folder()
        self._keep_global_batch()
        self.dataset, self.valid_dataset = self._open_data(dataset)
        self.split = self._split()
        self._refuse_other_configuration()
        check_trackers(self.config.trackers)
        self.backend = create_backend(
            self.config.backend,
            grad_accum_every=self.config.grad_accum_every,
            precision=self.config.precision,
            dist_timeout=self.config.dist_timeout,
            micro_batch_size=self.config.batch_size,
            accelerate_kwargs=self.config.accelerate_kwargs,
            deepspeed_config=self.config.deepspeed_config,
        )
        self._check_same_options()
        self._check_shared_folder()
        self._set_up_networks()
        self._resume()
        self.tracker = self._make_tracker() if self.is_main else None

    # ------------------------------------------------------------------------------------- what a subclass says

    @abstractmethod
    def check_model(self) -> None:
        """Raise `UserError` for a model or options that cannot work; no process group is there yet."""

    @abstractmethod
    def build_engines(self) -> dict[str, Engine]:
        """Prepare each network with its optimizer; the first engine's network is averaged, evaluated and exported."""

    @abstractmethod
    def update(self, micro_batches: list[Any]) -> dict[str, Tensor]:
        """One optimizer step of every engine on what `take` gave for this rank's batches: images (b, c, h, w).

        Returns:
            Numbers to log, as 0-d tensors on the device. Each must be finite, or the run ends: see `FiniteGuard`.
        """

    def numbers_over_ranks(self) -> dict[str, float]:
        """Further numbers since the last line that are not means over ranks; every rank calls this."""
        return {}

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Measure the averaged (or live) weights on the validation split."""

    @abstractmethod
    def save_pictures(self, path: Path) -> None:
        """Draw what the model makes of `picture_images`; every rank calls this, to gather what rank 0 draws."""

    # ------------------------------------------------------------------------------------- the loop

    def train(self, log_fn: Callable[[dict[str, float]], Any] | None = None) -> dict[str, float]:
        """Train until `num_train_steps`, from the last checkpoint if there is one.

        Args:
            log_fn: called on rank 0 with each line of numbers.

        Returns:
            The numbers of the last validation, or none if there is no validation split.

        Raises:
            PeerLost: other ranks are gone; the message names them and the last complete checkpoint.
            Stopped: a rank got SIGTERM, SIGUSR1 or SIGINT: every rank finished its step, and all of it is saved. A
                validation is broken off; the resumed run makes it again.
        """
        self.log_fn = log_fn
        self._exported = -1  # somebody may have removed it
        try:
            with (
                StopSignals() as self.signals,
                self.checkpoints.outlasting_errors(),
                naming_lost_peers(self._how_far),
            ):
                with self._progress_bar() as self.bar:
                    if self._validation_broken_off:  # in the run that this one resumes
                        self.run_evaluation()
                        self._stop_if_asked()
                    while self.step < self.num_train_steps:
                        self.train_step()
                        self._stop_if_asked()
                return self.finish()
        finally:
            self.signals = None

    def _how_far(self) -> tuple[str, str]:
        """How far this run came, and how it goes on, for `PeerLost`."""
        newest, in_doubt = self.checkpoints.latest(PATIENCE), self.checkpoints.in_doubt()
        kept = "there is no complete checkpoint yet" if newest is None else f"the last complete checkpoint is {newest}"
        then = "starts anew" if newest is None else "goes on"
        doubt = f" ({in_doubt.name} was being completed)" if in_doubt is not None else ""
        return f" after step {self.step}", f"{kept}: the same command {then}{doubt}"

    def _asked_to_stop(self) -> int:
        """The signal that a rank received lately, or 0: the same on every rank. Every rank calls this as often."""
        if self.signals is not None and not self._stopping:
            self._stopping = self.backend.largest_lately(self.signals.received)
        return self._stopping

    def _stop_if_asked(self) -> None:
        """Save and raise `Stopped` once all ranks know that one of them received a signal."""
        number = self._asked_to_stop()
        # what is left of a run after its last step is `finish`
        if number and (self.step != self.num_train_steps or self._validation_broken_off):
            self._stop(number)

    def _stop(self, number: int) -> None:
        if self._saved != self.step:
            self._save_checkpoint()
        self._settle()
        if self.tracker is not None:
            self.tracker.close()
        record_stop(number, step=self.step, run=str(self.run_folder))
        stopped = Stopped(number, self.step, str(self.run_folder))
        self.print(stopped.message)
        raise stopped

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step on the next images, then whatever is due after it.

        Returns:
            This step's numbers on this rank, as 0-d tensors: reading one waits for the device.
        """
        micro_batches = self.next_micro_batches()
        self.guard.begin(self.engines)
        logs = self.update(micro_batches)
        self.step += 1
        self.position += self.global_batch
        self.guard.end(self.step, logs)
        if not self.guard.dropped(next(iter(self.engines))):
            self.update_ema()
        self.means.add(logs)
        if self.bar is not None:
            self.bar.update()
        self._log_when_due()
        self._end_if(self.guard.gives_up())
        self._evaluate_when_due()
        self._save_when_due()
        return logs

    def take(self, batch: Batch) -> Any:
        """What `update` and `evaluate` get of a loaded batch: its images (b, c, h, w), on this rank's device."""
        return self.to_device(batch.item)

    def next_micro_batches(self) -> list[Any]:
        """The next `grad_accum_every` micro-batches of this rank, as `take` gives them."""
        began = time.perf_counter()
        if self._batches is None:
            self._batches = self._train_loader()
        taken = []
        for _ in range(self.config.grad_accum_every):
            batch = next(self._batches)
            self._note_bad(batch.bad)
            taken.append(self.take(batch))
        self._waited += time.perf_counter() - began
        return taken

    def positions(self, micro_batch: int) -> range:
        """Places in the data order of this rank's images in a micro-batch (from 0) of the coming update.

        What is drawn at random for an image is seeded by its place, so that it is the same for any number of ranks.
        """
        size, world_size = self.config.batch_size, self.backend.world_size
        start = self.position + (micro_batch * world_size + self.backend.rank) * size
        return range(start, start + size)

    def step_engine(self, name: str, numbers: dict[str, Tensor], *, lr: float) -> dict[str, Tensor]:
        """Update an engine after its last micro-batch, or drop the update as `on_nonfinite` says.

        Args:
            name: of the engine.
            numbers: its losses and what else is logged of it, 0-d; they must be finite.
            lr: its learning rate.

        Returns:
            The numbers with the gradient norm: `grad_norm`, or `NAME_grad_norm` where there are several engines.
        """
        norm = "grad_norm" if len(self.engines) == 1 else f"{name}_grad_norm"
        self.guard.owned(norm, name)
        return {**numbers, norm: self.guard.step(name, self.engines[name], numbers, lr=lr)}

    def update_ema(self) -> None:
        """Fold the new weights into the average."""
        if self.ema is not None:
            self.ema.update()

    def learning_rate(
        self, peak: float, *, schedule: Any = None, warmup_steps: int | None = None, start: int = 0
    ) -> float:
        """The rate of the coming update.

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

    def finish(self) -> dict[str, float]:
        """Save, measure and draw the end of the run, if that was not done at this very step."""
        if self._saved != self.step:  # first, in case that whoever stops the run has little patience
            self._save_checkpoint()
        if self._exported != self.step:  # resumed at its end: whoever killed it may have done so before the export
            self._export_step()
        numbers = self.last_evaluation[1] if self.last_evaluation[0] == self.step else self.run_evaluation()
        if self._validation_broken_off:
            self._stop(self._stopping)
        if self._pictured != self.step:
            self._draw()
        self._stop_if_undrawn()
        self._settle()
        if self._bad_images:
            self.print(
                f"{len(self._bad_images)} images could not be decoded and were skipped: {_some(self._bad_images)}"
            )
        if self.tracker is not None:
            self.tracker.artifact(self.run_folder / "export")
            self.tracker.close()
        return numbers

    def _stop_if_undrawn(self) -> None:
        undrawn = torch.tensor([self._undrawn], device=self.device)
        number = int(self.backend.gather(undrawn).max())
        if number:
            self._stop(number)

    def _save_when_due(self) -> None:
        every = self.config.save_model_every
        if every and self.step % every == 0:
            self._save_checkpoint()
        every = self.config.check_ranks_every
        if every and self.step % every == 0:
            check_ranks_agree(self.backend, self.named_tensors(), self.step)

    # ------------------------------------------------------------------------------------- set-up

    def _open_data(self, dataset: Dataset | None) -> tuple[ImageDataset, ImageDataset]:
        config = self.config
        if (dataset is None) == (config.folder is None):
            given = "neither" if dataset is None else "both"
            raise UserError(f"folder or dataset must be given, and {given} was; see `vqdist train --help` for sources")
        shape = {"image_size": config.image_size, "channels": self.model.channels}
        view = {**shape, "seed": config.seed, "on_bad_image": config.on_bad_image}
        source = config.folder if dataset is None else dataset
        train = ImageDataset(source, exts=config.exts, augment=config.augment, **view)
        return train, ImageDataset(train.source, augment=False, **view)

    def _split(self) -> Split:
        config = self.config
        split = split_indices(len(self.dataset), valid_frac=config.valid_frac, seed=config.random_split_seed)
        if config.epochs is not None and round(config.epochs * len(split.train)) < 1:
            raise UserError(
                f"epochs {config.epochs:g} of {len(split.train)} images is less than one image; give more, or "
                "num_train_steps"
            )
        world_size = world_size_of_launcher()
        global_batch = config.batch_size * config.grad_accum_every * world_size
        if global_batch > len(split.train):
            raise UserError(
                f"one optimizer step takes {global_batch} images (batch_size {config.batch_size} x grad_accum_every "
                f"{config.grad_accum_every} x {world_size} processes) but there are {len(split.train)} to train on; "
                "lower one of them"
            )
        return split

    def _set_up_networks(self) -> None:
        config = self.config
        seeding.seed_everything(config.seed, "train", self.backend.rank)
        allow_tf32(self.device, config.tf32)
        keep_freed_memory(self.device)
        channels_last = self.device.type == "cuda" if config.channels_last is None else config.channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(device=self.device, memory_format=self.memory_format).train()
        if config.compile and not self.backend.capabilities.compiles:
            raise UserError(
                f"compile is not possible on {self.backend.title}, which swaps weights while a network runs; leave it "
                "out, or use ZeRO 0, 1, 2, DDP or FSDP2"
            )
        self.engines = self.build_engines()
        self.ema = self._make_ema() if config.use_ema else None
        check_ranks_agree(self.backend, self.named_tensors(), self.step)
        skip = config.on_nonfinite == "skip"
        self.guard = FiniteGuard(self.backend, skip=skip, max_skipped_steps=config.max_skipped_steps)
        self.guard.except_constants(self.held_tensors())
        self._batches: Iterator | None = None
        self._saved = -1
        self.signals: StopSignals | None = None  # while `train` runs
        self._stopping = 0  # the signal that all ranks know of
        self._nothing_reported()

    def _make_ema(self) -> MovingAverage:
        return MovingAverage(
            self.main_engine,
            beta=self.config.ema_beta,
            update_after_step=self.config.ema_update_after_step,
            update_every=self.config.ema_update_every,
        )

    def make_optimizer(self, module: nn.Module, options: OptimizerOptions | None = None) -> Optimizer:
        """Return the optimizer of a network's trainable weights, by default as the run's options say it."""
        return make_optimizer(module, options or self.config.optimizer_options, self.device)

    def _make_tracker(self) -> Tracker:
        return Tracker(self.run_folder, self.config.trackers, self._resolved_configuration(), self.step)

    def _train_loader(self):
        config = self.config
        return train_loader(
            self.dataset,
            self.split.train,
            seed=config.seed,
            batch_size=config.batch_size,
            rank=self.backend.rank,
            world_size=self.backend.world_size,
            position=self.position,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=config.prefetch_factor,
            labels=self.with_labels,
        )

    # ------------------------------------------------------------------------------------- facts

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live."""
        return self.backend.device

    @property
    def is_distributed(self) -> bool:
        """Whether more than one process trains."""
        return self.backend.world_size > 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the whole run."""
        return self.backend.is_main

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.backend.is_local_main

    @property
    def global_batch(self) -> int:
        """Images of one optimizer step over all ranks."""
        return self.config.batch_size * self.config.grad_accum_every * self.backend.world_size

    @property
    def num_train_steps(self) -> int:
        """Optimizer steps of the whole run; `epochs` are counted in images, so they hold for any number of ranks."""
        if self.config.epochs is None:
            return self.config.num_train_steps
        images_left = max(0, round(self.config.epochs * len(self.split.train)) - self.position)
        return self.step + math.ceil(images_left / self.global_batch)

    @property
    def num_workers(self) -> int:
        """Loader processes of this rank."""
        if self.config.num_workers is not None:
            return self.config.num_workers
        return default_workers()

    @property
    def pin_memory(self) -> bool:
        """Whether batches are loaded into page-locked memory."""
        return self.device.type == "cuda" if self.config.pin_memory is None else self.config.pin_memory

    @property
    def main_engine(self) -> Engine:
        """The engine whose network is averaged, evaluated and exported."""
        return next(iter(self.engines.values()))

    def averaged_network(self) -> AbstractContextManager[nn.Module]:
        """Context of the network to evaluate and export: the average if there is one, else the live one.

        Every rank enters it; within it the weights are whole, and no rank waits for another.
        """
        return self.main_engine.whole(None if self.ema is None else self.ema.ema_model)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights and buffers of the engines and the average, whole, by dotted name; every rank takes all."""
        for name, engine in self.engines.items():
            for key, tensor in engine.named_tensors():
                yield f"{name}.{key}", tensor
        if self.ema is not None:
            for key, tensor in self.ema.named_tensors():
                yield f"ema.{key}", tensor

    def held_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of this rank that goes into a checkpoint, as messages name it; nothing is exchanged."""
        return held_tensors(self.engines, None if self.ema is None else (self.main_engine, self.ema.ema_model))

    def to_device(self, images: Tensor) -> Tensor:
        """Images (in the run's memory format) or codes on this rank's device, without waiting."""
        layout = {"memory_format": self.memory_format} if images.ndim == 4 else {}
        return images.to(self.device, non_blocking=True, **layout)

    def close(self) -> None:
        """Leave the process group and the run folder, when every rank is done; call it at the end of a script."""
        self.backend.close()
        self.checkpoints.latest()  # waits for what is being completed
        self._lock = self.checkpoints.lock = None


def _some(names: set[str], most: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
