"""The place of the model of a run, of an export or of a name. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import read_json

FILES = ("config.json", "model.safetensors")
"""The files of a saved model."""

DISCRIMINATOR = "discriminator.safetensors"
"""The file beside them that only further training reads."""


def find_export(name_or_path: str | Path) -> Path:
    """Return the folder of a model: `export/` of a run, any other path as it is."""
    path = Path(name_or_path).expanduser()
    return path / "export" if (path / "export").is_dir() else path


def is_name_on_hub(given: str | Path, path: Path) -> bool:
    """Return whether this is owner/name on the Hub: not where there is a folder here that it would lie in."""
    return not path.parent.is_dir() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(given)) is not None


def check_location(given: str | Path, path: Path) -> None:
    """Raise `UserError` unless a path, or a name on the Hub, may be that of a saved model.

    Args:
        given: as the user gave it.
        path: what `find_export` makes of it.
    """
    if path.is_dir() and (path / "metrics.jsonl").exists():
        raise _no_export(path)
    if not path.is_dir() and not is_name_on_hub(given, path):
        raise UserError(
            f"no such run, export or file: {path}; expected a run folder, one with config.json and "
            "model.safetensors, as export/, or a file of another project"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; expected a folder that save_pretrained wrote, as RUN/export")
        # says what is wrong with a damaged one, which the hub's mixin does not
        if "trainer" in config_of_folder(path):  # of a run
            raise _no_export(path)


def check_given(name_or_path: str | Path) -> None:
    """Raise `UserError` where no file, folder with weights or name on the Hub is given, or a run without an export."""
    path = find_export(name_or_path)
    if not path.is_file() and not any(any(path.glob(f"*{suffix}*")) for suffix in (".safetensors", ".bin")):
        check_location(name_or_path, path)


def config_of_folder(folder: Path) -> dict[str, Any]:
    """Return config.json of a saved model; raise `UserError` where it is damaged."""
    try:
        return read_json(folder / "config.json")
    except UserError as error:
        raise UserError(f"{folder} holds no model that can be loaded ({error})") from error


def _no_export(run: Path) -> UserError:
    return UserError(f"{run} has no export/ yet; train it to its first checkpoint")
