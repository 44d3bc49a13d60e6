"""The loop that every trainer shares. A subclass says what one optimizer step is: see `VQGanVAETrainer.update`."""

from __future__ import annotations

import inspect
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from vqdist import seeding, uncaught
from vqdist.allocator import keep_freed_memory
from vqdist.backends import Engine, create_backend
from vqdist.backends.peers import account_for, naming_lost_peers
from vqdist.checkpoint import PATIENCE, CheckpointStore
from vqdist.data.loader import Batch, Split
from vqdist.errors import PeerLost, UserError
from vqdist.models.pretrained import PretrainedModel
from vqdist.ranks import first_to_say
from vqdist.schedules import learning_rate
from vqdist.stopping import Stopped, record_stop
from vqdist.tracking import Tracker, check_trackers
from vqdist.trainers.average import MovingAverage
from vqdist.trainers.bad_images import BadImages
from vqdist.trainers.config import TrainerConfig, build_config, signature_of
from vqdist.trainers.data import Images, RunData, open_images
from vqdist.trainers.feed import Feed
from vqdist.trainers.finite import FiniteGuard
from vqdist.trainers.networks import Networks
from vqdist.trainers.optimizers import OptimizerOptions, make_optimizer
from vqdist.trainers.progress import Progress
from vqdist.trainers.report import LogFunction, Report
from vqdist.trainers.resume import Resume
from vqdist.trainers.run import Run
from vqdist.trainers.steps import Left, Steps
from vqdist.trainers.stop_request import FAULT, StopRequest

T = TypeVar("T")
TrainerT = TypeVar("TrainerT", bound="Trainer")


