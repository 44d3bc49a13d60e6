"""The manifest of a checkpoint: what stands in it, its own checksum, and whether one can be believed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from vqdist.errors import UserError
from vqdist.files import read_json

MANIFEST = "manifest.json"
VERSION = 2  # the first one had neither a version nor a checksum
FIRST_KEYS = {"step", "position", "world_size", "backend", "global_batch", "validation_broken_off", "files"}


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a manifest with its version and checksum."""
    content = {**content, "version": VERSION}
    return {**content, "sha256": checksum_of(content)}


def checksum_of(content: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of all that stands in a manifest but its checksum."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, required: Collection[str] = ()) -> dict[str, Any]:
    """Return the manifest of a checkpoint if it can be believed; the files that it lists are not looked at.

    Args:
        folder: the checkpoint. If its name is that of a step, the manifest must be of that step.
        required: entries that the manifest must have besides `step` and `files`.

    Raises:
        UserError: naming the manifest and what is wrong with it.
    """
    path = folder / MANIFEST
    content = read_json(path)
    problem = _problem_of(content, {"step", "files", *required}) or _other_step(content["step"], folder)
    if problem is not None:
        raise UserError(f"{path} is damaged ({problem}); remove {folder} to resume from an older one")
    return content


def _problem_of(content: dict[str, Any], required: Collection[str]) -> str | None:
    missing = sorted(required - content.keys())
    if missing:
        return f"it has no {missing[0]!r}"
    if not {"version", "sha256"}.isdisjoint(content):
        if content.get("sha256") != checksum_of(content):
            return "its own checksum differs"
        if content.get("version") != VERSION:
            return f"its version is {content.get('version')!r}, and {VERSION} is expected"
    elif not content.keys() <= FIRST_KEYS:
        return f"it has an unknown entry {min(content.keys() - FIRST_KEYS)!r} and no checksum"
    for name, (holds, words) in ENTRIES.items():
        if name in content and not holds(content[name]):
            return f"{name} is not {words}"
    return None


def _other_step(step: int, folder: Path) -> str | None:
    """Return the problem of a manifest that was written for another folder."""
    named = re.fullmatch(r"step_(\d+)", folder.name)
    return None if named is None or int(named[1]) == step else f"it is of step {step}"


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _are_files(value: Any) -> bool:
    """Return whether these are files below a folder, each with its size and checksum."""
    return isinstance(value, dict) and len(value) > 0 and all(map(_is_file, value.keys(), value.values()))


def _is_file(name: str, file: Any) -> bool:
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and isinstance(file, dict) and _is_count(file.get("bytes")) and isinstance(file.get("sha256"), str)


def _is_batch(value: Any) -> bool:
    names = {"batch_size", "grad_accum_every", "images"}
    return isinstance(value, dict) and value.keys() == names and all(_is_count(size, 1) for size in value.values())


# what each entry holds, where it is there
ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a number of steps"),
    "files": (_are_files, "a table of files with sizes and checksums"),
    "position": (_is_count, "a number of images"),
    "world_size": (lambda value: _is_count(value, 1), "a number of processes"),
    "backend": (lambda value: isinstance(value, str), "the name of a backend"),
    "global_batch": (_is_batch, "the sizes of a step's batches"),
    "validation_broken_off": (lambda value: isinstance(value, bool), "true or false"),
    "picture_broken_off": (lambda value: isinstance(value, bool), "true or false"),
}
