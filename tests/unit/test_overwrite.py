"""A launcher's restart of a command that begins a run anew: it tells the old run from the new one."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from scenarios import build_trainer, train_steps

from vqdist import UserError
from vqdist.backends.local import LocalBackend
from vqdist.trainers import overwrite
from vqdist.trainers.overwrite import MARK, begun_by_this_launch

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
AGAIN = {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}
SLURM = {"SLURM_JOB_ID": "77"}
REQUEUED = {**SLURM, "SLURM_RESTART_COUNT": "1"}


@pytest.fixture
def attempt(monkeypatch, tmp_path):
    """Begin an attempt of a command in a process of its own, as far as that can be told; return its step."""

    def begin(launch: dict[str, str], *, steps: int = 1, **options) -> int:
        overwrite._begun_here.clear()
        for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in launch.items():
            monkeypatch.setenv(name, value)
        trainer = build_trainer(tmp_path, save_model_every=1, **(options or {"overwrite": True}))
        found = trainer.step
        train_steps(trainer, steps)
        trainer.close()
        return found

    return begin


def launched_now(folder: Path) -> None:
    """Let the mark be of before the process that stands for torchrun here, as if that were a new one."""
    mark = json.loads((folder / MARK).read_text())
    (folder / MARK).write_text(json.dumps({**mark, "at": 1.0}))


@pytest.mark.parametrize("again", [AGAIN, REQUEUED, {**TORCHRUN, **REQUEUED}], ids=["torchrun", "slurm", "both"])
@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": False}], ids=["overwrite", "no resume"])
def test_a_restart_goes_on_with_the_run_that_its_launch_has_begun(attempt, tmp_path, again, options):
    first = {name: value for name, value in again.items() if "COUNT" not in name}
    if "overwrite" in options:
        attempt({}, steps=3)
    assert attempt(first, **options) == 0
    assert attempt(again, **options) == 1
    assert attempt({**again, "TORCHELASTIC_RESTART_COUNT": "2", "SLURM_RESTART_COUNT": "2"}, **options) == 2


@pytest.mark.parametrize("again", [AGAIN, REQUEUED, {**TORCHRUN, **REQUEUED}], ids=["torchrun", "slurm", "both"])
@pytest.mark.parametrize("before", ["resume", "overwrite"])
def test_a_restart_removes_the_old_run_where_the_first_attempt_ended_before_that(attempt, tmp_path, again, before):
    """Also where the old run was begun by the same command, under another launch."""
    attempt({"SLURM_JOB_ID": "76", **TORCHRUN} if before == "overwrite" else {}, steps=2, **{before: True})
    if before == "overwrite":
        launched_now(tmp_path)
    assert attempt(again) == 0
    assert attempt({**again, "TORCHELASTIC_RESTART_COUNT": "2", "SLURM_RESTART_COUNT": "2"}) == 1


@pytest.mark.parametrize("again", [AGAIN, REQUEUED], ids=["torchrun", "slurm"])
def test_a_restart_refuses_the_old_run_without_resume(attempt, again):
    attempt({})
    with pytest.raises(UserError, match="holds a run, and resume is false"):
        attempt(again, resume=False)


@pytest.mark.parametrize("again", [AGAIN, REQUEUED], ids=["torchrun", "slurm"])
@pytest.mark.parametrize("configuration", ["whole", "damaged", "older"])
def test_a_restart_does_not_remove_a_run_that_may_be_its_own_from_before_there_were_marks(
    attempt, tmp_path, again, configuration
):
    attempt(SLURM, steps=2)
    (tmp_path / MARK).unlink()
    path = tmp_path / "config.json"
    if configuration == "damaged":
        path.write_text("{")
        with pytest.raises(UserError, match=r"config\.json"):
            attempt(again)
    if configuration == "older":
        content = json.loads(path.read_text())
        del content["trainer"]["overwrite"]
        path.write_text(json.dumps(content))
    if configuration != "damaged":
        assert attempt(again) == 2
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir()


@pytest.mark.parametrize("again", [AGAIN, REQUEUED], ids=["torchrun", "slurm"])
def test_a_restart_without_resume_refuses_a_run_from_before_there_were_marks(attempt, tmp_path, again):
    attempt(SLURM)
    (tmp_path / MARK).unlink()
    with pytest.raises(UserError, match="holds a run, and resume is false"):
        attempt(again, resume=False)


@pytest.mark.parametrize("name", ["job-8c1f", "77"])
def test_a_job_that_is_started_again_as_a_whole_goes_on_under_a_run_id_of_its_own(attempt, tmp_path, name):
    named = {"TORCHELASTIC_RUN_ID": name}
    assert attempt(named, steps=2) == 0
    launched_now(tmp_path)
    assert attempt(named) == 2
    assert attempt({"TORCHELASTIC_RUN_ID": f"{name}0"}) == 0


def test_another_rank_that_knows_the_run_keeps_this_one_from_removing_it(attempt, tmp_path, monkeypatch):
    """On a host that has joined since, this one finds another launch's."""
    attempt(TORCHRUN, steps=2)
    launched_now(tmp_path)
    asked: list[bool] = []

    def any_of_two(_backend, flag: bool) -> bool:
        asked.append(flag)
        return flag or len(asked) == 1

    monkeypatch.setattr(LocalBackend, "any", any_of_two)
    assert attempt(TORCHRUN) == 2 and asked[0] is False
    assert (tmp_path / "checkpoints" / "step_00000003").is_dir()


