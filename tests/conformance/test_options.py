"""No option is accepted and ignored: each one is flipped and something is seen to change; each mistake is one line.

The lists of options are those of the code, so a new option without a case here fails.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import not_finite
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import Cases
from PIL import Image
from scenarios import (
    AR_MODELS,
    QUIET,
    SmallFeatures,
    build_ar_trainer,
    build_dvae_trainer,
    build_trainer,
    build_vae,
    train_steps,
)
from torch import Tensor, nn

from vqdist import DiscreteVAETrainer, UserError, VQGanVAE, VQGanVAETrainer
from vqdist import precision as precision_of_float32
from vqdist.cli.train import train_options
from vqdist.data import loader
from vqdist.models.networks.conv import ConvEncoder, ResidualBlock
from vqdist.models.quantizers import FSQQuantizer, LFQQuantizer, ResidualVQQuantizer, SimVQQuantizer, VQQuantizer
from vqdist.objectives import Perceptual, perceptual
from vqdist.options import in_one_form
from vqdist.trainers import networks, setup
from vqdist.trainers.base import Trainer
from vqdist.trainers.config import TrainerConfig
from vqdist.trainers.dvae import DiscreteVAETrainerConfig
from vqdist.trainers.vqgan import VQGanTrainerConfig

NETWORKS = {"generator", "discriminator", "ema"}
# three steps are an epoch of the 48 images to train on
EXPONENTIAL = {"lr_schedule": "exponential", "batch_size": 16}

# option: (steps, options of both runs, changed value, networks whose weights change; the others stay bit-equal)
CHANGES_WEIGHTS = {
    "batch_size": (1, {}, 8, NETWORKS),
    "lr": (1, {}, 1e-3, NETWORKS),
    "adam_betas": (2, {}, [0.5, 0.9], NETWORKS),
    "weight_decay": (1, {}, 0.1, NETWORKS),
    "optimizer": (1, {}, "sgd", NETWORKS),
    "freeze": (1, {}, ["encoder"], {"generator", "ema"}),
    "freeze_codebook": (1, {"freeze": ["encoder"], "quantizer": "vq"}, False, {"generator", "ema"}),
    "lr_scale": (1, {}, {"decoder": 0.1}, {"generator", "ema"}),
    "discr_lr": (1, {}, 1e-3, {"discriminator"}),
    "discr_optimizer": (1, {}, "sgd", {"discriminator"}),
    "discr_adam_betas": (2, {"adversarial_weight": 0.0}, [0.5, 0.9], {"discriminator"}),
    "discr_weight_decay": (1, {}, 0.1, {"discriminator"}),
    "discr_lr_schedule": (2, {"adversarial_weight": 0.0}, "cosine", {"discriminator"}),
    "discr_lr_warmup_steps": (1, {}, 4, {"discriminator"}),
    "grad_accum_every": (1, {}, 2, NETWORKS),
    "max_grad_norm": (1, {}, 1e-6, {"generator", "ema"}),
    "discr_max_grad_norm": (1, {}, 1e-6, {"discriminator"}),
    "warmup_steps": (1, {}, 4, NETWORKS),
    "lr_schedule": (2, {}, "cosine", NETWORKS),
    "lr_min_ratio": (2, {"lr_schedule": "linear"}, 0.5, NETWORKS),
    "lr_decay_share": (4, {"lr_schedule": "wsd"}, 1.0, NETWORKS),
    "lr_decay_rate": (4, EXPONENTIAL, 0.5, NETWORKS),
    "precision": (1, {}, "bf16", NETWORKS),
    "ema_beta": (3, {}, 0.1, {"ema"}),
    "ema_update_after_step": (3, {}, 5, {"ema"}),
    "ema_update_every": (2, {}, 2, {"ema"}),
    "seed": (1, {}, 1, NETWORKS),
    "augment": (1, {}, False, NETWORKS),
    "flip": (1, {}, False, NETWORKS),
    "crop": (1, {}, "resized", NETWORKS),
    "shorter_side": (1, {"crop": "random"}, [1.5, 2.0], NETWORKS),
    "crop_area": (1, {"crop": "resized"}, [0.5, 0.5], NETWORKS),
    "crop_aspect": (1, {"crop": "resized"}, [1.0, 1.0], NETWORKS),
    "resample": (1, {}, "lanczos", NETWORKS),
    "valid_frac": (1, {}, 0.5, NETWORKS),
    "random_split_seed": (1, {}, 43, NETWORKS),
    "apply_grad_penalty_every": (1, {}, 0, {"discriminator"}),
    "grad_penalty_weight": (1, {}, 5.0, {"discriminator"}),
    "grad_penalty": (1, {"apply_grad_penalty_every": 1}, "r1", {"discriminator"}),
    "lecam_weight": (2, {"lecam_weight": 1.0, "adversarial_weight": 0.0}, 10.0, {"discriminator", "lecam_averages"}),
    "lecam": (2, {"lecam_weight": 10.0, "adversarial_weight": 0.0}, "of_means", {"discriminator", "lecam_averages"}),
    "lecam_decay": (1, {"lecam_weight": 10.0}, 0.5, {"discriminator", "lecam_averages"}),
    "discr_loss_weight": (1, {}, 0.5, {"discriminator"}),
    "discriminator_before_start": (
        3,
        {"discriminator_start": 2, "adversarial_weight": 0.0},
        "zero_loss",
        {"discriminator"},
    ),
    "update_order": (1, {}, "discriminator_first", {"generator", "ema"}),
    "fresh_reconstruction": (1, {}, True, {"discriminator"}),
    "adaptive_weight_form": (1, {}, "taming", {"generator", "ema"}),
    "quantizer_weight": (1, {}, 0.5, {"generator", "ema"}),
    "quantizer_temperature": (1, {"quantizer": "gumbel"}, 0.3, {"generator", "ema"}),
    "discriminator_start": (1, {}, 1, NETWORKS),
    "discriminator_warmup_steps": (1, {}, 1, {"generator", "ema"}),
    "adversarial_ramp_steps": (1, {}, 4, {"generator", "ema"}),
    "adversarial_weight": (1, {}, 0.5, {"generator", "ema"}),
    "adaptive_weight": (1, {}, False, {"generator", "ema"}),
    "max_adaptive_weight": (1, {}, 1e-3, {"generator", "ema"}),
}

BOTH = {"vae", "ema"}
# options of its own: those of every trainer are flipped on the VQGAN's, which has every kind of network
DVAE_CHANGES_WEIGHTS = {
    "starting_temp": (1, {}, 2.0, BOTH),
    "temp_min": (2, {"anneal_rate": 10.0}, 0.7, BOTH),
    "anneal_rate": (2, {}, 0.5, BOTH),
    "kl_warmup_steps": (1, {"model": {"kl_div_loss_weight": 1.0}}, 4, BOTH),
}

BUILDERS = {
    "vqgan": build_trainer,
    "dvae": build_dvae_trainer,
    **{kind: partial(build_ar_trainer, kind=kind) for kind in AR_MODELS},
}
TABLES = {"vqgan": CHANGES_WEIGHTS, "dvae": DVAE_CHANGES_WEIGHTS}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory) -> Callable[..., dict[str, Tensor]]:
    """Return the weights of the plain run after so many steps, each computed once."""
    known = {}

    def run(steps: int, kind: str = "vqgan") -> dict[str, Tensor]:
        if (steps, kind) not in known:
            known[steps, kind] = train_steps(BUILDERS[kind](tmp_path_factory.mktemp("plain") / "run"), steps)
        return known[steps, kind]

    return run


@pytest.mark.parametrize("kind, option", [(kind, option) for kind, table in TABLES.items() for option in table])
def test_option_changes_exactly_the_weights_that_it_is_about(kind, option, tmp_path, unchanged):
    steps, common, value, expected = TABLES[kind][option]
    build = BUILDERS[kind]
    plain = train_steps(build(tmp_path / "plain", **common), steps) if common else unchanged(steps, kind)
    changed = train_steps(build(tmp_path / "changed", **{**common, option: value}), steps)
    assert plain.keys() == changed.keys()
    differ = {name.partition(".")[0] for name in plain if not torch.equal(plain[name], changed[name])}
    assert differ == expected


@pytest.mark.parametrize("kind", ["dvae", *AR_MODELS])
def test_every_trainer_hands_on_what_all_of_them_share(kind, tmp_path, monkeypatch):
    """The optimizer, the engine, the average and the data get the values; what these do with them is shown above."""
    optimizer = {"lr": 1e-2, "adam_betas": [0.5, 0.8], "weight_decay": 0.1, "warmup_steps": 4, "max_grad_norm": 0.25}
    data = {"batch_size": 2, "grad_accum_every": 3, "augment": False, "valid_frac": 0.5, "random_split_seed": 43}
    average = {"ema_beta": 0.1, "ema_update_after_step": 5, "ema_update_every": 2}
    options = {**optimizer, **data, **average, "precision": "bf16", "seed": 1}
    trainer = BUILDERS[kind](tmp_path, **options)
    assert {name: getattr(trainer.config, name) for name in options} == options
    engine, taken = trainer.main_engine, []
    assert (engine.max_grad_norm, engine.grad_accum_every, engine.precision) == (0.25, 3, "bf16")
    take = trainer.take
    monkeypatch.setattr(trainer, "take", lambda batch: taken.append(len(batch.item)) or take(batch))
    logs = trainer.train_step()
    groups = engine.optimizer.param_groups
    assert {(group["lr"], tuple(group["betas"])) for group in groups} == {(1e-2 / 4, (0.5, 0.8))}
    assert float(logs["lr"]) == pytest.approx(1e-2 / 4)
    assert 0.1 in {group["weight_decay"] for group in groups} and taken == [2, 2, 2] and trainer.position == 6
    average = trainer.ema.average
    assert (average.beta, average.update_after_step, average.update_every) == (0.1, 5, 2)
    assert len(trainer.split.train) == 32


def test_the_same_options_give_the_same_weights(tmp_path, unchanged):
    again = train_steps(build_trainer(tmp_path), 3)
    assert all(torch.equal(tensor, again[name]) for name, tensor in unchanged(3).items())


def test_bf16_is_a_rounding_and_weights_stay_float32(tmp_path, unchanged):
    trainer = build_trainer(tmp_path, precision="bf16")
    kinds = []
    trainer.generator.module.encoder[0].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    changed, plain = train_steps(trainer, 1), unchanged(1)
    assert kinds == [torch.bfloat16]
    for name, tensor in plain.items():
        assert changed[name].dtype == tensor.dtype
        assert torch.allclose(changed[name].double(), tensor.double(), atol=2 * trainer.config.lr * 1.001), name


# ------------------------------------------------------------------------- options that do something else

case = CASES = Cases()


def case_of(*options: str) -> Callable[[Callable], Callable]:
    """Register a function as the case of several options: one run, or two, show them all."""

    def register(function: Callable) -> Callable:
        CASES.update(dict.fromkeys(options, function))
        return function

    return register


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def images_of(trainer: VQGanVAETrainer) -> Tensor:
    return torch.cat(trainer.next_micro_batches())


def write_images(folder: Path, names: list[str]) -> str:
    """Images of 16 pixels, each of another grey; a name that ends in `broken.png` is no image."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        if name.endswith("broken.png"):
            (folder / name).write_bytes(b"not an image")
        else:
            Image.new("RGB", (16, 16), (20 * number + 5,) * 3).save(folder / name)
    return str(folder)


