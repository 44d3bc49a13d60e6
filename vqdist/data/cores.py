"""The processor cores that a process may use, which are often fewer than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc/self/cgroup")
RANKS_HERE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""Number of ranks on this node: by torchrun, Open MPI, and Intel MPI or MPICH."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables that say how a thread waits for others: OpenMP's own, GNU's, and those of Intel and LLVM."""
SPINS = "1000"
"""Turns of a waiting thread before it sleeps: those that GNU's OpenMP takes where it has more threads than cores."""


def share_cores() -> None:
    """Let OpenMP share this machine's cores, where its variables say nothing; call it before torch is imported.

    A thread that waits for another spins for 20 microseconds, then sleeps. GNU's default is 6 milliseconds. Beside
    other programs that is the time in which the other thread could have run on this core. The number of threads is
    that of the cores of this rank: OpenMP knows neither the quota of a container nor the ranks beside this one.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if "OMP_NUM_THREADS" not in os.environ and cores_of_rank() < _affinity():
        os.environ["OMP_NUM_THREADS"] = str(cores_of_rank())


def cores_of_rank() -> int:
    """Return the cores that one rank may use: its share of those that the ranks on this node have together.

    Tasks that Slurm started have cores of their own, so nothing is divided there. They are as many as
    `--cpus-per-task` says, or those that the task is bound to, as by `--cpus-per-gpu`.
    """
    cores, on_node = cores_of_process(), _number("SLURM_CPUS_ON_NODE")
    if _is_slurm_task():
        tasks = _number("SLURM_CPUS_PER_TASK")
        if tasks or cores < on_node:
            return max(1, min(cores, tasks or cores))
    if on_node:
        cores = min(cores, on_node)
    return max(1, cores // max(1, *map(_number, RANKS_HERE)))


def cores_of_process() -> int:
    """Return the cores that the system lets this process use: by its affinity, and by the quota of its cgroups."""
    return max(1, math.ceil(min(_affinity(), _quota())))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_slurm_task() -> bool:
    """Return whether this rank is a task of an `srun`, as against one that a launcher started within a task."""
    return _number("SLURM_STEP_NUM_TASKS") == _number("WORLD_SIZE") > 1


def _quota() -> float:
    """Return the cores of the tightest quota among this process's cgroups, of version 2 or 1; infinite without one."""
    quotas = [math.inf]
    for line in _lines(PROC):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        version_1 = "cpu" in controllers.split(",")
        if not controllers or version_1:
            root = CGROUP / controllers if version_1 else CGROUP
            inner = root / path.lstrip("/")
            # within a container the path may be that of the host, and the container's own is the root
            quotas += [
                _quota_of(folder, version_1) for folder in {root, inner, *inner.parents} if folder.is_relative_to(root)
            ]
    return min(quotas)


def _quota_of(folder: Path, version_1: bool) -> float:
    if version_1:
        quota, period = _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us")
        words = [*quota[:1], *period[:1]]
    else:
        words = " ".join(_lines(folder / "cpu.max")[:1]).split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return math.inf  # "max", or -1
    return int(words[0]) / int(words[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeError):
        return []


def _number(name: str) -> int:
    """Return a number of the environment, 0 where there is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() and len(value) < 10 else 0
