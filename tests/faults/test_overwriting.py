"""A run that gives way to a new one: on two ranks, while a process trains in it, after a restart by torchrun."""

from __future__ import annotations

import json
import re
import signal
import sys

import pytest
from campaign import PATIENCE, WORKERS, content_of, differences, error_of, finish, start, undisturbed, wait_until
from launching import free_port, last_step, run, torchrun
from scenarios import build_trainer, train_steps

from vqdist.trainers.overwrite import MARK

pytestmark = pytest.mark.distributed


def test_two_ranks_overwrite_a_run_and_end_as_those_that_found_none(tmp_path):
    whole = undisturbed(tmp_path, ranks=2)
    out = tmp_path / "run"
    finish(out, "--trainer.lr", "0.5", "--trainer.num_train_steps", "7")
    finish(out, "--overwrite", ranks=2)
    assert differences(out, whole, but=[MARK, "config.json"]) == []
    before, now = (json.loads(content["config.json"]) for content in (whole, content_of(out)))
    assert now == {**before, "trainer": {**before["trainer"], "overwrite": True}}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_trains_is_not_overwritten(tmp_path, ranks):
    out = tmp_path / "run"
    endless = ["--trainer.num_train_steps", "100000"]
    (first,) = start(out, *endless)
    wait_until(lambda: last_step(out) >= 4, [first])
    others = start(out, *endless, "--overwrite", ranks=ranks)
    assert [job.wait(PATIENCE) for job in others] == [2] * ranks, [job.printed[-3000:] for job in others]
    for job in others:
        assert f"another process writes {out} (process {first.pid} on " in error_of(job)
    reached = last_step(out)
    wait_until(lambda: last_step(out) > reached + 2, [first])
    first.send(signal.SIGTERM)
    assert first.wait(PATIENCE) == 75
    lines = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == 1 and {*range(1, reached)} <= {*lines} and not (out / MARK).exists()


@pytest.mark.parametrize(("dies", "begins"), [("start", [0]), ("training", [0, 3])])
def test_torchruns_restart_neither_goes_on_with_the_old_run_nor_removes_the_new_one(tmp_path, dies, begins):
    old = build_trainer(tmp_path, save_model_every=1, lr=0.5)
    train_steps(old, 2)
    old.close()
    command = ["--max-restarts", "1", str(WORKERS / "overwrite_worker.py"), str(tmp_path), dies]
    done = torchrun(command, warm=False)  # whose ranks are its children
    assert [int(step) for step in re.findall(r"begins at step (\d+)", done.stdout)] == begins
    assert last_step(tmp_path) == 5
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["lr"] != 0.5


@pytest.mark.nightly
def test_a_host_that_has_joined_as_rank_0_removes_nothing_and_a_second_trainer_begins_anew_on_all_ranks(tmp_path):
    done = torchrun([str(WORKERS / "joined_worker.py"), str(tmp_path)])
    begins = {"first": 0, "second": 0, "joined": 2, "refusing": 3, "strange": 0}
    found = re.findall(r"(\w+) begins at step (\d+)", done.stdout)
    assert sorted(found) == sorted((name, str(step)) for name, step in begins.items() for _ in range(2))


def test_each_launch_from_one_process_is_a_launch_of_its_own(tmp_path):
    """Also where it is older than what it has begun before, as a notebook's kernel is."""
    command = [sys.executable, str(WORKERS / "kernel_worker.py"), str(tmp_path), str(free_port())]
    run(command, warm=False)
    assert (tmp_path / "found").read_text().split() == ["False", "True", "False", "True"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_torchrun_is_a_launch_of_its_own(tmp_path, wrapped):
    """Though all of them have the same name; also where a script lies between torchrun and the interpreter."""
    worker = f"{WORKERS / 'launch_worker.py'} {tmp_path}"
    command = ["--no-python", "bash", "-c", f"{sys.executable} {worker}; exit $?"] if wrapped else worker.split()
    for _ in range(2):
        run(["torchrun", "--nproc_per_node", "1", "--max-restarts", "1", *command], warm=False)
    assert (tmp_path / "found").read_text().split() == ["False", "True", "False", "True"]
