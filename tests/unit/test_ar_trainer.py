"""The trainer of models that predict codes: labels, stored codes, numbers, pictures, options.

Ranks are in test_distributed.py."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from scenarios import (
    AR_EVERYTHING,
    AR_MODELS,
    IMAGE_SIZE,
    build_ar_trainer,
    build_prior,
    build_tokenizer,
    build_vae,
    train_steps,
    weights_of,
)
from torch.nn.functional import cross_entropy

from vqdist import ARTrainer, UserError
from vqdist.drawing import draw_numbers
from vqdist.models.pretrained import load_model_of_any_type
from vqdist.sampling import DrawOptions
from vqdist.trainers.ar import ARTrainerConfig
from vqdist.trainers.config import TrainerConfig

KINDS = pytest.mark.parametrize("kind", AR_MODELS)


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------- learning


@KINDS
def test_training_lowers_the_likelihood_of_what_is_trained_on(kind, tmp_path):
    options = {"num_train_steps": 40, "lr": 3e-3, "batch_size": 16, "folder": "synthetic:16", "valid_frac": 0}
    build_ar_trainer(tmp_path, kind, augment=False, use_ema=False, **options).train()
    lines = [line for line in logged(tmp_path) if "cross_entropy" in line]
    assert lines[-1]["cross_entropy"] < 0.75 * lines[0]["cross_entropy"]
    assert lines[-1]["accuracy"] > lines[0]["accuracy"] + 0.1


@KINDS
def test_an_update_is_the_loss_of_the_model_and_adam(kind, tmp_path):
    trainer = build_ar_trainer(tmp_path, kind, grad_accum_every=2, lr=1e-3, use_ema=False)
    by_hand = load_from(build_ar_trainer(tmp_path / "other", kind, grad_accum_every=2, lr=1e-3, use_ema=False))
    model, optimizer, batches = by_hand
    for item, label, places in batches:
        inputs = model.inputs(item, trainer.hide_labels(label, places))
        (model.loss(model(*inputs), *inputs)[0] / 2).backward()
    optimizer.step()
    trainer.train_step()
    for name, weight in trainer.engine.module.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=1e-7)


def load_from(trainer: ARTrainer):
    """Return the bare model of an untouched trainer, Adam over it, and the trainer's first batches."""
    model = trainer.engine.module
    return model, torch.optim.Adam(model.parameters(), lr=trainer.config.lr), trainer.next_micro_batches()


@KINDS
def test_training_again_and_resuming_give_the_same_weights_to_the_bit(kind, tmp_path):
    options = {"num_train_steps": 6, "grad_accum_every": 2, **AR_EVERYTHING}
    straight = train_steps(build_ar_trainer(tmp_path / "straight", kind, **options), 6)
    first = build_ar_trainer(tmp_path / "stopped", kind, **options)
    train_steps(first, 3)
    first.save(first.run_folder / "checkpoints" / "step_00000003")
    second = build_ar_trainer(tmp_path / "stopped", kind, **options)
    assert second.step == 3
    resumed = train_steps(second, 3)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("kind", ["prior", "var"])
def test_the_tokenizer_is_neither_trained_nor_averaged_nor_in_a_checkpoint(kind, tmp_path):
    trainer = build_ar_trainer(tmp_path, kind)
    before = trainer.model.tokenizer.fingerprint()
    train_steps(trainer, 2)
    assert trainer.model.tokenizer.fingerprint() == before and not trainer.model.tokenizer.training
    assert trainer.ema.ema_model.tokenizer is trainer.model.tokenizer
    assert not any("tokenizer" in name for name, _ in trainer.named_tensors())
    trained = {id(weight) for group in trainer.engine.optimizer.param_groups for weight in group["params"]}
    assert not trained & {id(weight) for weight in trainer.model.tokenizer.parameters()}


# --------------------------------------------------------------------------------------------- labels


def test_hidden_labels_belong_to_the_place_in_the_data_order(tmp_path):
    trainer = build_ar_trainer(tmp_path, label_dropout=0.3)
    label = torch.zeros(4000, dtype=torch.long)
    hidden = trainer.hide_labels(label, range(4000))
    assert set(hidden.unique().tolist()) == {0, 10}
    assert abs(float((hidden == 10).float().mean()) - 0.3) < 0.03
    assert torch.equal(trainer.hide_labels(label[:100], range(50, 150)), hidden[50:150])
    for dropout, share in ((0.0, 0), (1.0, 1)):
        trainer.config = dataclasses.replace(trainer.config, label_dropout=dropout)
        assert float((trainer.hide_labels(label, range(4000)) == 10).float().mean()) == share


