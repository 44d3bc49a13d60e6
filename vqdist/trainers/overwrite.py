"""A run that gives way to a new one in its folder, and how a launcher's restart knows which of the two is there.

Launchers start the same command again after a failure or a preemption. Then the new run must not be removed, and the
old one, where the first attempt ended before it was removed, must not be gone on with. A mark in the folder says which
launch has begun the run that is there. Ranks may know different things of it: one that knows its launch keeps all of
them from removing the run, see `Run.settle`.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import EVENTS, METRICS, holds_steps, read_json, write_json, writing
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
UNNAMED = ("", "none")  # run ids that launches share, since nobody gave one
# with the process: a kernel that has trained by itself forks workers, which have begun nothing
_begun_here: set[tuple[int, Path]] = set()


# ------------------------------------------------------------------------------------- whose run it is


def begun_by_this_launch(folder: Path, *, overwrites: bool = False) -> bool:
    """Return whether an earlier attempt of this launch has begun the run in a folder, as `mark_begun` says it there.

    An attempt is later where Slurm has requeued the job of the mark since. With torchrun it is where the mark has its
    run id, and that is one that somebody gave, or the launch of this process was there before the mark. A process on
    a host that has joined since cannot see the latter.

    Args:
        folder: of the run.
        overwrites: whether the command removes a run of another launch. Then one that has no mark, and may be of this
            launch all the same, is taken for such.
    """
    if (os.getpid(), folder.resolve()) in _begun_here:
        return False
    mark = _read_mark(folder)
    if mark is None:
        return overwrites and _is_restart() and _was_overwriting(folder)
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and mark["job"] == job and _requeued() > mark["requeued"]:
        return True
    run_id = os.environ.get(RUN_ID)
    if run_id is None or mark["run_id"] != run_id:
        return False
    return run_id not in UNNAMED or (not _is_launched_anew(mark) and _launched_before(mark["at"]))


def mark_begun(folder: Path) -> None:
    """Say in a folder that this launch begins the run in it."""
    note_begun(folder)
    launch = {"run_id": os.environ.get(RUN_ID), "launcher": _launcher(), "logs": _logs_of_launch()}
    job = {"job": os.environ.get("SLURM_JOB_ID"), "requeued": _requeued()}
    write_json(folder / MARK, {"at": time.time(), **launch, **job})


def note_begun(folder: Path) -> None:
    """Note that this process has begun the run in a folder: the next one that it begins there is another run."""
    _begun_here.add((os.getpid(), folder.resolve()))


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


def _is_restart() -> bool:
    """Return whether the launcher says that it has started this command before."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return _requeued() > 0 or (count.isdecimal() and int(count) > 0)


def _was_overwriting(folder: Path) -> bool:
    """Return whether the last command of a run may have been one that overwrites: its configuration denies it or not.

    There were such before there were marks.
    """
    trainer: Any = None
    with suppress(UserError):
        trainer = read_json(folder / "config.json").get("trainer")
    return holds_steps(folder) and not (isinstance(trainer, dict) and trainer.get("overwrite") is False)


def _is_launched_anew(mark: dict[str, Any]) -> bool:
    """Return whether the process that launched the run of a mark has launched once more since, as a notebook does.

    Each launch has a folder for logs, with one attempt within it for each restart.
    """
    logs = _logs_of_launch()
    same_process = mark.get("launcher") is not None and mark["launcher"] == _launcher()
    return same_process and None not in (logs, mark.get("logs")) and logs != mark["logs"]


def _logs_of_launch() -> str | None:
    """Return torch's folder for the logs of this launch; None where it has none, or lays it out in another way."""
    path = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    return str(path.parents[2]) if len(path.parents) > 3 and path.parts[-3] == attempt else None


def _launcher() -> str | None:
    """Return what no other process has in common with the one that launched this one; None where nobody can know."""
    try:
        process = _torchrun()
        namespace, boot = os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {namespace} {process} {_ticks(process)}"
    except (OSError, AttributeError):
        return None


def _launched_before(moment: float) -> bool:
    """Return whether torchrun was there at a moment of the clock; where nobody can know, whether it restarted this."""
    try:
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - _ticks(_torchrun()) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return time.time() - age < moment


def _ticks(process: int) -> int:
    """Return when a process began, in ticks since the host did."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])


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
