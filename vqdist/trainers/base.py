"""The loop that every trainer shares. A subclass says what one optimizer step is: see `VQGanVAETrainer.update`."""

from __future__ import annotations

import inspect
import weakref
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor
from torch.utils.data import Dataset

from vqdist import uncaught
from vqdist.backends import Engine
from vqdist.backends.peers import naming_lost_peers
from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import Batch
from vqdist.model_card import write_cards
from vqdist.models.pretrained import PretrainedModel
from vqdist.seeding import OwnGenerators
from vqdist.stopping import BrokenOff
from vqdist.tracking import check_trackers
from vqdist.trainers.bad_images import BadImages
from vqdist.trainers.best import Best, standing_of
from vqdist.trainers.config import TrainerConfig, build_config, described, signature_of
from vqdist.trainers.data import Images, RunData, open_images
from vqdist.trainers.early_end import EarlyEnd
from vqdist.trainers.feed import Feed
from vqdist.trainers.finite import FiniteGuard
from vqdist.trainers.further_measures import FurtherMeasures
from vqdist.trainers.measure import Measure, compared_by, known_names, refuse_unmeasured
from vqdist.trainers.networks import Networks
from vqdist.trainers.owner import RunOwner
from vqdist.trainers.progress import Progress
from vqdist.trainers.report import LogFunction, Report
from vqdist.trainers.resume import Resume
from vqdist.trainers.run import Run
from vqdist.trainers.setup import make_average, make_backend, place_network
from vqdist.trainers.steps import Left, Steps
from vqdist.trainers.stop_request import StopRequest


