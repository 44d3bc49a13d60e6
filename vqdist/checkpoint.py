"""Checkpoints: complete or absent. The engines write the bytes; this file says when a folder counts.

`run/checkpoints/step_00000020/` is written as `step_00000020.partial`; when every rank is done, rank 0 writes
`manifest.json` (size and SHA-256 of each file), flushes everything to the disk and renames. A folder without the
suffix is complete. Whatever a killed process left is found by its suffix and removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
        with everywhere(self.backend, f"what a killed run left in {self.folder} cannot be removed"):
            if self.backend.is_main and self.folder.is_dir():
                for left in self.folder.glob(f"*{PARTIAL}"):
                    shutil.rmtree(left)

    def save(self, step: int, write: Callable[[Path], None], info: dict[str, Any]) -> Path:
        """Write the checkpoint of this step.

        Args:
            step: finished optimizer steps.
            write: called on every rank with the folder to write into.
            info: goes into the manifest, for people and for messages.
        """
        target = self.path(step)
        write_atomically(target, self.backend, write, {"step": step, **info})
        with everywhere(self.backend, f"old checkpoints in {self.folder} cannot be removed"):
            if self.backend.is_main and self.keep is not None:
                for old in self.steps()[: -self.keep]:
                    remove_atomically(self.path(old))
        return target


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where in this folder the checkpoint of a step is or will be."""
    return folder / f"step_{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint in this folder, ascending."""
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
    partial = target.with_name(target.name + PARTIAL)
    try:
        with everywhere(backend, f"{target} cannot be written"):
            if backend.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with everywhere(backend, f"{target} cannot be written"):
            partial.mkdir(parents=True, exist_ok=True)  # it is there; NFS else says for a while what it said before
            write(partial)
        with everywhere(backend, f"{target} cannot be written"):
            if backend.is_main:
                _complete(partial, target, info)
    except UserError:
        if backend.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _complete(partial: Path, target: Path, info: dict[str, Any]) -> None:
    write_manifest(partial, info)
    if target.exists():
        remove_atomically(target)
    partial.rename(target)
    _flush(target.parent)


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


def write_manifest(folder: Path, info: dict[str, Any]) -> None:
    """Flush every file to the disk and list it with size and checksum."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # a checksum takes about as long as the disk: both at once, and several files at once
    with ThreadPoolExecutor(min(8, 2 * len(paths) or 1)) as threads:
        flushed = [threads.submit(_flush, path) for path in paths]
        sums = list(threads.map(sha256_of, paths))
        for flush in flushed:
            flush.result()
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, sums, strict=True)
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
