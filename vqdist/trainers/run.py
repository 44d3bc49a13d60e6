"""A run's folder: whose it is, which configuration it holds, and that all ranks mean the same run."""

from __future__ import annotations

import dataclasses
import json
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vqdist.backends import Backend, peers
from vqdist.backends.environment import world_size_of_launcher
from vqdist.checkpoint import checkpoint_path, complete_steps
from vqdist.classes import checked_names
from vqdist.data.sources import folder_of
from vqdist.errors import UserError
from vqdist.files import LEASE_SECONDS, FolderLock, holds_steps, lock_folder, read_json, write_json
from vqdist.manifest import read_manifest
from vqdist.models.pretrained import PretrainedModel
from vqdist.options import default_options, names_with
from vqdist.parts import called
from vqdist.ranks import on_main
from vqdist.trainers.config import TrainerConfig, differing_keys
from vqdist.trainers.global_batch import NEEDED_TO_RESUME, GlobalBatch, global_batch_of
from vqdist.trainers.measure import VALID
from vqdist.trainers.overwrite import begun_by_this_launch, mark_begun, note_begun, remove_run

__all__ = ["NEEDED_TO_RESUME", "Run"]

MOST_OPTIONS = 512


class Run:
    """The folder of a run, and what is written there before the first step.

    Nothing is written, and no process group is needed, before `open`.

    Args:
        config: as the user gave it.
        model: to train.
        begun: whether another rank has said that this launch has begun the run.

    Attributes:
        folder: of the run.
        config: with the accumulation that keeps the run's images per step; set once, before training.
        told_batch: what the options said of the batch, for the next start to compare with.
        lock: of the folder, on rank 0 from `open` to `close`.
        data: fingerprint of the images to train on, from `identify` on.
        valid_data: fingerprint of the images to validate on, likewise; None where they are a share of the others.
        all_data: fingerprint of all images, likewise.
        is_anew: whether a run that is in the folder is none of this one's, and is removed when this one opens.
    """

    def __init__(self, config: TrainerConfig, model: PretrainedModel, *, begun: bool = False):
        self.model = model
        self.folder = _folder_of(config)
        asked = config.overwrite or not config.resume
        self._is_own = asked and (begun or begun_by_this_launch(self.folder, overwrites=config.overwrite))
        self._begins = asked and not self._is_own
        self.is_anew = config.overwrite and self._begins
        if world_size_of_launcher() == 1:  # else `settle` asks the other ranks first
            self._refuse_to_go_on()
        self.told_batch, self.config = self._with_global_batch(config)
        self.lock: FolderLock | None = None
        self.data = self.all_data = ""
        self.valid_data: str | None = None

    def identify(self, data: str, all_data: str | None = None, valid: str | None = None) -> None:
        """Raise `UserError` if the folder holds a run of another model, configuration or data.

        Args:
            data: fingerprint of the images to train on.
            all_data: that of these and of the images to validate on, which all ranks must see; by default `data`.
            valid: that of the images to validate on; None where they are a share of the others.
        """
        self.data, self.all_data, self.valid_data = data, all_data or data, valid
        self._refuse_other_configuration()

    def settle(self, backend: Backend) -> bool:
        """Agree over ranks on whose run is there, before `open`; every rank calls this.

        A rank on a host that has joined since cannot know that this launch has begun the run: one that knows it
        keeps all ranks from removing it, and from refusing it.

        Returns:
            Whether this rank took the run for one to remove, and has to make another `Run`, with `begun`.

        Raises:
            UserError: a run is there, no rank knows it, and the options say to refuse it.
        """
        if not backend.any(self._is_own):
            self._refuse_to_go_on()
            return False
        was_anew, self.is_anew, self._begins = self.is_anew, False, False
        return was_anew

    def _refuse_to_go_on(self) -> None:
        """Raise `UserError` if a run is there that this one is neither to go on with nor to remove."""
        if self._begins and not self.is_anew and self.has_begun():
            raise UserError(
                f"{self.folder} holds a run, and resume is false; give another run folder, or --overwrite to remove it"
            )

    def open(self, backend: Backend) -> None:
        """Make sure that all ranks train this run, and lock the folder; every rank calls this after `settle`.

        Raises:
            UserError: ranks got other options, see another folder or other images, or somebody else trains here.
        """
        self.backend = backend
        self._check_same_options()
        self._check_shared_folder()
        if self._begins:
            note_begun(self.folder)
        self.is_anew = False

    def close(self) -> None:
        """Give the folder free."""
        self.lock = None

    def configuration(self) -> dict[str, Any]:
        """Return what config.json holds: the resolved options of trainer and model, and what the images are."""
        return {
            "model_type": self._model_type,
            "trainer": self.config.recorded(),
            "model": self.model.configuration(),
            "data": {
                "images": self.data,
                "valid": self.valid_data,
                **self._classes(),
            },  # in place of their path, which may differ between machines
        }

    def _classes(self) -> dict[str, Any]:
        names = getattr(self.model, "class_names", None)
        return {} if names is None else {"classes": names}

    def classes_before(self, now: Sequence[str] | None) -> Sequence[str] | None:
        """Return the class names by which the run began; None where they were not kept, `now` for a new run."""
        path = self.folder / "config.json"
        if not path.is_file() or not self.has_begun():
            return now
        data = read_json(path).get("data")
        return checked_names(data.get("classes") if isinstance(data, dict) else None, path)

    def write_configuration(self) -> None:
        """Write config.json; from then on the folder is this run's."""
        self.write_on_main(lambda: write_json(self.folder / "config.json", self.configuration()))

    def write_on_main(self, write: Callable[[], None]) -> None:
        """Let rank 0 write into the run folder; every rank calls this and fails if rank 0 does."""
        on_main(self.backend, write, f"the run folder {self.folder} cannot be written")

    @property
    def _model_type(self) -> str | None:
        return getattr(self.model, "model_type", None)

    # ------------------------------------------------------------------------------------- before a group starts

    def _with_global_batch(self, config: TrainerConfig) -> tuple[GlobalBatch, TrainerConfig]:
        """Take as many images a step as the run did so far, whatever the number of processes."""
        processes = world_size_of_launcher()
        told = GlobalBatch.of(config.batch_size, config.grad_accum_every, processes)
        newest = None if self.is_anew else _newest_manifest(self.folder / "checkpoints")
        if newest is None or config.may_change("batch_size", "grad_accum_every"):
            return told, config
        before = global_batch_of(*newest)
        if before is None:
            return told, config
        told, accumulation = before.resumed(told, processes)
        return told, dataclasses.replace(config, grad_accum_every=accumulation)

    def has_begun(self) -> bool:
        """Return whether there is anything of a run; one without a finished step leaves its configuration only."""
        return not self.is_anew and holds_steps(self.folder)

    def _refuse_other_configuration(self) -> None:
        path = self.folder / "config.json"
        if not path.is_file() or not self.has_begun():
            return
        before = read_json(path)
        if not all(isinstance(before.get(part), dict) for part in ("trainer", "model", "data")):
            raise UserError(f"{path} is not of a run of vqdist; give another run folder")
        # runs from before it was written do not say it: their options and networks are compared all the same
        first_type = self.model.first_type() if isinstance(self.model, PretrainedModel) else None
        if before.setdefault("model_type", self._model_type) == first_type:  # by an older version, or of that class
            before["model_type"] = self._model_type
        if before["model_type"] != self._model_type:
            raise UserError(
                f"{self.folder} holds a run of a model of type {before['model_type']!r} and this one is "
                f"{self._model_type!r}; give another run folder"
            )
        if isinstance(self.model, PretrainedModel):
            self.model.follow_before(before["model"])
        if self.config.allow_config_change is True:
            return
        self._refuse_other_best(before["trainer"].get("keep_best"))
        # an option that did not exist when the run began has had its default's meaning
        before["trainer"] = {**default_options(type(self.config)), **before["trainer"]}
        self.config.follow_before(before["trainer"])
        now = json.loads(json.dumps(self.configuration()))
        before["data"] = {**now["data"], **before["data"]}  # class names and `valid` were not kept at first
        if complete_steps(self.folder / "checkpoints"):  # then `_with_global_batch` has compared these
            for name in ("batch_size", "grad_accum_every"):
                before["trainer"][name] = now["trainer"][name]
        # a network that was given as `vgg` was once recorded as the default in its place
        if before["model"].get("perceptual") == "vgg16" and isinstance(now["model"].get("perceptual"), dict):
            before["model"]["perceptual"] = now["model"]["perceptual"]
        lines = differing_keys(before, now, names_with(type(self.config), "free"))
        lines = [line for line in lines if not self._is_allowed(line.partition(":")[0])]
        if lines:
            raise UserError(
                f"{self.folder} holds a run with another configuration ({'; '.join(lines)}); give another run "
                "folder, or resume it all the same with --trainer.allow_config_change true"
            )

    def _refuse_other_best(self, before: Any) -> None:
        """Raise `UserError` if the best checkpoint, which the run keeps by a name, would go."""
        now = self.config.keep_best
        named = [one.removeprefix(VALID) if isinstance(one, str) else one for one in (before, now)]
        if isinstance(before, str) and named[0] != named[1] and not self.config.may_change("keep_best"):
            raise UserError(
                f"{self.folder} keeps the best checkpoint by {before}, and keep_best {now} would let it go; give "
                f"--trainer.keep_best {before}, or --trainer.allow_config_change keep_best"
            )

    def _is_allowed(self, key: str) -> bool:
        """Return whether an option may differ, by its dotted key or that of the dictionary it stands in."""
        parts = key.removeprefix("trainer.").split(".")
        return self.config.may_change(*(".".join(parts[:count]) for count in range(1, len(parts) + 1)))

    # ------------------------------------------------------------------------------------- on all ranks

    def _check_same_options(self) -> None:
        """Every rank must have been told the same: with another rate or batch each would train a model of its own."""
        told = self._told()
        # of one size, whatever was told
        marks = torch.zeros(MOST_OPTIONS, dtype=torch.int64, device=self.backend.device)
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
        own = names_with(type(self.config), "own")
        config = {**self.config.recorded(), "model_type": self._model_type, "backend": self.backend.title}
        options = {name: value for name, value in config.items() if name not in own}
        model = self.model.configuration()
        options |= {f"model.{name}": value for name, value in model.items()}
        tokenizer = getattr(self.model, "tokenizer", None)
        options["tokenizer"] = None if tokenizer is None else tokenizer.fingerprint()
        return {name: json.dumps(options[name], sort_keys=True, default=_name_of_class) for name in sorted(options)}

    def _check_shared_folder(self) -> None:
        """Rank 0 makes the run folder; every rank must see it, with the same data."""
        # a name that nobody has used: what an earlier start left on a node's own disk would be seen there
        token = self.backend.sum(
            torch.tensor([uuid.uuid4().int >> 66 if self.backend.is_main else 0], device=self.backend.device)
        )
        probe = self.folder / f".seen_by_every_process_{int(token):x}"
        self.write_on_main(lambda: self._make_run_folder(probe))
        unseen = self._ranks_where(not _is_seen(probe))
        if self.backend.is_main:
            probe.unlink()
        if unseen:
            raise UserError(
                f"the run folder {self.folder} of {peers.named([0])} is not seen by {peers.named(unseen)}; give "
                "one on a shared file system, mounted at the same path on every host"
            )
        fingerprint = torch.tensor([int(self.all_data[:15], 16)], device=self.backend.device)
        others = self._ranks_where(bool((fingerprint != self.backend.gather(fingerprint)[0]).any()))
        if others:
            raise UserError(
                f"the images of {called(self.config.folder or 'the dataset')} on {peers.named(others)} are others "
                f"than on {peers.named([0])}; every host must see the same files: use a shared file system, or copy "
                "them anew"
            )

    def _ranks_where(self, flag: bool) -> list[int]:
        """Return the ranks on which the flag is set; every rank gets the same."""
        flags = self.backend.gather(torch.tensor([float(flag)], device=self.backend.device))
        return flags.flatten().nonzero().flatten().tolist()

    def _make_run_folder(self, probe: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # the peers wait meanwhile, and no longer than this
        self.lock = lock_folder(self.folder, patience=min(LEASE_SECONDS, 30 * self.config.dist_timeout))
        if self.is_anew:
            remove_run(self.folder)
        if self._begins:  # last: until then a launcher's restart has all of it to do
            mark_begun(self.folder)
        probe.touch()


def _folder_of(config: TrainerConfig) -> Path:
    """Return the folder of the run; raise `UserError` for one that cannot be."""
    if not config.results_folder:
        raise UserError("results_folder is empty; give the folder of the run")
    folder = Path(config.results_folder).expanduser()
    for given, use in ((config.folder, "trained"), (config.valid, "validated")):
        images = folder_of(given)
        if images is not None and folder.resolve().is_relative_to(images.resolve()):
            raise UserError(
                f"the run folder {folder} lies in the folder of the images, {images}: its pictures would be {use} "
                "on; give another one"
            )
    if (folder / "encode.json").exists():
        raise UserError(f"the run folder {folder} holds codes that `vqdist encode` wrote; give another one")
    return folder


def _name_of_class(value: Any) -> str:
    """Return the class of what JSON has no form for: its own words may hold an address in memory."""
    return type(value).__name__


def _is_seen(probe: Path) -> bool:
    """Return whether a file that another host has just made is there.

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
    """Return the newest complete checkpoint whose manifest can be read, and the manifest."""
    for step in reversed(complete_steps(checkpoints)):
        path = checkpoint_path(checkpoints, step)
        try:
            return path, read_manifest(path, NEEDED_TO_RESUME)
        except UserError:  # damaged: `Resume.load_newest` says so
            continue
    return None
