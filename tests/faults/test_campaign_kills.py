"""kill -9 at random moments, again and again: every chain ends as an undisturbed run, to the bit."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

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
MOST = 8  # kills of one chain
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
    kills: list[int] = []

    def chain(number: int) -> None:
        out, chance = tmp_path / f"chain_{number}", random.Random(f"{SEED} {number}")
        killed = ended = 0
        while killed < MOST and not ended:
            if chance.random() < 0.5:
                (job,) = start(out, program=(*AT_EVENT, str(chance.randint(1, changes))))
            else:
                (job,) = start(out)
                time.sleep(chance.uniform(0, seconds))
                job.send(signal.SIGKILL)
            code = job.wait(PATIENCE)
            assert code in (0, -signal.SIGKILL), job.printed[-3000:]
            killed, ended = killed + (code != 0), code == 0
        finish(out)
        assert differences(out, whole) == [], f"chain {number} after {killed} kills"
        kills.append(killed)

    chains = 0
    while sum(kills) < 100:
        side_by_side(chain, range(chains, chains + 2 * AT_ONCE))
        chains += 2 * AT_ONCE
    print(f"{sum(kills)} kills in {chains} chains, a run has {changes} changes of files and takes {seconds:.1f} s")
    tried(
        "kill -9 of one process, half at random moments, half at random changes of files",
        sum(kills),
        f"{chains} of {chains} chains end as an undisturbed run, to the bit",
    )


@pytest.mark.timeout(3000)
def test_kills_of_two_ranks(tmp_path, tried):
    """One of them or both; the one that is left ends by itself, with one line."""
    programs()  # whose start is no part of a run's time
    began = time.monotonic()
    whole = undisturbed(tmp_path, ranks=2)
    seconds = time.monotonic() - began
    kills: list[int] = []

    def chain(number: int) -> None:
        out, chance = tmp_path / f"chain_{number}", random.Random(f"{SEED} two {number}")
        killed = ended = 0
        while killed < 4 and not ended:
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
            killed, ended = killed + hit, not hit
        finish(out, ranks=2)
        assert differences(out, whole) == [], f"chain {number} after {killed} kills"
        kills.append(killed)

    chains = 0
    while sum(kills) < 30:
        side_by_side(chain, range(chains, chains + 2 * AT_ONCE))
        chains += 2 * AT_ONCE
    tried(
        "kill -9 of one of two ranks or of both, at random moments",
        sum(kills),
        f"{chains} of {chains} chains end as an undisturbed run, to the bit; a rank that is left says so in one line",
    )


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
