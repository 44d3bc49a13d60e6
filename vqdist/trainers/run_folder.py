"""A trainer's run folder: who may resume it, what a checkpoint holds, how a run comes back from one."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqdist import seeding
from vqdist.backends import Backend, Engine, peers
from vqdist.backends.environment import world_size_of_launcher
from vqdist.backends.state import load_network_tensors, save_tensors
from vqdist.checkpoint import (
    CheckpointStore,
    checkpoint_path,
    complete_steps,
    everywhere,
    verify,
    write_all,
    write_atomically,
)
from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import Split
from vqdist.data.sources import folder_of
from vqdist.errors import UserError
from vqdist.export import mend_export, write_export
from vqdist.files import LEASE_SECONDS, FolderLock, lock_folder, read_json, write_json
from vqdist.manifest import read_manifest
from vqdist.metrics import RunningMeans
from vqdist.models.pretrained import PretrainedModel
from vqdist.parts import called
from vqdist.trainers.average import MovingAverage
from vqdist.trainers.config import TrainerConfig, default_options, differing_keys
from vqdist.trainers.finite import FiniteGuard, how_to_go_on
from vqdist.trainers.global_batch import GlobalBatch

# options that may differ between hosts
OWN_OF_A_HOST = frozenset(
    [
        *("folder", "results_folder", "deepspeed_config", "dist_timeout"),
        *("num_workers", "prefetch_factor", "pin_memory"),
    ]
)
MOST_OPTIONS = 512
NEEDED_TO_RESUME = ("position", "world_size", "backend")  # entries of every manifest of a run


class RunFolder(ABC):
    """The part of `Trainer` that writes and reads the run folder; see there for the attributes.

    `_write_state` lists all that weights, lines of numbers and charts of later steps depend on; `load` restores it.
    What belongs to one rank (random state, `means`, `counts_to_come`) is of no use to another number of ranks: then
    noise is drawn anew, and the first line and chart are of the resumed steps only. Speed is always measured anew.
    """

    config: TrainerConfig
    model: nn.Module
    backend: Backend
    engines: dict[str, Engine]
    main_engine: Engine
    ema: MovingAverage | None
    dataset: ImageDataset
    split: Split
    means: RunningMeans
    guard: FiniteGuard
    step: int
    position: int
    num_train_steps: int
    global_batch: int
    _lock: FolderLock | None = None  # of the run folder, on rank 0
    _exported: int = -1  # the step of which `train` has looked after the export
    _resumed_at = -1  # the step of the checkpoint that was loaded

    @abstractmethod
    def held_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of this rank that goes into a checkpoint, as messages name it."""

    @abstractmethod
    def averaged_model(self) -> AbstractContextManager[PretrainedModel]:
        """Within this context the model has the averaged weights, or the live ones without an average; every rank
        enters it."""

    def counts_to_come(self) -> dict[str, Tensor]:
        """What this rank has counted for the next line of numbers and the next chart; `load` sets it in place."""
        return {}

    def export(self, folder: Path) -> None:
        """Write the averaged model and its step; every rank calls it, rank 0 writes with `save_pretrained`.

        It appears whole or not at all, and an equal one stays.

        Raises:
            UserError: a value of the run is not finite.
        """
        self._end_if(self.guard.tensors(self.held_tensors()))
        self._write_export(folder)

    def _write_export(self, folder: Path) -> None:
        with self.averaged_model() as model:
            if self.is_main:
                self._export(model, folder)

    def _export(self, model: PretrainedModel, folder: Path) -> None:
        model.image_size, model.buffers_are_live = self.config.image_size, True
        write_export(folder, model.save_pretrained, self.step)

    # ------------------------------------------------------------------------------------- save and load

    def save(self, path: str | Path) -> None:
        """Write the whole state of the run as one folder; every rank calls this.

        Raises:
            UserError: it cannot be written, or has a value that is not finite.
        """
        self._check_finite()
        write_atomically(Path(path), self.backend, self._write_state, self._state_info())

    def load(self, path: str | Path) -> None:
        """Restore all that `save` wrote: weights, optimizers, EMA, codebooks, step, random state, data position."""
        path = Path(path)
        info = self._verified(path)
        for name, engine in self.engines.items():
            engine.load(path / name)
        if self.ema is not None:
            self._load_ema(path)
        self.step, self.position = info["step"], info["position"]
        self._validation_broken_off = info.get("validation_broken_off", False)
        self._batches = None
        self._saved = self._resumed_at = self.step
        self._exported = -1
        self._load_rank_state(path, info)
        self.guard.restore(info.get("skipped"))
        problem = self.guard.tensors(self.held_tensors())
        if problem is not None:  # as checkpoints could be before they were looked at
            raise UserError(f"{path} was saved though {problem}; remove it to resume from an older one")
        self._restart_clock()

    def _verified(self, path: Path) -> dict[str, Any]:
        """Return the manifest of a checkpoint whose files rank 0 has checked; every rank fails if one does."""
        with everywhere(self.backend, f"{path} cannot be read"):
            if self.is_main:
                verify(path, NEEDED_TO_RESUME)
        with everywhere(self.backend, f"{path} cannot be read"):  # after rank 0, which may have been completing it
            return read_manifest(path, NEEDED_TO_RESUME)

    def _save_checkpoint(self) -> None:
        paused = time.perf_counter()
        self._check_finite()
        self.checkpoints.save(self.step, self._write_state, self._state_info())
        self._export_step()
        self._saved = self.step
        self._clock += time.perf_counter() - paused

    def _export_step(self) -> None:
        """Let `export/` be that of this step; every rank calls this, and fails if it cannot be written."""
        with everywhere(self.backend, f"{self.run_folder / 'export'} cannot be written"):
            self._write_export(self.run_folder / "export")
        self._exported = self.step

    def _check_finite(self) -> None:
        """Raise `UserError` if a number since the start or any tensor that is to be saved is not finite."""
        self._end_if(self.guard.numbers() or self.guard.tensors(self.held_tensors()))

    def _end_if(self, problem: str | None) -> None:
        """Raise `UserError` on every rank alike if there is a problem with values that are not finite."""
        if problem is None:
            return
        self._settle()
        at_step = "" if " at step " in problem else f" at step {self.step}"
        newest = self.checkpoints.latest()
        resumed = newest == self.checkpoints.path(self._resumed_at)
        raise UserError(f"{problem}{at_step}; {how_to_go_on(newest, resumed=resumed)}")

    def _settle(self) -> None:
        """Wait until the newest checkpoint is complete; every rank calls this, and fails if it cannot be."""
        try:
            self.checkpoints.settle()
        except UserError:
            self._saved = -1
            raise

    def _state_info(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "position": self.position,
            "world_size": self.backend.world_size,
            "backend": self.backend.name,
            "global_batch": dataclasses.asdict(self.told_batch),
            "validation_broken_off": self._validation_broken_off,
            "skipped": self.guard.state(),
        }

    def _write_state(self, folder: Path) -> None:
        engines = [partial(engine.save, folder / name) for name, engine in self.engines.items()]
        write_all(*engines, partial(self._write_rank_state, folder), partial(self._write_ema, folder))

    def _write_rank_state(self, folder: Path) -> None:
        torch.save(seeding.generator_states(), folder / f"random_rank_{self.backend.rank:05d}.pt")
        numbers = {"means": self.means.state(), "counts": self.counts_to_come()}
        torch.save(numbers, folder / f"numbers_rank_{self.backend.rank:05d}.pt")

    def _write_ema(self, folder: Path) -> None:
        if self.ema is None:
            return
        tensors = {name: tensor.cpu() for name, tensor in self.ema.named_tensors() if self.is_main}
        if self.is_main:
            save_tensors(folder / "ema.safetensors", {**tensors, **self.ema.counters()})

    def _load_ema(self, path: Path) -> None:
        if not (path / "ema.safetensors").is_file():
            raise UserError(f"{path} was saved with use_ema false and has no average; resume it with use_ema false")
        try:
            # whole, where a rank may hold a part
            self.ema.fill(load_network_tensors(self.main_engine.module, path / "ema.safetensors"))
        except RuntimeError as error:
            raise UserError(f"{path} holds the average of another network than this configuration builds") from error
        if self.backend.any(not self.ema.follows()):
            self.print(
                f"{path} holds an average of tensors that are copied now, as of the codebook; the average takes the "
                "live ones of this checkpoint"
            )
        self.ema.follow()

    def _load_rank_state(self, path: Path, info: dict[str, Any]) -> None:
        if info["world_size"] == self.backend.world_size:
            states = torch.load(path / f"random_rank_{self.backend.rank:05d}.pt", weights_only=True)
            seeding.restore_generator_states(states)
            self._load_numbers(path / f"numbers_rank_{self.backend.rank:05d}.pt")
            if info["backend"] != self.backend.name:
                self.print(f"{path} was saved by backend {info['backend']} and is resumed by {self.backend.name}")
            return
        self._load_numbers(None)
        seeding.seed_everything(self.config.seed, "resume", self.step, self.backend.rank)
        self.print(
            f"{path} was saved by {_processes(info['world_size'])} ({info['backend']}) and is resumed by "
            f"{self.backend.world_size} ({self.backend.name}): weights, optimizers, EMA, step and data position are "
            f"as saved, and training noise is drawn anew; {self._words_of_batch(_global_batch(path, info))}"
        )

    def _words_of_batch(self, before: GlobalBatch | None) -> str:
        now = f"one step takes {self.global_batch} images with grad_accum_every {self.config.grad_accum_every}"
        if before is None or self.global_batch == before.images:
            return f"{now}, as it did"
        return f"WARNING: {now}, and not {before.images}: what is learnt from here on differs"

    def _load_numbers(self, path: Path | None) -> None:
        """Of the next line and chart; they begin anew without a file, as checkpoints had none at first."""
        found = path is not None and path.is_file()
        loaded = torch.load(path, self.device, weights_only=True) if found else {"means": None, "counts": {}}
        self.means.restore(loaded["means"])
        for name, counts in self.counts_to_come().items():
            counts.copy_(loaded["counts"].get(name, torch.zeros_like(counts)))

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is one; from then on the folder is this run's."""
        self._load_newest()
        self._write_on_main(lambda: write_json(self.run_folder / "config.json", self._resolved_configuration()))

    def _load_newest(self) -> None:
        self.checkpoints = CheckpointStore(
            self.run_folder / "checkpoints", self.backend, keep=self.config.keep_checkpoints, lock=self._lock
        )
        self.checkpoints.clean()
        self._write_on_main(lambda: mend_export(self.run_folder / "export"))
        found = torch.tensor([self.checkpoints.steps()[-1:] or [-1]], device=self.device)
        if bool((self.backend.gather(found) != found).any()):
            raise UserError(f"processes see different checkpoints in {self.run_folder}; use a shared file system")
        damaged: list[str] = []
        for step in reversed(self.checkpoints.steps()):
            try:
                self.load(self.checkpoints.path(step))
            except UserError as error:
                damaged.append(str(error))
                self.print(f"warning: {error}")
                continue
            self.print(f"resumed {self.checkpoints.path(step)}: step {self.step} of {self.num_train_steps}")
            self._warn_if_past_the_end()
            return
        if damaged:
            raise UserError(f"no checkpoint of {self.run_folder} can be loaded; {damaged[0]}")
        if (self.run_folder / "metrics.jsonl").exists():
            self.print(f"warning: {self.run_folder} holds a run without a complete checkpoint; it starts at step 0")

    def _warn_if_past_the_end(self) -> None:
        epochs, trained = self.config.epochs, self.position / len(self.split.train)
        if epochs is None and self.step > self.num_train_steps:
            self.print(f"warning: this run is past num_train_steps {self.num_train_steps}; nothing is trained")
        # the last batch of a finished run may have gone past its end
        if epochs is not None and self.position - round(epochs * len(self.split.train)) >= self.global_batch:
            self.print(f"warning: this run is past epochs {epochs:g}, at {trained:.4g} of them; nothing is trained")

    # ------------------------------------------------------------------------------------- whose folder it is

    def _run_folder(self) -> Path:
        if not self.config.results_folder:
            raise UserError("results_folder is empty; give the folder of the run")
        folder, images = Path(self.config.results_folder).expanduser(), folder_of(self.config.folder)
        if images is not None and folder.resolve().is_relative_to(images.resolve()):
            raise UserError(
                f"the run folder {folder} lies in the folder of the images, {images}: its pictures would be trained "
                "on; give another one"
            )
        if (folder / "encode.json").exists():
            raise UserError(f"the run folder {folder} holds codes that `vqdist encode` wrote; give another one")
        return folder

    def _resolved_configuration(self) -> dict[str, Any]:
        model = self.model.configuration()
        images = self.dataset.fingerprint()  # in place of their path, which may differ between machines
        return {
            "model_type": self._model_type,
            "trainer": self.config.recorded(),
            "model": model,
            "data": {"images": images},
        }

    def _has_begun(self) -> bool:
        """Whether there is anything of a run: one that ended before its first step leaves its configuration only."""
        lines = self.run_folder / "metrics.jsonl"
        return any(self.run_folder.glob("checkpoints/step_*")) or (lines.is_file() and lines.stat().st_size > 0)

    @property
    def _model_type(self) -> str | None:
        return getattr(self.model, "model_type", None)

    def _keep_global_batch(self) -> None:
        """Take as many images a step as the run did so far, whatever the number of processes.

        Called before a process group starts; what the options said is kept in `told_batch`, for the next resume.
        """
        config, processes = self.config, world_size_of_launcher()
        self.told_batch = GlobalBatch.of(config.batch_size, config.grad_accum_every, processes)
        newest = _newest_manifest(self.run_folder / "checkpoints")
        if newest is None or config.allow_config_change:
            return
        before = _global_batch(*newest)
        if before is not None:
            self.told_batch, config.grad_accum_every = before.resumed(self.told_batch, processes)

    def _refuse_other_configuration(self) -> None:
        path = self.run_folder / "config.json"
        if not path.is_file() or not self._has_begun():
            return
        before = read_json(path)
        if not all(isinstance(before.get(part), dict) for part in ("trainer", "model", "data")):
            raise UserError(f"{path} is not of a run of vqdist; give another run folder")
        # runs from before it was written do not say it: their options and networks are compared all the same
        if before.setdefault("model_type", self._model_type) != self._model_type:
            raise UserError(
                f"{self.run_folder} holds a run of a model of type {before['model_type']!r} and this one is "
                f"{self._model_type!r}; give another run folder"
            )
        if self.config.allow_config_change:
            return
        # an option that did not exist when the run began has had its default's meaning
        before["trainer"] = {**default_options(type(self.config)), **before["trainer"]}
        now = json.loads(json.dumps(self._resolved_configuration()))
        if complete_steps(self.run_folder / "checkpoints"):  # then `_keep_global_batch` has compared these
            for name in ("batch_size", "grad_accum_every"):
                before["trainer"][name] = now["trainer"][name]
        lines = differing_keys(before, now)
        if lines:
            raise UserError(
                f"{self.run_folder} holds a run with another configuration ({'; '.join(lines)}); give another run "
                "folder, or resume it all the same with --trainer.allow_config_change true"
            )

    def _check_same_options(self) -> None:
        """Every rank must have been told the same: with another rate or batch each would train a model of its own."""
        told = self._told()
        marks = torch.zeros(MOST_OPTIONS, dtype=torch.int64, device=self.device)  # of one size, whatever was told
        sums = [zlib.crc32(f"{name} {value}".encode()) for name, value in told.items()]
        marks[: len(sums)] = torch.tensor(sums)
        table = self.backend.gather(marks)
        differs = (table != table[0]).cpu()
        others = differs.any(dim=1).nonzero().flatten().tolist()
        if others:
            names = [name for name, differing in zip(told, differs.any(dim=0).tolist(), strict=False) if differing]
            raise UserError(
                f"{peers.named(others)} got other options than {peers.named([0])} ({', '.join(names[:5])}); start all "
                "of them with the same command"
            )

    def _told(self) -> dict[str, str]:
        """Every option that all ranks must agree on, by name, as JSON."""
        config = {**self.config.recorded(), "model_type": self._model_type, "backend": self.backend.title}
        options = {name: value for name, value in config.items() if name not in OWN_OF_A_HOST}
        model = self.model.configuration()
        options |= {f"model.{name}": value for name, value in model.items()}
        tokenizer = getattr(self.model, "tokenizer", None)
        options["tokenizer"] = None if tokenizer is None else tokenizer.fingerprint()
        return {name: json.dumps(options[name], sort_keys=True, default=_name_of_class) for name in sorted(options)}

    def _check_shared_folder(self) -> None:
        """Rank 0 makes the run folder; every rank must see it, with the same data."""
        # a name that nobody has used: what an earlier start left on a node's own disk would be seen there
        token = self.backend.sum(torch.tensor([uuid.uuid4().int >> 66 if self.is_main else 0], device=self.device))
        probe = self.run_folder / f".seen_by_every_process_{int(token):x}"
        self._write_on_main(lambda: self._make_run_folder(probe))
        unseen = self._ranks_where(not _is_seen(probe))
        if self.is_main:
            probe.unlink()
        if unseen:
            raise UserError(
                f"the run folder {self.run_folder} of {peers.named([0])} is not seen by {peers.named(unseen)}; give "
                "one on a shared file system, mounted at the same path on every host"
            )
        fingerprint = torch.tensor([int(self.dataset.fingerprint()[:15], 16)], device=self.device)
        others = self._ranks_where(bool((fingerprint != self.backend.gather(fingerprint)[0]).any()))
        if others:
            raise UserError(
                f"the images of {called(self.config.folder or 'the dataset')} on {peers.named(others)} are others "
                f"than on {peers.named([0])}; every host must see the same files: use a shared file system, or copy "
                "them anew"
            )

    def _ranks_where(self, flag: bool) -> list[int]:
        """The ranks on which the flag is set; every rank gets the same."""
        flags = self.backend.gather(torch.tensor([float(flag)], device=self.device))
        return flags.flatten().nonzero().flatten().tolist()

    def _make_run_folder(self, probe: Path) -> None:
        self.run_folder.mkdir(parents=True, exist_ok=True)
        # the peers wait meanwhile, and no longer than this
        self._lock = lock_folder(self.run_folder, patience=min(LEASE_SECONDS, 30 * self.config.dist_timeout))
        probe.touch()

    def _write_on_main(self, write: Callable[[], None]) -> None:
        """Let rank 0 write into the run folder; every rank calls this and fails if rank 0 does."""
        problem = None
        if self.is_main:
            try:
                write()
            except OSError as error:
                problem = UserError(f"the run folder {self.run_folder} cannot be written: {error.strerror}")
            except UserError as error:
                problem = error
        if self.backend.any(problem is not None):
            raise problem or UserError(f"rank 0 cannot write the run folder {self.run_folder}")


