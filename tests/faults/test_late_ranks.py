"""A rank that starts long after another has left its start, or never, without torchrun."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from campaign import PATIENCE, TRAIN, error_of, listens, wait_until
from launching import environment, free_port
from warm import Job

from vqdist.backends.peers import AWAITED, FAREWELL

pytestmark = pytest.mark.distributed
PLAIN = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}


class Start:
    """The start of two ranks, each at its time.

    Args:
        folder: of the run and the logs.
        by: plain variables, or those of `srun`.
    """

    def __init__(self, folder: Path, by: dict[str, str]):
        self.folder, self.by = folder, by
        self.of_place = {"MASTER_PORT": str(free_port())} if by is PLAIN else {"SLURM_JOB_ID": str(free_port())}

    def rank(self, rank: int) -> Job:
        """Start a rank, and return when it listens to signals."""
        names = ("RANK", "LOCAL_RANK") if self.by is PLAIN else ("SLURM_PROCID", "SLURM_LOCALID")
        variables = environment(**self.by, **self.of_place, **dict.fromkeys(names, str(rank)))
        variables["VQDIST_STOP_DIR"] = str(self.folder / "records")
        command = ["-m", "vqdist", *TRAIN, "--out", str(self.folder / "run"), "--dist_timeout", "2"]
        job = Job(command, environment=variables, log=self.folder / f"rank_{rank}.log")
        wait_until(lambda: listens(job), [job])
        return job


def lines_of(job: Job) -> list[str]:
    """Return what a rank said, without torch's words, which a real start silences before it imports torch."""
    return [line for line in job.printed.splitlines() if line.startswith("vqdist")]


@pytest.mark.parametrize("by", [PLAIN, SRUN], ids=["plain", "srun"])
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_comes_late_leaves_with_the_code_of_the_one_that_left(tmp_path, leaver, by):
    start = Start(tmp_path, by)
    first = start.rank(leaver)
    time.sleep(2)  # until it waits for the other
    first.send(signal.SIGUSR1)
    time.sleep(0.6 * FAREWELL)
    second = start.rank(1 - leaver)
    assert [first.wait(PATIENCE), second.wait(PATIENCE)] == [75, 75], (first.printed, second.printed)
    said = f"vqdist: stopped by SIGUSR1 (rank {leaver}) before training began; the same command starts again"
    assert lines_of(first) == [said]
    assert error_of(second).startswith(f"vqdist: error: lost rank {leaver}: it ended with: stopped by SIGUSR1 before")
    assert [path.name for path in (tmp_path / "records").iterdir()] == [f"stopped_rank_{leaver:05d}.json"]


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_says_who_never_came_when_it_leaves(tmp_path, leaver):
    first = Start(tmp_path, PLAIN).rank(leaver)
    awaited = "2 processes" if leaver == 0 else "rank 0"
    deadline = time.monotonic() + 3 * AWAITED
    while f"vqdist: rank {leaver} waits for {awaited} at 127.0.0.1:" not in first.printed:
        assert first.poll() is None and time.monotonic() < deadline, first.printed
        time.sleep(0.2)
    first.send(signal.SIGTERM)
    assert first.wait(PATIENCE) == 75
    assert lines_of(first)[1:] == [
        f"vqdist: stopped by SIGTERM (rank {leaver}) before training began; the same command starts again",
        f"vqdist: rank {1 - leaver} did not come within {FAREWELL:g} seconds and was not told; stop it too, or it "
        "waits for this rank until dist_timeout",
    ]
