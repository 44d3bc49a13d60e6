"""The exported model of a run: which checkpoint it is of, whether it is whole, and its exchange for a newer one."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import read_json, sha256_of, write_json

RECORD = "export.json"
MODEL_CARD = "README.md"  # people edit it, so it is not compared
NUMBERS_BEGIN, NUMBERS_END = "<!-- numbers of vqdist -->", "<!-- end of the numbers of vqdist -->"
"""Comments in a card between which `vqdist.model_card` writes; the rest is the owner's."""
NEEDED = ("config.json", "model.safetensors")

AT_FDCWD = -100  # of Linux: a path is relative to the current folder
RENAME_EXCHANGE = 2


def write_export(folder: Path, save: Callable[[Path], Any], step: int, *, weights: str | None = None) -> None:
    """Make `folder` the export of a step, which is written beside it first; an equal, undamaged one stays in place.

    Args:
        folder: holds the export before, or nothing yet.
        save: writes the model into the folder that it is given.
        step: finished optimizer steps of the checkpoint with these weights.
        weights: `averaged` or `live`.

    Raises:
        OSError, SafetensorError: the disk is full, for example; then `folder` is as it was.
    """
    new, old = _beside(folder)
    _remove(new)
    save(new)
    record = {"step": step, "files": _checksums(new), **({} if weights is None else {"weights": weights})}
    write_json(new / RECORD, record)
    if is_export_of(folder, record):
        _remove(new)
    elif folder.is_dir() and exchange(new, folder):
        _remove(new)  # the one before
    else:
        _remove(old)
        if os.path.lexists(folder):
            folder.rename(old)
        new.rename(folder)
        _remove(old)


def mend_export(folder: Path) -> None:
    """Remove what a killed process left beside an export; put the one before in its place if there is none."""
    new, old = _beside(folder)
    if not os.path.lexists(folder) and is_whole(old):
        old.rename(folder)
    for left in (new, old):
        _remove(left)


def remove_export(folder: Path) -> None:
    """Remove an export, if there is one, so that no moment shows half of it."""
    _, old = _beside(folder)
    _remove(old)
    if os.path.lexists(folder):
        folder.rename(old)
    _remove(old)


def step_of_export(folder: Path) -> int | None:
    """Return the step of an export that is whole; None of any other, and of one without a record."""
    record = _record_of(folder)
    step = None if record is None or not is_whole(folder) else record.get("step")
    return step if isinstance(step, int) else None


def is_export_of(folder: Path, record: dict[str, Any]) -> bool:
    """Return whether a folder is the export with this record, and each file has the checksum that stands there."""
    return _record_of(folder) == record and _files_are(folder, record)


def is_whole(folder: Path) -> bool:
    """Return whether an export has the needed files, and all others as its record says, if it has one."""
    record = _record_of(folder)
    return all((folder / name).is_file() for name in NEEDED) and (record is None or _files_are(folder, record))


def check_weights(path: Path) -> None:
    """Raise `UserError` unless a file of weights is the one that the record of its export names, if there is one.

    Args:
        path: the file, in an export or in a folder of it. An export may be exchanged for a newer one meanwhile.
    """
    for folder in (path.parent, path.parent.parent):
        name = path.relative_to(folder).as_posix()
        while (digest := _digest_of(folder, name)) and not _files_are(folder, {"files": {name: digest}}):
            if path.is_file() and _digest_of(folder, name) == digest:
                raise UserError(
                    f"{path} is not the file that {folder / RECORD} names: it is damaged, or comes from elsewhere; "
                    f"the command of the run makes its export anew, and without {RECORD} weights are not compared"
                )


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths so that at no moment one is missing; return False, without a change, where the system cannot.

    Linux can on its own file systems. NFS cannot.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return where the next export is written, and where the one before is for a moment if they cannot be swapped."""
    return folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")


def _checksums(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MODEL_CARD, RECORD))
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}


def _record_of(folder: Path) -> dict[str, Any] | None:
    """Return what stands in the record of an export, or None without one that can be read."""
    try:
        return read_json(folder / RECORD)
    except UserError:
        return None


def _digest_of(folder: Path, name: str) -> str | None:
    """Return the checksum of a file that the record of an export names, or None."""
    files = (_record_of(folder) or {}).get("files")
    return files.get(name) if isinstance(files, dict) else None


def _files_are(folder: Path, record: dict[str, Any]) -> bool:
    files = record.get("files")
    try:
        return isinstance(files, dict) and all(sha256_of(folder / name) == digest for name, digest in files.items())
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Remove a folder, or the link or file that stands in its place; what cannot go stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
