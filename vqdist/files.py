"""Reading and writing the small files of a run, so that a broken one is said in one line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vqdist.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `UserError` naming the file if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"{path} is not valid JSON ({error}); it is damaged or not of vqdist") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a JSON object is expected")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object so that the file is whole or absent at every moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
    partial.replace(path)


def follow_umask(path: Path) -> None:
    """Give a file the permissions that the user's umask says: safetensors writes 0600, for the owner's eyes only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
