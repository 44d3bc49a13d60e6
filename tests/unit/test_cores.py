"""The cores of a rank, by affinity, quota and Slurm: of the machine they may be a small part."""

from __future__ import annotations

import os

import pytest

from vqdist.data import cores
from vqdist.data.loader import default_workers

TASK = {"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "96"}
NAMES = ("WORLD_SIZE", *cores.RANKS_HERE, "SLURM_STEP_NUM_TASKS", "SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Set up a machine of 96 cores without a quota, and no launcher."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(96)), raising=False)
    monkeypatch.setattr(cores, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "PROC", tmp_path / "proc")


@pytest.mark.parametrize(
    ("bound_to", "environment", "expected"),
    [
        (96, {}, 96),
        (96, {"LOCAL_WORLD_SIZE": "8"}, 12),
        (96, {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 12),
        (96, {"MPI_LOCALNRANKS": "4"}, 24),
        (96, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "32"}, 4),
        (1, {"LOCAL_WORLD_SIZE": "8"}, 1),
        (96, {**TASK, "SLURM_CPUS_PER_TASK": "6"}, 6),
        (4, {**TASK, "SLURM_CPUS_PER_TASK": "6"}, 4),
        (12, TASK, 12),  # as --cpus-per-gpu binds them; scripts export LOCAL_WORLD_SIZE
        (96, TASK, 12),  # of a cluster that binds no task
        (96, {**TASK, "SLURM_STEP_NUM_TASKS": "1"}, 12),  # torchrun in one task
        (96, {"LOCAL_WORLD_SIZE": "many"}, 96),
    ],
)
def test_cores_of_a_rank(monkeypatch, bound_to, environment, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(bound_to)), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores.cores_of_rank() == expected
    assert default_workers() == max(0, min(4, expected - 1))


@pytest.mark.parametrize(
    ("proc", "files", "expected"),
    [
        ("0::/job", {"cpu.max": "max 100000", "job/cpu.max": "250000 100000"}, 3),
        ("0::/job/step", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "800000 100000"}, 4),
        ("0::/of/the/host", {"cpu.max": "200000 100000"}, 2),  # in a container
        (
            "4:cpu,cpuacct:/a",
            {f"cpu,cpuacct/a/cpu.cfs_{of}_us": f"{us}" for of, us in (("quota", 5), ("period", 1))},
            5,
        ),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 96),
        ("4:memory:/a", {"memory/a/cpu.max": "100000 100000"}, 96),
        ("no line of its form", {"cpu.max": "0 0"}, 96),
    ],
)
def test_quotas_of_cgroups(proc, files, expected):
    cores.PROC.write_text(proc)
    for name, content in files.items():
        (cores.CGROUP / name).parent.mkdir(parents=True, exist_ok=True)
        (cores.CGROUP / name).write_text(content)
    assert cores.cores_of_process() == expected
