"""Signals that come while a training validates, draws or saves: in one process, or run by torchrun on two ranks.

usage: stopping_worker.py FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scenarios import build_dvae_trainer

from vqdist import completion
from vqdist.checkpoint import verify
from vqdist.stopping import Stopped
from vqdist.trainers.base import Trainer

# 23 images to train on; the 41 to validate on are 6 batches of rank 0 and 5 of rank 1, or 11 of one process
VALIDATING = {"valid_frac": 0.64, "num_train_steps": 3, "validate_every": 2, "batch_size": 4}


def signal_at(call: int, function: Callable, rank: int | None, trainer: Trainer, number: int = signal.SIGTERM):
    """Return the function; this rank (None: every rank) gets a signal in this call of it, from 1."""
    calls = 0

    def signalled(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and rank in (None, trainer.backend.rank):
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return signalled


def stopped(trainer: Trainer, code: int = 75) -> Stopped:
    """Train until `Stopped`, which must have this code."""
    with pytest.raises(Stopped) as error:
        trainer.train()
    assert error.value.code == code
    return error.value


def lines_of(trainer: Trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.run_folder / "metrics.jsonl").read_text().splitlines()]


def validated_steps(trainer: Trainer) -> list[int]:
    return [line["step"] for line in lines_of(trainer) if "valid/l1" in line]


def newest_manifest(trainer: Trainer) -> dict:
    return json.loads((trainer.checkpoints.latest() / "manifest.json").read_text())


def during_a_validation(folder: Path, **backend) -> None:
    """One rank gets it; all stop at the same batch, and the resumed run validates as if nothing had been."""
    options = {**VALIDATING, **backend}
    trainer = build_dvae_trainer(folder / "validation", **options)
    # at the third batch, after those of two steps
    trainer.take = signal_at(2 + 3, trainer.take, trainer.backend.world_size - 1, trainer)
    assert "stopped by SIGTERM after step 2, which is saved" in stopped(trainer).message
    assert trainer.step == 2 and validated_steps(trainer) == [] and newest_manifest(trainer)["validation_broken_off"]
    trainer.backend.barrier()
    resumed = build_dvae_trainer(folder / "validation", **options)
    resumed.train()
    undisturbed = build_dvae_trainer(folder / "undisturbed", **options)
    undisturbed.train()
    resumed.backend.barrier()
    assert validated_steps(resumed) == [2, 3] and not newest_manifest(resumed)["validation_broken_off"]
    ours, theirs = ([line for line in lines_of(one) if "valid/l1" in line] for one in (resumed, undisturbed))
    for line in (*ours, *theirs):
        assert line.pop("valid/seconds") > 0 and 0 < line.pop("valid/time_share") <= 1
    assert ours == theirs


def at_the_end_of_a_validation(folder: Path, **backend) -> None:
    """With one batch less to come than ranks need to agree, the numbers are there, and the run stops all the same."""
    trainer = build_dvae_trainer(folder / "late", **VALIDATING, **backend)
    batches = 11 if trainer.backend.world_size == 1 else 5  # of the last rank
    trainer.take = signal_at(2 + batches, trainer.take, trainer.backend.world_size - 1, trainer, signal.SIGUSR1)
    stopped(trainer)
    trainer.backend.barrier()
    assert validated_steps(trainer) == [2] and not newest_manifest(trainer)["validation_broken_off"]


def during_the_last_validation(folder: Path, **backend) -> None:
    """All steps are made and saved, and the code says that the run has not ended."""
    options = {**VALIDATING, "validate_every": 0, **backend}
    trainer = build_dvae_trainer(folder / "last", **options)
    trainer.take = signal_at(3 + 2, trainer.take, trainer.backend.world_size - 1, trainer, signal.SIGINT)
    stopped(trainer, code=130)
    trainer.backend.barrier()
    assert trainer.checkpoints.steps() == [3] and validated_steps(trainer) == []
    again = build_dvae_trainer(folder / "last", **options)
    assert again.train()["images"] == 41
    again.backend.barrier()
    assert validated_steps(again) == [3]


def during_a_save(folder: Path, **backend) -> None:
    """Check that the checkpoint that is being written is finished."""
    trainer = build_dvae_trainer(
        folder / "save", **{**VALIDATING, "validate_every": 0, "save_model_every": 2}, **backend
    )
    written = completion.write_manifest
    completion.write_manifest = signal_at(1, written, 0, trainer)
    try:
        stopped(trainer)
    finally:
        completion.write_manifest = written
    trainer.backend.barrier()
    # training goes on meanwhile, and another rank hears of the signal a step later
    assert trainer.checkpoints.steps() == [2, 3][: trainer.step - 1]
    verify(trainer.checkpoints.latest())


def during_a_picture(folder: Path, **backend) -> None:
    """Check that a picture half drawn by rank 0 at the signal never appears, and that the last one is drawn again."""
    options = {**VALIDATING, "validate_every": 3, **backend}
    trainer = build_dvae_trainer(folder / "picture", **options)
    views = []
    trainer.views = lambda *_: [os.kill(os.getpid(), signal.SIGTERM), views.append("gone on")]
    stopped(trainer)
    trainer.backend.barrier()
    assert trainer.step == 3 and views == [] and not trainer.picture_path.exists()
    again = build_dvae_trainer(folder / "picture", **options)
    again.train()
    again.backend.barrier()
    assert again.picture_path.is_file()


def before_a_picture(folder: Path, **backend) -> None:
    """Check a signal after the question whether to draw: the ranks' part is done, and nothing is drawn."""
    options = {**VALIDATING, "validate_every": 0, "save_results_every": 2, **backend}
    trainer = build_dvae_trainer(folder / "before", **options)
    averaged, entered = trainer.averaged_network, signal_at(1, lambda: None, 0, trainer)

    def averaged_network():
        if trainer.step == 2:
            entered()
        return averaged()

    trainer.averaged_network = averaged_network
    assert "stopped by SIGTERM after step 2, which is saved" in stopped(trainer).message
    trainer.backend.barrier()
    assert newest_manifest(trainer)["picture_broken_off"] and not trainer.picture_path.exists()
    drawn_by_the_next_run(folder / "before", folder / "as_ever", options, step=2)