class Trainer(RunOwner):
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
        measure: by which number validations are compared; None keeps no best one.
        with_labels: whether batches come with the classes of their images.
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    model_argument: ClassVar[str] = "vae"
    measure: ClassVar[Measure | None] = None
    picture_name: ClassVar[str] = "reconstructions"
    if TYPE_CHECKING:  # an attribute or a property of each trainer

        @property
        def with_labels(self) -> bool: ...

    else:
        with_labels = False
    __signature__: ClassVar[inspect.Signature]
    _loop: Callable[[], Steps | None]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        model = inspect.signature(cls.__init__).parameters.get(cls.model_argument)
        default = inspect.Parameter.empty if model is None else model.default
        cls.__signature__ = signature_of(cls.config_class, cls.model_argument, default)
        if cls.__doc__:
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{described(cls.config_class)}"

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
        self._meet_ranks(dataset, valid_dataset)
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

    def validation_protocol(self) -> dict[str, Any]:
        """Return what validations are measured on, see `vqdist.protocol`."""
        said = {**self.data.protocol_of_valid(), "pixels": "float"}
        weights = "averaged" if self.networks.has_average else "live"
        return {**said, "weights": weights, **self.further.protocol()}

    def validation_names(self) -> set[str] | None:
        """Return the names of the numbers that `evaluate` gives, by which steps can be compared; None: not known.

        A subclass with an `evaluate` of its own says them, too, or has none of `validate_with`.
        """
        return None

    @abstractmethod
    def save_pictures(self, path: Path) -> None:
        """Draw what the model makes of `picture_images`; every rank calls this, to gather what rank 0 draws."""

    @abstractmethod
    def averaged_model(self) -> AbstractContextManager[PretrainedModel]:
        """Return a context in which the model has the averaged weights, or the live ones; every rank enters it."""

    # ------------------------------------------------------------------------------------- the loop

    def train(self, log_fn: LogFunction | None = None) -> dict[str, float]:
        """Train until `num_train_steps`, or as `patience` says, from the last checkpoint if there is one.

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
        loop = Steps(self._steps(log_fn), within=self.generators)
        self._loop = weakref.ref(loop)
        return loop

    def _steps(self, log_fn: LogFunction | None) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
        self.report.log_fn = log_fn
        self.resume.forget_export()  # somebody may have removed it
        self._forget_broken_step()
        with self.stop.listening(), self.checkpoints.outlasting_errors(), naming_lost_peers(self.early_end.how_far):
            self.early_end.if_put_off()
            with self.report.progress_bar(self.num_train_steps):
                if self.report.validation_broken_off:  # in the run that this one resumes
                    self.run_evaluation()
                    self.early_end.if_asked(of=self.last_step)
                if self.report.picture_broken_off:
                    self.report.draw(self.save_pictures)
                    self.early_end.if_asked(of=self.last_step)
                if self.step < self.last_step:
                    self.best.hold()
                    self._read_ahead()
                    self.stop.asked_now()
                    self.early_end.if_asked(of=self.last_step)
                while self.step < self.last_step:
                    numbers = self.train_step()
                    left = None
                    try:
                        yield self.step, numbers
                    except Left as thrown:
                        left = thrown.by_all
                    if left is not None:
                        self.early_end.leave(by_all=left)
                        return
                    self._read_ahead()
                    self.early_end.if_asked(of=self.last_step)
            self.finish()

    def train_step(self) -> dict[str, Tensor]:
        """Make one optimizer step on the next images, then whatever is due after it.

        Returns:
            This step's numbers on this rank, as 0-d tensors: reading one waits for the device.
        """
        with self.generators:
            return self._train_step()

    def _train_step(self) -> dict[str, Tensor]:
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
        if self.has_ended_early and self.report.logged_at != self.step:  # its last step has a log line, as any run's
            self._log()
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
        self.feed.read_ahead(self.last_step - self.step, self.config.grad_accum_every, self.global_batch)

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

    def _log_when_due(self) -> None:
        if self.step % self.config.log_every == 0 or self.step in (1, self.num_train_steps):
            self._log()

    def _log(self) -> None:
        numbers = {**self.report.mean_numbers(), **self.numbers_over_ranks(), **self.report.speed(self.global_batch)}
        if self.guard.skip:
            numbers["skipped_steps"] = self.guard.skipped_steps
        if self.config.on_bad_image == "skip":
            numbers["skipped_images"] = self.report.bad_images.count_over_ranks()
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
        if (every and self.step % every == 0) or self.best.wants_checkpoint:
            self.resume.checkpoint()
        every = self.config.check_ranks_every
        if every and self.step % every == 0:
            self.networks.check_ranks_agree(self.step)

    def run_evaluation(self) -> dict[str, float]:
        """Validate, log the numbers as `valid/NAME`, and return them.

        Nothing without a validation split, or where a signal breaks the validation off, on every rank at the same
        batch.
        """
        if not len(self.split.valid):
            return {}
        numbers = self.report.validate(self.evaluate)
        self.best.note(numbers)
        return numbers

    def validate_end(self) -> dict[str, float]:
        """Return the numbers of the last step, and measure what was not."""
        evaluated_at, numbers = self.report.last_evaluation
        return numbers if evaluated_at == self.step else self.run_evaluation()

    def finish(self) -> dict[str, float]:
        """Save, measure and draw the end of the run, if that was not done at this very step."""
        self.resume.checkpoint_unless_saved()  # first, in case that whoever stops the run has little patience
        self.resume.export_unless_done()  # resumed at its end: whoever killed it may have done so before the export
        numbers = self.validate_end()
        if self.report.validation_broken_off:
            self.early_end.stop_now(self.stop.number)
        if self.report.pictured != self.step:
            self.report.draw(self.save_pictures)
        if self.report.picture_broken_off:
            self.early_end.stop_now(self.stop.number)
        self.resume.settle()
        reason = self.best.reason if self.has_ended_early else None
        if reason is not None:
            self.report.print(f"ended at step {self.step} of {self.num_train_steps}: {reason}")
        self.best.finish()
        if self.best.standing.keeps_checkpoint:
            self.checkpoints.remove_old()  # one that was the best before the validation of the last step
        self.report.print_bad_images()
        if self.is_main:
            write_cards(self.run.folder, (self.run.folder / "export", self.best.folder), self.report.alert)
        if self.tracker is not None:
            self.tracker.artifact(self.run.folder / "export")
        self.report.note_end(reason)
        self.report.close()
        return numbers

    # ------------------------------------------------------------------------------------- set-up, in this order

    def _open_run(self, dataset: Dataset | None, valid_dataset: Dataset | None, *, begun: bool = False) -> None:
        """Check all that can be checked by one process: model, options, folder, data."""
        self.check_model()
        self.run = Run(self.config, self.model, begun=begun)
        self.config = self.run.config
        self.progress = Progress()
        train, valid = self._open_data(dataset, valid_dataset)
        own_valid = valid_dataset is not None or self.config.valid is not None
        self.data = RunData(self.config, train, valid, own_valid=own_valid)
        data = self.data
        self.run.identify(data.fingerprint(), data.fingerprint_of_all(), data.fingerprint_of_valid())
        if not self.run.has_begun():  # one from before goes on as it was
            self.model.check_all_read()
        check_trackers(self.config.trackers)
        self._open_measures()

    def _open_measures(self) -> None:
        """Open what validations need beside the model, and look whether they will have the number of keep_best."""
        config, count = self.config, len(self.split.valid)
        named = isinstance(config.keep_best, str)
        if not count:
            more = ("keep_best",) if named else ()
            config.refuse_set("validate_with", "patience", *more, because="there are no images to validate on")
        known = known_names(self)
        refuse_unmeasured(config.measures.names, known, type(self).__name__)
        self.compared = compared_by(config.keep_best, self.measure, known)
        self.further = FurtherMeasures(
            config,
            channels=self.model.channels,
            image_size=config.image_size,
            count=count,
            has_images=isinstance(self.data.valid, ImageDataset),
        )

    def _meet_ranks(self, dataset: Dataset | None, valid_dataset: Dataset | None) -> None:
        """Start the process group; make sure that all ranks train this run."""
        self.backend = make_backend(self.config)
        uncaught.listen()
        if self.run.settle(self.backend):
            self._open_run(dataset, valid_dataset, begun=True)
            self.backend.grad_accum_every = self.config.grad_accum_every
        self.run.open(self.backend)

    def _set_up_networks(self) -> None:
        """Build the engines, and what holds and watches them."""
        self.memory_format = place_network(self.model, self.backend, self.config)
        self.further.on(self.backend)
        engines = self.build_engines()
        average = make_average(next(iter(engines.values())), self.config)
        self.networks = Networks(self.backend, engines, average, self.state_tensors(), self.rank_tensors())
        self.networks.check_ranks_agree(self.step)
        skip = self.config.on_nonfinite == "skip"
        self.guard = FiniteGuard(self.backend, skip=skip, max_skipped_steps=self.config.max_skipped_steps)
        self.guard.except_constants(self.networks.held_tensors())

    def _go_on(self) -> None:
        """Go on from the newest checkpoint, if there is one; from then on the folder is this run's."""
        self.generators = OwnGenerators()
        self._in_step = False
        self._loop = lambda: None  # of `steps`, as long as somebody holds it
        self.stop = StopRequest(self.backend)
        bad_images = BadImages(self.backend, len(self.dataset), self.config.max_bad_frac)
        if self.data.own_valid:
            bad_images.of_valid = BadImages(self.backend, len(self.split.valid), self.config.max_bad_frac)
        self.report = Report(self.backend, self.progress, self.stop, self.run.folder, bad_images)
        trainer = weakref.proxy(self)  # who has the feed: when it goes, both do
        self.feed = Feed(
            self.backend, self.progress, self.stop, self.report, bad_images, lambda at: trainer._train_batches(at)
        )
        said: dict[str, Any] | None = {} if len(self.split.valid) else None
        if self.is_main and said is not None:
            said = self.report.validation_protocol = self.validation_protocol()
        standing = standing_of(self.compared, self.measure, self.config.keep_best, said, self.backend)
        self.resume = Resume(
            self.run, self.backend, self.networks, self.progress, self.report, self.guard, self, standing
        )
        self.early_end = EarlyEnd(self.stop, self.feed, self.resume)
        exports = (self.resume.export_best, self.resume.export_of)
        self.best = Best(self.run, self.backend, self.progress, self.report, self.compared, standing, *exports)
        resumed = self.resume.load_newest()
        self.best.restore(newest=resumed)
        if resumed:
            newest = self.checkpoints.path(self.step)
            self.report.print(f"resumed {newest}: step {self.step} of {self.num_train_steps}")
            if self.has_ended_early:
                self.report.print(
                    f"this run ended at step {self.step}: {self.best.reason}; a larger --trainer.patience goes on"
                )
            if (passed := self.end_passed()) is not None:
                self.report.alert(f"this run is past {passed}; nothing is trained")
        if (overlap := self.data.overlap()) is not None:
            self.report.alert(overlap)
        self.run.write_configuration()
        self.report.open(cast(list[Any], self.config.trackers), self.run.configuration())

    # ------------------------------------------------------------------------------------- data

    def _open_data(self, dataset: Dataset | None, valid_dataset: Dataset | None) -> tuple[Images, Images]:
        """Return the images to train on and to validate on, see `open_images`."""
        return open_images(self.config, self.model.channels, dataset, valid_dataset)

    def _train_batches(self, position: int) -> Generator[Batch, None, None]:
        return self.data.train_batches(self.backend, position, labels=self.with_labels)

    def valid_batches(self) -> Iterator[Any]:
        """Yield this rank's share of the validation images, as `take` gives them.

        Raises:
            BrokenOff: a rank got a signal, or could not read its images; raised on every rank at the same batch, and
                so only where all are taken.
        """
        loader = self.data.valid_batches(self.backend, labels=self.with_labels)
        for _ in range(0, len(self.split.valid), self.config.batch_size * self.backend.world_size):
            self.stop.break_off_if_asked()
            batch = None
            if not self.stop.fault:
                with self.feed.noting_problems():
                    batch = next(loader, None)
            if batch is not None:
                self.report.note_bad(batch.bad, of_valid=True)
                yield self.take(batch)
        self.stop.break_off_if_faulty()

    def picture_images(self) -> Tensor:
        """Return the images (n, c, h, w) that pictures show, the same at every step, on this rank's device.

        Raises:
            BrokenOff: this rank could not read them.
        """
        with self.feed.noting_problems():
            return self.to_device(self.data.shown(self.config.num_images_save))
        raise BrokenOff
