"""Checkpoints: complete or absent. The engines write the bytes; this file says when a folder counts.

`run/checkpoints/step_00000020/` is written as `step_00000020.partial`; when every rank is done, rank 0 flushes
everything to the disk, writes `manifest.json` (size and SHA-256 of each file) and renames. A folder without the suffix
is complete. Whatever a killed process left is found by its suffix and removed.

Training waits until the files are written. What rank 0 does then takes as long again or longer, and is done by threads
while the next steps are made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vqdist.backends.base import Backend
from vqdist.errors import PeerLost, UserError
from vqdist.files import read_json, sha256_of

MANIFEST = "manifest.json"
PARTIAL = ".partial"
# what a full disk raises: of the system, of torch, of safetensors, and of those here that say it in words
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, UserError)
PATIENCE = 30.0  # seconds that a question about checkpoints waits for the one that is being completed

# by folder of checkpoints: what threads of this process are completing there
_completing: weakref.WeakValueDictionary[Path, Future] = weakref.WeakValueDictionary()


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: holds one folder per step.
        backend: every method but `latest` and `steps` is called by every rank.
        keep: how many of the newest to keep; None keeps all.
    """

    def __init__(self, folder: Path, backend: Backend, *, keep: int | None):
        self.folder = folder
        self.backend = backend
        self.keep = keep
        self._unsettled: tuple[Path, Future | None] | None = None  # the last checkpoint; rank 0 completes it

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return complete_steps(self.folder)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step is or will be."""
        return checkpoint_path(self.folder, step)

    def clean(self) -> None:
        """Remove what a killed process left. Call once, before the first save."""
        wait_for_completion(self.folder)
        with everywhere(self.backend, f"what a killed run left in {self.folder} cannot be removed"):
            if self.backend.is_main and self.folder.is_dir():
                for left in self.folder.glob(f"*{PARTIAL}"):
                    shutil.rmtree(left)

    def save(self, step: int, write: Callable[[Path], None], info: dict[str, Any]) -> Path:
        """Write the checkpoint of this step; rank 0 completes it meanwhile.

        Args:
            step: finished optimizer steps.
            write: called on every rank with the folder to write into.
            info: goes into the manifest, for people and for messages.

        Raises:
            UserError: a rank cannot write this checkpoint, or the one before was not completed.
        """
        self.settle()
        target = self.path(step)
        _write_partial(target, self.backend, write)
        future = _complete(target, {"step": step, **info}, self._remove_old) if self.backend.is_main else None
        self._unsettled = target, future
        return target

    def settle(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            UserError: it cannot be completed; on every rank, and nothing of it is left.
        """
        if self._unsettled is not None:
            (target, future), self._unsettled = self._unsettled, None
            _await_completion(target, self.backend, future)

    def _remove_old(self) -> None:
        if self.keep is None:
            return
        try:
            for old in _steps_in(self.folder)[: -self.keep]:
                remove_atomically(self.path(old))
        except OSError as error:
            raise UserError(f"old checkpoints in {self.folder} cannot be removed: {error.strerror}") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where in this folder the checkpoint of a step is or will be."""
    return folder / f"step_{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint in this folder, ascending; waits for the one that this process completes."""
    wait_for_completion(folder)
    return _steps_in(folder)


def wait_for_completion(folder: Path) -> None:
    """Let threads of this process come to an end with a checkpoint in this folder; no longer than `PATIENCE`."""
    future = _completing.get(folder.resolve())
    if future is not None:
        wait([future], timeout=PATIENCE)


def is_completing() -> bool:
    """Whether threads of this process are completing a checkpoint; its usual end waits for them."""
    return any(not future.done() for future in _completing.values())


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
    _await_completion(target, backend, _complete(target, info) if backend.is_main else None)


def _partial_of(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)


def _write_partial(target: Path, backend: Backend, write: Callable[[Path], None]) -> None:
    partial = _partial_of(target)
    with _nothing_left(target, backend):
        with everywhere(backend, f"{target} cannot be written"):
            if backend.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with everywhere(backend, f"{target} cannot be written"):
            partial.mkdir(parents=True, exist_ok=True)  # it is there; NFS else says for a while what it said before
            write(partial)


def _complete(target: Path, info: dict[str, Any], afterwards: Callable[[], None] = lambda: None) -> Future[None]:
    """Flush, add up checksums, write the manifest and rename, in threads.

    All of it is handed to them at once: a process that comes to its end lets threads finish what they have got, and
    gives them nothing more.
    """
    partial = _partial_of(target)
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    threads = ThreadPoolExecutor(min(8, 2 * len(paths)) + 1, thread_name_prefix="checkpoint")
    # a checksum takes about as long as the disk: both at once, and several files at once
    flushed = [threads.submit(_flush, path) for path in paths]
    sums = {path: threads.submit(sha256_of, path) for path in paths}

    def complete() -> None:
        for flush in flushed:
            flush.result()
        write_manifest(partial, info, {path: checksum.result() for path, checksum in sums.items()})
        if target.exists():
            remove_atomically(target)
        partial.rename(target)
        _flush(target.parent)
        afterwards()

    future = threads.submit(complete)
    threads.shutdown(wait=False)
    _completing[target.parent.resolve()] = future
    return future


def _await_completion(target: Path, backend: Backend, future: Future | None) -> None:
    """Wait for what `_complete` gave on rank 0; every rank fails if that does."""
    with _nothing_left(target, backend), everywhere(backend, f"{target} cannot be written"):
        if future is not None:
            future.result()


@contextmanager
def _nothing_left(target: Path, backend: Backend) -> Iterator[None]:
    """Remove what there is of a checkpoint that cannot be written; the error must come on every rank."""
    try:
        yield
    except UserError:
        if backend.is_main:
            shutil.rmtree(_partial_of(target), ignore_errors=True)
        raise


@contextmanager
def everywhere(backend: Backend, message: str) -> Iterator[None]:
    """A write in which some ranks or all take part, and which every rank waits for: if it fails on one, it fails on
    all, with one line.

    Args:
        backend: every rank of it enters this context.
        message: what cannot be done; the reason is added.
    """
    problem = None
    try:
        yield
    except PeerLost:
        raise
    except UserError as error:
        problem = error
    except WRITE_ERRORS as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        problem = UserError(f"{message}: {reason[:200]}")
        problem.__cause__ = error
    if backend.any(problem is not None):
        raise problem or UserError(f"{message}: another rank says why")


def remove_atomically(folder: Path) -> None:
    """Remove a checkpoint so that no moment shows half of it as a whole one.

    What somebody still reads a network file system may not let go; `clean` removes it at the next start.
    """
    doomed = folder.with_name(folder.name + ".removed" + PARTIAL)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


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


def write_manifest(folder: Path, info: dict[str, Any], checksums: Mapping[Path, str]) -> None:
    """List the files of a checkpoint, which are on the disk by now, with size and SHA-256; flush that too."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in checksums.items()
    }
    (folder / MANIFEST).write_text(json.dumps({**info, "files": files}, indent=2))
    _flush(folder / MANIFEST)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _flush(path)


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest.

    Raises:
        UserError: naming the folder and what is wrong with it.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} has no {MANIFEST}: it is not a checkpoint, or one that was never finished")
    manifest = read_json(folder / MANIFEST)
    if not {"files", "step"} <= manifest.keys():
        raise UserError(f"{folder / MANIFEST} is not the manifest of a checkpoint; remove {folder}")
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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
