"""A checkpoint of a run: the one list of all state, its export, and the way back from it."""

from __future__ import annotations

import dataclasses
import weakref
from abc import abstractmethod
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vqdist import seeding
from vqdist.backends import Backend
from vqdist.backends.state import load_network_tensors, load_tensors, save_tensors
from vqdist.checkpoint import CheckpointStore, verify, write_all, write_atomically
from vqdist.errors import UserError
from vqdist.export import mend_export, write_export
from vqdist.files import CannotWrite
from vqdist.manifest import read_manifest
from vqdist.model_card import carry_card
from vqdist.models.pretrained import PretrainedModel
from vqdist.ranks import everywhere, on_main
from vqdist.trainers.finite import FiniteGuard, how_to_go_on
from vqdist.trainers.global_batch import GlobalBatch, global_batch_of
from vqdist.trainers.networks import Networks
from vqdist.trainers.progress import Progress
from vqdist.trainers.report import Report
from vqdist.trainers.run import NEEDED_TO_RESUME, Run
from vqdist.trainers.standing import Standing

STATE = "state.safetensors"  # file of what belongs to no network


class Trained(Protocol):
    """The parts of a trainer that depend on the model, and its random numbers."""

    generators: seeding.OwnGenerators

    @abstractmethod
    def averaged_model(self) -> AbstractContextManager[PretrainedModel]:
        """Return a context in which the model has the averaged weights, or the live ones; every rank enters it."""

    @abstractmethod
    def counts_to_come(self) -> dict[str, Tensor]:
        """Return what this rank has counted for the next log line and chart; `Resume.load` sets it in place."""


