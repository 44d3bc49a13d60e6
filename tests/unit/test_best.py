"""The weights of the best validation are kept, and a run that goes wrong says so."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import ROOT, torchrun
from safetensors.torch import load_file
from scenarios import (
    AR_MODELS,
    MULTISCALE,
    QUIET,
    build_ar_trainer,
    build_dvae_trainer,
    build_tokenizer,
    build_trainer,
    build_vae,
    evaluated_weights,
    largest_difference,
)
from workers.best_worker import run_at as run_as_the_ranks

from vqdist import UserError, VQGanVAE, VQGanVAETrainer
from vqdist.cli import main
from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.encoding import CodeWriter
from vqdist.metrics import few_codes
from vqdist.trainers.best import FOLDER, RECORD
from vqdist.trainers.measure import OF_FEATURES, OF_RECONSTRUCTIONS, OF_SAMPLES, measure_of
from vqdist.trainers.report import LINES_OF_FEW
from vqdist.trainers.resume import Resume

MULTISCALE_VQ = {
    "quantizer": "multiscale_vq",
    "model": {"codebook_size": 32, "quantizer_kwargs": MULTISCALE, "use_gan": False},
}
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


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_numbers_that_are_not_finite_count_for_patience(tmp_path, worst, capsys):
    trainer = run_at(tmp_path, {1: 10.0, 2: worst, 3: 9.9, 4: worst}, num_train_steps=9, patience=2)
    trainer.train()
    assert trainer.step == 3 and f"warning: valid/psnr is {worst} at step 2" in capsys.readouterr().err
    never = run_at(tmp_path / "never", dict.fromkeys(range(9), worst), num_train_steps=9, patience=3)
    never.train()
    assert never.step == 3 and never.best.reason.startswith("valid/psnr was not a finite number in 3 validations")
    never.close()
    again = run_at(tmp_path / "never", num_train_steps=9, patience=3)
    assert again.has_ended_early and again.best.standing.waited == 3


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
    assert trainer.step == 1 and (trainer.best.step, trainer.best.value) == (1, 10.0)  # as its checkpoint says
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


@pytest.fixture
def as_before(monkeypatch):
    """Let checkpoints say nothing of the best step, as those of before did."""
    state_info = Resume.state_info
    monkeypatch.setattr(Resume, "state_info", lambda one: {**state_info(one), "best": None})


@pytest.mark.parametrize("damage", ["not JSON", "[]", '{"step": 2}', '{"step": "x", "value": 3}', None])
def test_a_record_that_says_nothing_is_as_none(tmp_path, damage, as_before):
    stopped_after(run_at(tmp_path), 3)
    record = tmp_path / RECORD
    assert run_at(tmp_path).best.step == 2
    record.unlink() if damage is None else record.write_text(damage)
    assert run_at(tmp_path).best.step == -1


def test_a_record_that_is_lost_is_written_anew_from_the_checkpoint(tmp_path):
    stopped_after(run_at(tmp_path), 3)
    record = tmp_path / RECORD
    said = json.loads(record.read_text())
    record.write_text("not JSON")
    assert run_at(tmp_path).best.step == 2 and json.loads(record.read_text()) == said


@pytest.mark.parametrize("lost", ["removed", "damaged"])
def test_weights_of_the_best_step_that_are_lost_leave_its_number(tmp_path, lost, capsys):
    stopped_after(run_at(tmp_path), 3)
    if lost == "removed":
        shutil.rmtree(tmp_path / FOLDER)
    else:
        (tmp_path / FOLDER / "model.safetensors").write_bytes(b"cut")
    trainer = run_at(tmp_path, {4: 13.0, 5: 14.5, 6: 1.0}, num_train_steps=6)
    assert (trainer.best.step, trainer.best.value, trainer.best.is_another) == (2, 14.0, False)
    said = capsys.readouterr().err
    assert (
        "does not hold the weights of step 2, the best one, and no checkpoint does; the next step that is better th"
        in said
    )
    weights = weights_by_step(trainer)
    assert trainer.best.step == 5 and is_export(tmp_path / FOLDER, weights[5])


def test_a_run_that_patience_has_ended_stays_ended_without_its_best_weights(tmp_path):
    values = {step: 1.0 if step > 1 else 2.0 for step in range(1, 10)}
    options = {"num_train_steps": 9, "patience": 2}
    first = run_at(tmp_path, values, **options)
    first.train()
    first.close()
    shutil.rmtree(tmp_path / FOLDER)
    again = run_at(tmp_path, values, **options)
    assert again.has_ended_early and list(again.steps()) == [] and again.step == 3


# --------------------------------------------------------------------------------------- a number by its name


def checkpoints_of(folder: Path) -> list[int]:
    return [int(path.name.partition("_")[2]) for path in sorted((folder / "checkpoints").iterdir())]


NAMED = {"keep_best": "valid/l1", "keep_checkpoints": 1}
L1 = {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.15}


def named_at(folder: Path, values=L1, **options):
    return measured(run_at(folder, **{**NAMED, **options}), values, "l1")


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, capsys):
    trainer = named_at(tmp_path)
    weights = weights_by_step(trainer)
    assert checkpoints_of(tmp_path) == [2, 4] and is_export(tmp_path / FOLDER, weights[2])  # lower is better
    assert "with l1 0.1; " in capsys.readouterr().err
    said = json.loads((tmp_path / RECORD).read_text())
    assert said == {"step": 2, "value": 0.1, "measure": "l1", "protocol": trainer.best.standing.protocol}
    trainer.load(tmp_path / "checkpoints" / "step_00000002")
    again = evaluated_weights(trainer)
    assert trainer.step == 2 and all(torch.equal(again[name], weights[2][name]) for name in again)


def test_a_checkpoint_is_written_where_none_is_due(tmp_path):
    trainer = named_at(tmp_path, save_model_every=0, keep_checkpoints=3)
    kept = [checkpoints_of(tmp_path) for _ in trainer.steps() if trainer.checkpoints.settle() is None]
    assert kept == [[1], [1, 2], [1, 2], [1, 2]] and checkpoints_of(tmp_path) == [1, 2, 4]


def test_the_one_before_goes_once_the_better_one_is_complete(tmp_path):
    trainer = named_at(tmp_path, {1: 0.3, 2: 0.4, 3: 0.2, 4: 0.1})
    kept = [checkpoints_of(tmp_path) for _ in trainer.steps() if trainer.checkpoints.settle() is None]
    assert kept == [[1], [1, 2], [3], [4]] and not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("lost", ["export", "damaged", "newer"])
def test_weights_of_the_best_step_come_from_its_checkpoint(tmp_path, lost):
    first = named_at(tmp_path, {**L1, 4: 0.05}, num_train_steps=6)
    weights = {step: evaluated_weights(first) for step, _ in zip(range(1, 4), first.steps())}
    first.close()
    best = tmp_path / FOLDER
    if lost == "export":
        shutil.rmtree(best)
    elif lost == "damaged":
        (best / "model.safetensors").write_bytes(b"cut")
    else:  # killed after the export of step 4, and before its checkpoint
        record = json.loads((best / "export.json").read_text())
        (best / "export.json").write_text(json.dumps({**record, "step": 4}))
        (tmp_path / RECORD).write_text(json.dumps({"step": 4, "value": 0.05, "measure": "l1"}))
    resumed = named_at(tmp_path, num_train_steps=6)
    assert (resumed.step, resumed.best.step, resumed.best.value) == (3, 2, 0.1)
    assert is_export(best, weights[2]) and json.loads((tmp_path / RECORD).read_text())["step"] == 2
    assert largest_difference(evaluated_weights(resumed), weights[3])[0] == 0  # and the run is where it was


@pytest.mark.parametrize("other", [True, False, "psnr", "valid/ssim"])
def test_another_number_would_let_the_best_checkpoint_go(tmp_path, other):
    stopped_after(named_at(tmp_path), 3)
    with pytest.raises(
        UserError, match=f"keeps the best checkpoint by valid/l1, and keep_best {other} would let it go"
    ):
        named_at(tmp_path, keep_best=other)
    assert checkpoints_of(tmp_path) == [2, 3] and (tmp_path / FOLDER).is_dir()
    assert named_at(tmp_path, keep_best="l1").best.value == 0.1  # another spelling


def test_another_number_that_is_allowed_begins_anew(tmp_path, capsys):
    first = named_at(tmp_path, num_train_steps=5)
    weights = {step: evaluated_weights(first) for step, _ in zip(range(1, 4), first.steps())}
    first.close()
    allowed = {"keep_best": "psnr", "keep_checkpoints": 1, "allow_config_change": "keep_best", "num_train_steps": 5}
    resumed = run_at(tmp_path, {4: 5.0, 5: 4.0}, **allowed)
    assert f"until a later step is validated {tmp_path / FOLDER} keeps step 2" in capsys.readouterr().err
    assert checkpoints_of(tmp_path) == [2, 3] and is_export(tmp_path / FOLDER, weights[2])
    more = [(checkpoints_of(tmp_path), resumed.best.step) for _ in resumed.steps() if not resumed.checkpoints.settle()]
    assert more == [([4], 4), ([4, 5], 4)]


def test_a_run_at_its_end_keeps_its_best_step_though_it_is_measured_anew(tmp_path, capsys):
    first = run_at(tmp_path)
    weights = weights_by_step(first)
    first.close()
    again = run_at(tmp_path, {4: 0.5}, keep_best="psnr", valid_images=9, allow_config_change="valid_images")
    assert again.train() == {"psnr": 0.5}
    assert "warning: valid/psnr is compared anew from step 4 on" in capsys.readouterr().err
    assert again.best.is_another and is_export(tmp_path / FOLDER, weights[2])


def test_any_number_may_be_named_later(tmp_path):
    stopped_after(run_at(tmp_path), 3)
    assert run_at(tmp_path, keep_best="valid/l1").best.step == 2  # its weights stay until the next validation


@pytest.mark.parametrize(
    "options, said",
    [
        ({"keep_best": "valid/rfid"}, "^keep_best valid/rfid is none of the numbers of a validation"),
        (
            {"keep_best": "valid/psnrr"},
            "^there is no number of a validation to compare steps by 'psnrr'; nearest: psnr",
        ),
        ({"keep_best": "images"}, "^there is no number of a validation to compare steps by 'images'"),
        ({"keep_best": "valid/l1", "valid_frac": 0}, "^keep_best valid/l1 does nothing, because there are no images"),
        ({"patience": 0}, "^patience 0 is not possible; it must be at least 1"),
        ({"patience": 2, "keep_best": False}, "^patience 2 does nothing, because keep_best is false"),
        ({"patience": 2}, "^patience 2 does nothing, because validate_every is 0"),
        (
            {"patience": 2, "validate_every": 1, "valid_frac": 0},
            "^patience 2 does nothing, because there are no images",
        ),
    ],
)
def test_mistakes(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        build_trainer(tmp_path, **options)


NAMES = {"vqgan": build_trainer, "dvae": build_dvae_trainer, "multiscale": partial(build_trainer, **MULTISCALE_VQ)}
NAMES["residual"] = partial(build_trainer, quantizer="residual_vq", model={"vq_kwargs": {"kmeans_init": False}})
NAMES |= {kind: partial(build_ar_trainer, kind=kind) for kind in AR_MODELS}


@pytest.mark.parametrize("kind", NAMES)
def test_every_number_of_a_validation_can_be_kept(tmp_path, kind):
    trainer = NAMES[kind](tmp_path, num_train_steps=1)
    numbers = trainer.evaluate()
    assert trainer.validation_names() == numbers.keys() - {"images"}
    better = {name for name in numbers if name != "images" and measure_of(f"valid/{name}").higher}
    words = ("psnr", "ssim", "usage", "codebook_perplexity", "accuracy")
    assert better == {name for name in numbers if any(word in name for word in words)}


def test_measures_of_features_have_their_direction():
    higher = {name for name in (*OF_SAMPLES, *OF_FEATURES) if measure_of(name).higher}
    assert higher == {"is", "precision", "recall", "ris", "rprecision", "rrecall"}
    assert not measure_of("valid/lpips").higher
    rfid = measure_of("valid/rfid", OF_RECONSTRUCTIONS)
    assert rfid.has_fallen(2.6, 2.0) and not rfid.has_fallen(2.4, 2.0) and not rfid.has_fallen(1.0, 2.0)


class Own(VQGanVAETrainer):
    """A trainer with a validation of its own."""

    def evaluate(self):
        return {"psnr": PSNR[self.step]}


class Named(Own):
    def validation_names(self):
        return {"psnr"}


@pytest.mark.parametrize("kind", [Own, Named])
def test_a_validation_of_ones_own_measures_what_it_names(tmp_path, kind, capsys):
    def build(**options):
        given = {"num_train_steps": 2, "validate_every": 1, "results_folder": str(tmp_path), **options}
        return kind(build_vae(use_gan=False), **{**QUIET, **given})

    with pytest.raises(
        UserError, match=f"^validate_with names lpips, and {kind.__name__} does not say in validation_"
    ):
        build(validate_with="lpips")
    if kind is Named:
        with pytest.raises(UserError, match="^keep_best valid/l1 is none of the numbers of a validation"):
            build(keep_best="valid/l1")
        return
    build(keep_best="valid/l1").train()  # what its validations give is not known
    assert capsys.readouterr().err.count("warning: keep_best names l1, and validations have psnr: no step is ke") == 1


# --------------------------------------------------------------------------------------- patience


def test_a_run_ends_after_so_many_validations_that_are_not_better(tmp_path, capsys):
    trainer = named_at(tmp_path, {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.1, 5: 0.01}, num_train_steps=9, patience=2, log_every=5)
    assert [step for step, _ in trainer.steps()] == [1, 2, 3, 4]  # as good as the best is not better
    said = "valid/l1 was not better than 0.1, that of step 2, in 2 validations (patience 2)"
    assert f"ended at step 4 of 9: {said}" in capsys.readouterr().err
    assert trainer.has_ended_early and checkpoints_of(tmp_path) == [2, 4]
    assert json.loads((tmp_path / "export" / "export.json").read_text())["step"] == 4
    assert (tmp_path / "results" / "step_00000004.png").is_file()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "recon_loss" in line] == [1, 4]
    trainer.close()
    resumed = named_at(tmp_path, num_train_steps=9, patience=2)
    assert f"this run ended at step 4: {said}; a larger --trainer.patience goes on" in capsys.readouterr().err
    assert list(resumed.steps()) == [] and resumed.step == 4 and resumed.best.standing.waited == 2
    resumed.close()
    more = named_at(tmp_path, dict.fromkeys(range(4, 10), 0.2), num_train_steps=9, patience=4)
    assert [step for step, _ in more.steps()] == [5, 6]


def test_patience_counts_over_a_restart_and_a_validation_that_is_made_again_once(tmp_path):
    values = {step: 0.2 if step != 2 else 0.1 for step in range(1, 10)}
    stopped_after(named_at(tmp_path / "a", values, num_train_steps=9, patience=3), 3)
    resumed = named_at(tmp_path / "a", values, num_train_steps=9, patience=3)
    assert resumed.best.standing.waited == 1
    resumed.run_evaluation()
    assert resumed.best.standing.waited == 1
    assert [step for step, _ in resumed.steps()] == [4, 5]
    whole = named_at(tmp_path / "b", values, num_train_steps=9, patience=3)
    assert [step for step, _ in whole.steps()] == [1, 2, 3, 4, 5]


def test_at_its_last_step_a_run_has_not_ended_early(tmp_path, capsys):
    trainer = named_at(tmp_path, num_train_steps=4, patience=2)
    trainer.train()
    assert trainer.best.has_given_up and not trainer.has_ended_early
    assert "ended at step" not in capsys.readouterr().err


def test_the_summary_says_why_a_run_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VQGanVAETrainer, "evaluate", lambda trainer: {"psnr": PSNR[trainer.step]})
    arguments = "--data synthetic:64 --image_size 16 --model.dim 16 --model.layers 2 --model.perceptual none"
    arguments += " --model.use_gan false --trainer.num_train_steps 9 --trainer.batch_size 4 --data.num_workers 0"
    arguments += f" --trainer.validate_every 1 --patience 2 --keep_best valid/psnr --out {tmp_path}"
    assert main(["train", "vqgan", *arguments.split()]) == 0
    out = capsys.readouterr().out
    assert "ended early, of 9: valid/psnr was not better than 14, that of step 2, in 2 validations" in out
    assert ["checkpoint", str(tmp_path / "checkpoints" / "step_00000002")] in [
        line.split() for line in out.splitlines()
    ]


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
    one, two = (json.loads((tmp_path / run / RECORD).read_text()) for run in ("one", "two"))
    assert one == two and (one["step"], one["value"], one["measure"]) == (2, 14.0, "psnr")


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
