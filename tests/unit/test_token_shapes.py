"""Codes in a row, and images that are not square: through everything that stands on a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenarios import QUIET, build_prior, build_trainer, build_vae
from torch import Tensor, nn

from vqdist import ARTrainer, DiscreteVAE, Prior, Tokenizer, UserError, VQGanVAE
from vqdist.backends import create_backend
from vqdist.cli import main
from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.encoding import CodeWriter
from vqdist.models.networks.base import code_shape_of
from vqdist.sizes import image_size_of, sides_of

WIDE, SIZES = (16, 24), {"batch_size": 2, "shard_size": 4}


class Rows(nn.Module):
    """An encoder whose number of codes does not depend on the image."""

    dim = 8

    def __init__(self, count: int = 6):
        super().__init__()
        self.count = count
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(16, count)

    def code_shape(self, image_size: int) -> tuple[int]:
        if image_size != 16:
            raise UserError(f"image_size {image_size} is not possible; give 16")
        return (self.count,)

    def forward(self, image: Tensor) -> Tensor:
        return self.mix(self.patches(image).flatten(2)).transpose(1, 2)


class FromRows(nn.Module):
    def __init__(self, count: int = 6):
        super().__init__()
        self.mix = nn.Linear(count, 16)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=4)
        self.last_layer = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.up(self.mix(features.transpose(1, 2)).unflatten(2, (4, 4)))


class Global(nn.Module):
    """An encoder whose map has one row, whatever the image; it says so itself."""

    dim = 4

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def code_shape(self, image_size: int) -> tuple[int, int]:
        return self.code_shape_of_sides(image_size, image_size)

    def code_shape_of_sides(self, height: int, width: int) -> tuple[int, int]:
        return 1, height + width

    def forward(self, image: Tensor) -> Tensor:
        mixed = self.layer(image)
        return torch.cat([mixed.mean(dim=3), mixed.mean(dim=2)], dim=2)[:, :, None]


def rows(count: int = 6, **options) -> dict:
    return {"encoder": Rows(count), "decoder": FromRows(count), "dim": 16, "layers": 4, **options}


def build(count: int = 6, **options) -> VQGanVAE:
    torch.manual_seed(1)
    parts = {"encoder": Rows(count), "decoder": FromRows(count), "quantizer": "fsq", "codebook_size": 256}
    return VQGanVAE(**{**parts, "use_gan": False, "perceptual": "none", **options}).eval()


def wide_tokenizer() -> Tokenizer:
    return Tokenizer(build_vae(use_vgg_and_gan=False), WIDE)


# --------------------------------------------------------------------------------------------- codes in a row


@pytest.mark.parametrize("count", [6, 9, 1])  # 9 could be a square map
@pytest.mark.parametrize("levels", [1, 2])
def test_codes_of_a_row_are_decoded_though_nobody_said_the_image_size(count, levels):
    many = {"quantizer": "residual_vq", "vq_kwargs": {"kmeans_init": False, "codebook_dim": 8, "num_quantizers": 2}}
    model, image = build(count, **(many if levels == 2 else {})), torch.rand(2, 3, 16, 16)
    quantized, ids, _ = model.encode(image)
    assert model.image_size is None and ids.shape == (2, count, *([2] if levels == 2 else []))
    torch.testing.assert_close(model.decode_from_ids(ids), model.decode(quantized))
    assert torch.equal(model.decode_from_ids(ids), model.network.detokenize(ids))


def test_codes_of_a_map_in_a_row_are_decoded_in_the_shape_of_the_models_images():
    model = build_vae(use_vgg_and_gan=False).eval()
    _, ids, _ = model.encode(torch.rand(2, 3, *WIDE))
    with pytest.raises(UserError, match="24 codes do not make a square"):
        model.decode_from_ids(ids.flatten(1))
    model.image_size = WIDE
    assert torch.equal(model.decode_from_ids(ids.flatten(1)), model.decode_from_ids(ids))
    square = model.encode(torch.rand(2, 3, 16, 16))[1]
    assert torch.equal(model.decode_from_ids(square.flatten(1)), model.decode_from_ids(square))


def test_a_run_with_codes_in_a_row_is_trained_drawn_evaluated_encoded_and_learnt(tmp_path):
    model = {**rows(), "quantizer": "fsq", "codebook_size": 256, "layers": 4, "encdec_resnet_groups": 16}
    trainer = build_trainer(tmp_path / "run", model=model, num_train_steps=2, valid_frac=0.25, save_results_every=1)
    trainer.train()
    numbers = trainer.evaluate()
    assert 0 < numbers["codebook_usage"] <= 1 and numbers["images"] > 0
    assert {path.suffix for path in (tmp_path / "run" / "results").iterdir()} == {".png"}
    tokenizer = Tokenizer(trainer.model)
    assert (tokenizer.code_shape, tokenizer.num_codes, tokenizer.code_side) == ((6,), 6, None)
    images = ImageDataset("synthetic:6", 16, augment=False)
    CodeWriter(tokenizer, images, tmp_path / "codes", **SIZES).write(create_backend("local"), num_workers=0)
    codes = CodeDataset(tmp_path / "codes")
    assert torch.equal(codes[3], tokenizer.encode(images[3][None])[0]) and codes.code_side is None
    prior = build_prior(tokenizer, num_classes=0)
    assert prior.num_codes == 6 and prior.sample(2).shape == (2, 3, 16, 16)


def test_an_encoder_of_one_size_says_it_to_the_model(tmp_path):
    encoder = Rows()
    encoder.image_size = 16
    model = build(encoder=encoder)
    assert model.image_size == 16 and Tokenizer(model).num_codes == 6
    encoder.image_size = "large"  # of somebody else, it may mean anything
    assert build(encoder=encoder).image_size is None


# --------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("given, size", [(16, 16), ([16, 24], (16, 24)), ((16, 16), 16), ([8, 8], 8)])
def test_the_one_form_of_an_image_size(given, size):
    assert image_size_of(given) == size
    assert sides_of(size) == (size if isinstance(size, tuple) else (size, size))


@pytest.mark.parametrize("given", [True, "16", 1.5, [16], [16, 24, 3], [16, 0], None])
def test_an_image_size_that_is_none(given):
    with pytest.raises(UserError, match=r"image_size .* height and width, as \[256, 384\]"):
        image_size_of(given)


def test_the_map_of_codes_follows_height_and_width():
    tokenizer, images = wide_tokenizer(), torch.rand(2, 3, *WIDE)
    facts = (tokenizer.image_size, tokenizer.code_shape, tokenizer.num_codes, tokenizer.code_side)
    assert facts == (WIDE, (4, 6), 24, None)
    codes = tokenizer.encode(images)
    recon, ids = tokenizer.network.reconstruct(images)
    assert torch.equal(codes, ids.flatten(1))
    torch.testing.assert_close(tokenizer.decode(codes), recon.clamp(0, 1))
    with pytest.raises(UserError, match=r"\(batch, 3, 16, 24\) is expected"):
        tokenizer.encode(images.mT)
    with pytest.raises(UserError, match="image_size 18 is not a multiple of 4"):
        Tokenizer(build_vae(use_vgg_and_gan=False), (16, 18))


def test_an_encoder_may_say_the_shape_for_both_sides_or_must():
    assert code_shape_of(Global(), (16, 24)) == (1, 40) and code_shape_of(Global(), 16) == (1, 32)

    class OfSides(Rows):
        def code_shape(self, image_size: int) -> tuple[int]:
            return (image_size,)

    with pytest.raises(UserError, match=r"16 and 24 codes for sides of 16 and 24.*code_shape_of_sides"):
        code_shape_of(OfSides(), (16, 24))


def test_other_tokenizers_take_images_that_are_not_square_or_say_why_not(tmp_path):
    model = DiscreteVAE(image_size=(16, 24), num_tokens=8, codebook_dim=4, num_layers=2, hidden_dim=4)
    tokenizer = Tokenizer(model)
    assert (tokenizer.code_shape, model.num_codes, model.noise_shape(WIDE)) == ((4, 6), 24, (4, 6, 8))
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == [16, 24]
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.image_size == WIDE and again.fingerprint() == tokenizer.fingerprint()
    scales = {"quantizer": "multiscale_vq", "quantizer_kwargs": {"v_patch_nums": [1, 4], "kmeans_init": False}}
    with pytest.raises(UserError, match=r"image_size \[16, 24\] is not square"):
        Tokenizer(build_vae(**scales, codebook_size=8, use_vgg_and_gan=False), WIDE)


def test_fingerprints_of_square_images_are_as_before():
    model = build_vae(use_vgg_and_gan=False)
    prints = [Tokenizer(model, size).fingerprint() for size in (16, (16, 16), (16, 24), (24, 16))]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_codes_and_a_prior_of_images_that_are_not_square(tmp_path):
    tokenizer = wide_tokenizer()
    images = ImageDataset("synthetic:6", WIDE, augment=False)
    CodeWriter(tokenizer, images, tmp_path / "codes", **SIZES).write(create_backend("local"), num_workers=0)
    codes = CodeDataset(tmp_path / "codes")
    assert (codes.image_size, codes.num_codes, codes.code_side) == (WIDE, 24, None)
    assert torch.equal(codes[5], tokenizer.encode(images[5][None])[0])
    options = {**QUIET, "image_size": None, "results_folder": str(tmp_path / "run"), "num_train_steps": 1}
    for steps in (1, 2):  # and goes on
        prior = build_prior(tokenizer, num_classes=0)
        trainer = ARTrainer(prior, dataset=codes, **{**options, "folder": None, "num_train_steps": steps})
        trainer.train()
        trainer.close()
        assert trainer.step == steps
    loaded = Prior.from_pretrained(tmp_path / "run")
    assert (loaded.image_size, loaded.num_codes) == (WIDE, 24) and loaded.sample(2).shape == (2, 3, *WIDE)


def test_a_manifest_with_an_image_size_that_cannot_be(tmp_path):
    images = ImageDataset("synthetic:2", WIDE, augment=False)
    CodeWriter(wide_tokenizer(), images, tmp_path, **SIZES).write(create_backend("local"), num_workers=0)
    path = tmp_path / "manifest.json"
    for size in ([16], [16, "24"], [0, 24], 0):
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_size": size}))
        with pytest.raises(UserError, match="'image_size' is missing or wrong"):
            CodeDataset(tmp_path)


def test_the_commands_take_height_and_width(tmp_path, capsys):
    model = build_vae(use_vgg_and_gan=False)
    model.image_size = 16
    model.save_pretrained(tmp_path / "export")
    run, wide = str(tmp_path / "export"), ["--data", "synthetic:4", "--image_size", "[16, 24]"]
    assert main(["evaluate", run, *wide, "--num_workers", "0"]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["images"] == 4
    assert main(["reconstruct", run, *wide, "--out", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").size[0] > Image.open(tmp_path / "sheet.png").size[1]
    assert main(["encode", run, *wide, "--out", str(tmp_path / "codes"), "--num_workers", "0"]) == 0
    assert CodeDataset(tmp_path / "codes").image_size == WIDE


@pytest.mark.parametrize(
    "size, box",
    [((6, 3), (0, 0, 4, 8)), ((2, 4), (0, 3, 4, 5)), ((2, 2), (0, 2, 4, 6)), ((8, 2), (1, 0, 3, 8))],
)
def test_the_largest_part_in_the_middle_is_cut_out(size: tuple[int, int], box: tuple[int, ...], tmp_path: Path):
    picture = Image.effect_noise((4, 8), 100)
    picture.save(tmp_path / "image.png")
    found = ImageDataset(str(tmp_path), size, channels=1, augment=False)[0]
    expected = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, box=box))
    assert found.shape == (1, *size) and np.array_equal((found[0] * 255).round().numpy(), expected)
