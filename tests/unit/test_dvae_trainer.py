"""The discrete VAE's trainer: schedules, noise, logs, pictures, learning; its ranks are in test_distributed.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from scenarios import QUALITY, SmallFeatures, build_dvae_trainer, build_trainer, train_steps

from vqdist import DiscreteVAE, DiscreteVAETrainer, Tokenizer, UserError
from vqdist.evaluation import reconstruct


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_transparent_images(folder: Path, count: int, side: int = 16) -> str:
    """Discs of several colours on nothing: inside opaque, outside transparent, soft at the edge."""
    folder.mkdir(parents=True)
    across = torch.linspace(-1, 1, side)
    inside = ((0.8 - (across[:, None] ** 2 + across[None, :] ** 2).sqrt()) * 8).clamp(0, 1)
    for number in range(count):
        colour = [(number * step) % 256 for step in (37, 91, 153)]
        image = Image.new("RGBA", (side, side), (*colour, 255))
        image.putalpha(Image.fromarray((inside * 255).byte().numpy()))
        image.save(folder / f"{number:03d}.png")
    return str(folder)


# --------------------------------------------------------------------------------------------- schedules


def test_temperature_and_learning_rate_are_the_formulas(tmp_path):
    """48 images and batches of 16: every third step begins an epoch."""
    options = {"starting_temp": 2.0, "temp_min": 1.5, "anneal_rate": 0.05, "lr_decay_rate": 0.9, "batch_size": 16}
    build_dvae_trainer(tmp_path, num_train_steps=10, lr=1e-3, **options).train()
    lines = [line for line in logged(tmp_path) if "temperature" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line in lines:
        finished = line["step"] - 1
        assert line["temperature"] == pytest.approx(max(2.0 * math.exp(-0.05 * finished), 1.5), rel=1e-6)
        assert line["lr"] == pytest.approx(1e-3 * 0.9 ** (finished // 3), rel=1e-6)
    assert lines[-1]["temperature"] == 1.5 and lines[4]["temperature"] > 1.5


def test_defaults_are_those_of_train_vae(tmp_path):
    trainer = build_dvae_trainer(tmp_path, num_train_steps=None)
    config = trainer.config
    assert (config.epochs, config.lr, config.lr_schedule, config.lr_decay_rate) == (20, 1e-3, "exponential", 0.98)
    assert (config.starting_temp, config.temp_min, config.anneal_rate, config.num_images_save) == (1.0, 0.5, 1e-6, 4)
    trainer.progress.step = 11_800  # where the ancestor had reached its minimum
    assert trainer.temperature == pytest.approx(math.exp(-0.0118))
    trainer.progress.step = 693_147
    assert trainer.temperature == pytest.approx(0.5, abs=1e-6)
    trainer.progress.step = 10**9
    assert trainer.temperature == 0.5


def test_the_weight_of_the_kl_loss_rises(tmp_path):
    model = {"kl_div_loss_weight": 0.5}
    build_dvae_trainer(tmp_path, model=model, num_train_steps=5, kl_warmup_steps=4).train()
    lines = [line for line in logged(tmp_path) if "kl_loss" in line]
    assert [line["kl_weight"] for line in lines] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    for line in lines:
        assert line["loss"] == pytest.approx(line["recon_loss"] + line["kl_weight"] * line["kl_loss"], rel=1e-5)
        assert line["kl_loss"] > 0


# --------------------------------------------------------------------------------------------- noise


def test_an_image_has_its_noise_whatever_the_batches(tmp_path):
    trainer = build_dvae_trainer(tmp_path)
    whole = trainer.noise(range(8, 16))
    assert whole.shape == (8, 4, 4, 32)
    assert torch.equal(whole[3:5], trainer.noise(range(11, 13)))
    assert len({float(noise.sum()) for noise in whole}) == 8
    other = build_dvae_trainer(tmp_path / "other", seed=1)
    assert not torch.equal(whole, other.noise(range(8, 16)))


def test_micro_batches_carry_the_next_places_of_the_stream(tmp_path):
    trainer = build_dvae_trainer(tmp_path, grad_accum_every=3)
    trainer.train_step()
    assert [list(places) for _, places in trainer.next_micro_batches()] == [
        [12, 13, 14, 15],
        [16, 17, 18, 19],
        [20, 21, 22, 23],
    ]


def test_training_noise_does_not_come_from_the_global_generator(tmp_path):
    first = train_steps(build_dvae_trainer(tmp_path / "first"), 2)
    trainer = build_dvae_trainer(tmp_path / "second")
    torch.manual_seed(99)
    second = train_steps(trainer, 2)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# --------------------------------------------------------------------------------------------- logs and pictures


def test_numbers_of_a_run(tmp_path):
    trainer = build_dvae_trainer(tmp_path, model={"kl_div_loss_weight": 0.1})
    numbers = trainer.train()
    assert numbers.keys() == {*QUALITY, "codebook_usage", "codebook_perplexity", "images"}
    of_the_run = {"step", "images_per_second", "data_wait", "memory_gb", "codebook_usage", "codebook_perplexity"}
    of_a_step = {"loss", "recon_loss", "kl_loss", "kl_weight", "temperature", "lr", "grad_norm"}
    assert logged(tmp_path)[0].keys() == of_the_run | of_a_step


def test_usage_is_of_the_codes_since_the_last_line(tmp_path):
    trainer = build_dvae_trainer(tmp_path, num_train_steps=4, log_every=2)
    with torch.no_grad():
        trainer.model.encoder[-1].bias[7] = 1e4
    trainer.train()
    for line in (line for line in logged(tmp_path) if "loss" in line):
        assert line["codebook_usage"] == 1 / 32 and line["codebook_perplexity"] == pytest.approx(1)
    chart = Image.open(tmp_path / "results" / "step_00000004_codes.png")
    heights = (torch.frombuffer(bytearray(chart.tobytes()), dtype=torch.uint8).view(128, 32, 2) < 128).sum(0)[:, 0]
    assert heights.tolist() == [128 if code == 7 else 0 for code in range(32)]


def test_a_chart_is_of_all_codes_since_the_last_one(tmp_path, monkeypatch):
    """Lines come at steps 1, 3 and 5, charts at 2, 4 and 5: they wait for no line, and none counts a code twice."""
    trainer = build_dvae_trainer(tmp_path, num_train_steps=5, log_every=3, save_results_every=2)
    seen, drawn, add = [], {}, trainer.codes.add
    monkeypatch.setattr(trainer.codes, "add", lambda ids: (seen.append(ids.flatten()), add(ids)))
    monkeypatch.setattr(trainer.tracker, "histogram", lambda step, name, counts, path: drawn.update({step: counts}))
    trainer.train()
    for last, step in ((0, 2), (2, 4), (4, 5)):
        assert torch.equal(drawn.pop(step), torch.bincount(torch.cat(seen[last:step]), minlength=32)), step
    assert drawn == {} and len(seen) == 5


def test_a_kl_reduction_without_kl_is_refused(tmp_path):
    message = r"^kl_reduction dalle does nothing, because the model's kl_div_loss_weight is 0; leave it out, or give"
    with pytest.raises(UserError, match=message):
        build_dvae_trainer(tmp_path / "run", model={"kl_reduction": "dalle"})
    assert not (tmp_path / "run").exists()
    build_dvae_trainer(tmp_path / "run", model={"kl_reduction": "dalle", "kl_div_loss_weight": 1e-3}).train_step()


def test_a_picture_shows_original_soft_hard_and_average(tmp_path):
    trainer = build_dvae_trainer(tmp_path, num_train_steps=2, num_images_save=3)
    trainer.train()
    with Image.open(trainer.picture_path) as picture:  # four views of an image, two images a row
        assert picture.size == (8 * 18 + 2, 2 * 18 + 2)
    images = torch.rand(3, 3, 16, 16)
    networks = [trainer.model, trainer.ema.ema_model]
    original, soft, hard, average = trainer.views(images, networks)
    assert torch.equal(original, images) and torch.equal(hard, reconstruct(trainer.model, images))
    assert torch.equal(average, reconstruct(trainer.ema.ema_model, images))
    assert bool((soft >= 0).all()) and bool((soft <= 1).all()) and not torch.equal(soft, hard)
    again = trainer.views(images, networks)[1]
    assert torch.equal(soft, again)  # the noise of a picture is always the same


def test_compile_compiles_encoder_and_decoder(tmp_path):
    for given in (True, False):
        vae = build_dvae_trainer(tmp_path / str(given), compile=given).model
        assert [part._compiled_call_impl is not None for part in (vae.encoder, vae.decoder)] == [given, given]


# --------------------------------------------------------------------------------------------- export


def test_the_export_is_the_average_and_says_its_size(tmp_path):
    trainer = build_dvae_trainer(tmp_path, num_train_steps=3)
    trainer.train()
    loaded = DiscreteVAE.from_pretrained(tmp_path / "export")
    for name, tensor in trainer.ema.ema_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tokenizer = Tokenizer.from_pretrained(tmp_path / "export")
    assert (tokenizer.image_size, tokenizer.num_codes, tokenizer.codebook_size) == (16, 16, 32)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), reconstruct(trainer.ema.ema_model, images))


def test_a_dataset_in_place_of_a_folder(tmp_path):
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(16)]
    trainer = build_dvae_trainer(tmp_path, folder=None, image_size=None, dataset=images)
    trainer.train()
    assert trainer.config.image_size == 16 and trainer.position == 16


# --------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("draw", [{}, {"straight_through": True}, {"straight_through": True, "reinmax": True}])
def test_every_draw_learns(tmp_path, draw):
    """A few steps on digits take the validation error well below that of the best constant image."""
    model = {"image_size": 28, "channels": 1, "hidden_dim": 32, "kl_div_loss_weight": 0.003, **draw}
    options = {"folder": "digits", "image_size": 28, "num_train_steps": 200, "batch_size": 16, "valid_frac": 0.01}
    trainer = build_dvae_trainer(tmp_path, model=model, lr=2e-3, ema_beta=0.9, **options)
    images = torch.stack([trainer.valid_dataset.fetch(0, int(index))[0] for index in trainer.split.valid])
    constant = float((images - images.median()).abs().mean())
    assert trainer.train()["l1"] < 0.75 * constant


def test_transparent_images_from_end_to_end(tmp_path):
    """Four channels in and out: alpha is learnt, exported and drawn as alpha."""
    folder = write_transparent_images(tmp_path / "images", 32)
    trainer = build_dvae_trainer(
        tmp_path / "run",
        model={"channels": 4, "kl_div_loss_weight": 0.001, "hidden_dim": 32},
        folder=folder,
        num_train_steps=200,
        batch_size=16,
        lr=3e-3,
        ema_beta=0.9,
        lr_schedule="cosine",
    )
    trainer.train()
    with Image.open(trainer.picture_path) as picture:
        assert picture.mode == "RGBA"
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run" / "export")
    images = torch.stack([trainer.valid_dataset.fetch(0, index)[0] for index in range(8)])
    assert images.shape == (8, 4, 16, 16) and float(images[:, 3].min()) == 0
    recon = tokenizer.decode(tokenizer.encode(images))
    constant = float((images[:, 3] - images[:, 3].median()).abs().mean())
    assert float((recon[:, 3] - images[:, 3]).abs().mean()) < 0.5 * constant


# --------------------------------------------------------------------------------------------- mistakes


WRONG = [
    ({"image_size": 32}, "^image_size 32 is given but the model was built for 16; build it with the same, or leave "),
    (
        {"kl_warmup_steps": 5},
        "^kl_warmup_steps 5 does nothing, because the model's kl_div_loss_weight is 0; leave it ",
    ),
    ({"temp_min": 2.0}, "^temp_min 2 is above starting_temp 1; the temperature falls$"),
    ({"temp_min": 0.0}, "^temp_min 0.0 is not possible; it must be above 0$"),
    ({"starting_temp": -1.0}, "^starting_temp -1.0 is not possible; it must be above 0$"),
    ({"anneal_rate": -1e-6}, "^anneal_rate -1e-06 is not possible; it must be at least 0$"),
    ({"kl_warmup_steps": -1}, "^kl_warmup_steps -1 is not possible; it must be at least 0$"),
    ({"discr_lr": 1.0}, "^there is no option 'discr_lr'"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_a_wrong_option_is_one_line_before_anything_begins(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        build_dvae_trainer(tmp_path / "run", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_kind_of_model_is_refused(tmp_path):
    model = SmallFeatures()
    with pytest.raises(UserError, match="^the model is a SmallFeatures; DiscreteVAETrainer trains a DiscreteVAE$"):
        DiscreteVAETrainer(model, folder="synthetic:64", results_folder=str(tmp_path / "run"))


def test_a_run_of_another_kind_of_model_is_not_resumed(tmp_path):
    build_trainer(tmp_path).train_step()
    with pytest.raises(UserError, match="holds a run of a model of type 'vqgan' and this one is 'dvae'; give another"):
        build_dvae_trainer(tmp_path)


def test_loss_that_is_no_number_stops_the_run(tmp_path):
    trainer = build_dvae_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.decoder[-1].bias.fill_(float("nan"))
    with pytest.raises(UserError, match="^loss is nan in the vae at step 1; there is no checkpoint yet: start"):
        trainer.train_step()


# --------------------------------------------------------------------------------------------- the shipped recipe


@pytest.mark.slow
@pytest.mark.nightly  # a minute and a half; the digits' codes are looked at in test_average.py too
def test_the_shipped_recipe_uses_its_codes(tmp_path, capsys):
    """A minute on digits: the loss falls, more than half of the codes are in use, digits are recognisable."""
    from vqdist.cli import main

    recipe = Path(__file__).parents[2] / "launch" / "recipes" / "digits_dvae.yaml"
    assert main(["train", "dvae", "--config", str(recipe), "--out", str(tmp_path)]) == 0
    lines = logged(tmp_path)
    losses = [line["recon_loss"] for line in lines if "recon_loss" in line]
    assert losses[-1] < losses[0] / 10
    last = lines[-1]
    assert last["valid/codebook_usage"] > 0.5 and last["valid/codebook_perplexity"] > 64
    assert last["valid/psnr"] > 21
