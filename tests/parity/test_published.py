"""Tokenizers of taming, LlamaGen, VAR, IBQ and diffusers: their files against what the projects' own code gave."""

from __future__ import annotations

import json

import pytest
import torch
from fixtures import FOLDER, Fixture, fixture
from safetensors.torch import load_file
from torch import Tensor

from vqdist import Tokenizer, VQGanVAE
from vqdist.models.published import WEIGHTS, family_named, published_names, read_published, write_published
from vqdist.models.quantizers import GradientVQ, Gumbel
from vqdist.schedules import check_temperature, weight_at

CLOSE = {"atol": 1e-5, "rtol": 0}
FAMILIES = ["taming_vqgan", "taming_gumbel", "llamagen_vq", "var_vqvae", "ibq", "diffusers_vqmodel"]
# the sides of VAR's maps stand in no tensor, and IBQ's names are taming's
BY_SHAPES = [family for family in FAMILIES if family not in ("var_vqvae", "ibq")]


def read(family: str, *, with_config: bool = True, **options) -> VQGanVAE:
    folder = FOLDER / family
    config = folder / "config.json" if with_config else None
    return read_published(folder / "weights.safetensors", peer_config=config, **options)


def in_unit_range(image: Tensor) -> Tensor:
    return (image + 1) / 2


def first_of(found: dict[str, Tensor], *names: str) -> Tensor:
    return next(found[name] for name in names if name in found)


def indices_of(given: Fixture) -> Tensor:
    if "idx_0" in given.found:
        return torch.cat([given.found[f"idx_{scale}"] for scale in range(7)], dim=1)
    return first_of(given.found, "indices_argmax", "indices")


@torch.no_grad()
def check(model: VQGanVAE, given: Fixture) -> None:
    """Compare every stage of an image's way; images of the projects are in [-1, 1]."""
    image, indices = in_unit_range(given.given["image"]), indices_of(given)
    torch.testing.assert_close(model.autoencoder.features(image), given.found["features"], **CLOSE)
    quantized, ids, loss = model.encode(image)
    assert torch.equal(ids, indices) and loss == 0
    expected = first_of(given.found, "recon_eval", "decoded_from_argmax", "recon")
    torch.testing.assert_close(model.decode(quantized), in_unit_range(expected), **CLOSE)
    torch.testing.assert_close(model.decode_from_ids(indices), in_unit_range(expected), **CLOSE)
    if "indices_argmax" not in given.found:  # of Gumbel the fixture's quantized are drawn
        torch.testing.assert_close(quantized, first_of(given.found, "quantized", "fhat"), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_indices_and_images(family):
    check(read(family), fixture(family))


@pytest.mark.parametrize("family", BY_SHAPES)
def test_family_and_configuration_by_names_and_shapes(family):
    model = read(family, with_config=False)
    check(model, fixture(family))
    assert model.image_size == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_written_back_equal(family, tmp_path):
    given, path = fixture(family), tmp_path / "written"
    write_published(read(family), family, path)
    again = read_published(path, family=family, peer_config=FOLDER / family / "config.json")
    check(again, given)
    content = torch.load(path, weights_only=True) if path.is_file() else load_file(path / WEIGHTS[0])
    found = content.get("state_dict", content.get("model", content))
    assert found.keys() - {"quantize.codebook_used"} == given.weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in given.weights.items())


def test_one_network_in_every_form(tmp_path):
    """From taming to diffusers and back."""
    model = read("diffusers_vqmodel")
    write_published(model, "taming", tmp_path / "last.ckpt")
    write_published(read_published(tmp_path / "last.ckpt"), "diffusers", tmp_path / "diffusers")
    check(read_published(tmp_path / "diffusers"), fixture("diffusers_vqmodel"))
    written = json.loads((tmp_path / "diffusers" / "config.json").read_text())
    theirs = json.loads((FOLDER / "diffusers_vqmodel" / "diffusers_config.json").read_text())
    # what our file does not say: no number of it reaches the model
    unsaid = {"_diffusers_version", "force_upcast", "lookup_from_codebook", "scaling_factor", "sample_size"}
    assert {name: value for name, value in theirs.items() if name not in unsaid}.items() <= written.items()


# losses and their gradients


