"""Checkpoints are complete or absent, checked, kept as many as asked for, and whole."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, run, torchrun
from scenarios import EVERYTHING, build_trainer, train_steps, weights_of

from vqdist import completion
from vqdist.backends.local import LocalBackend
from vqdist.checkpoint import CheckpointStore, complete_steps, verify
from vqdist.completion import MANIFEST
from vqdist.errors import PeerLost, UserError


def store(folder: Path, keep: int | None = None) -> CheckpointStore:
    return CheckpointStore(folder, LocalBackend(), keep=keep)


def write(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "weights").write_bytes(b"0123456789")


def complete(checkpoints: CheckpointStore, step: int, info: dict) -> Path:
    path = checkpoints.save(step, write, info)
    checkpoints.settle()
    return path


def test_only_complete_folders_count(tmp_path):
    checkpoints = store(tmp_path)
    checkpoints.save(5, write, {"note": "x"})
    (tmp_path / "step_00000009.partial").mkdir()
    (tmp_path / "step_00000008").mkdir()  # no manifest
    assert checkpoints.steps() == [5]
    assert checkpoints.latest() == tmp_path / "step_00000005"
    checkpoints.clean()
    assert not (tmp_path / "step_00000009.partial").exists()


def test_a_write_that_fails_leaves_the_older_checkpoint_in_place(tmp_path):
    checkpoints = store(tmp_path)
    checkpoints.save(5, write, {})

    def broken(folder: Path) -> None:
        write(folder)
        raise OSError("disk full")

    with pytest.raises(UserError, match="step_00000006 cannot be written: disk full$"):
        checkpoints.save(6, broken, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
    checkpoints.save(6, write, {})
    assert checkpoints.steps() == [5, 6]


class Held:
    """In place of `completion.write_manifest`: it waits until it is let go, and may fail then."""

    def __init__(self, monkeypatch, error: Exception | None = None):
        self.error = error
        self.let_go, self._original = threading.Event(), completion.write_manifest
        monkeypatch.setattr(completion, "write_manifest", self)

    def __call__(self, *arguments) -> None:
        assert self.let_go.wait(60)
        if self.error is not None:
            raise self.error
        self._original(*arguments)


def test_training_goes_on_while_a_checkpoint_is_completed(tmp_path, monkeypatch):
    held = Held(monkeypatch)
    trainer = build_trainer(tmp_path, save_model_every=2, **EVERYTHING)
    expected = train_steps(trainer, 2)
    train_steps(trainer, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002.partial"]
    held.let_go.set()
    assert trainer.checkpoints.steps() == [2]
    resumed = build_trainer(tmp_path, save_model_every=2, **EVERYTHING)
    assert resumed.step == 2 and all(
        torch.equal(expected[name], tensor) for name, tensor in weights_of(resumed).items()
    )


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_checkpoint_that_cannot_be_completed_is_said_and_ends_the_next_save(tmp_path, monkeypatch, capsys):
    held = Held(monkeypatch, FULL)
    checkpoints = store(tmp_path)
    checkpoints.save(5, write, {})
    held.let_go.set()
    assert checkpoints.steps() == [] and list(tmp_path.iterdir()) == []
    line = f"vqdist: warning: {tmp_path}/step_00000005 cannot be completed: No space left on device\n"
    assert capsys.readouterr().err == line
    with pytest.raises(UserError, match="step_00000005 cannot be written: No space left on device$"):
        checkpoints.save(6, write, {})
    held.error = None
    checkpoints.save(6, write, {})
    assert checkpoints.steps() == [6]


def test_threads_that_cannot_be_started_are_a_failed_write_on_every_rank(tmp_path, monkeypatch):
    started, start = itertools.count(1), threading.Thread.start

    def refuse_the_last(thread: threading.Thread) -> None:
        if thread.name.startswith("checkpoint") and next(started) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    sums = completion.sha256_of
    monkeypatch.setattr(completion, "sha256_of", lambda path: time.sleep(0.3) or sums(path))  # none is idle
    monkeypatch.setattr(completion, "_flush", lambda path: time.sleep(0.3))
    monkeypatch.setattr(threading.Thread, "start", refuse_the_last)
    checkpoints = store(tmp_path)
    checkpoints.save(5, write, {})
    with pytest.raises(UserError, match="step_00000005 cannot be written: can't start new thread$"):
        checkpoints.settle()
    time.sleep(1)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_rank_0_completes_is_in_doubt_until_it_says_so(tmp_path, monkeypatch):
    class SecondRank(LocalBackend):
        is_main = False

    checkpoints = CheckpointStore(tmp_path, SecondRank(), keep=None)
    (tmp_path / "step_00000005.partial").mkdir()
    checkpoints.save(5, write, {})
    assert checkpoints.in_doubt() == tmp_path / "step_00000005"

    def lost(_flag: bool) -> bool:
        raise PeerLost((0,), "lost rank 0")

    monkeypatch.setattr(checkpoints.backend, "any", lost)
    with pytest.raises(PeerLost):
        checkpoints.settle()
    assert checkpoints.in_doubt() == tmp_path / "step_00000005"


def test_old_checkpoints_that_cannot_be_removed_are_said(tmp_path, monkeypatch, capsys):
    checkpoints = store(tmp_path, keep=1)
    complete(checkpoints, 5, {})

    def refuse(_folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("vqdist.checkpoint.remove_atomically", refuse)
    words = f"old checkpoints in {tmp_path} cannot be removed: Permission denied"
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        complete(checkpoints, 6, {})
    assert capsys.readouterr().err == f"vqdist: warning: {words}\n" and checkpoints.steps() == [5, 6]


def test_a_run_whose_last_checkpoint_failed_is_saved_by_another_call(tmp_path, monkeypatch):
    held = Held(monkeypatch, FULL)
    held.let_go.set()
    trainer = build_trainer(tmp_path, num_train_steps=1)
    with pytest.raises(UserError, match="No space left on device"):
        trainer.train()
    held.error = None
    trainer.train()
    assert trainer.checkpoints.steps() == [1]


def test_others_wait_while_threads_write(tmp_path, monkeypatch):
    """The folder is locked until they are done; who looks for checkpoints, cleans up or loads one waits."""
    held = Held(monkeypatch)
    trainer = build_trainer(tmp_path / "run", save_model_every=1)
    trainer.train_step()
    path = trainer.checkpoints.path(1)
    assert trainer.checkpoints.in_doubt() == path and trainer.checkpoints.latest(patience=0.1) is None
    del trainer
    gc.collect()
    lock = [
        sys.executable,
        "-c",
        f"from vqdist.files import lock_folder as f; from pathlib import Path as P; f(P({str(tmp_path / 'run')!r}))",
    ]
    assert "another process writes" in run(lock, check=False).stderr
    other = build_trainer(tmp_path / "other")
    threading.Timer(0.5, held.let_go.set).start()
    other.load(path)
    assert other.step == 1
    gc.collect()
    run(lock)


def test_a_checkpoint_is_completed_where_it_was_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = Held(monkeypatch)
    checkpoints = store(Path("run"), keep=1)
    folder = checkpoints.folder.absolute()
    checkpoints.save(5, write, {})
    monkeypatch.chdir("/")
    held.let_go.set()
    assert complete_steps(folder) == [5]


@pytest.mark.parametrize("error", [UserError("a mistake"), RuntimeError("a defect")])
def test_an_error_lets_the_checkpoint_be_completed(tmp_path, monkeypatch, error):
    """A rank with peers leaves by `os._exit`, which waits for no thread; the words on lost ranks wait."""
    held = Held(monkeypatch)
    trainer = build_trainer(tmp_path, save_model_every=1, num_train_steps=5, **EVERYTHING)
    update = trainer.update

    def update_once(micro_batches):
        if trainer.step == 1:
            threading.Timer(0.5, held.let_go.set).start()
            if isinstance(error, RuntimeError):
                assert "step_00000001: the same command goes on" in trainer.early_end.how_far()[1]
            raise error
        return update(micro_batches)

    trainer.update = update_once
    with pytest.raises(type(error)):
        trainer.train()
    assert (tmp_path / "checkpoints" / "step_00000001" / MANIFEST).is_file()


@pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_process_that_just_ends_completes_its_checkpoint(warm, tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from scenarios import build_trainer
from vqdist import completion

sums = completion.sha256_of
completion.sha256_of = lambda path: time.sleep(0.2) or sums(path)
build_trainer(Path({str(tmp_path)!r}), save_model_every=1).train_step()
"""
    run([sys.executable, "-c", code], warm=warm)
    verify(tmp_path / "checkpoints" / "step_00000001")


