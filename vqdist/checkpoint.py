"""Checkpoints: complete or absent. The engines write the bytes; this file says when a folder counts.

`run/checkpoints/step_00000020/` is written as `step_00000020.partial`; when every rank is done, rank 0 flushes
everything to the disk, writes `manifest.json` (size and SHA-256 of each file, and its own) and renames: see
`completion.py` and `manifest.py`. A folder without the suffix is complete. Whatever a killed process left is found by
its suffix and removed.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqdist.backends.base import Backend
from vqdist.completion import (
    PARTIAL,
    partial_of,
    remove_atomically,
    start_completion,
    wait_for_completion,
)
from vqdist.errors import PeerLost, UserError
from vqdist.files import WRITE_ERRORS, CannotWrite, FolderLock, sha256_of
from vqdist.manifest import MANIFEST, read_manifest
from vqdist.ranks import everywhere, on_main

PATIENCE = 15.0  # seconds that a run which fails waits for a checkpoint that is being completed


class CheckpointStore:
    """The checkpoints of one run. Rank 0 completes the newest one while training goes on.

    Args:
        folder: holds one folder per step.
        backend: every rank of it calls the methods that clean, save or settle.
        keep: how many of the newest to keep; None keeps all.
        kept_steps: gives steps whose checkpoints are kept beside these.
        lock: of the run folder, which is held as long as this store is used or threads write.
    """

    def __init__(
        self,
        folder: Path,
        backend: Backend,
        *,
        keep: int | None,
        kept_steps: Callable[[], Collection[int]] = frozenset,
        lock: FolderLock | None = None,
    ):
        self.folder = folder
        self.backend = backend
        self.keep = keep
        self.kept_steps = kept_steps
        self.lock = lock
        self._unsettled: tuple[Path, Future | None] | None = None  # the newest; the future is rank 0's

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, ascending; rank 0 waits for the one that it is completing."""
        return complete_steps(self.folder)

    def latest(self, patience: float | None = None) -> Path | None:
        """Return the newest complete checkpoint, or None.

        Rank 0 waits for the one that it is completing, at most so many seconds.
        """
        steps = complete_steps(self.folder, patience)
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        """Return where the checkpoint of this step is or will be."""
        return checkpoint_path(self.folder, step)

    def clean(self) -> None:
        """Remove what a killed process left. Call once, before the first save."""
        on_main(self.backend, self._clean, f"what a killed run left in {self.folder} cannot be removed")

    def _clean(self) -> None:
        if self.folder.is_dir():
            wait_for_completion(self.folder)
            for left in self.folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(left)

    def save(self, step: int, write: Callable[[Path], None], info: dict[str, Any]) -> Path:
        """Write the files of this step's checkpoint, which is complete after the next `settle`.

        Args:
            step: finished optimizer steps.
            write: called on every rank with the folder to write into.
            info: goes into the manifest, for people and for messages.

        Returns:
            Where the checkpoint will be.

        Raises:
            UserError: a rank cannot write this checkpoint, or the one before was not completed.
        """
        self.settle()
        target = self.path(step)
        _write_partial(target, self.backend, write)
        # those that stay once this one is there: until then, that of a best step before it stays, too
        remove_old = functools.partial(self._remove_old, kept=frozenset(self.kept_steps()))
        future = start_completion(target, {"step": step, **info}, remove_old) if self.backend.is_main else None
        self._unsettled = target, future
        return target

    def settle(self) -> None:
        """Wait until the newest checkpoint is complete.

        Raises:
            UserError: it cannot be completed, or old ones cannot be removed; on every rank.
        """
        if self._unsettled is None:
            return
        try:
            _settle(*self._unsettled, self.backend)
        except UserError:
            self._unsettled = None
            raise
        self._unsettled = None  # only now: if rank 0 is lost meanwhile, this one is in doubt

    def in_doubt(self) -> Path | None:
        """Return the newest checkpoint while rank 0 may still be completing it, else None; any rank may ask."""
        unsettled = self._unsettled  # once: another thread may ask while it changes
        if unsettled is None:
            return None
        target, future = unsettled
        done = future is not None and future.done()
        return None if done or (target / MANIFEST).is_file() else target

    @contextmanager
    def outlasting_errors(self) -> Iterator[None]:
        """Within this context an error lets the newest checkpoint be completed first, in `PATIENCE` seconds.

        A process that knows of other ranks leaves without its usual end, and so without its threads. `PeerLost` does
        not wait: its caller has waited for a complete checkpoint. The error of a file that cannot be written says
        where the run goes on.
        """
        try:
            yield
        except PeerLost:
            raise
        except CannotWrite as error:
            newest = self.latest(PATIENCE)
            how = "starts anew" if newest is None else f"goes on from {newest}"
            raise CannotWrite(f"{error}; once it can be, the same command {how}") from error
        except Exception:
            wait_for_completion(self.folder, PATIENCE)
            raise

    def remove_old(self) -> None:
        """Remove those beyond the ones to keep, which a process left that was killed after it had saved the newest."""
        kept = frozenset(self.kept_steps())
        on_main(self.backend, lambda: self._remove_old(self.folder, kept), f"old checkpoints in {self.folder} stay")

    def _remove_old(self, folder: Path, kept: frozenset[int]) -> None:
        if self.keep is None:
            return
        try:
            for old in _steps_in(folder)[: -self.keep]:
                if old not in kept:
                    remove_atomically(checkpoint_path(folder, old))
        except OSError as error:
            raise UserError(f"old checkpoints in {folder} cannot be removed: {error.strerror}") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where in this folder the checkpoint of a step is or will be."""
    return folder / f"step_{step:08d}"


def complete_steps(folder: Path, patience: float | None = None) -> list[int]:
    """Return the steps with a complete checkpoint in this folder, ascending.

    Args:
        folder: holds the checkpoints.
        patience: seconds to wait at most for those that this process is completing.
    """
    wait_for_completion(folder, patience)
    return _steps_in(folder)


def _steps_in(folder: Path) -> list[int]:
    found = folder.glob("step_*") if folder.is_dir() else ()
    matches = (re.fullmatch(r"step_(\d+)", path.name) for path in found if (path / MANIFEST).is_file())
    return sorted(int(match[1]) for match in matches if match)


def write_atomically(target: Path, backend: Backend, write: Callable[[Path], None], info: dict[str, Any]) -> None:
    """Make `target` a complete checkpoint folder; until the last moment it does not exist. Every rank calls this.

    Args:
        target: the folder.
        backend: its ranks write together.
        write: called on every rank with the folder to write into. Where it exchanges anything with other ranks, it
            does so before it raises.
        info: goes into the manifest.

    Raises:
        UserError: a rank could not write; on every rank, and nothing of the folder is left.
    """
    _write_partial(target, backend, write)
    _settle(target, start_completion(target, info) if backend.is_main else None, backend)


def _write_partial(target: Path, backend: Backend, write: Callable[[Path], None]) -> None:
    partial = partial_of(target)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    try:
        on_main(backend, begin, f"{target} cannot be written", CannotWrite)
        with everywhere(backend, f"{target} cannot be written", CannotWrite):
            partial.mkdir(parents=True, exist_ok=True)  # it is there; NFS else says for a while what it said before
            write(partial)
    except UserError:
        if backend.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _settle(target: Path, completion: Future | None, backend: Backend) -> None:
    """Wait for rank 0's completion of this checkpoint; every rank fails if that does."""
    with everywhere(backend, f"{target} cannot be written", CannotWrite):
        if completion is not None:
            completion.result()


def write_all(*parts: Callable[[], None]) -> None:
    """Call all parts of a write though one fails, since other ranks exchange what the later ones need; then raise."""
    failures = []
    for part in parts:
        try:
            part()
        except PeerLost:
            raise
        except WRITE_ERRORS as error:
            failures.append(error)
    if failures:
        raise failures[0]


def verify(folder: Path, required: Collection[str] = ()) -> dict[str, Any]:
    """Check the manifest of a checkpoint, and every file against it, and return the manifest.

    Args:
        folder: the checkpoint.
        required: entries that the manifest must have besides `step` and `files`.

    Raises:
        UserError: naming the folder and what is wrong with it.
    """
    wait_for_completion(folder.parent)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} has no {MANIFEST}: it is not a checkpoint, or one that was never finished")
    manifest = read_manifest(folder, required)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"{path} is missing though the manifest lists it; remove {folder} to resume from an older one"
            )
        if path.stat().st_size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
            raise UserError(
                f"{path} is damaged (size or checksum differs); remove {folder} to resume from an older one"
            )
    return manifest