def grad_norms(model: VQGanVAE, family: str) -> dict[str, float]:
    """Return the norms of the gradients of every tensor by the project's names."""
    grads = {name: weight.grad for name, weight in model.network.named_parameters()}
    theirs = family_named(family).theirs({name: grad for name, grad in grads.items() if grad is not None})
    return {name: float(grad.norm()) for name, grad in theirs.items()}


def check_norms(found: dict[str, float], expected: dict[str, float | None]) -> None:
    assert found.keys() == {name for name, norm in expected.items() if norm is not None}
    wrong = {
        name: (norm, expected[name])
        for name, norm in found.items()
        if norm != pytest.approx(expected[name], rel=1e-3, abs=1e-5)
    }
    assert not wrong


def test_losses_of_var():
    given, model = fixture("var_vqvae"), read("var_vqvae").train()
    out = model.autoencoder(in_unit_range(given.given["image"]))
    assert out.aux_loss.item() == pytest.approx(given.values["vq_loss"], abs=1e-6)
    total = ((out.recon * 2 - 1) - given.given["image"]).abs().mean() + out.aux_loss
    assert total.item() == pytest.approx(given.values["l1_plus_vq_loss"], abs=1e-5)
    total.backward()
    check_norms(grad_norms(model, "var_vqvae"), given.values["grad_norms"])
    assert list(model.quantizer.inner.phi_of) == given.values["phi_of_scale"]


@torch.no_grad()
def test_scales_of_var():
    given, model = fixture("var_vqvae"), read("var_vqvae")
    codes = [given.found[f"idx_{scale}"] for scale in range(7)]
    torch.testing.assert_close(model.network.idxBl_to_var_input(codes), given.found["var_input"], **CLOSE)
    for scale in range(7):
        so_far = torch.cat(codes[: scale + 1], dim=1)
        torch.testing.assert_close(model.quantizer.decode_indices(so_far), given.found[f"fhat_{scale}"], **CLOSE)
        image = model.network.idxBl_to_img(codes[: scale + 1])
        torch.testing.assert_close(image, in_unit_range(given.found[f"image_{scale}"]), **CLOSE)


def test_losses_of_diffusers():
    given, model = fixture("diffusers_vqmodel"), read("diffusers_vqmodel").train()
    out = model.autoencoder(in_unit_range(given.given["image"]))
    assert out.aux_loss.item() == pytest.approx(given.values["commit_loss"], abs=1e-6)
    total = ((out.recon * 2 - 1) - given.given["image"]).square().mean() + out.aux_loss
    assert total.item() == pytest.approx(given.values["l2_plus_commit"], abs=1e-5)
    total.backward()
    check_norms(grad_norms(model, "diffusers_vqmodel"), given.values["grad_norms"])


@pytest.mark.parametrize("kind", ["legacy", "fixed"])
def test_losses_of_taming(kind):
    given, quantizer = fixture("taming_vqgan"), read("taming_vqgan").quantizer.train()
    assert isinstance(quantizer, GradientVQ) and quantizer.codebook_loss == "legacy"
    quantizer.codebook_loss = kind
    features = given.found["features"].clone().requires_grad_()
    out = quantizer(features)
    assert out.aux_loss.item() == pytest.approx(given.values[f"codebook_loss_{kind}"], abs=1e-6)
    out.aux_loss.backward()
    codes = quantizer.decode_indices(out.indices).detach()
    away = 2 * (features.detach() - codes) / codes.numel()  # of the mean of squares
    weight = 1.0 if kind == "legacy" else 0.25
    torch.testing.assert_close(features.grad, weight * away, atol=1e-7, rtol=0)
    moved = torch.zeros_like(quantizer.embedding.weight)
    moved.index_add_(0, out.indices.flatten(), -away.permute(0, 2, 3, 1).flatten(0, 2))
    torch.testing.assert_close(quantizer.embedding.weight.grad, 0.25 / weight * moved, atol=1e-7, rtol=0)


def test_losses_of_llamagen():
    given, quantizer = fixture("llamagen_vq"), read("llamagen_vq").quantizer.train()
    out = quantizer(given.found["features"])
    names = ("vq_loss", "commit_loss", "entropy_loss")
    assert out.aux_loss.item() == pytest.approx(sum(given.values[name] for name in names), abs=1e-6)
    torch.testing.assert_close(out.quantized, given.found["quantized"], **CLOSE)


