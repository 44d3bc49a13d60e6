"""Both stages of TiTok's training: another tokenizer's codes are learned, then its decoder makes the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scenarios import QUIET, weights_of

from vqdist import Tokenizer, UserError, VQGanVAE, VQGanVAETrainer
from vqdist.cli import main
from vqdist.models.proxy import ProxyCodes
from vqdist.models.published import read_published, write_published

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 1, "heads": 2, "num_latent_tokens": 5}
TARGET = {"hidden_channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}
RUN: dict[str, Any] = {**QUIET, "num_train_steps": 4, "save_model_every": 2, "validate_every": 0, "batch_size": 4}
CRITIC = {"class_path": "patch", "init_args": {"dim": 16, "layers": 2, "groups": 4}}


def target_model() -> VQGanVAE:
    """Return a small MaskGIT-VQGAN with a map of 4 x 4 codes for 16 pixels."""
    torch.manual_seed(3)
    return VQGanVAE(
        encoder={"class_path": "maskgit", "init_args": {**TARGET, "z_channels": 8}},
        decoder={"class_path": "maskgit", "init_args": TARGET},
        quantizer={"class_path": "gradient_vq", "init_args": {"codebook_size": 12, "codebook_loss": "legacy"}},
        use_vgg_and_gan=False,
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("target") / "maskgit-vqgan.bin"
    write_published(target_model(), "maskgit", path)
    return path


def first_model(target: Path, **options: Any) -> VQGanVAE:
    torch.manual_seed(4)
    parts: dict[str, Any] = {
        "encoder": {"class_path": "titok", "init_args": {**SIZES, "token_size": 6, "legacy": True}},
        "decoder": {"class_path": "titok_proxy", "init_args": {**SIZES, "proxy_codebook_size": 12}},
        "quantizer": {"class_path": "gradient_vq", "init_args": {"codebook_size": 24, "l2_norm": True}},
    }
    terms = [{"class_path": "proxy_codes", "init_args": {"tokenizer": str(target)}}]
    return VQGanVAE(**{**parts, "terms": terms, "use_gan": False, **options})


def first_stage(folder: Path, target: Path, **options: Any) -> VQGanVAETrainer:
    return VQGanVAETrainer(first_model(target), **{**RUN, "results_folder": str(folder), **options})


def second_stage(folder: Path, first: Path, target: Path, **options: Any) -> VQGanVAETrainer:
    model = {"perceptual": "none", "discriminator": CRITIC}
    start = {"init_from": str(first), "init_pixel_from": str(target), "freeze": ["encoder", "quantizer"]}
    start["apply_grad_penalty_every"] = 0
    return VQGanVAETrainer(model, **{**RUN, **start, "results_folder": str(folder), **options})


@pytest.fixture(scope="module")
def first(tmp_path_factory, target) -> Path:
    """Return a run of the first stage that came to its end."""
    folder = tmp_path_factory.mktemp("first") / "run"
    with first_stage(folder, target, log_every=1) as trainer:
        trainer.train()
    return folder


def test_the_first_stage_is_the_cross_entropy_of_the_targets_codes(tmp_path, target):
    trainer = first_stage(tmp_path, target)
    image = trainer.next_micro_batches()[0]
    model = first_model(target).train()
    out = model.autoencoder(image)
    codes = read_published(target).network.tokenize(image)
    assert out.recon is None and out.proxy.shape == (4, 12, 4, 4) and codes.shape == (4, 4, 4)
    loss = F.cross_entropy(out.proxy, codes)
    (loss + out.aux_loss).backward()
    surrogate, numbers = trainer.generator_loss(image, trainer.generator(image))
    trainer.generator.backward(surrogate)
    assert numbers["proxy_loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: weight.grad for name, weight in model.autoencoder.named_parameters()}
    for name, weight in trainer.generator.module.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-5, atol=1e-8, msg=name)
    assert torch.equal(model(image, return_loss=True), loss + out.aux_loss)
    with pytest.raises(UserError, match="first stage gives codes of its proxy tokenizer and no images"):
        model(image)


def test_the_first_stage_is_measured_and_drawn_by_the_targets_decoder(first, target):
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    losses = [line["proxy_loss"] for line in lines if "proxy_loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    valid = lines[-1]
    assert {"valid/psnr", "valid/l1", "valid/codebook_usage", "valid/proxy_loss"} <= valid.keys()
    assert 0 <= valid["valid/proxy_accuracy"] <= 1
    assert list((first / "results").glob("*.png")) or list(first.rglob("*.png"))
    model = VQGanVAE.from_pretrained(first / "export")
    assert not model.autoencoder.makes_images and model.discriminator is None
    tokenizer, image = Tokenizer.from_pretrained(first), torch.rand(2, 3, 16, 16)
    codes = tokenizer.encode(image)
    assert codes.shape == (2, 5)
    with pytest.raises(UserError, match="no images; train the second stage"):
        tokenizer.decode(codes)
    written = json.loads((first / "config.json").read_text())["model"]["terms"]
    fingerprint = Tokenizer.from_pretrained(target).codes_fingerprint()
    assert written == [
        {"class_path": "proxy_codes", "init_args": {"tokenizer": str(target), "fingerprint": fingerprint}}
    ]


def test_the_command_of_a_first_stages_evaluation_is_one_line(first, capsys):
    assert main(["evaluate", str(first), "--data", "synthetic:8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no images; train the second stage" in error


@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_resumed_stage_is_the_undisturbed_one_to_the_bit(stage, tmp_path, target, first):
    def build(folder: Path) -> VQGanVAETrainer:
        return first_stage(folder, target) if stage == "first" else second_stage(folder, first, target)

    with build(tmp_path / "straight") as straight:
        straight.train()
    broken = build(tmp_path / "killed")
    for _ in range(3):  # the third is lost
        broken.train_step()
    broken.close()
    resumed = build(tmp_path / "killed")
    assert resumed.step == 2
    resumed.train()
    expected, found = weights_of(straight), weights_of(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def test_the_second_stage_begins_with_both_and_keeps_every_code(tmp_path, target, first):
    trainer = second_stage(tmp_path, first, target)
    begun = {name: one.clone() for name, one in trainer.generator.module.state_dict().items()}
    of_first = load_file(first / "export" / "model.safetensors")
    of_first = {name.removeprefix("autoencoder."): one for name, one in of_first.items()}
    assert all(torch.equal(begun[name], one) for name, one in of_first.items())
    theirs = read_published(target).network
    assert torch.equal(begun["decoder.pixel_embedding.weight"], theirs.quantizer.embedding.weight)
    pixel = {name: begun[f"decoder.pixel_decoder.{name}"] for name in theirs.decoder.state_dict()}
    assert all(torch.equal(pixel[name], one) for name, one in theirs.decoder.state_dict().items())
    assert len(begun) == len(of_first) + len(pixel) + 1
    trainer.train()
    trainer.close()
    after = trainer.generator.module.state_dict()
    for name, one in begun.items():
        moved = not torch.equal(after[name], one)
        assert moved == name.startswith("decoder."), name
    record = json.loads((tmp_path / "config.json").read_text())["trainer"]["init_pixel_from"]
    assert record["path"] == str(target) and len(record["sha256"]) == 64
    one, two = Tokenizer.from_pretrained(first), Tokenizer.from_pretrained(tmp_path)
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(one.encode(image), two.encode(image))
    assert one.codes_fingerprint() == two.codes_fingerprint()
    assert two.decode(two.encode(image)).shape == image.shape
    written = tmp_path / "titok.bin"
    write_published(VQGanVAE.from_pretrained(tmp_path / "export"), "titok", written)
    again = read_published(written, peer_config={"sizes": {"enc": [16, 1, 2], "dec": [16, 1, 2]}})
    assert torch.equal(Tokenizer(again).encode(image), two.encode(image))


def test_a_run_goes_on_with_the_tokenizers_that_it_began_with(tmp_path, target, first):
    second_stage(tmp_path / "second", first, target, num_train_steps=2).train()
    other = tmp_path / "other.bin"
    model = target_model()
    with torch.no_grad():
        model.quantizer.embedding.weight.add_(1.0)
    write_published(model, "maskgit", other)
    with pytest.raises(UserError, match="that began from .*maskgit-vqgan.bin .* init_pixel_from is .*other.bin"):
        second_stage(tmp_path / "second", first, other)
    with pytest.raises(UserError, match="init_pixel_from is not given"):
        second_stage(tmp_path / "second", first, target, init_pixel_from=None)
    first_stage(tmp_path / "one", target, num_train_steps=2).train()
    kept = target.read_bytes()
    try:
        target.write_bytes(other.read_bytes())
        with pytest.raises(UserError, match="options of the run .*terms|terms: "):
            first_stage(tmp_path / "one", target)
    finally:
        target.write_bytes(kept)
    fingerprint = Tokenizer.from_pretrained(target).codes_fingerprint()
    assert ProxyCodes(target, fingerprint=fingerprint).fingerprint == fingerprint
    with pytest.raises(UserError, match="was begun with a tokenizer of fingerprint"):
        ProxyCodes(other, fingerprint=fingerprint)


def other_codes(target: Path) -> dict[str, Any]:
    return {"decoder": {"class_path": "titok_proxy", "init_args": {**SIZES, "proxy_codebook_size": 13}}}


MISTAKES = {
    "a discriminator": (
        lambda target: {"use_gan": True, "discriminator": CRITIC},
        "makes no images in this stage, and a discriminator compares images; give --model.use_gan false",
    ),
    "pixels": (
        lambda target: {"terms": ["reconstruction"]},
        "makes no images in this stage, and the loss compares pixels; give model.terms with .class_path: proxy_codes",
    ),
    "no terms": (lambda target: {"terms": None}, "makes no images in this stage, and the loss compares pixels"),
    "other codes": (other_codes, "gives 4 x 4 of 12 codes for 3 channels .* predicts 4 x 4 of 13 codes"),
    "a decoder of pixels": (
        lambda target: {"decoder": {"class_path": "titok", "init_args": SIZES}},
        "proxy_codes needs a decoder that predicts codes, and TiTokDecoder does not",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_first_stage_that_cannot_be_is_one_line(mistake, tmp_path, target):
    change, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        VQGanVAETrainer(first_model(target, **change(target)), **RUN, results_folder=str(tmp_path))


def test_a_second_stage_that_cannot_be_is_one_line(tmp_path, target, first):
    with pytest.raises(UserError, match="is for a TiTok of the first stage, and .* is none"):
        second_stage(tmp_path, target, target)
    with pytest.raises(UserError, match="has GradientVQ and TiTokProxyDecoder; expected a MaskGIT-VQGAN"):
        second_stage(tmp_path, first, first)
    with pytest.raises(UserError, match="makes no images in this stage, and a discriminator compares images"):
        second_stage(tmp_path, first, target, init_pixel_from=None)
    with pytest.raises(UserError, match="init_pixel_from .* does nothing, because init_from is not given"):
        first_stage(tmp_path, target, init_pixel_from=str(target))
    with pytest.raises(UserError, match="there is no .*nowhere.bin to begin from"):
        second_stage(tmp_path, first, tmp_path / "nowhere.bin")
