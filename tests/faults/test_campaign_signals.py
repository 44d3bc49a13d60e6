"""Signals at random moments: the right code, all of it saved, and the end of an undisturbed run."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from campaign import (
    PATIENCE,
    SEED,
    STEPS,
    WORKERS,
    differences,
    finish,
    listens,
    side_by_side,
    start,
    undisturbed,
    wait_until,
)
from warm import programs
from workers.signalled_at_end import MOMENTS

from vqdist.checkpoint import complete_steps
from vqdist.stopping import NOTED, exit_code

pytestmark = pytest.mark.distributed
USUAL, KEEP = range(2, STEPS + 1, 2), 3  # steps that are saved in any case, and checkpoints that stay


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("ranks", "signals"), [(1, 24), (2, 12)])
def test_signals_at_random_moments(tmp_path, tried, ranks, signals):
    """From the moment on at which the command listens; of two ranks one gets the signal, or both."""
    programs()  # whose start is no part of a run's time
    began = time.monotonic()
    whole = undisturbed(tmp_path, ranks=ranks)
    seconds = time.monotonic() - began

    def stopped(number: int) -> str:
        out, chance = tmp_path / f"run_{number}", random.Random(f"{SEED} {ranks} {number}")
        sent = NOTED[number % len(NOTED)]
        jobs = start(out, "--dist_timeout", "1", ranks=ranks)
        wait_until(lambda: all(map(listens, jobs)), jobs)
        time.sleep(chance.uniform(0, seconds))
        for rank in chance.choice([(0,), (ranks - 1,), range(ranks)]):
            jobs[rank].send(sent)
        codes = {job.wait(PATIENCE) for job in jobs}
        printed = "".join(job.printed for job in jobs)
        assert not re.search("Traceback|Exception ignored", printed), printed[-4000:]
        assert codes in ({exit_code(sent)}, {0}), (sent.name, codes, printed[-4000:])
        seen, step = _when_it_came(printed, sent) if codes != {0} else ("at the end", STEPS)
        finish(out, ranks=ranks)
        kept = _kept({*USUAL, step} if step else USUAL)
        assert complete_steps(out / "checkpoints") == sorted(kept)
        moved = [f"checkpoints/step_{step:08d}/" for step in kept ^ _kept(USUAL)]
        assert differences(out, whole, but=[*moved, *_to_come(out)]) == [], f"{sent.name}, {seen}"
        return seen

    seen = side_by_side(stopped, range(signals))
    counts = ", ".join(f"{seen.count(kind)} {kind}" for kind in ("before training", "while it trained", "at the end"))
    processes = "one process" if ranks == 1 else "two ranks"
    names = ", ".join(number.name.removeprefix("SIG") for number in NOTED)
    tried(
        f"signals ({names}) to {processes} at random moments",
        signals,
        f"{counts}: 75, or 130 after INT; every step saved; resumed, all end as an undisturbed run, to the bit",
    )


@pytest.mark.timeout(3000)
def test_signals_between_the_last_step_and_the_end_of_the_process(tmp_path, tried):
    """All is done, or is made up for by the same command; no process ends by the signal itself."""
    whole = undisturbed(tmp_path)
    moments = [(moment, sent) for moment in (*MOMENTS, "exit") for sent in (signal.SIGTERM, signal.SIGINT)]

    def ended(tried_one: tuple[str, signal.Signals]) -> bool:
        moment, sent = tried_one
        out = tmp_path / f"{moment}_{sent.name}"
        (job,) = start(out, program=(str(WORKERS / "signalled_at_end.py"), moment, str(int(sent))))
        code, printed = job.wait(PATIENCE), job.printed
        assert not re.search("Traceback|Exception ignored", printed), printed[-4000:]
        said = f"stopped by {sent.name} after step {STEPS}, which is saved" in printed
        if moment == "exit" and sent == signal.SIGINT:  # of a process that has nothing left to do
            assert code == -sent, printed[-2000:]
            code = 0
        assert code == 0 or (code == exit_code(sent) and said), (moment, sent, code, printed[-2000:])
        assert complete_steps(out / "checkpoints")[-1] == STEPS
        if code == 0:
            assert differences(out, whole) == [], tried_one
        finish(out)
        assert differences(out, whole) == [], tried_one
        return code == 0

    done = sum(side_by_side(ended, moments))
    tried(
        f"signals (TERM, INT) at {len(MOMENTS) + 1} moments after the last step",
        len(moments),
        f"{done} change nothing, {len(moments) - done} stop what is left to do: 75 or 130, and the same command ends "
        "as an undisturbed run, to the bit",
    )


def _when_it_came(printed: str, sent: signal.Signals) -> tuple[str, int]:
    """Return when the signal came, by what the run said, and the step that it saved; 0 where there was none."""
    if f"stopped by {sent.name}" in printed and "before training began" in printed:
        return "before training", 0
    match = re.search(rf"stopped by {sent.name} after step (\d+), which is saved", printed)
    assert match is not None and 0 <= int(match[1]) <= STEPS, printed[-4000:]
    return "while it trained", int(match[1])


def _to_come(out: Path) -> list[str]:
    """Return the beginnings of files of checkpoints that a broken-off validation or picture would have changed."""
    found = []
    for path in out.glob("checkpoints/*/manifest.json"):
        manifest, folder = json.loads(path.read_text()), f"checkpoints/{path.parent.name}"
        found += [f"{folder}/numbers_rank_"] if manifest["picture_broken_off"] else []  # how often each code occurred
        found += [f"{folder}/{path.name}"] if manifest["validation_broken_off"] else []  # the best one so far
    return found


def _kept(steps: Iterable[int]) -> set[int]:
    """Return the steps whose checkpoints are kept at the end of a run: the one of the signal is one of them."""
    return {*sorted(steps)[-KEEP:]}