@case
def epochs(tmp_path):
    """48 images to train on: 2.5 passes are 8 steps of 16; after 3 of them 72 images are left, 9 steps of 8."""
    trainer = build_trainer(tmp_path, num_train_steps=None, epochs=2.5, batch_size=16, save_model_every=3)
    assert trainer.num_train_steps == 8
    for _ in range(3):
        trainer.train_step()
    changed = {"batch_size": 8, "allow_config_change": True}
    resumed = build_trainer(tmp_path, num_train_steps=None, epochs=2.5, **changed)
    assert (resumed.step, resumed.position, resumed.num_train_steps) == (3, 48, 3 + 9)
    assert build_dvae_trainer(tmp_path / "dvae", num_train_steps=None, batch_size=16).num_train_steps == 20 * 3


@case
def image_size(tmp_path):
    for side in (16, 24):
        assert images_of(build_trainer(tmp_path / str(side), image_size=side)).shape == (4, 3, side, side)


@case
def valid(tmp_path):
    """Other images are validated on, and all of those to train on are trained on."""
    trainer = build_trainer(tmp_path, valid="synthetic:7", valid_frac=0.05)
    assert (len(trainer.split.train), len(trainer.split.valid)) == (64, 7)
    assert sum(len(images) for images in trainer.valid_batches()) == 7


@case
def valid_images(tmp_path):
    """Fewer images are validated on, the same on every rank and start; none more is trained on."""
    limited, whole = (build_trainer(tmp_path / str(given), valid_images=given) for given in (5, None))
    assert [len(trainer.split.valid) for trainer in (limited, whole)] == [5, 16]
    assert set(limited.split.valid.tolist()) < set(whole.split.valid.tolist())
    assert torch.equal(limited.split.train, whole.split.train)
    own = [build_trainer(tmp_path / f"own{seed}", **OWN_VALID, random_split_seed=seed).split.valid for seed in (7, 8)]
    assert [len(indices) for indices in own] == [6, 6] and not torch.equal(*own)


OWN_VALID = {"valid": "synthetic:40", "valid_frac": 0.05, "valid_images": 6}


@case
def folder(tmp_path):
    names = [f"{number}.png" for number in range(6)]
    trainer = build_trainer(tmp_path / "run", folder=write_images(tmp_path / "images", names), batch_size=2)
    assert len(trainer.dataset) == 6
    shades = {round(float(image.mean()) * 255) for image in images_of(trainer)}
    assert len(shades) == 2 and shades <= {5, 25, 45, 65, 85, 105}


@case
def exts(tmp_path):
    images = write_images(tmp_path / "images", ["a.png", "b.png", "c.bmp", "d.bmp", "e.bmp"])
    for given, found in ((None, 5), (["png"], 2), ([".BMP"], 3)):
        trainer = build_trainer(tmp_path / f"run{found}", folder=images, exts=given, batch_size=1, valid_frac=0.0)
        assert len(trainer.dataset) == found


@case
def on_bad_image(tmp_path, capsys):
    images = write_images(tmp_path / "images", ["a.png", "b.png", "broken.png"])
    options = {"folder": images, "batch_size": 3, "valid_frac": 0.0}
    with pytest.raises(UserError, match=r"broken\.png"):
        build_trainer(tmp_path / "raise", **options).train_step()
    build_trainer(tmp_path / "skip", on_bad_image="skip", **options).train_step()
    assert f"skipped an image that cannot be decoded: {images}/broken.png" in capsys.readouterr().err


@case
def max_bad_frac(tmp_path):
    images = write_images(tmp_path / "images", ["a.png", "b.png", "broken.png", "broken_too.png"])
    (Path(images) / "broken_too.png").write_bytes(b"no image")
    options = {"folder": images, "batch_size": 4, "valid_frac": 0.0, "on_bad_image": "skip"}
    with pytest.raises(UserError, match="2 of 4 images cannot be decoded"):
        build_trainer(tmp_path / "few", **options).train_step()
    build_trainer(tmp_path / "half", max_bad_frac=0.5, **options).train_step()