def test_a_worker_that_a_kernel_forks_has_begun_nothing_yet(attempt, tmp_path, monkeypatch):
    attempt(TORCHRUN)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert begun_by_this_launch(tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("/logs/none_a/attempt_0/0/error.json", "/logs/none_a/attempt_1/0/error.json", True),
        ("/logs/none_a/attempt_0/0/error.json", "/logs/none_b/attempt_1/0/error.json", False),
        ("/logs/none_a/attempt_0/0/error.json", "/logs/b/error.json", True),
        ("", "/logs/none_b/attempt_1/0/error.json", True),
    ],
    ids=["restart", "another launch", "another layout", "no logs before"],
)
def test_a_launch_is_told_from_one_before_of_the_same_process_by_its_logs(tmp_path, monkeypatch, before, now, same):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for count, path in enumerate((before, now)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
        if not count:
            overwrite.mark_begun(tmp_path)
            overwrite._begun_here.clear()
    assert begun_by_this_launch(tmp_path) == same


@pytest.mark.parametrize("launch", [{}, SLURM, TORCHRUN], ids=["none", "slurm", "torchrun"])
def test_a_command_that_is_typed_again_overwrites(attempt, tmp_path, launch):
    """Also in the same allocation of Slurm, and by a new torchrun, whose runs all have the same name by default."""
    attempt(launch, steps=2)
    launched_now(tmp_path)
    assert attempt(launch) == 0


def test_a_second_trainer_of_a_process_overwrites_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for _ in range(2):
        trainer = build_trainer(tmp_path, overwrite=True, save_model_every=1)
        assert trainer.step == 0
        train_steps(trainer, 1)
        trainer.close()


@pytest.mark.parametrize("name", ["results", "metrics.jsonl", "config.json"])
def test_a_removal_that_was_broken_off_is_done_again(attempt, tmp_path, monkeypatch, name):
    """Whatever was still there; a file of the user's keeps the folder from being empty."""
    attempt({}, steps=2)
    (tmp_path / "results").mkdir(exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")

    def killed_at(path: Path, *_args, **_options) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        remove(path, *_args, **_options)

    remove, what, where = (
        (shutil.rmtree, "rmtree", shutil) if name == "results" else (Path.unlink, "unlink", type(tmp_path))
    )
    with monkeypatch.context() as patched:
        patched.setattr(where, what, killed_at)
        with pytest.raises(KeyboardInterrupt):
            attempt(TORCHRUN)
    assert attempt(AGAIN) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_ended_before_its_configuration_is_overwritten(attempt, tmp_path):
    attempt({})
    (tmp_path / "notes.txt").write_text("mine")
    attempt({})
    (tmp_path / "config.json").unlink()
    assert attempt({}) == 0 and (tmp_path / "config.json").is_file()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"at": "x", "run_id": "none", "job": null, "requeued": 0}'])
def test_a_damaged_mark_is_none(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    (tmp_path / MARK).write_text(content)
    assert not begun_by_this_launch(tmp_path)


def test_torchrun_is_found_above_a_script_that_it_started(monkeypatch):
    """A process between the two begins anew with each restart; its variables say that it is no launcher."""
    monkeypatch.setattr(os, "getppid", lambda: os.getpid())
    assert overwrite._torchrun() == os.getpid()  # pytest was not launched
    assert overwrite._launched_before(time.time())
    assert not overwrite._launched_before(time.time() - 86_400 * 365)
