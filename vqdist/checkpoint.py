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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqdist.backends.base import Backend
from vqdist.errors import UserError
from vqdist.files import read_json, sha256_of

MANIFEST = "manifest.json"
PARTIAL = ".partial"


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
        found = self.folder.glob("step_*") if self.folder.is_dir() else ()
        matches = (re.fullmatch(r"step_(\d+)", path.name) for path in found if (path / MANIFEST).is_file())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step is or will be."""
        return self.folder / f"step_{step:08d}"

    def clean(self) -> None:
        """Remove what a killed process left. Call once, before the first save."""
        if self.backend.is_main and self.folder.is_dir():
            for left in self.folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(left)
        self.backend.barrier()

    def save(self, step: int, write: Callable[[Path], None], info: dict[str, Any]) -> Path:
        """Write the checkpoint of this step.

        Args:
            step: finished optimizer steps.
            write: called on every rank with the folder to write into.
            info: goes into the manifest, for people and for messages.
        """
        target = self.path(step)
        write_atomically(target, self.backend, write, {"step": step, **info})
        if self.backend.is_main and self.keep is not None:
            for old in self.steps()[: -self.keep]:
                remove_atomically(self.path(old))
        return target


def write_atomically(target: Path, backend: Backend, write: Callable[[Path], None], info: dict[str, Any]) -> None:
    """Make `target` a complete checkpoint folder; until the last moment it does not exist. Every rank calls this."""
    partial = target.with_name(target.name + PARTIAL)
    if backend.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    backend.barrier()
    write(partial)
    backend.barrier()
    if backend.is_main:
        write_manifest(partial, info)
        if target.exists():
            remove_atomically(target)
        partial.rename(target)
        _flush(target.parent)
    backend.barrier()


def remove_atomically(folder: Path) -> None:
    """Remove a checkpoint so that no moment shows half of it as a whole one."""
    doomed = folder.with_name(folder.name + ".removed" + PARTIAL)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def write_manifest(folder: Path, info: dict[str, Any]) -> None:
    """Flush every file to the disk and list it with size and checksum."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
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
