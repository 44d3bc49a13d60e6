"""Python's prompt and notebooks: objects that show themselves, names and signatures that help."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from scenarios import (
    build_dvae,
    build_dvae_trainer,
    build_prior,
    build_tokenizer,
    build_trainer,
    build_vae,
    build_var,
    build_vq_ar,
)
from torch import nn

import vqdist
from vqdist.models.quantizers import build_quantizer


class Squares(vqdist.Source):
    """Ten images in two classes, by a name that would clear a terminal."""

    spec, class_names = "squares\x1b[2J", ["even", "odd"]

    def __len__(self):
        return 10


SHOWN = {
    "vqgan": (
        lambda: build_vae("fsq"),
        "VQGanVAE(ConvEncoder, FSQQuantizer(240 codes, features of 32), ConvDecoder, "
        "discriminator PatchDiscriminator, 99.2 K parameters)",
    ),
    "alone": (lambda: build_vae("fsq", use_gan=False), "ConvDecoder, "),
    "dvae": (build_dvae, "DiscreteVAE(32 codes of dimension 16, 16 x 16 pixels, "),
    "prior": (build_prior, "Prior(16 codes of 32, 3 classes, 16 x 16 pixels, "),
    "var": (build_var, "VAR(21 codes of 32, 3 classes, 16 x 16 pixels, "),
    "vq_ar": (build_vq_ar, "VQImageAutoregressiveAutoencoder(16 codes of 32, 16 x 16 pixels, "),
    "simple_vqvae": (vqdist.SimpleVQVAE, "SimpleVQVAE(MultiScaleQuantizer(16 codes, scales 1-2-"),
    "tokenizer": (build_tokenizer, "Tokenizer(VQGanVAE, 16 x 16 pixels, 3 channels, 4 x 4 codes of 32)"),
    "of scales": (lambda: build_var().tokenizer, "1 x 1 + 2 x 2 + 4 x 4 codes of 32)"),
    "residual": (
        lambda: build_quantizer("residual_vq", dim=8, codebook_size=32, num_quantizers=3),
        "ResidualVQQuantizer(32 codes, 3 levels, features of 8)",
    ),
    "images": (
        lambda: vqdist.ImageDataset("synthetic:2000", (32, 48), channels=1),
        "ImageDataset(SyntheticSource(synthetic:2000, 2,000 images), 32 x 48 pixels, 1 channel, augmented)",
    ),
    "source": (Squares, r"Squares(squares\x1b[2J, 10 images, 2 classes)"),
    "dummies": (lambda: vqdist.DummyDataset(7), "DummyDataset(7)"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_objects_show_themselves_in_one_line(name):
    build, words = SHOWN[name]
    shown = repr(build())
    assert words in shown and "\n" not in shown and len(shown) < 250
    if isinstance(build(), nn.Module) and name not in ("residual",):
        assert str(build()) == shown


def test_a_model_says_how_many_parameters_it_has():
    model = build_dvae()
    count = sum(weight.numel() for weight in model.parameters())
    assert repr(model).endswith(f"{count / 1000:.3g} K parameters)") and 10_000 < count < 999_000
    assert "\n" in repr(build_vae().network) and "Conv2d" in repr(build_vae().network)  # all of it, when asked for


def test_a_trainer_shows_itself(tmp_path):
    for kind, build in {"vqgan": build_trainer, "dvae": build_dvae_trainer}.items():
        with build(tmp_path / kind) as trainer:
            assert repr(trainer).startswith(type(trainer).__name__) and "\n" not in repr(trainer)


def test_public_names_are_listed_and_documented():
    assert dir(vqdist) == sorted(vqdist.__all__)
    for name in set(vqdist.__all__) - {"__version__"}:
        first = inspect.getdoc(getattr(vqdist, name)).splitlines()[0]
        assert first.endswith((".", ":")) and len(first) > 15, name


TRAINERS = (vqdist.VQGanVAETrainer, vqdist.DiscreteVAETrainer, vqdist.ARTrainer)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_signatures_show_the_values_that_hold(trainer):
    shown = str(inspect.signature(trainer))
    assert "<factory>" not in shown and "adam_betas: 'list[float]' = [0.9, 0.9" in shown
    must_be_given = "batch_size: 'int'," in shown
    assert must_be_given == (trainer is not vqdist.DiscreteVAETrainer)
    assert ("(vae=None, " in shown) == (trainer is vqdist.VQGanVAETrainer)  # there, init_from may stand for it


@pytest.mark.parametrize("trainer", TRAINERS)
def test_help_explains_each_option(trainer):
    text = inspect.getdoc(trainer)
    for name in (field.name for field in dataclasses.fields(trainer.config_class)):
        assert f"    {name}: " in text, name
