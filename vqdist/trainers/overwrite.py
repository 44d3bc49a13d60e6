"""A run that gives way to a new one in its folder: what a run writes is removed, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vqdist.errors import UserError
from vqdist.files import EVENTS, METRICS, read_json, writing
from vqdist.protocol import EVALUATIONS

# config.json goes last: until then the folder is known as a run's
WRITTEN = (
    "checkpoints",
    *(name + end for name in ("export", "export_best") for end in ("", ".old", ".partial")),
    *("best.json", "init_optimizer.partial"),
    "results",
    "tensorboard",
    "wandb",
    "wandb.json",
    METRICS,
    EVALUATIONS,
    EVENTS,
    "config.json",
)
# launchers start the same command again after a failure or a preemption, which must not cost the run its steps
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def is_restarted() -> bool:
    """Return whether a launcher has started this command again."""
    return any(os.environ.get(name, "0").strip() not in ("", "0") for name in RESTARTS)


def remove_run(folder: Path) -> None:
    """Remove what the run in a folder has written; the lock and whatever else lies there stay.

    Raises:
        UserError: the folder has files, and none of them says that it is a run's; nothing is removed then.
    """
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if not entries:
        return
    if not _is_run(folder):
        raise UserError(f"{folder} holds no run of vqdist, and overwrite removes nothing else; give another folder")
    for path in [folder / name for name in WRITTEN]:
        with writing(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    content = read_json(path)
    return all(isinstance(content.get(part), dict) for part in ("trainer", "model", "data"))