def during_a_picture_of_a_step(folder: Path, **backend) -> None:
    """In the middle of training: every rank stops at its very step, and the resumed run draws it first."""
    options = {**VALIDATING, "validate_every": 0, "save_results_every": 2, **backend}
    trainer = build_dvae_trainer(folder / "half", **options)
    trainer.views = lambda *_: os.kill(os.getpid(), signal.SIGHUP)
    assert "stopped by SIGHUP after step 2, which is saved" in stopped(trainer).message
    trainer.backend.barrier()
    assert trainer.step == 2 and newest_manifest(trainer)["picture_broken_off"]
    drawn_by_the_next_run(folder / "half", folder / "undisturbed_half", options, step=2)


def instead_of_a_picture(folder: Path, **backend) -> None:
    """All ranks know of the signal when they would draw: nothing is begun, and the resumed run draws it."""
    options = {**VALIDATING, "validate_every": 2, "save_results_every": 2, **backend}
    trainer = build_dvae_trainer(folder / "instead", **options)
    trainer.take = signal_at(2 + 3, trainer.take, trainer.backend.world_size - 1, trainer, signal.SIGUSR2)
    stopped(trainer)
    trainer.backend.barrier()
    manifest = newest_manifest(trainer)
    assert manifest["validation_broken_off"] and manifest["picture_broken_off"]
    drawn_by_the_next_run(folder / "instead", folder / "undisturbed_instead", options, step=2)


def drawn_by_the_next_run(stopped_run: Path, undisturbed: Path, options: dict, step: int) -> None:
    """Check that the resumed run has the pictures of an undisturbed one, to the bit."""
    for folder in (stopped_run, undisturbed):
        trainer = build_dvae_trainer(folder, **options)
        trainer.train()
        trainer.backend.barrier()
    assert not newest_manifest(trainer)["picture_broken_off"]
    name = f"results/step_{step:08d}.png"
    assert (stopped_run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert {path.name for path in (stopped_run / "results").glob("*.png")} == {
        path.name for path in (undisturbed / "results").glob("*.png")
    }


SCENARIOS = (
    during_a_validation,
    at_the_end_of_a_validation,
    during_the_last_validation,
    during_a_save,
    during_a_picture,
    before_a_picture,
    during_a_picture_of_a_step,
    instead_of_a_picture,
)


if __name__ == "__main__":
    for scenario in SCENARIOS:
        scenario(Path(sys.argv[1]), backend="accelerate")
        print(f"{scenario.__name__}: as expected", flush=True)
