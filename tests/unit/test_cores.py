"""The cores of a rank, by affinity, quota and Slurm: of the machine they may be a small part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch  # noqa: F401 - which OpenMP it has is asked below

from vqdist.data import cores
from vqdist.data.loader import default_workers

TASK = {"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "96"}
NAMES = ("WORLD_SIZE", *cores.RANKS_HERE, "SLURM_STEP_NUM_TASKS", "SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK")
OF_OPENMP = ("OMP_NUM_THREADS", *cores.WAITING)


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


def has_gnu_openmp() -> bool:
    maps = Path("/proc/self/maps")
    return maps.is_file() and "libgomp" in maps.read_text()


@pytest.fixture
def openmp_unsaid():
    """Leave out OpenMP's variables, and what is set within the test after it."""
    with mock.patch.dict(os.environ):
        for name in OF_OPENMP:
            os.environ.pop(name, None)
        yield


@pytest.mark.parametrize(
    ("said", "added"),
    [
        ({}, {"GOMP_SPINCOUNT": cores.SPINS}),
        ({"LOCAL_WORLD_SIZE": "8"}, {"GOMP_SPINCOUNT": cores.SPINS, "OMP_NUM_THREADS": "12"}),
        ({"LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "3"}, {"GOMP_SPINCOUNT": cores.SPINS}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        ({"KMP_BLOCKTIME": "200", "MPI_LOCALNRANKS": "4"}, {"OMP_NUM_THREADS": "24"}),
    ],
)
def test_threads_share_the_cores_unless_variables_say_otherwise(openmp_unsaid, said, added):
    os.environ.update(said)
    before = dict(os.environ)
    cores.share_cores()
    assert dict(os.environ) == {**before, **added}


def test_threads_are_no_more_than_the_quota_allows(openmp_unsaid):
    cores.PROC.write_text("0::/job")
    (cores.CGROUP / "job").mkdir(parents=True)
    (cores.CGROUP / "job" / "cpu.max").write_text("150000 100000")
    cores.share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.skipif(not has_gnu_openmp(), reason="torch was built with another OpenMP")
def test_the_command_says_it_before_openmp_reads_it(openmp_unsaid):
    code = "from vqdist.cli import main; main(['--version']); import torch"
    shown = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", code], env=shown, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{cores.SPINS}'" in done.stderr
