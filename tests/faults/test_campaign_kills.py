"""kill -9 at random moments, again and again: every chain ends as an undisturbed run, to the bit."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from campaign import (
    AT_ONCE,
    PATIENCE,
    SEED,
    TRAIN,
    WORKERS,
    differences,
    error_of,
    finish,
    side_by_side,
    start,
    undisturbed,
)
from launching import ROOT, environment
from warm import programs

pytestmark = pytest.mark.distributed
AT_EVENT = (str(WORKERS / "killed_at_event.py"),)


@pytest.mark.timeout(3000)
def test_kills_of_one_process(tmp_path, tried):
    """Half of them at a random moment of the clock, half at a random change of a file."""
    whole = undisturbed(tmp_path)
    began = time.monotonic()
    (counted,) = start(tmp_path / "counted", program=(*AT_EVENT, "0"))
    assert counted.wait(PATIENCE) == 0
    seconds = time.monotonic() - began
    changes = int(re.search(r"changes: (\d+)", counted.printed)[1])

    def attempt(out: Path, chance: random.Random) -> bool:
        if chance.random() < 0.5:
            (job,) = start(out, program=(*AT_EVENT, str(chance.randint(1, changes))))
        else:
            (job,) = start(out)
            time.sleep(chance.uniform(0, seconds))
            job.send(signal.SIGKILL)
        code = job.wait(PATIENCE)
        assert code in (0, -signal.SIGKILL), job.printed[-3000:]
        return code != 0

    kills, chains = kill_in_chains(attempt, tmp_path, whole, kills=100, most=8, seed=f"{SEED}")
    print(f"{kills} kills in {chains} chains, a run has {changes} changes of files and takes {seconds:.1f} s")
    tried(
        "kill -9 of one process, half at random moments, half at random changes of files",
        kills,
        f"{chains} of {chains} chains end as an undisturbed run, to the bit",
    )


@pytest.mark.timeout(3000)
def test_kills_of_two_ranks(tmp_path, tried):
    """One of them or both; the one that is left ends by itself, with one line."""
    programs()  # whose start is no part of a run's time
    began = time.monotonic()
    whole = undisturbed(tmp_path, ranks=2)
    seconds = time.monotonic() - began

    def attempt(out: Path, chance: random.Random) -> bool:
        jobs = start(out, "--dist_timeout", "0.5", ranks=2)
        time.sleep(chance.uniform(0, seconds))
        victims = chance.choice([(0,), (1,), (0, 1)])
        for victim in victims:
            jobs[victim].send(signal.SIGKILL)
        codes = [job.wait(PATIENCE) for job in jobs]
        hit = any(codes[victim] == -signal.SIGKILL for victim in victims)
        for rank in {0, 1} - set(victims):
            assert codes[rank] in ((0, 2, 69) if hit else (0,)), (codes, jobs[rank].printed[-3000:])
            if codes[rank]:
                assert re.search("lost rank|did not meet|cannot exchange|lost the", error_of(jobs[rank]))
        return hit

    kills, chains = kill_in_chains(attempt, tmp_path, whole, kills=30, most=4, seed=f"{SEED} two", ranks=2)
    tried(
        "kill -9 of one of two ranks or of both, at random moments",
        kills,
        f"{chains} of {chains} chains end as an undisturbed run, to the bit; a rank that is left says so in one line",
    )


def kill_in_chains(
    attempt: Callable[[Path, random.Random], bool],
    folder: Path,
    whole: dict[str, Any],
    *,
    kills: int,
    most: int,
    seed: str,
    ranks: int = 1,
) -> tuple[int, int]:
    """Kill runs until there were enough kills, and return the kills and the runs; each must end as `whole`.

    Args:
        attempt: starts a run in a folder, or goes on with it, and returns whether it was killed, or came to its end.
        folder: holds those of the runs.
        whole: content of an undisturbed run.
        kills: at least.
        most: of one run.
        seed: of the draws, with the number of the run.
        ranks: that each run ends with.
    """

    def chain(number: int) -> int:
        out, chance, killed = folder / f"chain_{number}", random.Random(f"{seed} {number}"), 0
        while killed < most and attempt(out, chance):
            killed += 1
        finish(out, ranks=ranks)
        assert differences(out, whole) == [], f"chain {number} after {killed} kills"
        return killed

    found: list[int] = []
    while sum(found) < kills:
        found += side_by_side(chain, range(len(found), len(found) + 2 * AT_ONCE))
    return sum(found), len(found)


@pytest.mark.timeout(1200)
def test_kills_of_the_command_as_it_is_typed(tmp_path, tried):
    """Nothing is imported before; the run that ends is such a one, too."""
    whole, out = undisturbed(tmp_path), tmp_path / "run"
    command = [sys.executable, "-m", "vqdist", *TRAIN, "--out", str(out)]
    for step in (3, 8):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        wait_for_line(out, step, process)
        process.kill()
        assert process.wait(60) in (-signal.SIGKILL, 0)
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences(out, whole) == []
    tried("kill -9 of a command as it is typed", 2, "the chain ends as an undisturbed run, to the bit")


def wait_for_line(out: Path, step: int, process: subprocess.Popen) -> None:
    """Return once a run has logged a step."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and f'"step": {step},' not in _lines(out):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _lines(out: Path) -> str:
    return (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
