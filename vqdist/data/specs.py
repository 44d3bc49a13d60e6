"""The spec of a data source: what it may be, and whether its folder is there. Imports no torch."""

from __future__ import annotations

import os
from typing import Any

from vqdist.errors import UserError
from vqdist.parts import PATH, unknown
from vqdist.registries import SOURCES

FORMS = (
    "a folder of images, `digits`, `synthetic[:LENGTH]`, `torchvision:NAME[:SPLIT]`, `wds:SHARDS-{000..099}.tar`, "
    "`hf:NAME[:SPLIT]` or the import path of a source of your own, `my_data.MySource`"
)


def check_spec(spec: Any) -> None:
    """Raise `UserError` for a spec that names neither a folder that is there, nor a source, nor an import path.

    Args:
        spec: as `open_source` takes it; what is no plain string passes.
    """
    if not isinstance(spec, str) or not spec.strip() or spec.lstrip().startswith("{"):
        return
    if spec.partition(":")[0] in SOURCES or os.path.exists(os.path.expanduser(spec)):
        return
    if "://" in spec or spec.lower().endswith(".tar"):
        raise UserError(f"{spec} is not a folder; tar files, local or remote, are given as `wds:{spec}`")
    if "/" in spec or spec.startswith((".", "~")):
        raise UserError(f"no such folder: {absolute_path(spec)}; check the path, or give {FORMS}")
    if not PATH.fullmatch(spec):
        like = spec.partition(":")[0].lower()
        raise unknown("folder and no data source", spec, SOURCES.names(), f"; give {FORMS}", like=like)


def absolute_path(path: str) -> str:
    """Return a path from the root on, with `~` expanded."""
    return os.path.abspath(os.path.expanduser(path))
