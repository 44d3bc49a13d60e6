"""Files that come with vqdist beside its code: recipes, and configurations of accelerate and DeepSpeed.

In a clone they lie at its top level, in an installed wheel within the package (setup.py puts them there).
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# where each kind lies in a clone
KINDS = {
    "recipes": "launch/recipes",
    "accelerate_configs": "accelerate_configs",
    "deepspeed_configs": "deepspeed_configs",
}
SUFFIXES = {"recipes": ".yaml", "accelerate_configs": ".yaml", "deepspeed_configs": ".json"}


def folder_of(kind: str) -> Path:
    """Return the folder of the files of a kind."""
    installed = PACKAGE / "shipped" / kind
    return installed if installed.is_dir() else PACKAGE.parent / KINDS[kind]


def files_of(kind: str) -> dict[str, Path]:
    """Return the files of a kind, by their names without the suffix."""
    return {path.stem: path for path in sorted(folder_of(kind).glob(f"*{SUFFIXES[kind]}"))}


def resolve(kind: str, given: str) -> str:
    """Return the path of a file that a user names: a path, or what comes with vqdist.

    Args:
        kind: of the file.
        given: a path; or, where there is no such file, a name (`digits_vqgan`, `digits_vqgan.yaml`), or the path that
            it has in a clone (`launch/recipes/digits_vqgan.yaml`).
    """
    path = Path(given)
    named = path.name == given or path.parent.as_posix() == KINDS[kind]
    if not named or path.is_file() or path.suffix not in ("", SUFFIXES[kind]):
        return given
    return str(files_of(kind).get(path.stem, given))