def _name_of_class(value: Any) -> str:
    """What JSON has no form for: its own words may hold an address in memory."""
    return type(value).__name__


def _is_seen(probe: Path) -> bool:
    """Whether a file that another host has just made is there.

    A host that looked before, when there was no such folder, may be told so by NFS for half a minute; to make the
    folder asks the file server itself.
    """
    with suppress(OSError):
        probe.parent.mkdir(parents=True, exist_ok=True)
    if probe.is_file():
        return True
    with suppress(OSError):  # an empty one is this host's own
        probe.parent.rmdir()
    return False


def _newest_manifest(checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint whose manifest can be read, and the manifest."""
    for step in reversed(complete_steps(checkpoints)):
        path = checkpoint_path(checkpoints, step)
        try:
            return path, read_manifest(path, NEEDED_TO_RESUME)
        except UserError:  # damaged: `_load_newest` says so
            continue
    return None


def _global_batch(path: Path, manifest: dict[str, Any]) -> GlobalBatch | None:
    """What the run of a checkpoint was told to take in one step, or None if nothing says it.

    Manifests did not say it at first; there the run's configuration does.
    """
    if "global_batch" in manifest:
        return GlobalBatch(**manifest["global_batch"])
    configuration = path.parent.parent / "config.json"
    if not configuration.is_file() or "world_size" not in manifest:
        return None
    trainer = read_json(configuration).get("trainer", {})
    if not {"batch_size", "grad_accum_every"} <= trainer.keys():
        return None
    return GlobalBatch.of(trainer["batch_size"], trainer["grad_accum_every"], manifest["world_size"])


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"
