"""Resuming with another number of processes: the same images in the same steps, and the same weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import build_dvae_trainer, largest_difference
from workers.elastic_worker import KINDS, STEPS, build, train_to

from vqdist.backends.state import load_tensors
from vqdist.data.loader import PositionSampler
from vqdist.errors import UserError
from vqdist.manifest import sealed
from vqdist.trainers.base import Trainer
from vqdist.trainers.global_batch import GlobalBatch, global_batch_of

WORKER = str(ROOT / "tests" / "workers" / "elastic_worker.py")

# --------------------------------------------------------------------------------------------- which images


def images_of_steps(phases: list[tuple[int, int, int, int]], length: int) -> list[list[int]]:
    """Return the images of each step, as all ranks take them.

    Args:
        phases: of the run, each with its steps, processes, batch size and accumulation.
        length: images to train on.
    """
    steps, position = [], 0
    for count, processes, batch_size, accumulation in phases:
        settings = {"seed": 3, "batch_size": batch_size, "world_size": processes, "position": position}
        ranks = [iter(PositionSampler(torch.arange(length), rank=rank, **settings)) for rank in range(processes)]
        for _ in range(count):
            batches = [next(rank) for _ in range(accumulation) for rank in ranks]
            steps.append([index for batch in batches for _, index in batch])
        position += count * processes * batch_size * accumulation
    return steps


@pytest.mark.parametrize("length", [7, 24, 61])
def test_steps_of_one_global_batch_are_the_same_on_any_processes(length):
    expected = images_of_steps([(15, 1, 12, 1)], length)
    for order in itertools.permutations([(1, 2, 6), (2, 3, 2), (3, 2, 2), (6, 1, 2), (4, 3, 1)], 3):
        assert images_of_steps([(5, *phase) for phase in order], length) == expected


@pytest.mark.parametrize("phases", [[(3, 2, 4, 1), (4, 1, 3, 2), (9, 3, 1, 3)], [(1, 5, 1, 1), (20, 3, 2, 1)]])
def test_every_epoch_has_each_image_once_though_the_global_batch_changes(phases):
    length = 20
    taken = list(itertools.chain(*images_of_steps(phases, length)))
    epochs = [taken[start : start + length] for start in range(0, len(taken) - length + 1, length)]
    assert len(epochs) >= 4 and all(sorted(epoch) == list(range(length)) for epoch in epochs)


# --------------------------------------------------------------------------------------------- real processes


def seen(folder: Path) -> dict[int, list[int]]:
    """Return the images of each step, in the order of their numbers."""
    lines = map(json.loads, (folder / "seen.jsonl").read_text().splitlines())
    return {line["step"]: sorted(line["images"]) for line in lines}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights, averages and optimizer states of the last checkpoint."""
    checkpoint = folder / "checkpoints" / f"step_{STEPS:08d}"
    files = {path.relative_to(checkpoint).as_posix(): load_tensors(path) for path in checkpoint.rglob("*.safetensors")}
    return {f"{file}/{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}


def resume_alone(folder: Path, steps: int, capsys) -> None:
    """In this process, on the accelerate backend: two micro-batches become four."""
    for kind in KINDS:
        trainer = build(kind, folder / f"changing_{kind}", backend="accelerate")
        assert (trainer.backend.world_size, trainer.config.grad_accum_every, trainer.global_batch) == (1, 4, 8)
        message = capsys.readouterr().err
        assert "saved by 2 processes" in message and "resumed by 1 (accelerate)" in message
        assert "one step takes 8 images with grad_accum_every 4, as it did" in message
        train_to(trainer, steps)
        trainer.close()


@pytest.mark.distributed
@pytest.mark.parametrize("backend", [("accelerate", "-"), ("deepspeed", "2")])
def test_two_one_and_two_processes_train_what_two_train(tmp_path, backend, capsys):
    """Across the boundary of an epoch, with DeepSpeed's ZeRO 2 to Accelerate and back."""
    torchrun([WORKER, *backend, str(tmp_path), str(STEPS), "straight", "changing:4"])
    resume_alone(tmp_path, 8, capsys)
    done = torchrun([WORKER, *backend, str(tmp_path), str(STEPS), "changing"])
    assert done.stderr.count("one step takes 8 images with grad_accum_every 2, as it did") == len(KINDS)
    for kind in KINDS:
        straight, changing = (tmp_path / f"{name}_{kind}" for name in ("straight", "changing"))
        assert seen(straight) == seen(changing) and len(seen(straight)) == STEPS
        first_epoch = sorted(itertools.chain(*(seen(changing)[step] for step in range(1, 10))))
        assert len(set(first_epoch)) == len(first_epoch) == 72
        difference, where = largest_difference(tensors_of(straight), tensors_of(changing))
        assert difference <= 1e-6, f"{kind}: {where} differs by {difference}"


# --------------------------------------------------------------------------------------------- the global batch


@pytest.mark.parametrize(
    "processes, told, accumulation, images",
    [
        (1, (4, 2), 4, 16),  # as two processes took
        (4, (4, 2), 1, 16),
        (2, (4, 2), 2, 16),
        (3, (4, 2), 1, 12),  # as near as it goes: 12 or 24
        (16, (4, 2), 1, 64),
        (1, (4, 4), 4, 16),  # said by the options
        (1, (16, 1), 1, 16),
        (8, (2, 1), 1, 16),
    ],
)
def test_accumulation_follows_the_processes(processes, told, accumulation, images):
    before = GlobalBatch.of(4, 2, 2)
    kept, found = before.resumed(GlobalBatch.of(*told, processes), processes)
    assert found == accumulation and told[0] * found * processes == images
    assert kept.images == 16  # what the run goes back to, when it can


def test_going_back_after_an_uneven_number_of_processes():
    before = GlobalBatch.of(4, 2, 2)
    uneven, _ = before.resumed(GlobalBatch.of(4, 2, 3), 3)
    assert uneven.resumed(GlobalBatch.of(4, 2, 2), 2) == (before, 2)


@pytest.mark.parametrize(
    "told, advice",
    [((8, 2), 1), ((4, 3), 2), ((5, 1), None)],
)
def test_changed_options_that_change_the_global_batch_are_refused(told, advice):
    advice = "" if advice is None else f"--trainer.grad_accum_every {advice} keeps that, "
    with pytest.raises(UserError) as error:
        GlobalBatch.of(4, 2, 2).resumed(GlobalBatch.of(*told, 2), 2)
    assert str(error.value) == (
        f"batch_size {told[0]} x grad_accum_every {told[1]} x processes 2 is {told[0] * told[1] * 2} images an "
        f"optimizer step, and the run has taken 16; {advice}--trainer.allow_config_change true goes on with "
        f"{told[0] * told[1] * 2}"
    )


def begun(folder: Path, **options) -> Trainer:
    trainer = build_dvae_trainer(folder, batch_size=2, grad_accum_every=4, save_model_every=1, **options)
    trainer.train_step()
    return trainer


def test_options_that_keep_the_global_batch_are_no_other_configuration(tmp_path):
    begun(tmp_path)
    trainer = build_dvae_trainer(tmp_path, batch_size=8, grad_accum_every=1)
    assert (trainer.step, trainer.position, trainer.global_batch, trainer.config.grad_accum_every) == (1, 8, 8, 1)
    trainer.train_step()
    assert trainer.position == 16


def test_options_that_change_it_need_to_be_allowed(tmp_path):
    begun(tmp_path)
    with pytest.raises(UserError, match=r"is 4 images an optimizer step, .* --trainer.grad_accum_every 4 keeps that"):
        build_dvae_trainer(tmp_path, batch_size=2, grad_accum_every=2)
    half = {"batch_size": 2, "grad_accum_every": 2}
    allowed = build_dvae_trainer(tmp_path, allow_config_change=True, save_model_every=1, **half)
    allowed.train_step()
    assert (allowed.global_batch, allowed.position) == (4, 12)
    assert build_dvae_trainer(tmp_path, **half).global_batch == 4  # from then on


def manifest_of(trainer: Trainer) -> Path:
    return trainer.checkpoints.latest() / "manifest.json"


def as_if_saved_by(processes: int, manifest: Path, **changes) -> None:
    """Rewrite a manifest."""
    content = json.loads(manifest.read_text())
    content["world_size"] = processes
    content["global_batch"] = {"batch_size": 2, "grad_accum_every": 4, "images": 8 * processes}
    manifest.write_text(json.dumps(sealed({**content, **changes})))


def test_a_global_batch_that_cannot_be_kept_is_said(tmp_path, capsys):
    trainer = begun(tmp_path)
    as_if_saved_by(3, manifest_of(trainer), global_batch={"batch_size": 2, "grad_accum_every": 4, "images": 21})
    resumed = build_dvae_trainer(tmp_path, batch_size=2, grad_accum_every=4)
    assert resumed.global_batch == 20
    message = capsys.readouterr().err
    assert "WARNING: one step takes 20 images with grad_accum_every 10, and not 21" in message
    assert resumed.resume.state_info()["global_batch"]["images"] == 21


def test_allowing_changes_takes_the_global_batch_as_told(tmp_path):
    as_if_saved_by(2, manifest_of(begun(tmp_path)))
    assert build_dvae_trainer(tmp_path / "run", batch_size=2, grad_accum_every=4).global_batch == 8
    assert build_dvae_trainer(tmp_path, batch_size=2, grad_accum_every=4, allow_config_change=True).global_batch == 8
    assert build_dvae_trainer(tmp_path, batch_size=2, grad_accum_every=4).global_batch == 16


def test_checkpoints_from_before_it_was_written_say_it_with_the_configuration(tmp_path):
    trainer = begun(tmp_path)
    as_if_saved_by(2, manifest_of(trainer))
    content = json.loads(manifest_of(trainer).read_text())
    for name in (
        "global_batch",
        "validation_broken_off",
        "picture_broken_off",
        "skipped",
        "version",
        "sha256",
        "best",
    ):
        del content[name]
    manifest_of(trainer).write_text(json.dumps(content))
    assert build_dvae_trainer(tmp_path, batch_size=2, grad_accum_every=4).config.grad_accum_every == 8
    assert global_batch_of(trainer.checkpoints.latest(), content).images == 32  # the resume wrote its own