def test_losses_of_ibq():
    given, quantizer = fixture("ibq"), read("ibq").quantizer.train()
    out = quantizer(given.found["features"])
    expected = given.values["quant_loss"] + 0.05 * given.values["entropy_loss"]
    assert out.aux_loss.item() == pytest.approx(expected, abs=1e-6)
    rows = given.found["features"].permute(0, 2, 3, 1).flatten(0, 2)
    entropy = quantizer.entropy_loss(rows, quantizer.embedding.weight)
    assert entropy.item() == pytest.approx(given.values["entropy_loss"], abs=1e-6)


def test_draws_of_gumbel():
    given, quantizer = fixture("taming_gumbel"), read("taming_gumbel").quantizer.train()
    assert isinstance(quantizer, Gumbel) and quantizer.kl_weight == given.arguments["kl_weight"]
    logits, noise = quantizer.logits(given.found["features"]), given.given["gumbel_noise"].permute(0, 2, 3, 1)
    torch.testing.assert_close(logits.permute(0, 3, 1, 2), given.found["logits"], **CLOSE)
    quantizer.temperature = given.arguments["tau"]
    for straight_through, name in ((True, "quantized"), (False, "quantized_soft")):
        quantizer.straight_through = straight_through
        quantized, indices = quantizer.drawn(logits, noise)
        torch.testing.assert_close(quantized, given.found[name], **CLOSE)
        assert torch.equal(indices, given.found["indices"])
    kl = quantizer.kl_weight * quantizer.kl_loss(logits)
    assert kl.item() == pytest.approx(given.values["kl_loss"], abs=1e-9)


def test_tamings_temperature_is_a_schedule_of_ours():
    given = fixture("taming_gumbel")
    options = given.arguments["temperature"]
    schedule = {"value": options["lr_max"], "decay_start": options["warm_up_steps"], "decay": "cosine"}
    schedule |= {"decay_steps": options["max_decay_steps"], "final": options["lr_min"]}
    check_temperature(schedule, "quantizer_temperature")
    for step, expected in given.values["temperature_at"].items():
        assert weight_at(schedule, int(step)) == pytest.approx(expected, rel=1e-9), step


# names and shapes of the published files, and the numbers of their parameters in millions

PUBLISHED = {
    "taming_vqgan_f16_1024": ("taming_vqgan_f16_1024", "taming", set(), 72.1),
    "taming_vqgan_f16_16384": ("taming_vqgan_f16_16384", "taming", set(), 76.1),
    "taming_vqgan_gumbel_f8_8192": ("taming_gumbel_f8_8192", "taming_gumbel", set(), 69.0),
    "ldm_vq_f8_16384": ("ldm_vq_f8", "ldm", set(), 67.7),
    "llamagen_vq8": ("llamagen_vq8", "llamagen", {"quantize.codebook_used"}, 70.1),
    "llamagen_vq16": ("llamagen_vq16", "llamagen", {"quantize.codebook_used"}, 71.9),
    "var_vqvae": ("var_vqvae", "var", {"quantize.ema_vocab_hit_SV"}, 108.9),
    "ibq_16384": ("ibq_16384", "ibq", set(), 111.0),
    "ibq_262144": ("ibq_262144", "ibq", set(), 173.9),
    "diffusers_vqgan_f16_1024": ("taming_vqgan_f16_1024", "diffusers", set(), 72.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published(name):
    preset, family, buffers, millions = PUBLISHED[name]
    expected = json.loads((FOLDER / "published" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = VQGanVAE.preset(preset, use_vgg_and_gan=False)
    assert buffers <= expected.keys()
    assert published_names(model, family) == {key: shape for key, shape in expected.items() if key not in buffers}
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("family", ["taming_vqgan", "llamagen_vq"])
def test_the_tokenizer_of_a_file_for_images_that_are_not_square(family, tmp_path):
    given = fixture(family)
    write_published(read(family), family, tmp_path / "file.pt")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "file.pt", image_size=(16, 24))
    codes = tokenizer.encode(in_unit_range(given.given["image"]))
    assert torch.equal(codes, given.found["indices"].flatten(1))
    expected = in_unit_range(first_of(given.found, "recon_eval", "recon")).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(codes), expected, **CLOSE)