@pytest.mark.distributed
def test_what_one_rank_cannot_write_ends_all_with_a_line(tmp_path):
    done = torchrun([str(ROOT / "tests" / "workers" / "failing_save.py"), str(tmp_path)])
    assert done.stdout.count("as expected") == 2 * 4


def test_manifest_lists_sizes_and_checksums(tmp_path):
    path = complete(store(tmp_path), 5, {"note": "x"})
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["step"] == 5 and manifest["note"] == "x"
    assert manifest["files"]["part/weights"]["bytes"] == 10
    assert verify(path) == manifest


def test_a_damaged_file_is_named(tmp_path):
    path = complete(store(tmp_path), 5, {})
    (path / "part" / "weights").write_bytes(b"012345678X")
    with pytest.raises(UserError, match=r"part/weights is damaged .* remove .*step_00000005"):
        verify(path)
    (path / "part" / "weights").unlink()
    with pytest.raises(UserError, match="part/weights is missing"):
        verify(path)


def test_retention_keeps_the_newest(tmp_path):
    checkpoints = store(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        checkpoints.save(step, write, {})
    assert checkpoints.steps() == [3, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]


@pytest.mark.parametrize("quantizer", ["random_vq", "lfq"])
def test_stop_and_resume_equals_straight_to_the_bit(tmp_path, quantizer):
    options = {**EVERYTHING, "num_train_steps": 6, "grad_accum_every": 2, "save_model_every": 3}
    straight = build_trainer(tmp_path / "straight", quantizer=quantizer, **options)
    expected = train_steps(straight, 6)
    stopped = build_trainer(tmp_path / "stopped", quantizer=quantizer, **options)
    train_steps(stopped, 3)
    torch.rand(17)  # whatever else draws between two runs
    resumed = build_trainer(tmp_path / "stopped", quantizer=quantizer, **options)
    assert (resumed.step, resumed.position) == (3, 24)
    actual = train_steps(resumed, 3)
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    for one, other in zip(straight.next_micro_batches(), resumed.next_micro_batches(), strict=True):
        assert torch.equal(one, other)


def test_save_and_load_of_any_path_restore_everything(tmp_path):
    trainer = build_trainer(tmp_path / "a", quantizer="random_vq", **EVERYTHING)
    train_steps(trainer, 2)
    trainer.save(tmp_path / "anywhere")
    expected = train_steps(trainer, 2)
    other = build_trainer(tmp_path / "b", quantizer="random_vq", **EVERYTHING)
    other.load(tmp_path / "anywhere")
    assert int(other.ema.step) == 2
    actual = train_steps(other, 2)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    trainer = build_trainer(tmp_path, save_model_every=1, **EVERYTHING)
    train_steps(trainer, 1)
    older = weights_of(trainer)
    train_steps(trainer, 1)
    weights = trainer.checkpoints.latest() / "generator" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    resumed = build_trainer(tmp_path, save_model_every=1, **EVERYTHING)
    assert resumed.step == 1
    assert all(torch.equal(older[name], tensor) for name, tensor in weights_of(resumed).items())
    assert "is damaged" in capsys.readouterr().err


def test_another_configuration_is_refused_with_keys_and_flag(tmp_path):
    build_trainer(tmp_path, **EVERYTHING).finish()
    changed = {**EVERYTHING, "lr": 0.5, "log_every": 7, "num_train_steps": 9}
    with pytest.raises(
        UserError, match=r"trainer\.lr: 0\.0001 -> 0\.5\); .*--trainer\.allow_config_change true"
    ) as error:
        build_trainer(tmp_path, **changed)
    assert "log_every" not in str(error.value) and "num_train_steps" not in str(error.value)
    trainer = build_trainer(tmp_path, allow_config_change=True, **changed)
    assert trainer.config.lr == 0.5


def test_another_model_is_refused_once_the_run_has_begun(tmp_path):
    build_trainer(tmp_path, model={"codebook_size": 16})  # ended before its first step
    build_trainer(tmp_path).train_step()
    with pytest.raises(UserError, match=r"model\.codebook_size: 32 -> 64"):
        build_trainer(tmp_path, model={"codebook_size": 64})


def test_checkpoint_without_average_says_so(tmp_path):
    trainer = build_trainer(tmp_path, use_ema=False)
    trainer.save(tmp_path / "plain")
    with pytest.raises(UserError, match="use_ema false"):
        build_trainer(tmp_path / "other").load(tmp_path / "plain")


def test_a_kill_before_old_checkpoints_are_removed_is_made_good(tmp_path):
    """Also of a run that was at its end: then no save follows that would remove them."""
    options = {**EVERYTHING, "num_train_steps": 3, "save_model_every": 1, "keep_checkpoints": 2}
    build_trainer(tmp_path / "run", **options).train()
    folder = tmp_path / "run" / "checkpoints"
    assert complete_steps(folder) == [2, 3]
    shutil.copytree(folder / "step_00000002", folder / "step_00000001")
    resumed = build_trainer(tmp_path / "run", **options)
    assert resumed.step == 3 and complete_steps(folder) == [2, 3]