def test_batches_have_the_labels_of_their_images(tmp_path):
    trainer = build_ar_trainer(tmp_path, augment=False)
    (item, label, _), *_ = trainer.next_micro_batches()
    by_content = {trainer.dataset[index].numpy().tobytes(): trainer.dataset.label(index) for index in range(64)}
    assert label.tolist() == [by_content[image.numpy().tobytes()] for image in item]


def test_labels_that_do_not_fit_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"the images have the label \d but the model knows the classes 0 to 1; num"):
        train_steps(build_ar_trainer(tmp_path / "few", model={"num_classes": 2}), 12)
    for number in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / f"{number}.png")
    with pytest.raises(
        UserError, match="the model knows 10 classes but there are images without a label; use a source with"
    ):
        build_ar_trainer(tmp_path / "run", folder=str(tmp_path / "images"), batch_size=1)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------- numbers and pictures


@KINDS
def test_validation_is_the_likelihood_of_the_averaged_model(kind, tmp_path):
    trainer = build_ar_trainer(tmp_path, kind, ema_beta=0.5)
    train_steps(trainer, 3)
    numbers = trainer.evaluate()
    model = trainer.ema.ema_model.eval()
    images = torch.stack([trainer.valid_dataset[int(index)] for index in trainer.split.valid])
    labels = torch.tensor([trainer.valid_dataset.label(int(index)) for index in trainer.split.valid])
    with torch.no_grad():
        out = model(*model.inputs(images, labels if model.num_classes else torch.zeros_like(labels)))
    nll = float(cross_entropy(out.logits.transpose(1, 2), out.indices))
    assert numbers["nll"] == pytest.approx(nll, rel=1e-5)
    assert numbers["bits_per_code"] == pytest.approx(nll / 0.6931472, rel=1e-5)
    assert numbers["accuracy"] == pytest.approx(float((out.logits.argmax(-1) == out.indices).float().mean()))
    assert numbers["images"] == 16
    assert ("psnr" in numbers) == (kind == "vq_ar")
    assert ("nll_scale_3" in numbers) == (kind == "var")
    if kind == "var":
        lengths = [1, 4, 16]
        parts = cross_entropy(out.logits.transpose(1, 2), out.indices, reduction="none").split(lengths, dim=1)
        for number, part in enumerate(parts, start=1):
            assert numbers[f"nll_scale_{number}"] == pytest.approx(float(part.mean()), rel=1e-5)