def mark_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item with whether it is the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def allow_tf32(device: torch.device, allowed: bool) -> None:
    """Let matrix products and convolutions on a CUDA device round to TensorFloat-32, or not; nothing elsewhere."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed  # torch allows it from the start: false must be said, too


class Trainer(ABC):
    """Trains one model on one source of images, on any backend.

    Everything that a user can get wrong is checked before a process group starts. Every method but the properties is
    called by every rank.

    Args:
        model: what to train; moved to this rank's device.
        dataset: images to train on in place of `folder`: a map-style dataset whose items are tensors (c, h, w) in
            [0, 1], or tuples that begin with one.
        valid_dataset: likewise, images to validate on in place of `valid` or of a share of those to train on. They
            are taken as they are: a dataset that crops or flips at random must not do so here.
        **options: the fields of `config_class`.

    Attributes:
        model_argument: what the constructor calls the model.
        picture_name: what the pictures show.
        with_labels: whether batches come with the classes of their images.
        config: the resolved options; nothing changes them later.
        run: the folder of the run.
        data: images to train and to validate on.
        progress: step and position.
        networks: the engines and the average.
        report: log lines, validations and pictures.
        resume: checkpoints.
        guard: keeps values that are not finite out of checkpoints.
        stop: signals.
        feed: training batches.
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    model_argument: ClassVar[str] = "vae"
    picture_name: ClassVar[str] = "reconstructions"
    if TYPE_CHECKING:  # an attribute or a property of each trainer

        @property
        def with_labels(self) -> bool: ...

    else:
        with_labels = False
    __signature__: ClassVar[inspect.Signature]
    config: TrainerConfig
    model: PretrainedModel
    run: Run
    data: RunData
    progress: Progress
    networks: Networks
    report: Report
    resume: Resume
    guard: FiniteGuard
    stop: StopRequest
    feed: Feed
    _loop: Callable[[], Steps | None]
    _in_step: bool

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature_of(cls.config_class, cls.model_argument)

    def __init__(
        self,
        model: PretrainedModel,
        *,
        dataset: Dataset | None = None,
        valid_dataset: Dataset | None = None,
        **options: Any,
    ):
        self.config, self.model = build_config(self.config_class, options), model
        self._open_run(dataset, valid_dataset)
        self._meet_ranks()
        self._set_up_networks()
        self._go_on()

    # ------------------------------------------------------------------------------------- what a subclass says

    @abstractmethod
    def check_model(self) -> None:
        """Raise `UserError` for a model or options that cannot work; no process group is there yet."""

    @abstractmethod
    def build_engines(self) -> dict[str, Engine]:
        """Prepare each network with its optimizer; the first engine's network is averaged, evaluated and exported."""

    @abstractmethod
    def update(self, micro_batches: list[Any]) -> dict[str, Tensor]:
        """Make one optimizer step of every engine on what `take` gave for this rank's batches.

        Returns:
            Numbers to log, as 0-d tensors on the device. Each must be finite, or the run ends: see `FiniteGuard`.
        """

    def numbers_over_ranks(self) -> dict[str, float]:
        """Return further numbers since the last log line that are not means over ranks; every rank calls this."""
        return {}

    def counts_to_come(self) -> dict[str, Tensor]:
        """Return what this rank has counted for the next log line and chart; a resumed run sets it in place."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return tensors beside the networks' on which later steps depend; a resumed run sets them in place.

        They are equal on every rank.
        """
        return {}

    def rank_tensors(self) -> dict[str, Tensor]:
        """Return tensors of the networks of which each rank has its own, by the names that `named_tensors` gives."""
        return {}

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Measure the averaged (or live) weights on the validation split."""

    @abstractmethod
    def save_pictures(self, path: Path) -> None:
        """Draw what the model makes of `picture_images`; every rank calls this, to gather what rank 0 draws."""

    @abstractmethod
    def averaged_model(self) -> AbstractContextManager[PretrainedModel]:
        """Return a context in which the model has the averaged weights, or the live ones; every rank enters it."""

    # ------------------------------------------------------------------------------------- the loop

    def train(self, log_fn: LogFunction | None = None) -> dict[str, float]:
        """Train until `num_train_steps`, from the last checkpoint if there is one.

        Args:
            log_fn: called on rank 0 with each log line.

        Returns:
            The numbers of the last validation, or none if there is no validation split.

        Raises:
            PeerLost: other ranks are gone; the message names them and the last complete checkpoint.
            Stopped: a rank got one of the signals of `stopping.NOTED`: every rank finished its step, and all of it is
                saved. A validation or a picture is broken off; the resumed run makes it first. Called once more,
                `train` goes on.
        """
        for _ in self.steps(log_fn):
            pass
        return self.report.last_evaluation[1] if self.report.last_evaluation[0] == self.step else {}

    def steps(self, log_fn: LogFunction | None = None) -> Steps:
        """Train as `train` does, and yield after every step: a for-loop over it is a callback.

        The end of the run is saved, measured and drawn after the last step. A loop that is left early may be followed
        by another one, which goes on; `save` keeps what was trained. All ranks leave it after the same step.

        A signal that comes in the body is noted, and acted on when the body ends. After `break` or `return` the step
        is saved by all ranks, and `Stopped` is raised where the script goes on. An error of the body passes: one
        process saves the step, and `Stopped` is raised by the next loop, or at the end of `with trainer`. An error
        that ends the script of one rank ends the others with a line that names it. (In processes of
        `torch.multiprocessing`, which catches errors, `with trainer` does that.) A loop that is kept in a variable
        notes signals until it is closed, at the latest by the next one.

        Returns:
            After every step, the number of finished steps, and the numbers of this step on this rank: 0-d tensors,
            and to read one waits for the device.
        """
        left = self._loop()
        if left is not None:  # still held, as a notebook does after an error; it would end within this one
            left.abandon()
        loop = Steps(self._steps(log_fn))
        self._loop = weakref.ref(loop)
        return loop

    def _steps(self, log_fn: LogFunction | None) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        self.report.log_fn = log_fn
        self.resume.forget_export()  # somebody may have removed it
        self._forget_broken_step()
        with self.stop.listening(), self.checkpoints.outlasting_errors(), naming_lost_peers(self._how_far):
            self._stop_if_put_off()
            with self.report.progress_bar(self.num_train_steps):
                if self.report.validation_broken_off:  # in the run that this one resumes
                    self.run_evaluation()
                    self._stop_if_asked()
                if self.report.picture_broken_off:
                    self.report.draw(self.save_pictures)
                    self._stop_if_asked()
                if self.step < self.num_train_steps:
                    self._read_ahead()
                    self.stop.asked_now()
                    self._stop_if_asked()
                while self.step < self.num_train_steps:
                    numbers = self.train_step()
                    left = None
                    try:
                        yield self.step, numbers
                    except Left as thrown:
                        left = thrown.by_all
                    if left is not None:
                        self._leave(by_all=left)
                        return
                    self._read_ahead()
                    self._stop_if_asked()
            self.finish()

    def train_step(self) -> dict[str, Tensor]:
        """Make one optimizer step on the next images, then whatever is due after it.

        Returns:
            This step's numbers on this rank, as 0-d tensors: reading one waits for the device.
        """
        self._in_step = True
        self.report.reopen()
        micro_batches = self.next_micro_batches()
        self.guard.begin(self.engines)
        numbers = self.update(micro_batches)
        self.progress.advance(self.global_batch)
        self.guard.end(self.step, numbers)
        if not self.guard.dropped(next(iter(self.engines))):
            self.networks.update_average()
        self.report.add(numbers)
        self._log_when_due()
        self.resume.end_if(self.guard.gives_up())
        self._evaluate_when_due()
        self._save_when_due()
        self._in_step = False
        return numbers

    def _forget_broken_step(self) -> None:
        """Take the images of a step that an error broke off anew, without its gradients."""
        if self._in_step:
            self._in_step = False
            self.feed.forget()
            for engine in self.engines.values():
                engine.local.zero_grad(set_to_none=True)

    def next_micro_batches(self) -> list[Any]:
        """Return the next `grad_accum_every` micro-batches of this rank, as `take` gives them."""
        return [self.take(batch) for batch in self.feed.take(self.config.grad_accum_every, self.global_batch)]

    def _read_ahead(self) -> None:
        self.feed.read_ahead(self.num_train_steps - self.step, self.config.grad_accum_every, self.global_batch)

    def take(self, batch: Batch) -> Any:
        """Return what `update` and `evaluate` get of a batch: its images (b, c, h, w), on this rank's device."""
        return self.to_device(batch.item)

    def step_engine(
        self, name: str, numbers: dict[str, Tensor], *, lr: float, norm: str = "grad_norm"
    ) -> dict[str, Tensor]:
        """Update an engine after its last micro-batch, or drop the update as `on_nonfinite` says.

        Args:
            name: of the engine.
            numbers: its losses and what else is logged of it, 0-d; they must be finite.
            lr: its learning rate.
            norm: name of the gradient norm.

        Returns:
            The numbers, and the gradient norm.
        """
        self.guard.owned(norm, name)
        return {**numbers, norm: self.guard.step(name, self.engines[name], numbers, lr=lr)}

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

    def _log_when_due(self) -> None:
        if self.step % self.config.log_every and self.step not in (1, self.num_train_steps):
            return
        numbers = {**self.report.mean_numbers(), **self.numbers_over_ranks(), **self.report.speed(self.global_batch)}
        if self.guard.skip:
            numbers["skipped_steps"] = self.guard.skipped_steps
        if self.config.on_bad_image == "skip":
            numbers["skipped_images"] = self.report.bad_images.over_ranks()
        self.report.log(numbers)
        self.resume.end_if(self.guard.numbers())

    def _evaluate_when_due(self) -> None:
        config = self.config
        if config.validate_every and self.step % config.validate_every == 0:
            self.run_evaluation()
        if config.save_results_every and self.step % config.save_results_every == 0:
            self.report.draw(self.save_pictures)

    def _save_when_due(self) -> None:
        every = self.config.save_model_every
        if every and self.step % every == 0:
            self.resume.checkpoint()
        every = self.config.check_ranks_every
        if every and self.step % every == 0:
            self.networks.check_ranks_agree(self.step)

    def run_evaluation(self) -> dict[str, float]:
        """Validate, log the numbers as `valid/NAME`, and return them.

        Nothing without a validation split, or where a signal breaks the validation off, on every rank at the same
        batch.
        """
        return self.report.validate(self.evaluate) if len(self.split.valid) else {}

    def finish(self) -> dict[str, float]:
        """Save, measure and draw the end of the run, if that was not done at this very step."""
        self.resume.checkpoint_unless_saved()  # first, in case that whoever stops the run has little patience
        self.resume.export_unless_done()  # resumed at its end: whoever killed it may have done so before the export
        evaluated_at, numbers = self.report.last_evaluation
        if evaluated_at != self.step:
            numbers = self.run_evaluation()
        if self.report.validation_broken_off:
            self._stop(self.stop.number)
        if self.report.pictured != self.step:
            self.report.draw(self.save_pictures)
        if self.report.picture_broken_off:
            self._stop(self.stop.number)
        self.resume.settle()
        self.report.print_bad_images()
        if self.tracker is not None:
            self.tracker.artifact(self.run.folder / "export")
        self.report.close()
        return numbers

    # ------------------------------------------------------------------------------------- an early end

    def _how_far(self) -> tuple[str, str]:
        """Return how far this run came, and how it goes on, for `PeerLost`."""
        newest, in_doubt = self.checkpoints.latest(PATIENCE), self.checkpoints.in_doubt()
        kept = "there is no complete checkpoint yet" if newest is None else f"the last complete checkpoint is {newest}"
        then = "starts anew" if newest is None else "goes on"
        doubt = f" ({in_doubt.name} was being completed)" if in_doubt is not None else ""
        return f" after step {self.step}", f"{kept}: the same command {then}{doubt}"

    def _stop_if_asked(self) -> None:
        """Save and raise `Stopped` once all ranks know that one of them received a signal."""
        number = self.stop.asked()
        # what is left of a run after its last step is `finish`
        broken_off = self.report.validation_broken_off or self.report.picture_broken_off
        if number and (number == FAULT or self.step != self.num_train_steps or broken_off):
            self._stop(number)

    def _end_without_data(self) -> NoReturn:
        """Save, and raise what keeps a rank from the images of a coming step; every rank calls this."""
        problem = self.feed.problem
        self.feed.forget()
        if self.step:
            self.resume.checkpoint_unless_saved()
            self.resume.settle()
        self.report.close()
        saved = f"; step {self.step} is saved in {self.run.folder}" if self.step else ""
        rank, reason = first_to_say(self.backend, None if problem is None else str(problem) or type(problem).__name__)
        if problem is None:
            raise UserError(f"rank {rank} has no images to train on: {reason}{saved}")
        if isinstance(problem, UserError) and saved:
            raise UserError(f"{problem}{saved}") from problem
        raise problem

    def _stop_if_put_off(self) -> None:
        """Save and raise `Stopped` on every rank if one has put a signal off."""
        number = self.stop.agree_on_put_off()
        if number:
            self._stop(number)

    def _leave(self, *, by_all: bool) -> None:
        """Act on a signal that came in the body of the loop, which the body has left now."""
        if by_all:
            number = self.stop.agree(self.stop.received)
            if number:
                self._stop(number)
        elif self.stop.received:
            self.stop.put_off()
            if not self.is_distributed:
                self.resume.checkpoint_unless_saved()
                self.resume.settle()

    def _stop(self, number: int) -> NoReturn:
        """Save, and raise `Stopped`, or what keeps a rank from its images; every rank calls this."""
        if number == FAULT:
            self._end_without_data()
        self.resume.checkpoint_unless_saved()
        self.resume.settle()
        self.report.close()
        record_stop(number, step=self.step, run=str(self.run.folder))
        stopped = Stopped(number, self.step, str(self.run.folder))
        self.report.print(stopped.message)
        raise stopped

    # ------------------------------------------------------------------------------------- set-up, in this order

    def _open_run(self, dataset: Dataset | None, valid_dataset: Dataset | None) -> None:
        """Check all that can be checked by one process: model, options, folder, data."""
        self.check_model()
        self.run = Run(self.config, self.model)
        self.config = self.run.config
        self.progress = Progress()
        train, valid = self._open_data(dataset, valid_dataset)
        own_valid = valid_dataset is not None or self.config.valid is not None
        self.data = RunData(self.config, train, valid, own_valid=own_valid)
        self.run.identify(self.data.fingerprint(), self.data.fingerprint_of_all())
        if not self.run.has_begun():  # one from before goes on as it was
            self.model.check_all_read()
        check_trackers(self.config.trackers)

    def _meet_ranks(self) -> None:
        """Start the process group; make sure that all ranks train this run."""
        config = self.config
        self.backend = create_backend(
            config.backend,
            grad_accum_every=config.grad_accum_every,
            precision=config.precision,
            dist_timeout=config.dist_timeout,
            micro_batch_size=config.batch_size,
            accelerate_kwargs=config.accelerate_kwargs,
            deepspeed_config=config.deepspeed_config,
        )
        uncaught.listen()
        self.run.open(self.backend)

    def _set_up_networks(self) -> None:
        """Build the engines, and what holds and watches them."""
        config = self.config
        seeding.seed_everything(config.seed, "train", self.backend.rank)
        allow_tf32(self.device, config.tf32)
        keep_freed_memory(self.device)
        channels_last = self.device.type == "cuda" if config.channels_last is None else config.channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        network: Any = self.model  # a module, as every model is
        network.to(device=self.device, memory_format=self.memory_format).train()
        if config.compile and not self.backend.capabilities.compiles:
            raise UserError(
                f"compile is not possible on {self.backend.title}, which swaps weights while a network runs; leave it "
                "out, or use ZeRO 0, 1, 2, DDP or FSDP2"
            )
        engines = self.build_engines()
        average = self._make_average(next(iter(engines.values()))) if config.use_ema else None
        self.networks = Networks(self.backend, engines, average, self.state_tensors(), self.rank_tensors())
        self.networks.check_ranks_agree(self.step)
        skip = config.on_nonfinite == "skip"
        self.guard = FiniteGuard(self.backend, skip=skip, max_skipped_steps=config.max_skipped_steps)
        self.guard.except_constants(self.networks.held_tensors())

    def _make_average(self, engine: Engine) -> MovingAverage:
        return MovingAverage(
            engine,
            beta=self.config.ema_beta,
            update_after_step=self.config.ema_update_after_step,
            update_every=self.config.ema_update_every,
        )

    def _go_on(self) -> None:
        """Go on from the newest checkpoint, if there is one; from then on the folder is this run's."""
        self._in_step = False
        self._loop = lambda: None  # of `steps`, as long as somebody holds it
        self.stop = StopRequest(self.backend)
        bad_images = BadImages(self.backend, len(self.dataset), self.config.max_bad_frac)
        self.report = Report(self.backend, self.progress, self.stop, self.run.folder, bad_images)
        trainer = weakref.proxy(self)  # who has the feed: when it goes, both do
        self.feed = Feed(
            self.backend, self.progress, self.stop, self.report, bad_images, lambda at: trainer._train_batches(at)
        )
        self.resume = Resume(
            self.run, self.backend, self.networks, self.progress, self.report, self.guard, trained=self
        )
        if self.resume.load_newest():
            newest = self.checkpoints.path(self.step)
            self.report.print(f"resumed {newest}: step {self.step} of {self.num_train_steps}")
            self._warn_if_past_the_end()
        self.run.write_configuration()
        self.report.open(cast(list[Any], self.config.trackers), self.run.configuration())

    def _warn_if_past_the_end(self) -> None:
        epochs, trained = self.config.epochs, self.position / len(self.split.train)
        if epochs is None and self.step > self.num_train_steps:
            self.report.print(f"warning: this run is past num_train_steps {self.num_train_steps}; nothing is trained")
        # the last batch of a finished run may have gone past its end
        if epochs is not None and self.position - round(epochs * len(self.split.train)) >= self.global_batch:
            self.report.print(
                f"warning: this run is past epochs {epochs:g}, at {trained:.4g} of them; nothing is trained"
            )

    def make_optimizer(self, module: nn.Module, options: OptimizerOptions | None = None) -> Optimizer:
        """Return the optimizer of a network's trainable weights, by default as the run's options say it."""
        return make_optimizer(module, options or self.config.optimizer_options, self.device)

    # ------------------------------------------------------------------------------------- data

    def _open_data(self, dataset: Dataset | None, valid_dataset: Dataset | None) -> tuple[Images, Images]:
        """Return the images to train on and to validate on, see `open_images`."""
        return open_images(self.config, self.model.channels, dataset, valid_dataset)

    def _train_batches(self, position: int) -> Generator[Batch, None, None]:
        return self.data.train_batches(self.backend, position, labels=self.with_labels)

    def valid_batches(self) -> Iterator[Any]:
        """Yield this rank's share of the validation images, as `take` gives them.

        Raises:
            BrokenOff: a rank got a signal; raised on every rank at the same batch, and so only where all are taken.
        """
        loader = self.data.valid_batches(self.backend, labels=self.with_labels)
        for _ in range(0, len(self.split.valid), self.config.batch_size * self.backend.world_size):
            self.stop.break_off_if_asked()
            batch = next(loader, None)
            if batch is not None:
                self.report.note_bad(batch.bad)
                yield self.take(batch)

    def picture_images(self) -> Tensor:
        """Return the images (n, c, h, w) that pictures show, the same at every step, on this rank's device."""
        return self.to_device(self.data.shown(self.config.num_images_save))

    def to_device(self, images: Tensor) -> Tensor:
        """Return images (in the run's memory format) or codes on this rank's device, without waiting."""
        layout: dict[str, Any] = {"memory_format": self.memory_format} if images.ndim == 4 else {}
        return images.to(self.device, non_blocking=True, **layout)

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

    def __repr__(self) -> str:
        """Return one line, for a prompt or a notebook: what is trained, how far it is, on what and where."""
        how_far = f"step {self.step} of {self.num_train_steps}, {len(self.split.train)} images"
        where = f"{self.backend.title} x{self.backend.world_size}, {self.run.folder}"
        return f"{type(self).__name__}({type(self.model).__name__}, {how_far}, {where})"

    def __enter__(self: TrainerT) -> TrainerT:
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
                self._stop_if_put_off()
        finally:
            self.close()

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
        """Where the picture of this step is or will be."""
        return self.report.picture_path

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
            return cast(int, self.config.num_train_steps)  # one of the two is given
        images_left = max(0, round(self.config.epochs * len(self.split.train)) - self.position)
        return self.step + math.ceil(images_left / self.global_batch)

    @property
    def num_workers(self) -> int:
        """Loader processes of this rank."""
        return self.data.num_workers

    @property
    def pin_memory(self) -> bool:
        """Whether batches are loaded into page-locked memory."""
        return self.data.pin_memory(self.device)
