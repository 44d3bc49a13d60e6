"""The weights of the best validation are kept, and a run that goes wrong says so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from launching import ROOT, torchrun
from safetensors.torch import load_file
from scenarios import build_ar_trainer, build_tokenizer, build_trainer, evaluated_weights, largest_difference
from workers.best_worker import run_at as run_as_the_ranks

from vqdist import VQGanVAE, VQGanVAETrainer
from vqdist.cli import main
from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.encoding import CodeWriter
from vqdist.metrics import few_codes
from vqdist.trainers.best import FOLDER, RECORD
from vqdist.trainers.report import LINES_OF_FEW

PSNR = {1: 10.0, 2: 14.0, 3: 12.5, 4: 9.0}


def measured(trainer, values=PSNR, name: str = "psnr"):
    """Let every validation of a trainer give these numbers, by step."""
    trainer.evaluate = lambda: {name: values[trainer.step]}
    return trainer


def run_at(folder: Path, values=PSNR, **options):
    settings = {"validate_every": 1, "save_model_every": 1, "keep_checkpoints": None, **options}
    return measured(build_trainer(folder, model={"use_gan": False}, **settings), values)


def weights_by_step(trainer) -> dict[int, dict[str, torch.Tensor]]:
    """Train to the end, and return the weights that each step would export."""
    return {step: evaluated_weights(trainer) for step, _ in trainer.steps()}


def is_export(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    found = load_file(folder / "model.safetensors")
    names = {name: name.removeprefix("autoencoder.") for name in found}
    return len(found) > 0 and all(torch.equal(found[name], weights[own]) for name, own in names.items())


def test_the_best_step_is_kept_beside_the_last(tmp_path, capsys):
    trainer = run_at(tmp_path)
    weights = weights_by_step(trainer)
    assert is_export(tmp_path / FOLDER, weights[2]) and is_export(tmp_path / "export", weights[4])
    assert not is_export(tmp_path / FOLDER, weights[4])
    assert json.loads((tmp_path / FOLDER / "export.json").read_text())["step"] == 2
    said = capsys.readouterr().err
    assert f"was that of step 2, with psnr 14 dB; {tmp_path / FOLDER} has its weights" in said
    assert said.count("warning: valid/psnr is 12.5 dB at step 3, and was 14 at step 2") == 1  # once, while it lasts
    assert "9 dB at step 4" in trainer.report.warnings["validation"]  # for the summary: how it is now
    assert VQGanVAE.from_pretrained(tmp_path / FOLDER).image_size == 16


def test_where_the_last_step_is_the_best_there_is_one_export(tmp_path, capsys):
    trainer = run_at(tmp_path, {1: 9.0, 2: 8.5, 3: 9.5, 4: 9.6})
    trainer.train()
    assert not (tmp_path / FOLDER).exists() and not trainer.report.warnings
    assert "best validation" not in capsys.readouterr().err


def test_a_small_fall_is_no_warning_and_a_recovery_withdraws_one(tmp_path, capsys):
    trainer = run_at(tmp_path, {1: 10.0, 2: 9.1, 3: 8.0, 4: 10.1})
    trainer.train()
    assert capsys.readouterr().err.count("warning: valid/psnr is 8 dB at step 3") == 1
    assert not trainer.report.warnings


@pytest.mark.parametrize("worst", [math.nan, math.inf, None])
def test_numbers_that_compare_nothing_are_passed_over(tmp_path, worst):
    trainer = run_at(tmp_path, {1: 10.0, 2: worst, 3: 11.0, 4: 9.5})
    if worst is None:
        trainer.evaluate = lambda: {} if trainer.step == 2 else {"psnr": {1: 10.0, 3: 11.0, 4: 9.5}[trainer.step]}
    trainer.train()
    assert (trainer.best.step, trainer.best.value) == (3, 11.0)


def stopped_after(trainer, step: int) -> None:
    for done, _ in trainer.steps():
        if done == step:
            break
    trainer.close()


def test_a_resumed_run_knows_its_best_step(tmp_path):
    stopped_after(run_at(tmp_path / "a"), 3)
    trainer = run_at(tmp_path / "a")
    weights = weights_by_step(trainer)
    assert list(weights) == [4] and (trainer.best.step, trainer.best.value) == (2, 14.0)
    whole = weights_by_step(run_at(tmp_path / "b"))
    assert is_export(tmp_path / "a" / FOLDER, whole[2])


def test_a_best_step_that_is_yet_to_be_made_does_not_count(tmp_path):
    stopped_after(run_at(tmp_path), 3)
    for step in (2, 3):  # as after a kill before the checkpoint of step 2
        (tmp_path / "checkpoints" / f"step_{step:08d}").rename(tmp_path / f"taken_away_{step}")
    trainer = run_at(tmp_path, {2: 10.0, 3: 11.0, 4: 8.0})
    assert trainer.step == 1 and trainer.best.step == -1
    weights = weights_by_step(trainer)
    assert trainer.best.step == 3 and is_export(tmp_path / FOLDER, weights[3])


def test_a_run_that_goes_on_after_its_end_keeps_the_step_that_was_its_best(tmp_path):
    values = {1: 10.0, 2: 11.0, 3: 9.0, 4: 8.0}
    first = run_at(tmp_path, values, num_train_steps=2)
    last = weights_by_step(first)[2]
    first.close()
    assert not (tmp_path / FOLDER).exists()
    run_at(tmp_path, values).train()
    assert is_export(tmp_path / FOLDER, last)


@pytest.mark.parametrize("damage", ["not JSON", "[]", '{"step": 2}', '{"step": "x", "value": 3}', None])
def test_a_record_that_says_nothing_is_as_none(tmp_path, damage):
    stopped_after(run_at(tmp_path), 3)
    record = tmp_path / RECORD
    record.unlink() if damage is None else record.write_text(damage)
    assert run_at(tmp_path).best.step == -1


def test_an_export_of_the_best_step_that_is_damaged_does_not_count(tmp_path):
    stopped_after(run_at(tmp_path), 3)
    (tmp_path / FOLDER / "model.safetensors").write_bytes(b"cut")
    assert run_at(tmp_path).best.step == -1


def test_keep_best_false_keeps_nothing_and_still_warns(tmp_path, capsys):
    trainer = run_at(tmp_path, keep_best=False)
    trainer.train()
    assert not (tmp_path / FOLDER).exists() and not (tmp_path / RECORD).exists()
    said = capsys.readouterr().err
    assert "warning: valid/psnr is 12.5 dB at step 3" in said and FOLDER not in said


def test_a_model_of_codes_is_compared_by_their_likelihood(tmp_path):
    trainer = build_ar_trainer(tmp_path, validate_every=1)
    measured(trainer, {1: 3.0, 2: 2.5, 3: 2.7, 4: 2.55}, "nll").train()
    assert trainer.best.step == 2 and (tmp_path / FOLDER / "model.safetensors").is_file()
    assert not trainer.report.warnings  # 2.55 is near the best, and 2.7 is forgotten


def test_the_summary_repeats_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VQGanVAETrainer, "evaluate", lambda trainer: {"psnr": PSNR[trainer.step]})
    arguments = "--data synthetic:64 --image_size 16 --model.dim 16 --model.layers 2 --model.perceptual none"
    arguments += " --model.use_gan false --trainer.num_train_steps 4 --trainer.batch_size 4 --data.num_workers 0"
    arguments += f" --trainer.validate_every 1 --out {tmp_path}"
    assert main(["train", "vqgan", *arguments.split()]) == 0
    out = capsys.readouterr().out.splitlines()
    assert ["best", str(tmp_path / FOLDER)] in [line.split() for line in out]
    assert any(line.startswith("warning: valid/psnr is 9 dB at step 4, and was 14 at step 2") for line in out)


@pytest.mark.distributed
def test_two_ranks_keep_what_one_process_keeps(tmp_path):
    torchrun([str(ROOT / "tests" / "workers" / "best_worker.py"), str(tmp_path / "two")])
    run_as_the_ranks(tmp_path / "one").train()
    one, two = (load_file(tmp_path / run / FOLDER / "model.safetensors") for run in ("one", "two"))
    assert largest_difference(one, two)[0] < 1e-5
    assert json.loads((tmp_path / "two" / RECORD).read_text()) == {"step": 2, "value": 14.0}


# ------------------------------------------------------------------------------------------------------ codes in use


def test_few_codes_are_a_tenth_of_those_that_could_be():
    assert few_codes(0.025, 10_000, 512) is not None and few_codes(0.11, 10_000, 512) is None
    assert "13 of 512 codes are in use (10000 were drawn)" in few_codes(13 / 512, 10_000, 512)
    # 640 draws can show a hundredth of 65,536 codes
    assert few_codes(600 / 65_536, 640, 65_536) is None and few_codes(60 / 65_536, 640, 65_536) is not None


def test_few_codes_are_said_after_several_lines(tmp_path, capsys):
    trainer = build_trainer(tmp_path, model={"use_gan": False}, num_train_steps=LINES_OF_FEW + 2)
    histogram = trainer.codes
    histogram.add = lambda indices: type(histogram).add(histogram, torch.zeros_like(indices))
    histogram.codebook_size = 32
    warned = [bool(trainer.report.warnings) for _ in trainer.steps()]
    assert warned == [False] * (LINES_OF_FEW - 1) + [True] * 3
    assert capsys.readouterr().err.count("warning: 1 of 32 codes are in use") == 1
    histogram.add(torch.arange(32))
    del histogram.add
    histogram.add(torch.arange(32).view(2, 4, 4))
    trainer.numbers_over_ranks()
    assert not trainer.report.warnings  # withdrawn


def stored_codes(folder: Path, tokenizer) -> CodeDataset:
    from vqdist.backends import create_backend

    images = ImageDataset("synthetic:64", 16, channels=3, augment=False)
    numbers = CodeWriter(tokenizer, images, folder, batch_size=16, shard_size=64).write(
        create_backend("local"), num_workers=0
    )
    assert (numbers["few"] is None) == (numbers["codebook_usage"] > 0.1)
    return CodeDataset(folder)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_a_prior_says_that_its_tokenizer_uses_few_codes(tmp_path, stored, few, capsys):
    tokenizer = build_tokenizer(codebook_size=32)
    if few:
        embedding = next(t for name, t in tokenizer.named_buffers() if name.endswith("embed"))
        embedding.copy_(embedding[..., :1, :].expand_as(embedding))  # all codes equal: the first is always the nearest
    given = {"dataset": stored_codes(tmp_path / "codes", tokenizer), "folder": None} if stored else {}
    trainer = build_ar_trainer(tmp_path / "run", model={"tokenizer": tokenizer}, num_train_steps=5, **given)
    trainer.train()
    assert ("codebook" in trainer.report.warnings) == few
    assert capsys.readouterr().err.count("warning: 1 of 32 codes are in use") == int(few)