class Resume:
    """Writes and reads the state of a run.

    `write_state` lists all that weights, log lines and charts of later steps depend on; `load` restores it. The state
    of one rank (random state, `means`, `counts_to_come`) is of no use to another number of ranks: then noise is drawn
    anew, and the first line and chart are of the resumed steps only. Statistics of BatchNorm, which are each rank's
    own, are then those of rank 0. Speed is always measured anew.

    Args:
        run: the folder and the configuration.
        backend: every rank of it calls each method.
        networks: all weights.
        progress: step and position.
        report: means, and the validation and the picture that were broken off.
        guard: keeps values that are not finite out.
        trained: the trainer.
        standing: how the validations compare so far.

    Attributes:
        checkpoints: of the run.
        saved: the step of the newest checkpoint of this run, or -1.
    """

    def __init__(
        self,
        run: Run,
        backend: Backend,
        networks: Networks,
        progress: Progress,
        report: Report,
        guard: FiniteGuard,
        trained: Trained,
        standing: Standing,
    ):
        self.run = run
        self.backend = backend
        self.networks = networks
        self.progress = progress
        self.report = report
        self.guard = guard
        self.trained: Trained = weakref.proxy(trained)  # the trainer has this object: when it goes, both do
        self.standing = standing
        self.checkpoints = CheckpointStore(
            run.folder / "checkpoints",
            backend,
            keep=run.config.keep_checkpoints,
            kept_steps=lambda: standing.kept_steps,
            lock=run.lock,
        )
        self.saved = -1
        self._exported = -1  # the step of which `finish` has looked after the export
        self._resumed_at = -1  # the step of the checkpoint that was loaded

    # ------------------------------------------------------------------------------------- save

    def save(self, path: Path) -> None:
        """Write the whole state of the run as one folder; every rank calls this.

        Raises:
            UserError: it cannot be written, or has a value that is not finite.
        """
        self.check_finite()
        write_atomically(path, self.backend, self.write_state, self.state_info())

    def checkpoint(self) -> None:
        """Write the checkpoint of this step, and its export; it is complete after `settle`."""
        with self.report.paused():
            self.check_finite()
            self.checkpoints.save(self.progress.step, self.write_state, self.state_info())
            self.export_step()
            self.saved = self.progress.step

    def checkpoint_unless_saved(self) -> None:
        """Write the checkpoint of this step, if there is none."""
        if self.saved != self.progress.step:
            self.checkpoint()

    def settle(self) -> None:
        """Wait until the newest checkpoint is complete; every rank calls this, and fails if it cannot be."""
        try:
            self.checkpoints.settle()
        except UserError:
            self.saved = -1
            raise

    def export(self, folder: Path) -> None:
        """Write the averaged model and its step; every rank calls it, rank 0 writes with `save_pretrained`.

        It appears whole or not at all, and an equal one stays.

        Raises:
            UserError: a value of the run is not finite.
        """
        self.end_if(self.guard.tensors(self.networks.held_tensors()))
        self._write_export(folder)

    def forget_export(self) -> None:
        """Let `export_unless_done` look at the export: somebody may have removed it."""
        self._exported = -1

    def export_unless_done(self) -> None:
        """Let `export/` be that of this step, unless this was done."""
        if self._exported != self.progress.step:
            self.export_step()

    def export_step(self) -> None:
        """Let `export/` be that of this step; every rank calls this, and fails if it cannot be written."""
        self._write_export_everywhere(self.run.folder / "export")
        self._exported = self.progress.step

    def export_best(self, folder: Path) -> None:
        """Write the averaged model of a step that is not saved otherwise; every rank fails if it cannot be written.

        Raises:
            UserError: likewise, or a value of the run is not finite.
        """
        with self.report.paused():
            self.check_finite()
            self._write_export_everywhere(folder)

    def export_of(self, step: int, folder: Path) -> bool:
        """Write the averaged model of another checkpoint of the run, and load that of this step again.

        Returns:
            True if there is such a checkpoint and it is whole; every rank gets the same.
        """
        now = self.checkpoints.path(self.progress.step)
        if self.backend.any(step not in self.checkpoints.steps()):
            return False
        try:
            self.load(self.checkpoints.path(step))
            self._write_export_everywhere(folder)
        except CannotWrite:
            raise
        except UserError as error:
            self.report.alert(str(error))
            return False
        finally:
            self.load(now)
        return True

    def _write_export_everywhere(self, folder: Path) -> None:
        with everywhere(self.backend, f"{folder} cannot be written", CannotWrite):
            self._write_export(folder)

    def _write_export(self, folder: Path) -> None:
        with self.trained.averaged_model() as model:
            if self.backend.is_main:
                self._export(model, folder)

    def _export(self, model: PretrainedModel, folder: Path) -> None:
        model.image_size, model.buffers_are_live = self.run.config.image_size, True

        def save(new: Path) -> None:
            model.save_pretrained(new)
            carry_card(folder, new)

        weights = "averaged" if self.networks.has_average else "live"
        write_export(folder, save, self.progress.step, weights=weights)

    def check_finite(self) -> None:
        """Raise `UserError` if a number since the start or any tensor that is to be saved is not finite."""
        self.end_if(self.guard.numbers() or self.guard.tensors(self.networks.held_tensors()))

    def end_if(self, problem: str | None) -> None:
        """Raise `UserError` on every rank alike if there is a problem with values that are not finite."""
        if problem is None:
            return
        self.settle()
        at_step = "" if " at step " in problem else f" at step {self.progress.step}"
        newest = self.checkpoints.latest()
        resumed = newest == self.checkpoints.path(self._resumed_at)
        message = f"{problem}{at_step}; {how_to_go_on(newest, resumed=resumed)}"
        self.report.note("error", message)
        raise UserError(message)

    def state_info(self) -> dict[str, Any]:
        """Return the entries of the manifest."""
        return {
            "step": self.progress.step,
            "position": self.progress.position,
            "world_size": self.backend.world_size,
            "backend": self.backend.name,
            "global_batch": dataclasses.asdict(self.run.told_batch),
            "validation_broken_off": self.report.validation_broken_off,
            "picture_broken_off": self.report.picture_broken_off,
            "skipped": self.guard.state(),
            "best": self.standing.record(),
        }

    def write_state(self, folder: Path) -> None:
        """Write all files of a checkpoint; every rank calls this."""
        engines = [partial(engine.save, folder / name) for name, engine in self.networks.engines.items()]
        write_all(
            *engines,
            partial(self._write_rank_state, folder),
            partial(self._write_average, folder),
            partial(self._write_state_tensors, folder),
        )

    def _write_rank_state(self, folder: Path) -> None:
        with self.trained.generators:
            states = seeding.generator_states()
        torch.save(states, folder / f"random_rank_{self.backend.rank:05d}.pt")
        numbers = {
            "means": self.report.means.state(),
            "counts": self.trained.counts_to_come(),
            "own": self.networks.of_rank,
            "bad_images": sorted(self.report.bad_images.names),
            "bad_valid_images": sorted(self.report.bad_images.of_valid.names),
        }
        torch.save(numbers, folder / f"numbers_rank_{self.backend.rank:05d}.pt")

    def _write_average(self, folder: Path) -> None:
        average, is_main = self.networks.average, self.backend.is_main
        if average is None:
            return
        tensors = {name: tensor.cpu() for name, tensor in average.named_tensors() if is_main}
        if is_main:
            save_tensors(folder / "ema.safetensors", {**tensors, **average.counters()})

    def _write_state_tensors(self, folder: Path) -> None:
        if self.networks.state and self.backend.is_main:
            save_tensors(folder / STATE, {name: tensor.cpu() for name, tensor in self.networks.state.items()})

    # ------------------------------------------------------------------------------------- load

    def load(self, path: Path) -> None:
        """Restore all that `save` wrote: weights, optimizers, average, codebooks, step, random state, position."""
        info = self._verified(path)
        for name, engine in self.networks.engines.items():
            engine.load(path / name)
        self._load_average(path)
        self._load_state_tensors(path)
        self.progress.step, self.progress.position = info["step"], info["position"]
        self.standing.restore(info.get("best"))
        self.report.begin_at(info)
        self.saved = self._resumed_at = self.progress.step
        self._exported = -1
        self._load_rank_state(path, info)
        self.guard.restore(info.get("skipped"))
        problem = self.guard.tensors(self.networks.held_tensors())
        if problem is not None:  # as checkpoints could be before they were looked at
            raise UserError(f"{path} was saved though {problem}; remove it to resume from an older one")
        self.report.restart_clock()

    def load_newest(self) -> bool:
        """Go on from the newest checkpoint that is whole; return whether there is one.

        Raises:
            UserError: there are some, and none can be loaded.
        """
        self.checkpoints.clean()
        self.run.write_on_main(lambda: mend_export(self.run.folder / "export"))
        found = torch.tensor([self.checkpoints.steps()[-1:] or [-1]], device=self.backend.device)
        if bool((self.backend.gather(found) != found).any()):
            raise UserError(f"processes see different checkpoints in {self.run.folder}; use a shared file system")
        damaged: list[str] = []
        for step in reversed(self.checkpoints.steps()):
            try:
                self.load(self.checkpoints.path(step))
            except UserError as error:
                damaged.append(str(error))
                self.report.alert(str(error))
                continue
            if not damaged:
                self.checkpoints.remove_old()
            return True
        if damaged:
            raise UserError(f"no checkpoint of {self.run.folder} can be loaded; {damaged[0]}")
        if (self.run.folder / "metrics.jsonl").exists():
            self.report.alert(f"{self.run.folder} holds a run without a complete checkpoint; it starts at step 0")
        return False

    def _verified(self, path: Path) -> dict[str, Any]:
        """Return the manifest of a checkpoint whose files rank 0 has checked; every rank fails if one does."""
        on_main(self.backend, lambda: verify(path, NEEDED_TO_RESUME), f"{path} cannot be read")
        with everywhere(self.backend, f"{path} cannot be read"):  # after rank 0, which may have been completing it
            return read_manifest(path, NEEDED_TO_RESUME)

    def _load_average(self, path: Path) -> None:
        average = self.networks.average
        if average is None:
            return
        if not (path / "ema.safetensors").is_file():
            raise UserError(f"{path} was saved with use_ema false and has no average; resume it with use_ema false")
        try:
            # whole, where a rank may hold a part
            average.fill(load_network_tensors(self.networks.main.module, path / "ema.safetensors"))
        except RuntimeError as error:
            raise UserError(f"{path} holds the average of another network than this configuration builds") from error
        if self.backend.any(not average.follows()):
            self.report.print(
                f"{path} holds an average of tensors that are copied now, as of the codebook; the average takes the "
                "live ones of this checkpoint"
            )
        average.follow()

    def _load_state_tensors(self, path: Path) -> None:
        """Restore tensors beside the networks'; they are 0, as at the start, where the run had none of that name."""
        found = load_tensors(path / STATE, self.backend.device) if (path / STATE).is_file() else {}
        for name, tensor in self.networks.state.items():
            tensor.copy_(found.get(name, torch.zeros_like(tensor)))

    def _load_rank_state(self, path: Path, info: dict[str, Any]) -> None:
        backend = self.backend
        if info["world_size"] == backend.world_size:
            states = torch.load(path / f"random_rank_{backend.rank:05d}.pt", weights_only=True)
            with self.trained.generators:
                seeding.restore_generator_states(states)
            self._load_numbers(path / f"numbers_rank_{backend.rank:05d}.pt")
            if info["backend"] != backend.name:
                self.report.print(f"{path} was saved by backend {info['backend']} and is resumed by {backend.name}")
            return
        self._load_numbers(None)
        with self.trained.generators:
            seeding.seed_everything(self.run.config.seed, "resume", self.progress.step, backend.rank)
        self.report.print(
            f"{path} was saved by {_processes(info['world_size'])} ({info['backend']}) and is resumed by "
            f"{backend.world_size} ({backend.name}): weights, optimizers, EMA, step and data position are "
            f"as saved, and training noise is drawn anew; {self._words_of_batch(global_batch_of(path, info))}"
        )

    def _words_of_batch(self, before: GlobalBatch | None) -> str:
        config = self.run.config
        images = GlobalBatch.of(config.batch_size, config.grad_accum_every, self.backend.world_size).images
        now = f"one step takes {images} images with grad_accum_every {config.grad_accum_every}"
        if before is None or images == before.images:
            return f"{now}, as it did"
        return f"WARNING: {now}, and not {before.images}: what is learnt from here on differs"

    def _load_numbers(self, path: Path | None) -> None:
        """Restore the next line and chart; they begin anew without a file, which checkpoints did not have at first."""
        loaded: dict[str, Any] = {"means": None, "counts": {}}
        if path is not None and path.is_file():
            loaded = torch.load(path, self.backend.device, weights_only=True)
        self.report.means.restore(loaded["means"])
        bad_images = self.report.bad_images
        bad_images.restore(loaded.get("bad_images", []))
        if bad_images.of_valid is not bad_images:
            bad_images.of_valid.restore(loaded.get("bad_valid_images", []))
        for name, counts in self.trained.counts_to_come().items():
            counts.copy_(loaded["counts"].get(name, torch.zeros_like(counts)))
        for name, own in self.networks.of_rank.items():  # rank 0's, where there are none of this rank
            own.copy_(loaded.get("own", {}).get(name, own))


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"