def test_a_line_has_accuracy_since_the_last_and_vq_ar_its_codes_in_use(tmp_path):
    build_ar_trainer(tmp_path / "a", "vq_ar", log_every=2, num_train_steps=4).train()
    build_ar_trainer(tmp_path / "b", "var", log_every=2, num_train_steps=4).train()
    for line in [line for line in logged(tmp_path / "a") if "loss" in line]:
        assert 0 < line["codebook_usage"] <= 1 and 1 <= line["codebook_perplexity"] <= 32
        total = line["cross_entropy"] + line["recon_loss"] + line["vq_commit_loss"] + line["ar_commit_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    for line in [line for line in logged(tmp_path / "b") if "loss" in line]:
        lengths = {1: 1, 2: 4, 3: 16}
        mean = sum(line[f"nll_scale_{k}"] * length for k, length in lengths.items()) / 21
        assert line["cross_entropy"] == pytest.approx(mean, rel=1e-4) and "codebook_usage" not in line


@KINDS
def test_pictures_show_samples_of_the_averaged_model_with_the_classes_in_turn(kind, tmp_path):
    trainer = build_ar_trainer(tmp_path, kind, save_results_every=2, num_images_save=9, sample_top_k=5)
    trainer.train()
    names = {path.name for path in (tmp_path / "results").iterdir()}
    expected = {"step_00000002.png", "step_00000004.png"}
    if kind == "vq_ar":
        expected |= {name.replace(".png", "_reconstructions.png") for name in expected}
    assert names == expected
    assert Image.open(tmp_path / "results" / "step_00000004.png").size == (3 * 18 + 2, 3 * 18 + 2)
    model = load_model_of_any_type(tmp_path)
    labels = torch.arange(9) % 10 if kind != "vq_ar" else torch.zeros(9, dtype=torch.long)
    drawn = draw_numbers(model, range(9), labels, DrawOptions(**{**model.draw_defaults, "top_k": 5}), seed=0)
    torch.testing.assert_close(drawn, trainer.samples(trainer.ema.ema_model, 9))


# --------------------------------------------------------------------------------------------- options

BOTH = {"model", "ema"}
# options of its own: test_options.py has those of every trainer
# option: a value with which other samples are drawn
CHANGES_SAMPLES = {
    "sample_temperature": 0.3,
    "sample_top_k": 1,
    "sample_top_p": 0.2,
    "sample_min_p": 0.99,
    "sample_cfg": 9.0,
}


def test_every_option_has_a_case():
    fields, shared = ({field.name for field in dataclasses.fields(c)} for c in (ARTrainerConfig, TrainerConfig))
    validated = {"validate_samples", "validate_samples_every"}  # tests/unit/test_validate_with.py has theirs
    assert fields - shared == {"label_dropout", *CHANGES_SAMPLES} | validated


def test_dropping_labels_changes_the_weights(tmp_path):
    plain, changed = (train_steps(build_ar_trainer(tmp_path / str(p), label_dropout=p), 1) for p in (0.1, 0.9))
    assert plain.keys() == changed.keys()
    assert {name.partition(".")[0] for name in plain if not torch.equal(plain[name], changed[name])} == BOTH


def test_option_of_samples_changes_samples_and_no_weight(tmp_path):
    plain = build_ar_trainer(tmp_path / "plain")
    for option, value in CHANGES_SAMPLES.items():
        changed = build_ar_trainer(tmp_path / option, **{option: value})
        assert not torch.equal(*(it.samples(it.ema.ema_model, 4) for it in (plain, changed))), option
        assert all(torch.equal(one, two) for one, two in zip(*map(tensors, (plain, changed)), strict=True))


def tensors(trainer: ARTrainer) -> list[torch.Tensor]:
    return list(weights_of(trainer).values())


def test_signature_shows_every_option():
    shown = inspect.signature(ARTrainer).parameters
    assert list(shown)[:2] == ["model", "dataset"]
    options = {field.name for field in dataclasses.fields(ARTrainerConfig)}
    assert options == shown.keys() - {"model", "dataset", "valid_dataset"}


def test_every_option_says_what_it_is():
    lines = [line.strip() for line in inspect.getsource(ARTrainerConfig).splitlines()]
    own = set(ARTrainerConfig.__annotations__)
    assert own == {line.partition(":")[0] for line, after in zip(lines, lines[1:]) if after.startswith('"""')} & own


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("prior", {"label_dropout": 1.5}, "label_dropout 1.5 is not possible; it must be at least 0 and at most 1"),
        ("prior", {"sample_top_k": 0}, "top_k 0 is not possible"),
        ("prior", {"image_size": 32}, "image_size 32 is given but the model is for 16; leave it out"),
        ("prior", {"sample_cfg": 2.0, "label_dropout": 0.0}, "sample_cfg 2 needs a model that can do without a class"),
        ("vq_ar", {"sample_cfg": 2.0}, r"sample_cfg 2.0 does nothing, because the model knows no classes"),
        ("vq_ar", {"label_dropout": 0.5}, r"label_dropout 0.5 does nothing, because the model knows no classes"),
        ("vq_ar", {"folder": "codes:somewhere"}, "Autoencoder makes its codes itself and trains on images; codes: is"),
        (
            "prior",
            {"folder": "codes:ABSENT", "augment": False},
            "augment False does nothing, because codes are stored",
        ),
        ("prior", {"folder": "codes:ABSENT"}, "ABSENT"),
    ],
)
def test_wrong_options_are_one_line_before_anything_begins(kind, options, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        build_ar_trainer(tmp_path / "run", kind, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="the model is a VQGanVAE; ARTrainer trains a Prior, a VAR or a VQ-AR model"):
        ARTrainer(build_vae(), folder="synthetic:64", num_train_steps=1, batch_size=1, results_folder=str(tmp_path))


def test_another_tokenizer_is_another_configuration(tmp_path):
    options = {"folder": "synthetic:64", "num_train_steps": 2, "batch_size": 4, "num_images_save": 4}
    options |= {"results_folder": str(tmp_path), "validate_every": 0}
    ARTrainer(build_prior(num_classes=10), **options).train()
    other = build_tokenizer(vq_kwargs={"codebook_dim": 4})
    assert other.image_size == IMAGE_SIZE
    with pytest.raises(UserError, match="model.tokenizer: '[0-9a-f]{64}' -> '[0-9a-f]{64}'"):
        ARTrainer(build_prior(other, num_classes=10), **options)
