"""A run that gives way to a new one in its folder, and how a launcher's restart knows which of the two is there.

Launchers start the same command again after a failure or a preemption. Then the new run must not be removed, and the
old one, where the first attempt ended before it was removed, must not be gone on with. A mark in the folder says which
launch has begun the run that is there.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import EVENTS, METRICS, read_json, write_json, writing
from vqdist.protocol import EVALUATIONS

MARK = "begun.json"
# the configuration goes last; in the midst of it the mark says that the folder is a run's
WRITTEN = (
    "checkpoints",
    *(name + end for name in ("export", "export_best") for end in ("", ".old", ".partial")),
    "init_optimizer.partial",
    "results",
    "tensorboard",
    "wandb",
    METRICS,
    EVALUATIONS,
    EVENTS,
    *(name + end for name in ("best.json", "wandb.json", "config.json") for end in (".partial", "")),
)
RUN_ID = "TORCHELASTIC_RUN_ID"
_begun_here: set[Path] = set()


# ------------------------------------------------------------------------------------- whose run it is


def begun_by_this_launch(folder: Path) -> bool:
    """Return whether an earlier attempt of this launch has begun the run in a folder, as `mark_begun` says it there.

    An attempt is later where Slurm has requeued the job of the mark since, or where the torchrun of this process was
    there before the mark. All ranks find the same, but for one on a host that has joined since.
    """
    mark = None if folder.resolve() in _begun_here else _read_mark(folder)
    if mark is None:
        return False
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and mark["job"] == job and _requeued() > mark["requeued"]:
        return True
    return RUN_ID in os.environ and mark["run_id"] == os.environ[RUN_ID] and _launched_before(mark["at"])


def mark_begun(folder: Path) -> None:
    """Say in a folder that this launch begins the run in it."""
    _begun_here.add(folder.resolve())
    mark = {"run_id": os.environ.get(RUN_ID), "job": os.environ.get("SLURM_JOB_ID"), "requeued": _requeued()}
    write_json(folder / MARK, {"at": time.time(), **mark})


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """Return the mark in a folder; None where there is none that is whole."""
    mark: dict[str, Any] = {}
    with suppress(UserError):
        mark = read_json(folder / MARK)
    numbers = all(isinstance(mark.get(name), int | float) for name in ("at", "requeued"))
    return mark if numbers and {"run_id", "job"} <= mark.keys() else None


def _requeued() -> int:
    """Return how often Slurm has started this job again."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def _launched_before(moment: float) -> bool:
    """Return whether torchrun was there at a moment of the clock; where nobody can know, whether it restarted this."""
    try:
        ticks = int(Path(f"/proc/{_torchrun()}/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return time.time() - age < moment


def _torchrun() -> int:
    """Return the process that launched this one: the nearest ancestor without a launched process's variables."""
    process = os.getppid()
    while f"{RUN_ID}=".encode() in Path(f"/proc/{process}/environ").read_bytes():
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process


# ------------------------------------------------------------------------------------- removing one


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
    # of no launch: the next attempt is to remove what this one leaves
    write_json(folder / MARK, {"at": 0.0, "run_id": None, "job": None, "requeued": 0})
    for path in [folder / name for name in WRITTEN]:
        with writing(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    if _read_mark(folder) is not None:
        return True
    path = folder / "config.json"
    if not path.is_file():
        return False
    content = read_json(path)
    return all(isinstance(content.get(part), dict) for part in ("trainer", "model", "data"))