@case
def max_pixels(tmp_path):
    images = write_images(tmp_path / "images", ["a.png", "b.png"])
    options = {"folder": images, "batch_size": 2, "valid_frac": 0.0}
    pixels = Image.open(Path(images) / "a.png").width ** 2
    with pytest.raises(UserError, match=f"it has {pixels} pixels, and max_pixels is {pixels - 1}"):
        build_trainer(tmp_path / "small", max_pixels=pixels - 1, **options).train_step()
    build_trainer(tmp_path / "large", max_pixels=pixels, **options).train_step()


@pytest.fixture
def loaders(monkeypatch) -> list[dict]:
    """Options of the loader processes that are started from here on."""
    made = []
    whole = loader.Workers
    monkeypatch.setattr(loader, "Workers", lambda *args, **options: made.append(options) or whole(*args, **options))
    return made


@case_of("num_workers", "prefetch_factor", "pin_memory")
def how_images_are_loaded(tmp_path, loaders):
    """Check for the same images, and for what the loader was told."""
    given = [
        {"num_workers": 0},
        {"num_workers": 1, "prefetch_factor": 1},
        {"num_workers": 1, "prefetch_factor": 5, "pin_memory": False},
        {"num_workers": 0, "pin_memory": True},
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no accelerator is found")
        images = [images_of(build_trainer(tmp_path / str(n), **options)) for n, options in enumerate(given)]
    assert all(torch.equal(images[0], others) for others in images)
    assert [made["count"] for made in loaders] == [1, 1]
    assert [made["prefetch"] for made in loaders] == [1, 5]
    assert [made["pin_memory"] for made in loaders] == [torch.cuda.is_available(), False]


@case
def tf32(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(setup, "allow_tf32", lambda device, allowed: told.append((device.type, allowed)))
    for allowed in (True, False):
        device = build_trainer(tmp_path / str(allowed), tf32=allowed).device.type
    assert told == [(device, True), (device, False)]
    monkeypatch.undo()
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for allowed, precision in ((True, "high"), (False, "highest")):
            precision_of_float32.allow_tf32(torch.device("cuda"), allowed)
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (precision, allowed)
        precision_of_float32.allow_tf32(torch.device("cpu"), True)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        precision_of_float32.allow_tf32(torch.device("cuda"))
        with precision_of_float32.without_tf32():
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def end_of_nan(trainer: Trainer, steps: range) -> int:
    """Return the step at which a training ends whose images of these steps are NaN."""
    not_finite.spoil_images(trainer, steps)
    with suppress(UserError):
        trainer.train()
    return trainer.step


@case_of("on_nonfinite", "max_skipped_steps")
def updates_that_are_not_finite(tmp_path):
    assert end_of_nan(build_trainer(tmp_path / "raise"), range(2, 3)) == 2
    for most in (2, 4):
        options = {"on_nonfinite": "skip", "num_train_steps": 7, "max_skipped_steps": most}
        assert end_of_nan(build_trainer(tmp_path / str(most), **options), range(2, 8)) == 1 + most


@case_of("channels_last", "compile")
def how_networks_lie_in_memory_and_run(tmp_path):
    for given in (True, False):
        trainer = build_trainer(tmp_path / str(given), channels_last=given, compile=given)
        module = trainer.generator.module
        assert [part._compiled_call_impl is not None for part in (module.encoder, module.decoder)] == [given, given]
        assert module.encoder[1].weight.is_contiguous(memory_format=torch.channels_last) == given
        assert images_of(trainer).is_contiguous(memory_format=torch.channels_last) == given


@case
def fused_adam(tmp_path):
    results = {}
    for given in (True, False):
        trainer = build_trainer(tmp_path / str(given), fused_adam=given)
        engines = trainer.engines.values()
        assert [engine.optimizer.param_groups[0]["fused"] for engine in engines] == [given, given]
        results[given] = train_steps(trainer, 1)
    assert all(torch.allclose(results[True][name].float(), t.float(), atol=1e-6) for name, t in results[False].items())


@case
def use_ema(tmp_path):
    averaged, plain = (build_trainer(tmp_path / str(given), use_ema=given) for given in (True, False))
    names = {name.partition(".")[0] for name in train_steps(averaged, 2)}
    assert names == NETWORKS
    with averaged.averaged_network() as network:
        assert network is averaged.ema.ema_model
    names = {name.partition(".")[0] for name in train_steps(plain, 2)}
    assert names == NETWORKS - {"ema"}
    with plain.averaged_network() as network:
        assert network is plain.generator.module


def steps_of(lines: list[dict], name: str) -> list[int]:
    return [line["step"] for line in lines if name in line]


def assert_written(run: Path, *, logged_at, validated_at, drawn_at, saved_at, rows: int, events: int) -> None:
    """Return steps of each kind of output of a run; rows of two images and their views in its last picture."""
    lines = logged(run)
    assert steps_of(lines, "recon_loss") == logged_at and steps_of(lines, "valid/psnr") == validated_at
    pictures = [f"step_{step:08d}{suffix}.png" for step in drawn_at for suffix in ("", "_codes")]
    assert sorted(path.name for path in (run / "results").iterdir()) == pictures
    with Image.open(run / "results" / pictures[-2]) as picture:  # three views of an image, two images a row
        assert picture.size == (6 * 18 + 2, rows * 18 + 2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_{step:08d}" for step in saved_at]
    assert len(list(run.glob("tensorboard/events*"))) == events


@case_of(
    *("num_train_steps", "log_every", "validate_every", "save_results_every", "save_model_every", "num_images_save"),
    *("trackers", "results_folder"),
)
def what_a_run_writes(tmp_path):
    """Two whole runs: one writes all it can at its end, the other each thing every so many steps of its own."""
    build_trainer(tmp_path / "at the end", num_train_steps=3).train()
    written = {"best.json", "checkpoints", "config.json", "events.jsonl", "export", "metrics.jsonl", "results"}
    assert {path.name for path in (tmp_path / "at the end").iterdir()} == written
    assert [path.name for path in tmp_path.iterdir()] == ["at the end"]
    end = {"validated_at": [3], "drawn_at": [3], "saved_at": [3]}
    assert_written(tmp_path / "at the end", logged_at=[1, 2, 3], **end, rows=8, events=0)
    often = {"log_every": 4, "validate_every": 2, "save_results_every": 3, "save_model_every": 5}
    more = {"num_images_save": 2, "trackers": ["tensorboard"]}
    build_trainer(tmp_path / "often", num_train_steps=7, **often, **more).train()
    steps = {"logged_at": [1, 4, 7], "validated_at": [2, 4, 6, 7], "drawn_at": [3, 6, 7], "saved_at": [5, 7]}
    assert_written(tmp_path / "often", **steps, rows=1, events=1)


@case
def keep_checkpoints(tmp_path):
    for keep, steps in ((2, [2, 3]), (None, [1, 2, 3])):
        trainer = build_trainer(tmp_path / str(keep), keep_checkpoints=keep, save_model_every=1)
        train_steps(trainer, 3)
        assert trainer.checkpoints.steps() == steps


@case
def keep_best(tmp_path):
    for keep in (True, False):
        trainer = build_trainer(tmp_path / str(keep), keep_best=keep, validate_every=1)
        trainer.evaluate = lambda trainer=trainer: {"psnr": -float(trainer.step)}  # the first is the best
        trainer.train()
        assert (trainer.run_folder / "export_best").is_dir() == keep


@case
def patience(tmp_path):
    for given, steps in ((None, 4), (2, 3), (1, 2)):
        trainer = build_trainer(tmp_path / str(given), patience=given, validate_every=1)
        trainer.evaluate = lambda trainer=trainer: {"psnr": -float(trainer.step)}
        trainer.train()
        assert trainer.step == steps


@case_of("validate_with", "features", "trust_features", "reference")
def measures(tmp_path):
    """Two extractors and a reference, each of which changes the number; tests/unit/test_validate_with.py has them."""
    found = []
    extractors = {"small": nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), "large": nn.Flatten()}
    np.savez(tmp_path / "reference.npz", mu=np.zeros(12), sigma=np.eye(12))
    for name, network in extractors.items():
        path = tmp_path / f"{name}.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.jit.script(network).save(str(path))
        options = {"validate_with": "rfid", "features": str(path)}
        with pytest.raises(UserError, match="is a TorchScript program"):
            build_trainer(tmp_path / "run", **options)
        more = [{}, {"reference": str(tmp_path / "reference.npz")}] if name == "small" else [{}]
        found += [
            build_trainer(tmp_path / f"{name}{len(one)}", **options, trust_features=True, **one).evaluate()["rfid"]
            for one in more
        ]
    assert len(set(found)) == 3 and "rfid" not in build_trainer(tmp_path / "none").evaluate()


@case
def check_ranks_every(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(networks, "check_ranks_agree", lambda backend, tensors, step: checked.append(step))
    for every, steps in ((0, [0]), (2, [0, 2, 4])):
        train_steps(build_trainer(tmp_path / str(every), check_ranks_every=every), 4)
        assert checked == steps
        checked.clear()


@case
def allow_config_change(tmp_path):
    build_trainer(tmp_path).train_step()
    with pytest.raises(UserError, match="lr: 0.0003 -> 0.1"):
        build_trainer(tmp_path, lr=0.1)
    resumed = build_trainer(tmp_path, lr=0.1, allow_config_change=True)
    assert resumed.config.lr == 0.1
    train_steps(resumed, 1)
    resumed.close()
    with pytest.raises(UserError, match=r"\(trainer.lr: 0.1 -> 0.4\)"):
        build_trainer(tmp_path, lr=0.4, weight_decay=0.1, allow_config_change="weight_decay,warmup_steps")
    assert (
        build_trainer(tmp_path, lr=0.2, weight_decay=0.1, allow_config_change=["lr", "weight_decay"]).config.lr == 0.2
    )
    with pytest.raises(UserError, match="there is no option 'lrr'; nearest: lr"):
        build_trainer(tmp_path, lr=0.1, allow_config_change="lrr")


def _a_run(folder):
    """Return a trainer whose run has a checkpoint, and a file of the user's beside it."""
    trainer = build_trainer(folder, save_model_every=1)
    train_steps(trainer, 1)
    (folder / "notes.txt").write_text("mine")
    return trainer


@case
def resume(tmp_path):
    _a_run(tmp_path).close()
    assert build_trainer(tmp_path).step == 1
    with pytest.raises(UserError, match="holds a run, and resume is false; give another run folder, or --overwrite"):
        build_trainer(tmp_path, resume=False)
    assert build_trainer(tmp_path / "new", resume=False).step == 0


@case
def overwrite(tmp_path):
    _a_run(tmp_path).close()
    anew = build_trainer(tmp_path, overwrite=True, lr=0.5)
    assert (anew.step, anew.config.lr) == (0, 0.5) and not list(tmp_path.glob("checkpoints/step_*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run of vqdist, and overwrite removes nothing else"):
        build_trainer(other, overwrite=True)
    assert (other / "a.txt").read_text() == "mine"


def test_a_run_from_before_an_option_existed_is_resumed(tmp_path):
    build_trainer(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["trainer"]["lr_decay_rate"], config["trainer"]["epochs"]
    path.write_text(json.dumps(config))
    build_trainer(tmp_path).train_step()
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="lr_decay_rate: 0.98 -> 0.5"):
        build_trainer(tmp_path, lr_decay_rate=0.5, lr_schedule="exponential")


@case_of("init_from", "trust_code")
def beginning(tmp_path):
    """Of an export whose encoder comes with this test."""
    named = {"class_path": f"{__name__}.OwnEncoder", "init_args": {"width": 16, "layers": 2}}
    source = build_vae(use_vgg_and_gan=False, encoder=named)
    source.save_pretrained(tmp_path / "source")
    begin = partial(
        VQGanVAETrainer, {"perceptual": "none", "use_gan": False}, **{**QUIET, "num_train_steps": 1, "image_size": 16}
    )
    begin = partial(begin, init_from=str(tmp_path / "source"), results_folder=str(tmp_path / "run"))
    with pytest.raises(UserError, match="OwnEncoder"):
        begin()
    begun = begin(trust_code=True).model
    assert isinstance(begun.autoencoder.encoder, OwnEncoder)
    for name, tensor in source.network.state_dict().items():
        assert torch.equal(tensor, begun.network.state_dict()[name])


@case
def init_pixel_from(tmp_path):
    """Put the decoder of another tokenizer behind a first stage; tests/unit/test_titok_stages.py has its weights."""
    sizes = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 1, "heads": 2, "num_latent_tokens": 5}
    of_target = {"hidden_channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}
    first = {
        "encoder": {"class_path": "titok", "init_args": {**sizes, "token_size": 6}},
        "decoder": {"class_path": "titok_proxy", "init_args": {**sizes, "proxy_codebook_size": 12}},
    }
    target = {
        "encoder": {"class_path": "maskgit", "init_args": {**of_target, "z_channels": 8}},
        "decoder": {"class_path": "maskgit", "init_args": of_target},
    }
    for name, parts in (("first", first), ("target", target)):
        codebook = {"class_path": "gradient_vq", "init_args": {"codebook_size": 12}}
        VQGanVAE(**parts, quantizer=codebook, use_vgg_and_gan=False).save_pretrained(tmp_path / name)
    given = {**QUIET, "num_train_steps": 1, "image_size": 16, "results_folder": str(tmp_path / "run")}
    begin = partial(VQGanVAETrainer, {"perceptual": "none", "use_gan": False}, **given)
    begin = partial(begin, init_from=str(tmp_path / "first"))
    with pytest.raises(UserError, match="makes no images in this stage"):
        begin()
    assert begin(init_pixel_from=str(tmp_path / "target")).model.autoencoder.makes_images


@case_of("family", "peer_config", "init_optimizer")
def beginning_from_elsewhere(tmp_path):
    """Of a file whose tensors two projects have, and of a run with optimizers."""
    fixture = Path(__file__).parent.parent / "data" / "parity" / "ibq"
    begin = partial(VQGanVAETrainer, {"perceptual": "none", "use_gan": False}, **{**QUIET, "num_train_steps": 2})
    begin = partial(begin, image_size=16, batch_size=2)
    file = {"init_from": str(fixture / "weights.safetensors"), "peer_config": str(fixture / "config.json")}
    for family, kind in ((None, "IBQ"), ("taming", "GradientVQ")):
        trainer = begin(results_folder=str(tmp_path / kind), family=family, **file)
        assert type(trainer.model.quantizer).__name__ == kind
        trainer.train()
        trainer.close()
    for taken in (True, False):
        place = {"results_folder": str(tmp_path / f"taken_{taken}"), "init_from": str(tmp_path / "IBQ")}
        assert bool(begin(**place, init_optimizer=taken).generator.optimizer.state) is taken


class OwnEncoder(ConvEncoder):
    """One that vqdist does not have."""


@case
def backend(tmp_path):
    for name in ("local", "accelerate"):
        trainer = build_trainer(tmp_path / name, backend=name)
        assert trainer.backend.name == name
        trainer.close()


@case
def accelerate_kwargs(tmp_path):
    for given in ({}, {"step_scheduler_with_optimizer": False}):
        trainer = build_trainer(tmp_path / str(len(given)), backend="accelerate", accelerate_kwargs=given)
        assert trainer.backend.accelerator.step_scheduler_with_optimizer == (not given)
        trainer.close()


@case
def dist_timeout(tmp_path):
    for minutes in (10.0, 2.5):
        trainer = build_trainer(tmp_path / str(minutes), backend="accelerate", dist_timeout=minutes)
        assert trainer.backend.accelerator.init_handler.timeout == timedelta(minutes=minutes)
        trainer.close()


def test_the_command_line_says_dist_timeout_beside_the_backend():
    options = train_options("dvae", "--data synthetic:8 --out OUT --dist_timeout 2.5".split())
    assert options.dist_timeout == 2.5 and "dist_timeout" not in options.trainer


@case
def deepspeed_config(tmp_path):
    config = tmp_path / "deepspeed.json"
    config.write_text('{"zero_optimization": {"stag": 2}}')
    with pytest.raises(UserError, match=rf"{config}: zero_optimization has no key 'stag'; nearest: stage"):
        build_trainer(tmp_path / "run", backend="deepspeed", deepspeed_config=str(config))


def options_of(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("kind, config", [("vqgan", VQGanTrainerConfig), ("dvae", DiscreteVAETrainerConfig)])
def test_every_trainer_option_has_a_case(kind, config):
    assert options_of(VQGanTrainerConfig) == CHANGES_WEIGHTS.keys() | CASES.keys()
    own = options_of(config) - options_of(TrainerConfig)
    assert own - CASES.keys() == TABLES[kind].keys() - options_of(TrainerConfig)


@pytest.mark.parametrize("function", dict.fromkeys(CASES.values()), ids=lambda function: function.__name__)
def test_options_have_their_effect(function, request):
    function(**{name: request.getfixturevalue(name) for name in inspect.signature(function).parameters})


@pytest.mark.parametrize("config", [VQGanTrainerConfig, DiscreteVAETrainerConfig])
def test_every_trainer_option_says_what_it_is(config):
    documented = {
        name
        for cls in config.__mro__[:-1]
        for name, following in _statements_after_fields(cls)
        if following.startswith('"""')
    }
    assert {field.name for field in dataclasses.fields(config)} == documented


def _statements_after_fields(cls: type) -> list[tuple[str, str]]:
    lines = [line.strip() for line in inspect.getsource(cls).splitlines()]
    fields = {field.name for field in dataclasses.fields(cls)}
    pairs = zip(lines, lines[1:])
    return [(line.partition(":")[0], following) for line, following in pairs if line.partition(":")[0] in fields]


@pytest.mark.parametrize("trainer", [VQGanVAETrainer, DiscreteVAETrainer])
def test_signature_shows_every_option(trainer):
    shown = inspect.signature(trainer).parameters
    assert list(shown)[:3] == ["vae", "dataset", "valid_dataset"]
    options = {field.name: field for field in dataclasses.fields(trainer.config_class)}
    assert options.keys() == shown.keys() - {"vae", "dataset", "valid_dataset"}
    assert shown["lr"].default == options["lr"].default
    batch_size = inspect.Parameter.empty if trainer is VQGanVAETrainer else 8
    assert shown["batch_size"].default == batch_size


# ------------------------------------------------------------------------------------- the model's arguments

model_case = MODEL_CASES = Cases("model_")


def with_and_without(**options):
    """Two models, one with these options."""
    return build_vae(), build_vae(**options)


def pixels(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 16, 16, generator=torch.Generator().manual_seed(3))


@model_case
def model_dim():
    assert [build_vae(dim=dim).autoencoder.encoder[0].out_channels for dim in (16, 8)] == [16, 8]


@model_case
def model_channels():
    assert [build_vae(channels=c)(pixels(c)).shape[1] for c in (1, 3, 4)] == [1, 3, 4]


@model_case
def model_layers():
    assert [build_vae(layers=layers).encode(pixels())[1].shape[1:] for layers in (1, 2, 3)] == [(8, 8), (4, 4), (2, 2)]


@model_case
def model_l2_recon_loss():
    l1, l2 = with_and_without(l2_recon_loss=True)
    recon, image = pixels(), 1 - pixels()
    assert torch.allclose(l1.reconstruction_loss(recon, image), (recon - image).abs().mean())
    assert torch.allclose(l2.reconstruction_loss(recon, image), (recon - image).square().mean())


@model_case
def model_use_hinge_loss():
    logits = torch.tensor([[-2.0, 3.0]])
    bce, hinge = with_and_without(use_hinge_loss=True)
    assert float(hinge.adversarial_loss(logits)) == -0.5
    assert float(bce.adversarial_loss(logits)) == pytest.approx((2.126928 + 0.048587) / 2)
    assert float(hinge.discriminator_loss(logits, logits)) == 1.5 + 2.0
    assert float(bce.discriminator_loss(logits, logits)) == pytest.approx(
        (2.126928 + 0.048587 + 0.126928 + 3.048587) / 2
    )


@model_case
def model_discr_loss():
    logits = torch.tensor([[-2.0, 3.0]])
    halved = build_vae(use_hinge_loss=True, discr_loss="hinge")
    assert float(halved.discriminator_loss(logits, logits)) == (1.5 + 2.0) / 2
    assert float(halved.adversarial_loss(logits)) == -0.5


@model_case
def model_gen_loss():
    logits = torch.tensor([[-2.0, 3.0]])
    per_image = build_vae(use_hinge_loss=True, gen_loss="non_saturating")
    assert float(per_image.adversarial_loss(logits)) == pytest.approx(0.474077)  # softplus(-0.5)
    assert float(per_image.discriminator_loss(logits, logits)) == 1.5 + 2.0


@model_case
def model_quantizer():
    names = {
        "lfq": (LFQQuantizer, 32),
        "vq": (VQQuantizer, 32),
        "fsq": (FSQQuantizer, 256),
        "simvq": (SimVQQuantizer, 32),
        "residual_vq": (ResidualVQQuantizer, 32),
    }
    built = {name: type(build_vae(quantizer=name, codebook_size=size).quantizer) for name, (_, size) in names.items()}
    assert built == {name: cls for name, (cls, _) in names.items()}


@model_case
def model_lookup_free_quantization():
    options = {"quantizer": None, "codebook_size": 32}
    assert isinstance(build_vae(lookup_free_quantization=True, **options).quantizer, LFQQuantizer)
    assert isinstance(build_vae(lookup_free_quantization=False, **options).quantizer, VQQuantizer)
    options["quantizer"] = "simvq"  # a name wins
    assert isinstance(build_vae(lookup_free_quantization=False, **options).quantizer, SimVQQuantizer)


@model_case
def model_codebook_size():
    assert [build_vae(codebook_size=size).codebook_size for size in (16, 64)] == [16, 64]


@model_case
def model_vq_kwargs():
    model = build_vae(quantizer="vq", vq_kwargs={"codebook_dim": 4, "decay": 0.5})
    assert model.quantizer.inner.codebook.shape[-1] == 4
    assert model.quantizer.inner._codebook.decay == 0.5


@model_case
def model_lfq_kwargs():
    assert [vae.quantizer.inner.diversity_gamma for vae in with_and_without(lfq_kwargs={"diversity_gamma": 2})] == [
        4,
        2,
    ]


@model_case
def model_quantizer_kwargs():
    model = build_vae(quantizer="fsq", codebook_size=None, quantizer_kwargs={"levels": [5, 3]})
    assert model.codebook_size == 15


@model_case
def model_use_vgg_and_gan():
    on, off = with_and_without(use_vgg_and_gan=False)
    assert on.discriminator is not None and on.perceptual_loss() is not None
    assert off.discriminator is None and off.perceptual_loss() is None


@model_case
def model_use_gan():
    on, off = with_and_without(use_gan=False)
    assert on.discriminator is not None and off.discriminator is None
    assert off.perceptual_loss() is not None


@model_case
def model_perceptual():
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        loss = perceptual.PerceptualLoss(nn.Identity())
        patch.setattr(perceptual.PerceptualLoss, "build", lambda spec: asked.append(spec) or loss)
        for spec in ("vgg16", "weights.pth"):
            assert build_vae(vgg=None, perceptual=spec).perceptual_loss() is loss
    assert asked == ["vgg16", "weights.pth"]
    assert build_vae(vgg=None, perceptual="none").perceptual_loss() is None
    with pytest.raises(UserError, match=r"--model.perceptual weights\.pth is neither vgg16, .* nor a file"):
        build_vae(vgg=None, perceptual="weights.pth").perceptual_loss()


@model_case
def model_encoder():
    given = {"class_path": "conv", "init_args": {"width": 16, "layers": 2, "groups": 8}}
    model = build_vae(encoder=given)
    assert {norm.num_groups for norm in model.autoencoder.encoder.modules() if isinstance(norm, nn.GroupNorm)} == {8}
    assert model.configuration()["encoder"] == given


@model_case
def model_decoder():
    given = {"class_path": "conv", "init_args": {"width": 8, "layers": 2, "layer_mults": [2, 4], "groups": 4}}
    assert build_vae(decoder=given).autoencoder.last_layer.in_channels == 8


@model_case
def model_discriminator():
    given = {"class_path": "patch", "init_args": {"dim": 16, "layers": 1, "groups": 4}}
    assert build_vae(discriminator=given, discr_layers=4).discriminator.layers == 1


@model_case
def model_preset():
    options = dict.fromkeys(("quantizer", "dim", "vgg")) | {"layers": 4, "encdec_resnet_groups": 16, "discr_layers": 4}
    with torch.device("meta"):
        small, large = (VQGanVAE(preset=name, use_vgg_and_gan=False) for name in ("ldm_vq_f8_n256", "ldm_vq_f8"))
        trained = build_vae(preset="ldm_vq_f8", perceptual="none", **options)
    assert (small.codebook_size, large.codebook_size) == (256, 16384) and large.image_size == 256
    assert trained.discriminator is not None and "preset" not in trained.configuration()
    assert trained.configuration()["encoder"]["init_args"]["z_channels"] == 4
    own = {"class_path": "gradient_vq", "init_args": {"codebook_size": 8}}
    with torch.device("meta"):
        assert VQGanVAE.preset("ldm_vq_f8", quantizer=own, use_vgg_and_gan=False).codebook_size == 8
    with pytest.raises(UserError, match="there is no preset 'ldm_vq_f9'; nearest: ldm_vq_f8"):
        VQGanVAE.preset("ldm_vq_f9")


@model_case
def model_terms():
    recon, image = pixels(), 1 - pixels()
    terms = [{"class_path": "reconstruction", "init_args": {"kind": "l2", "weight": 3.0}}]
    whole = build_vae(vgg=None, terms=terms).objective().whole(recon, image, None)
    assert torch.allclose(whole.loss, 3 * (recon - image).square().mean())


@model_case
def model_vgg():
    recon, image = pixels(), 1 - pixels()
    model = build_vae(vgg=nn.Identity())  # features are the normalised pixels
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    assert torch.allclose(model.perceptual_loss()(recon, image), ((recon - image) / std).square().mean())
    assert build_vae(vgg=None, perceptual="none").perceptual_loss() is None


@model_case
def model_discr_layers():
    assert [build_vae(discr_layers=n).discriminator(pixels()).shape[-1] for n in (1, 2, 3)] == [7, 3, 1]


@model_case
def model_encdec_layer_mults():
    default, changed = with_and_without(encdec_layer_mults=[1, 3])
    for model, widths in ((default, [16, 16, 32]), (changed, [16, 16, 48])):
        assert [conv.out_channels for conv in model.autoencoder.encoder if isinstance(conv, nn.Conv2d)] == widths


@model_case
def model_encdec_num_resnet_blocks():
    def places(blocks) -> list[int]:
        encoder = build_vae(encdec_num_resnet_blocks=blocks).autoencoder.encoder
        return [block.net[0].in_channels for block in encoder if isinstance(block, ResidualBlock)]

    assert [places(blocks) for blocks in (0, 1, [2, 1])] == [[], [32], [16, 16, 32]]


@model_case
def model_encdec_resnet_groups():
    for groups in (4, 8):
        model = build_vae(encdec_resnet_groups=groups)
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        assert {norm.num_groups for norm in norms} == {groups}


@model_case
def model_encdec_first_conv_kernel_size():
    sizes = [vae.autoencoder.encoder[0].kernel_size for vae in with_and_without(encdec_first_conv_kernel_size=7)]
    assert sizes == [(5, 5), (7, 7)]


@model_case
def model_kwargs():
    named = build_vae(quantizer="vq", vq_kwargs={}, vq_decay=0.5, vq_codebook_dim=4)
    assert named.quantizer.inner._codebook.decay == 0.5
    assert named.quantizer.inner.codebook.shape[-1] == 4


def test_every_argument_of_the_model_has_a_case():
    assert inspect.signature(VQGanVAE.__init__).parameters.keys() - {"self"} == MODEL_CASES.keys()


@pytest.mark.parametrize("argument", MODEL_CASES)
def test_argument_of_the_model_has_its_effect(argument):
    MODEL_CASES[argument]()


def test_every_argument_of_the_model_says_what_it_is():
    for name in inspect.signature(VQGanVAE.__init__).parameters.keys() - {"self", "kwargs"}:
        assert f"\n        {name}: " in inspect.getdoc(VQGanVAE).replace("\n    ", "\n        "), name


# ----------------------------------------------------------------------------------------------- messages

# options of the trainer (folder and results_folder are added) and what the message says
WRONG_OPTIONS = [
    ({"precision": "fp16"}, r"^precision 'fp16' is not supported: its gradients vanish .*use bf16 .*or fp32$"),
    ({"precision": "fp8"}, r"^precision 'fp8' is not known; choose one of fp32, bf16$"),
    ({"backend": "nccl"}, r"^backend 'nccl' is not known; choose auto, local, accelerate, deepspeed$"),
    ({"backend": "horovod"}, r"^backend 'horovod' is not supported; backend 'accelerate' does its job"),
    ({"grad_acum_every": 2}, r"^there is no option 'grad_acum_every'; nearest: grad_accum_every"),
    ({"xyzzy": 2}, r"^there is no option 'xyzzy'$"),
    (
        {"batch_size": 1000},
        r"^one optimizer step takes 1000 images \(batch_size 1000 x .* but there are 48 to train on; ",
    ),
    ({"grad_accum_every": 13}, r"takes 52 images .* but there are 48"),
    ({"image_size": 18}, r"^image_size 18 is not a multiple of 4 \(2 \*\* 2 layers\); try 16 or 20$"),
    ({"image_size": 2}, r"^image_size 2 is not a multiple of 4 .*; try 4$"),
    ({"image_size": 4}, r"^image_size 4 is too small for discr_layers 2, .* at least 8; use discr_layers 1 or "),
    ({"folder": None}, r"^folder or dataset must be given, and neither was"),
    ({"dataset": [torch.zeros(3, 16, 16)] * 8}, r"^folder or dataset must be given, and both was"),
    ({"accelerate_kwargs": {"cpu": True}}, r"^accelerate_kwargs is given but the backend is 'local'; use --backend "),
    ({"deepspeed_config": {"x": 1}}, r"^deepspeed_config is given but the backend is 'local'; use --backend d"),
    ({"backend": "accelerate", "deepspeed_config": "zero.json"}, r"deepspeed_config .* the backend is 'accelerate'"),
    (
        {"backend": "accelerate", "accelerate_kwargs": {"mixed_precision": "bf16"}},
        r"belongs to the run; use precision",
    ),
    ({"backend": "deepspeed", "deepspeed_config": {"optimizer": {}}}, r"sets 'optimizer', .* use optimizer, lr, "),
    ({"backend": "deepspeed", "deepspeed_config": "absent.json"}, r"^deepspeed_config absent.json is not a file"),
    (
        {"backend": "deepspeed", "deepspeed_config": {"zero_optimization": {"stage": 4}}},
        r"stage is 4; use 0, 1, 2 or 3$",
    ),
    (
        {"trackers": ["mlflow"]},
        r"^there is no tracker 'mlflow'; there are tensorboard, wandb; or give the import",
    ),
    ({"folder": "ABSENT/images"}, r"^no such folder: .*ABSENT/images; check the path"),
    ({"folder": "EMPTY"}, r"^no images in .*EMPTY: found no files; expected files ending in bmp, gif,"),
    ({"folder": "syntetic"}, r"nearest: synthetic"),
    ({"folder": "synthetic:64", "exts": ["png"]}, r"^exts \['png'\] has no meaning for 'synthetic:64'"),
    ({"lr_schedule": "liner"}, r"^there is no lr_schedule 'liner'; nearest: linear; there are constant, cosine"),
    ({"lr_decay_rate": 0.5}, r"^lr_decay_rate 0.5 does nothing, because lr_schedule is constant; leave it out$"),
    *(
        (
            {"lr_schedule": "exponential", "lr_decay_rate": rate},
            r"^lr_decay_rate \S+ is not possible; it must be above 0 and at most 1$",
        )
        for rate in (0.0, 1e200, float("inf"), float("nan"))
    ),
    ({"num_train_steps": None}, r"^num_train_steps is not given; say how many optimizer steps to train, or give epoc"),
    ({"epochs": 3}, r"^num_train_steps 4 and epochs 3 are both given; leave one out, or set it to null where"),
    ({"num_train_steps": None, "epochs": 0.001}, r"^epochs 0.001 of 48 images is less than one image; give more, or"),
    *(
        (
            {"num_train_steps": None, "epochs": epochs},
            r"^epochs \S+ is not possible; it must be above 0 and at most 1e",
        )
        for epochs in (-1.0, 1e300, float("inf"))
    ),
    ({"on_bad_image": "ignore"}, r"^on_bad_image 'ignore' is not known; choose one of raise, skip$"),
    ({"on_nonfinite": "ignore"}, r"^on_nonfinite 'ignore' is not known; choose one of raise, skip$"),
    ({"augment": False, "flip": False}, "^flip False does nothing, because augment is false; leave it out$"),
    ({"augment": False, "crop": "random"}, "^crop random does nothing, because augment is false; leave it out$"),
    ({"shorter_side": [1, 1.25]}, r"^shorter_side \[1, 1.25\] does nothing, because crop is center; leave it out$"),
    ({"crop": "random", "crop_area": [0.5, 1]}, r"^crop_area \[0.5, 1\] does nothing, because crop is random; leave"),
    ({"crop": "random", "crop_aspect": [1, 1]}, r"^crop_aspect \[1, 1\] does nothing, because crop is random; leave"),
    ({"crop": "resized", "shorter_side": [1, 2]}, r"^shorter_side \[1, 2\] does nothing, because crop is resized"),
    ({"crop": "corner"}, "^crop 'corner' is not known; choose one of center, random, resized$"),
    ({"crop": "resized", "crop_area": [0.5]}, r"^crop_area \[0.5\] is not possible; give the lowest and the highest"),
    ({"max_skipped_steps": 3}, r"^max_skipped_steps 3 does nothing, because on_nonfinite is raise; leave it out$"),
    ({"ema_beta": 1.5}, r"^ema_beta 1.5 is not possible; it must be at least 0 and at most 1$"),
    ({"valid_frac": 1.0}, r"^valid_frac 1.0 is not possible; give a share of the images in \[0, 1\)"),
    ({"valid_frac": 0.999}, r"^valid_frac 0.999 of 64 images leaves none to train on; lower it$"),
    ({"max_grad_norm": 0.0}, r"^max_grad_norm 0.0 is not possible; it must be above 0$"),
    ({"discr_max_grad_norm": -1.0}, r"^discr_max_grad_norm -1.0 is not possible; it must be above 0$"),
    ({"max_grad_norm": float("inf")}, r"^max_grad_norm inf is not possible; it must be above 0 and finite$"),
    *(
        ({"dist_timeout": minutes}, r"^dist_timeout \S+ is not possible; it must be above 0 and at most 525600$")
        for minutes in (0, 1e30, float("inf"))
    ),
    ({"adam_betas": [0.9]}, r"^adam_betas \[0.9\] is not possible; give two decays in \[0, 1\)"),
    ({"adam_betas": [0.9, 1]}, r"^adam_betas \[0.9, 1\] is not possible; give two decays"),
    ({"lr": float("nan")}, r"^lr nan is not possible; it must be at least 0$"),
    ({"lr": float("inf")}, r"^lr inf is not possible; it must be at least 0 and finite$"),
    ({"batch_size": None}, r"^batch_size None is not possible; give a whole number$"),
    ({"batch_size": "8"}, r"^batch_size '8' is not possible; give a whole number$"),
    ({"batch_size": True}, r"^batch_size True is not possible; give a whole number$"),
    ({"num_train_steps": 2.5}, r"^num_train_steps 2.5 is not possible; give a whole number or null$"),
    ({"num_train_steps": None, "epochs": "2"}, r"^epochs '2' is not possible; give a number or null$"),
    ({"use_ema": 1}, r"^use_ema 1 is not possible; give true or false$"),
    ({"folder": 64}, r"^folder 64 is not possible; give a string, a dictionary or null$"),
    ({"trackers": 3}, r"^trackers 3 is not possible; give a list, each item a name, an import"),
    (
        {"adaptive_weight": False, "max_adaptive_weight": 10.0},
        r"^max_adaptive_weight 10.0 does nothing, because ad",
    ),
    (
        {"apply_grad_penalty_every": 0, "grad_penalty_weight": 1.0},
        r"^grad_penalty_weight 1.0 does nothing, because apply_grad_penalty_every is 0; leave it out$",
    ),
    (
        {"apply_grad_penalty_every": 2, "grad_penalty_weight": 0.0},
        r"^apply_grad_penalty_every 2 does nothing, because grad_penalty_weight is 0; leave it out$",
    ),
    *(
        ({"adversarial_weight": 0.0, **option}, r" does nothing, because adversarial_weight is 0; leave it out$")
        for option in (
            {"adaptive_weight": False},
            {"max_adaptive_weight": 10.0},
            {"discriminator_warmup_steps": 1},
            {"adversarial_ramp_steps": 1},
        )
    ),
    ({"valid_frac": 0, "random_split_seed": 1}, r"^random_split_seed 1 does nothing, because valid_frac is 0; leave"),
    ({"valid_frac": 0, "valid_images": 5}, r"^valid_images 5 does nothing, because valid_frac is 0; leave it out$"),
    ({"valid_images": 0}, r"^valid_images 0 is not possible; it must be at least 1$"),
    ({"num_workers": 0, "prefetch_factor": 3}, r"^prefetch_factor 3 does nothing, because num_workers is 0; leave it"),
    ({"model": {"use_gan": False, "discr_layers": 3}}, r"^discr_layers 3 does nothing, because the model has no disc"),
    (
        {"model": {"use_gan": False, "use_hinge_loss": False}},
        r"^use_hinge_loss False does nothing, because the mo",
    ),
    (
        {"model": {"use_vgg_and_gan": False, "vgg": None, "perceptual": "lpips"}},
        r"^perceptual lpips does nothing, because use_vgg_and_gan is false; leave it out$",
    ),
    (
        {"model": {"quantizer": "fsq", "codebook_size": 256, "lookup_free_quantization": False}},
        r"^lookup_free_quantization False does nothing, because quantizer says which one; leave it out$",
    ),
    (
        {"model": {"use_vgg_and_gan": False, "vgg": None, "terms": ["reconstruction", Perceptual(SmallFeatures())]}},
        r"^use_vgg_and_gan is false, which turns the perceptual loss off, and terms have Perceptual; leave the term ",
    ),
    ({"exts": ["png", 3]}, r"^exts \['png', 3\] is not possible; give a list of strings or null$"),
    ({"accelerate_kwargs": ["cpu"]}, r"^accelerate_kwargs \['cpu'\] is not possible; give a dictionary$"),
]
LOWEST = {
    **dict.fromkeys(["num_train_steps", "batch_size", "image_size", "grad_accum_every", "log_every"], 1),
    **dict.fromkeys(["num_images_save", "ema_update_every", "prefetch_factor", "keep_checkpoints"], 1),
    **dict.fromkeys(["warmup_steps", "validate_every", "save_results_every", "save_model_every"], 0),
    **dict.fromkeys(["check_ranks_every", "num_workers", "lr", "discr_lr", "ema_update_after_step"], 0),
    "max_skipped_steps": 1,
    **dict.fromkeys(["weight_decay", "discr_weight_decay", "discr_lr_warmup_steps"], 0),
    **dict.fromkeys(["apply_grad_penalty_every", "grad_penalty_weight", "discriminator_start"], 0),
    **dict.fromkeys(["discriminator_warmup_steps", "adversarial_ramp_steps", "adversarial_weight"], 0),
    "max_adaptive_weight": 0,
}
WRONG_OPTIONS += [
    ({name: lowest - 1}, rf"^{name} {lowest - 1} is not possible; it must be at least {lowest}$")
    for name, lowest in LOWEST.items()
]


def assert_nothing_began(run: Path) -> None:
    assert not dist.is_initialized(), "a process group was started"
    assert not run.exists(), "the run folder was written to"


def describe(value) -> str:
    return ",".join(f"{key}={str(item)[:20]}" for key, item in value.items()) if isinstance(value, dict) else ""


@pytest.mark.parametrize("options, message", WRONG_OPTIONS, ids=describe)
def test_a_wrong_option_is_one_line_before_anything_begins(options, message, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    if options.get("folder") in ("EMPTY", "ABSENT/images"):
        options = {**options, "folder": str(tmp_path / options["folder"])}
    with pytest.raises(UserError, match=message) as error:
        build_trainer(tmp_path / "run", **options)
    assert "\n" not in str(error.value)
    assert_nothing_began(tmp_path / "run")


def test_numbers_of_numpy_stand_for_pythons(tmp_path):
    options = {"lr": np.float32(0.5), "batch_size": np.int64(2), "adam_betas": (np.float64(0.5), np.float32(0.75))}
    trainer = build_trainer(tmp_path / "run", **options, use_ema=np.bool_(False), model={"dim": np.int32(32)})
    assert (trainer.config.lr, trainer.config.batch_size, trainer.config.use_ema) == (0.5, 2, False)
    assert trainer.config.adam_betas == (0.5, 0.75)
    kinds = {type(value) for value in (trainer.config.lr, *trainer.config.adam_betas, trainer.config.batch_size)}
    assert kinds == {float, int}
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["model"]["dim"], written["trainer"]["batch_size"]) == (32, 2)
    with pytest.raises(UserError, match=r"^batch_size 2.0 is not possible; give a whole number$"):
        build_trainer(tmp_path / "other", batch_size=np.float64(2))
    with pytest.raises(UserError, match=r"^batch_size True is not possible; give a whole number$"):
        build_trainer(tmp_path / "other", batch_size=np.bool_(True))


def test_a_bare_word_stands_for_a_list_of_one(tmp_path, monkeypatch):
    assert build_trainer(tmp_path / "run", trackers="tensorboard").config.trackers == ["tensorboard"]
    (tmp_path / "run.yaml").write_text("trainer: {trackers: tensorboard}\ndata: {exts: png}\n")
    for arguments in (
        ["--config", str(tmp_path / "run.yaml")],
        ["--trainer.trackers", "tensorboard", "--data.exts", "png"],
        ["--trainer.trackers", "[tensorboard]", "--data.exts", "[png]"],
    ):
        options = train_options("vqgan", ["--data.image_size", "16", "--trainer.batch_size", "2", *arguments])
        given = {"trackers": options.trainer.trackers, "exts": options.data.exts}
        assert in_one_form(TrainerConfig, given) == {"trackers": ["tensorboard"], "exts": ["png"]}


def test_a_path_may_stand_for_a_string_and_a_tuple_for_a_list(tmp_path):
    images = Path(write_images(tmp_path / "images", [f"{number}.png" for number in range(6)]))
    options = {"folder": images, "exts": ("png",), "batch_size": 2, "lr": 1, "results_folder": tmp_path / "run"}
    trainer = build_trainer(tmp_path, **options)
    assert trainer.config.folder == str(images) and trainer.config.lr == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trainer"]["results_folder"].endswith("run")
    assert build_trainer(tmp_path, **options).run_folder == tmp_path / "run"


def test_missing_options_are_named(tmp_path):
    with pytest.raises(UserError, match="^these options have no default and were not given: image_size, batch_size$"):
        VQGanVAETrainer(build_vae(), folder="synthetic:64", results_folder=str(tmp_path / "run"))
    assert_nothing_began(tmp_path / "run")


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^tracker 'wandb' is not installed; install it with pip install 'vqdist"):
        build_trainer(tmp_path / "run", trackers=["wandb"])
    assert_nothing_began(tmp_path / "run")


def test_another_kind_of_model_is_refused(tmp_path):
    options = {"folder": "synthetic:64", "num_train_steps": 1, "batch_size": 1, "image_size": 16}
    with pytest.raises(UserError, match="^the model is a SmallFeatures; VQGanVAETrainer trains a VQGanVAE$"):
        VQGanVAETrainer(SmallFeatures(), results_folder=str(tmp_path / "run"), **options)
    assert_nothing_began(tmp_path / "run")


def test_local_backend_under_a_launcher_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="backend 'local' under a launcher of 2 processes would train 2 separate models"
    ):
        build_trainer(tmp_path / "run", backend="local")
    with pytest.raises(UserError, match=r"takes 64 images \(batch_size 32 x grad_accum_every 1 x 2 processes\)"):
        build_trainer(tmp_path / "run", batch_size=32)
    assert_nothing_began(tmp_path / "run")


WRONG_ARGUMENTS = [
    ({"channels": 2}, r"^channels 2 is not possible; use 1 \(grey\), 3 \(colour\) or 4"),
    ({"layers": 0}, r"^layers 0 is not possible; at least one halving"),
    ({"dim": 18}, r"^dim 18 is not a multiple of encdec_resnet_groups 4; try 16$"),
    ({"dim": 2}, r"^dim 2 is not a multiple of encdec_resnet_groups 4; try 4$"),
    ({"encdec_first_conv_kernel_size": 4}, r"^encdec_first_conv_kernel_size 4 is even; try 5$"),
    ({"encdec_layer_mults": [1]}, r"^encdec_layer_mults has 1 numbers; layers 2 needs 2$"),
    ({"encdec_num_resnet_blocks": [1, 1, 1]}, r"^encdec_num_resnet_blocks has 3 numbers; layers 2 needs 2$"),
    ({"discr_layers": 0}, r"^discr_layers 0 is not possible; at least one layer is needed$"),
    ({"quantizer": "lfg"}, r"^there is no quantizer 'lfg'; nearest: lfq"),
    ({"codebook_size": 33}, r"^quantizer lfq: codebook_size 33 is no power of 2, .*try 32 or 64$"),
    ({"codebok_size": 32}, r"^VQGanVAE has no argument 'codebok_size'; nearest: codebook_size$"),
    (
        {"vq_kwargs": {"decay": 0.9}},
        r"^vq_kwargs \{'decay': 0.9\} is given but the quantizer is 'lfq'; use .* 'vq' or ",
    ),
    ({"vq_decay": 0.9}, r"^vq_kwargs \{'decay': 0.9\} is given but the quantizer is 'lfq'"),
    ({"quantizer": "vq", "lfq_kwargs": {"diversity_gamma": 1}}, r"^lfq_kwargs .* is given but the quantizer is 'vq'"),
    ({"quantizer_kwargs": {"diversity_gama": 1}}, r"^quantizer lfq has no option 'diversity_gama'; nearest: divers"),
]


@pytest.mark.parametrize("arguments, message", WRONG_ARGUMENTS, ids=describe)
def test_a_wrong_argument_of_the_model_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        build_vae(**arguments)
    assert "\n" not in str(error.value)
