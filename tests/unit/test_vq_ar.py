"""VQ-AR: its arguments, losses against their formulas, what may see what, drawing, codes and back, files, messages."""

from __future__ import annotations

import copy
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
from cases import Cases
from einops import rearrange
from ema_pytorch import EMA
from scenarios import build_vq_ar
from torch import Tensor

from vqdist import Tokenizer, UserError, VQImageAutoregressiveAutoencoder
from vqdist.models.quantizers import rotated_onto
from vqdist.models.vq_ar import CodesAndImage
from vqdist.sampling import DrawOptions, draw

GREEDY = DrawOptions(temperature=0)


def build(*, varied: bool = True, **options) -> VQImageAutoregressiveAutoencoder:
    """Return a small model, equal on every call; `varied` sets its codebook to features of noise: codes differ."""
    model = build_vq_ar(**options)
    if varied:
        vary_codes(model)
    return model


@torch.no_grad()
def vary_codes(model: VQImageAutoregressiveAutoencoder) -> None:
    image = torch.rand(8, model.channels, model.image_size, model.image_size, generator=seeded(6))
    features = rearrange(model.encoder(image), "b d h w -> (b h w) d")
    chosen = features[torch.randperm(len(features), generator=seeded(7))][: model.codebook_size]
    model.quantizer.inner.codebook = chosen
    model.quantizer.inner._codebook.embed_avg.copy_(chosen)  # as if each had been taken once
    torch.nn.init.normal_(model.start_token, std=0.5, generator=seeded(8))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(batch: int = 2, channels: int = 3, size: int = 16) -> Tensor:
    return torch.rand(batch, channels, size, size, generator=seeded(3))


def uniform_for(model: VQImageAutoregressiveAutoencoder, batch: int = 3) -> Tensor:
    return torch.rand(batch, model.num_codes, generator=seeded(4))


def drawn(model: VQImageAutoregressiveAutoencoder, options: DrawOptions, **keywords) -> Tensor:
    model.eval()
    uniform = uniform_for(model)
    return model.draw_codes(uniform, model.labels(None, len(uniform)), options, **keywords)


def total_of(model: VQImageAutoregressiveAutoencoder, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return model.loss(model(image), image)


def gradients_of(model: VQImageAutoregressiveAutoencoder, part: str | None = None) -> dict[str, Tensor]:
    """Gradients of the loss, or of one of its parts, by parameter; zeros where it does not reach."""
    total, parts = total_of(model, pixels(channels=model.channels))
    model.zero_grad()
    (total if part is None else parts[part]).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def moved(gradients: dict[str, Tensor], prefix: str) -> bool:
    return any(bool(gradient.abs().sum() > 0) for name, gradient in gradients.items() if name.startswith(prefix))


# --------------------------------------------------------------------------------------------- the arguments

model_case = MODEL_CASES = Cases("model_")


@model_case
def model_image_size():
    assert [build(image_size=size).num_codes for size in (16, 24)] == [16, 36]


@model_case
def model_patch_size():
    for size in (2, 4, 8):
        model = build(patch_size=size)
        assert (model.stride, model.num_codes) == (size, (16 // size) ** 2)
        assert model.tokenize(pixels()).shape == (2, 16 // size, 16 // size)


@model_case
def model_dim():
    for dim in (8, 24):
        model = build(dim=dim)
        assert model.codebook().shape[1] == model.to_code.out_features == len(model.start_token) == dim


@model_case
def model_codebook_size():
    for size in (16, 64):
        model = build(codebook_size=size)
        assert model(pixels()).logits.shape[-1] == len(model.codebook()) == model.codebook_size == size


@model_case
def model_decay():
    """With a decay of 0, a code is the mean of the features that took it in the last batch."""
    at_once, slow = build(decay=0.0), build(decay=0.99)
    before = slow.codebook()
    features = rearrange(at_once.encoder(pixels()), "b d h w -> (b h w) d")
    indices = at_once(pixels()).indices.flatten()
    slow(pixels())
    code = int(indices.mode().values)
    assert torch.allclose(at_once.codebook()[code], features[indices == code].mean(dim=0), rtol=1e-3)
    assert 0 < (slow.codebook() - before).norm() < 0.2 * (at_once.codebook() - before).norm()


@model_case
def model_depth():
    sizes = [sum(p.numel() for p in build(depth=depth).transformer.parameters()) for depth in (1, 2, 3)]
    assert sizes[0] < sizes[1] and sizes[2] - sizes[1] == sizes[1] - sizes[0]


@model_case
def model_dim_head():
    assert [projection_widths(build(dim_head=width)) for width in (8, 16)] == [{16}, {32}]  # of two heads


@model_case
def model_heads():
    assert [projection_widths(build(heads=number, dim_head=8)) for number in (2, 3)] == [{16}, {24}]


def projection_widths(model: VQImageAutoregressiveAutoencoder) -> set[int]:
    return {len(p) for name, p in model.transformer.named_parameters() if name.endswith("to_q.weight")}


@model_case
def model_recon_from_pred_codes_weight():
    """Check that the option moves no value, but the share of the image's gradient that each side gets."""
    only_vq, half, only_predicted = (build(recon_from_pred_codes_weight=weight) for weight in (0.0, 0.5, 1.0))
    recons = [model(pixels()).recon for model in (only_vq, half, only_predicted)]
    assert torch.allclose(recons[0], recons[1], atol=1e-5) and torch.allclose(recons[0], recons[2], atol=1e-5)
    to_transformer = [gradients_of(model, "recon_loss")["to_code.weight"] for model in (only_vq, half, only_predicted)]
    assert not to_transformer[0].any() and to_transformer[2].any()
    assert torch.allclose(2 * to_transformer[1], to_transformer[2], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["recon_loss", "vq_commit_loss", "ar_commit_loss"])
def test_a_weight_weighs_its_part(name):
    totals = []
    for weight in (0.0, 1.0, 3.0):
        total, parts = total_of(build(**{f"{name}_weight": weight}), pixels())
        totals.append(total)
    assert parts[name] > 0
    assert torch.allclose(totals[1] - totals[0], parts[name]) and torch.allclose(
        totals[2] - totals[0], 3 * parts[name]
    )


for weight_name in ("recon_loss_weight", "vq_commit_loss_weight", "ar_commit_loss_weight"):
    MODEL_CASES[weight_name] = lambda name=weight_name: test_a_weight_weighs_its_part(name.removesuffix("_weight"))


@model_case
def model_logit_scale():
    """Check that the option is an inverse temperature."""
    plain, scaled = build(), build(logit_scale=3.0)
    assert torch.allclose(scaled(pixels()).logits, 3 * plain(pixels()).logits)
    assert torch.equal(drawn(scaled, DrawOptions(temperature=3.0)), drawn(plain, DrawOptions()))


@model_case
def model_channels():
    for channels in (1, 3, 4):
        model = build(channels=channels)
        assert model(pixels(channels=channels)).recon.shape == (2, channels, 16, 16)
        assert model.sample(2).shape == (2, channels, 16, 16)


@model_case
def model_num_resnet_blocks():
    """Without blocks a code sees its own patch only; with them, its neighbours'."""
    changed = pixels()
    changed[:, :, :4, :4] = 1 - changed[:, :, :4, :4]
    for number in (0, 1, 2):
        model = build(num_resnet_blocks=number)
        assert len(model.encoder.blocks) == len(model.decoder.blocks) == number
        difference = (model.encoder(pixels()) - model.encoder(changed)).abs().sum(dim=(0, 1)) > 0
        assert int(difference.sum()) == (1, 9, 16)[number]  # a block reaches two patches further, of 4 x 4 in all


@model_case
def model_vq_kwargs():
    cosine = build(varied=False, vq_kwargs={"use_cosine_sim": True, "codebook_dim": 8})
    assert torch.allclose(cosine.quantizer.inner.codebook.norm(dim=-1), torch.ones(32))
    assert cosine.quantizer.inner.codebook.shape == (32, 8) and cosine.codebook().shape == (32, 32)
    plain, heavier = build(), build(vq_kwargs={"commitment_weight": 2.0})
    assert torch.allclose(heavier(pixels()).vq_commit_loss, 2 * plain(pixels()).vq_commit_loss)


ARGUMENTS = inspect.signature(VQImageAutoregressiveAutoencoder.__init__).parameters.keys() - {"self"}


def test_every_argument_has_a_case():
    assert MODEL_CASES.keys() == ARGUMENTS


@pytest.mark.parametrize("argument", MODEL_CASES)
def test_argument_has_its_effect(argument):
    MODEL_CASES[argument]()


def test_every_argument_says_what_it_is():
    for name in ARGUMENTS:
        assert f"\n    {name}: " in inspect.getdoc(VQImageAutoregressiveAutoencoder), name


def test_the_defaults_are_those_of_the_ancestor():
    parameters = inspect.signature(VQImageAutoregressiveAutoencoder.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {
        "decay": 0.9,
        "depth": 3,
        "dim_head": 16,
        "heads": 4,
        "recon_from_pred_codes_weight": 1.0,
        "recon_loss_weight": 1.0,
        "vq_commit_loss_weight": 1.0,
        "ar_commit_loss_weight": 1.0,
        "channels": 1,
        "num_resnet_blocks": 0,
        "logit_scale": 1.0,
        "vq_kwargs": None,
    }
    codebook = build(decay=0.95).quantizer.inner._codebook
    assert (codebook.decay, codebook.threshold_ema_dead_code, codebook.use_cosine_sim) == (0.95, 0, False)
    assert bool(codebook.initted) and build().quantizer.inner.rotation_trick
    assert not build().quantizer.inner.has_projections and build().quantizer.inner.commitment_weight == 1


# --------------------------------------------------------------------------------------------- what forward gives


@pytest.mark.parametrize("blocks", [0, 1])
def test_shapes(blocks):
    model = build(num_resnet_blocks=blocks)
    out = model(pixels())
    assert isinstance(out, CodesAndImage)
    assert out.logits.shape == (2, 16, 32) and out.indices.shape == (2, 16) and out.indices.dtype == torch.int64
    assert out.recon.shape == pixels().shape and out.vq_commit_loss.shape == out.ar_commit_loss.shape == ()
    assert len(out.indices.unique()) > 8


def quantized_of(model: VQImageAutoregressiveAutoencoder, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, codes and their vectors in rows, with the arithmetic of a patchwise linear layer written out."""
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4)  # b c h' w' 4 4
    rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    features = (2 * rows - 1) @ model.encoder.to_features.weight.T + model.encoder.to_features.bias
    codebook = model.codebook()
    squares = (features[:, :, None] - codebook).square().sum(dim=-1)
    indices = squares.argmin(dim=-1)
    return features, indices, codebook[indices]


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_its_formula(training):
    weights = {"recon_loss_weight": 2.0, "vq_commit_loss_weight": 0.5, "ar_commit_loss_weight": 0.25}
    model, image = build(**weights).train(training), pixels()
    features, indices, quantized = quantized_of(model, image)
    predicted = model.predict(quantized[:, :-1])
    total, parts = total_of(model, image)
    distances = (predicted[:, :, None] - model.codebook()).square().sum(dim=-1).sqrt()
    log_chances = -distances - torch.logsumexp(-distances, dim=-1, keepdim=True)
    cross_entropy = -log_chances.gather(-1, indices[..., None]).mean()
    recon = quantized @ model.decoder.to_pixels.weight.T + model.decoder.to_pixels.bias
    recon = rearrange((recon + 1) / 2, "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=4, q=4)
    recon_loss = (recon - image).square().mean()
    vq_commit = (features - quantized).square().mean() if training else torch.zeros(())
    ar_commit = (predicted - quantized).square().mean()
    expected = cross_entropy + 2 * recon_loss + 0.5 * vq_commit + 0.25 * ar_commit
    assert torch.allclose(total, expected, rtol=1e-4)
    by_hand = {"cross_entropy": cross_entropy, "recon_loss": recon_loss}
    by_hand |= {"vq_commit_loss": vq_commit, "ar_commit_loss": ar_commit}
    assert parts.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert torch.allclose(parts[name], value, rtol=1e-4), name


def rotation_by_hand(source: Tensor, target: Tensor) -> Tensor:
    """lambda * R of arXiv 2410.06424, section 4.2, one (d, d) matrix a row."""
    e, q = source / source.norm(dim=-1, keepdim=True), target / target.norm(dim=-1, keepdim=True)
    r = (e + q) / (e + q).norm(dim=-1, keepdim=True)
    outer = torch.einsum
    rotation = torch.eye(source.shape[-1]) - 2 * outer("ni,nj->nij", r, r) + 2 * outer("ni,nj->nij", q, e)
    return rotation * (target.norm(dim=-1) / source.norm(dim=-1))[:, None, None]


def test_the_rotation_trick_is_its_formula():
    source = torch.randn(5, 8, generator=seeded(0), requires_grad=True)
    target = torch.randn(5, 8, generator=seeded(1), requires_grad=True)
    matrix = rotation_by_hand(source, target).detach()
    rotated = rotated_onto(source, target)
    assert torch.allclose(torch.einsum("nij,nj->ni", matrix, source), target, atol=1e-5)
    assert torch.equal(rotated, target)
    gradient = torch.randn(5, 8, generator=seeded(2))
    rotated.backward(gradient)
    assert target.grad is None
    assert torch.allclose(source.grad, torch.einsum("nij,ni->nj", matrix, gradient), atol=1e-5)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_image_is_decoded_from_rotated_predictions(weight):
    """The gradient with respect to the predictions is that of decoding them after the rotation written out."""
    model, image = build(recon_from_pred_codes_weight=weight), pixels()
    _, _, quantized = quantized_of(model, image)
    predicted = model.predict(quantized[:, :-1]).detach().requires_grad_()
    matrix = rotation_by_hand(predicted.flatten(0, 1), quantized.detach().flatten(0, 1)).detach()
    turned = torch.einsum("nij,nj->ni", matrix, predicted.flatten(0, 1)).view_as(predicted)

    def decoded(vectors: Tensor) -> Tensor:
        return model.decoder(rearrange(vectors, "b (h w) d -> b d h w", h=4))

    recon = weight * decoded(turned) + (1 - weight) * decoded(quantized.detach())
    (expected,) = torch.autograd.grad((recon - image).square().mean(), predicted)
    mixed = model._mix(predicted, quantized.detach())
    (gradient,) = torch.autograd.grad((decoded(mixed) - image).square().mean(), predicted)
    assert torch.allclose(recon, decoded(mixed), atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-7, rtol=1e-3) and bool(gradient.abs().sum() > 0)


def test_every_weight_learns():
    for name, gradient in gradients_of(build(num_resnet_blocks=1, depth=2)).items():
        assert bool(gradient.abs().sum() > 0), name


@pytest.mark.parametrize(
    "part, reached, spared",
    [
        ("cross_entropy", ["encoder", "transformer", "to_code", "start_token"], ["decoder"]),
        ("recon_loss", ["encoder", "transformer", "to_code", "decoder"], []),
        ("vq_commit_loss", ["encoder"], ["transformer", "to_code", "decoder", "start_token"]),
        ("ar_commit_loss", ["encoder", "transformer", "to_code"], ["decoder"]),
    ],
)
def test_a_part_teaches_what_it_should(part, reached, spared):
    gradients = gradients_of(build(recon_from_pred_codes_weight=0.5), part)
    assert all(moved(gradients, prefix) for prefix in reached)
    assert not any(moved(gradients, prefix) for prefix in spared)


def test_the_codebook_moves_in_train_mode_only_and_forward_leaves_the_mode():
    model = build()
    for training in (False, True):
        before = model.train(training).codebook()
        model(pixels())
        assert model.training is training and torch.equal(model.codebook(), before) is not training


def test_a_codebook_of_kmeans_is_there_from_the_first_step_on():
    model = build(varied=False, codebook_size=8, vq_kwargs={"kmeans_init": True})
    with pytest.raises(UserError, match="no codes yet"):
        model.eval()(pixels())
    out = model.train()(pixels())
    assert len(out.indices.unique()) > 4 and bool(out.logits.std(dim=-1).min() > 0)


def test_a_codebook_can_learn_by_gradient():
    learnt = {"learnable_codebook": True, "ema_update": False}
    model = build(varied=False, vq_kwargs=learnt)
    total, _ = total_of(model, pixels())
    total.backward()
    assert bool(model.quantizer.inner._codebook.embed.grad.abs().sum() > 0)


def test_the_loss_falls():
    model = build(dim=16, codebook_size=8, vq_kwargs={"kmeans_init": True}, varied=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    image = pixels(4) * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1)
    seen = []
    for _ in range(100):
        total, parts = total_of(model, image)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(parts["cross_entropy"].item() + parts["recon_loss"].item())
    assert seen[-1] < 0.5 * seen[0]


# --------------------------------------------------------------------------------------------- what sees what


@pytest.mark.parametrize("changed", [0, 5, 15])
def test_no_logit_sees_its_own_code_or_a_later_one(changed):
    model = build(depth=2).eval()
    image = pixels()
    row, column = divmod(changed, 4)
    other = image.clone()
    other[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0
    first, second = model(image), model(other)
    assert (first.indices != second.indices).any(dim=0).nonzero().flatten().tolist() == [changed]
    difference = (first.logits - second.logits).abs().amax(dim=(0, 2))
    assert bool((difference[: changed + 1] < 1e-5).all())
    assert bool((difference[changed + 1 :] > 1e-4).all())


def test_with_blocks_a_prediction_sees_only_the_codes_before():
    model = build(depth=2, num_resnet_blocks=1).eval()
    vectors = torch.randn(2, 15, 32, generator=seeded(0))
    other = vectors.clone()
    other[:, 6] = -2 * other[:, 6].flip(-1)
    difference = (model.predict(vectors) - model.predict(other)).abs().amax(dim=(0, 2))
    assert bool((difference[:7] < 1e-5).all()) and bool((difference[7:] > 1e-4).all())


def test_an_image_is_predicted_alike_alone_and_in_a_batch():
    model = build().eval()
    whole = model(pixels(3))
    for index in range(3):
        alone = model(pixels(3)[index : index + 1])
        assert torch.equal(alone.indices[0], whole.indices[index])
        assert torch.allclose(alone.logits[0], whole.logits[index], atol=1e-4)


# --------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("options", [GREEDY, DrawOptions(), DrawOptions(min_p=0.25, temperature=1.5)])
def test_codes_are_the_same_with_and_without_the_cache(depth, options):
    model = build(depth=depth)
    cached, uncached = (drawn(model, options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached) and cached.shape == (3, 16) and cached.dtype == torch.int64
    assert len(cached.unique()) > 1


def test_drawn_codes_are_those_that_the_logits_of_the_image_say():
    """Teacher forcing: the distribution that each code was drawn from is the one of the whole sequence at once."""
    model, options = build(depth=2), DrawOptions(min_p=0.1)
    codes = drawn(model, options)
    predicted = model.predict(model.codebook()[codes[:, :-1]])
    logits = -torch.cdist(predicted, model.codebook())
    assert torch.equal(draw(logits, uniform_for(model), options), codes)


def test_the_default_draws_are_the_ancestors():
    model = build()
    assert dict(model.draw_defaults) == {"min_p": 0.25, "temperature": 1.5}
    expected = model.decode_codes(
        drawn_with(model, torch.rand(4, 16, generator=seeded(9)), DrawOptions(min_p=0.25, temperature=1.5))
    )
    images = model.sample(4, generator=seeded(9))
    assert torch.equal(images, expected.clamp(0, 1)) and images.min() >= 0 and images.max() <= 1
    assert not torch.equal(model.sample(4, generator=seeded(9), temperature=0.5, min_p=0.9), images)


def drawn_with(model: VQImageAutoregressiveAutoencoder, uniform: Tensor, options: DrawOptions) -> Tensor:
    return model.eval().draw_codes(uniform, model.labels(None, len(uniform)), options)


@pytest.mark.parametrize("training", [True, False])
def test_drawing_leaves_the_model_as_it_was(training):
    model = build().train(training)
    before = copy.deepcopy(model.state_dict())
    model.sample(2)
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --------------------------------------------------------------------------------------------- codes and back


def test_codes_are_the_nearest_and_give_back_the_reconstruction():
    model = build().eval()
    features, indices, quantized = quantized_of(model, pixels())
    assert torch.equal(model.tokenize(pixels()).flatten(1), indices)
    out = model(pixels())
    assert torch.equal(out.indices, indices)
    assert torch.allclose(model.detokenize(model.tokenize(pixels())), out.recon, atol=1e-5)
    assert torch.allclose(model.decode_codes(indices), out.recon, atol=1e-5)


def test_it_is_a_tokenizer(tmp_path):
    model = build(num_resnet_blocks=1).eval()
    model.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    codes = tokenizer.encode(pixels())
    assert (tokenizer.code_side, tokenizer.num_codes, tokenizer.codebook_size, tokenizer.num_levels) == (4, 16, 32, 1)
    assert torch.equal(codes, model.tokenize(pixels()).flatten(1))
    assert torch.equal(tokenizer.decode(codes), model.decode_codes(codes).clamp(0, 1))
    assert tokenizer.fingerprint() == Tokenizer(model).fingerprint()
    larger = Tokenizer(model, image_size=24)
    assert larger.encode(pixels(size=24)).shape == (2, 36)


# --------------------------------------------------------------------------------------------- precision and copies


def test_autocast_is_close_to_float32():
    model, image = build(num_resnet_blocks=1).eval(), pixels()
    expected, _ = total_of(model, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(image)
        total, parts = model.loss(out, image)
    assert out.logits.dtype == out.ar_commit_loss.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in [total, *parts.values()])
    assert total.item() == pytest.approx(expected.item(), rel=0.05)
    total.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_precision_run(dtype):
    model = build(num_resnet_blocks=1).to(dtype).eval()
    out = model(pixels().to(dtype))
    assert out.logits.dtype == torch.float32 and out.recon.dtype == dtype
    assert model.detokenize(out.indices.view(2, 4, 4)).dtype == dtype
    assert model.sample(2).shape == (2, 3, 16, 16)


def test_ema_averages_weights_and_codes():
    model = build()
    average = EMA(model, beta=0.5, update_after_step=0, update_every=1, include_online_model=False)
    average.update()
    before = average.ema_model.to_code.weight.clone()
    with torch.no_grad():
        model.to_code.weight.add_(1)
    average.update()
    difference = average.ema_model.to_code.weight - before
    assert bool((difference > 0).all()) and bool((difference < 1).all())
    assert average.ema_model.sample(2).shape == (2, 3, 16, 16)


# an argument of each kind that is not the default
CHANGED = {
    "image_size": 12,
    "patch_size": 3,
    "dim": 20,
    "codebook_size": 10,
    "decay": 0.8,
    "depth": 2,
    "dim_head": 8,
    "heads": 3,
    "recon_from_pred_codes_weight": 0.25,
    "recon_loss_weight": 2.0,
    "vq_commit_loss_weight": 0.5,
    "ar_commit_loss_weight": 0.75,
    "channels": 4,
    "num_resnet_blocks": 2,
    "logit_scale": 3.0,
    "vq_kwargs": {"codebook_dim": 6, "use_cosine_sim": True, "threshold_ema_dead_code": 2},
}


def test_every_argument_is_saved_and_comes_back(tmp_path):
    assert CHANGED.keys() == ARGUMENTS
    model = VQImageAutoregressiveAutoencoder(**CHANGED)
    model.save_pretrained(tmp_path / "first")
    loaded = VQImageAutoregressiveAutoencoder.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("first", "again"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config == {**CHANGED, "model_type": "vq_ar", "buffers": "live"}
    assert not loaded.training
    assert torch.equal(loaded.sample(2, generator=seeded(1)), model.sample(2, generator=seeded(1)))


def test_what_is_saved_is_loaded(tmp_path):
    model = build(varied=False, vq_kwargs={"kmeans_init": True})
    model(pixels(16))
    model.save_pretrained(tmp_path)
    loaded = VQImageAutoregressiveAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.tokenize(pixels()), model.eval().tokenize(pixels()))
    assert torch.equal(loaded(pixels()).logits, model(pixels()).logits)


# --------------------------------------------------------------------------------------------- messages

LOWEST = {
    "image_size": 1,
    "patch_size": 1,
    "dim": 1,
    "depth": 1,
    "dim_head": 6,
    "heads": 1,
    "num_resnet_blocks": 0,
}
LOSS_WEIGHTS = ["recon_loss_weight", "vq_commit_loss_weight", "ar_commit_loss_weight"]
WRONG_ARGUMENTS = [
    *(
        ({name: low - 1}, rf"^{name} {low - 1} is not possible; it must be at least {low}$")
        for name, low in LOWEST.items()
    ),
    *(({name: None}, rf"^{name} None is not possible; give a whole number$") for name in LOWEST),
    ({"image_size": 18}, r"^image_size 18 is not a multiple of patch_size 4; try 16 or 20$"),
    ({"image_size": 2}, r"^image_size 2 is not a multiple of patch_size 4; try 4$"),
    ({"channels": 2}, r"^channels 2 is not possible; use 1 \(grey\), 3 \(colour\) or 4 \(colour and alpha\)$"),
    ({"codebook_size": 1}, r"^quantizer vq: codebook_size 1 is not an integer of at least 2"),
    ({"decay": 1.0}, r"^quantizer vq: decay 1.0 is out of range; expected a number of at least 0 and at most"),
    *(
        ({"recon_from_pred_codes_weight": share}, r"^recon_from_pred_codes_weight .* is not possible; give a share in")
        for share in (-0.1, 1.5, math.nan)
    ),
    *(
        ({name: weight}, rf"^{name} .* is not possible; it must be at least 0 and finite$")
        for name in LOSS_WEIGHTS
        for weight in (-1.0, math.nan, math.inf)
    ),
    *(({"logit_scale": scale}, r"^logit_scale .* must be above 0") for scale in (0.0, -1.0, math.inf, math.nan)),
    ({"vq_kwargs": {"decay": 0.5}}, r"^vq_kwargs has decay 0.5, which is an argument of the model; set it there$"),
    ({"vq_kwargs": {"dim": 8}}, r"^vq_kwargs has dim 8, which is an argument of the model; set it there$"),
    ({"vq_kwargs": {"codebook_size": 8}}, r"^vq_kwargs has codebook_size 8, which is an argument of the model; set"),
    ({"vq_kwargs": {"kmeans": True}}, r"^quantizer vq has no option 'kmeans'; nearest: kmeans_i"),
    (
        {"decay": 0.5, "vq_kwargs": {"learnable_codebook": True, "ema_update": False}},
        r"^quantizer vq: decay does nothing without ema_update; set ema_update or leave decay out$",
    ),
]


@pytest.mark.parametrize("arguments, message", WRONG_ARGUMENTS, ids=str)
def test_a_wrong_argument_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        build(**arguments)
    assert "\n" not in str(error.value)


MISTAKES = [
    (lambda model: model(pixels(channels=1)), r"^images of shape \(2, 1, 16, 16\) were given; \(batch, 3, height, wi"),
    (
        lambda model: model(pixels()[0]),
        r"^images of shape \(3, 16, 16\) were given; \(batch, 3, height, width\) is exp",
    ),
    (lambda model: model(pixels(size=18)), r"^image side 18 is not a multiple of patch_size 4; try 16 or 20$"),
    (lambda model: model(pixels(size=20)), r"^images of 20 x 20 pixels were given; the model is for 16 x 16$"),
    (
        lambda model: model.inputs(torch.zeros(2, 16, dtype=torch.long), torch.zeros(2)),
        r"^pixels of type torch.int64 were given; floating-point numbers in \[0, 1\] are expected$",
    ),
    (lambda model: model.sample(2, label=1), r"^class 1 is asked for but the model knows no classes; leave it out$"),
    (lambda model: model.sample(2, cfg=2.0), r"^cfg 2 is given but the model knows no classes; leave it out$"),
    (
        lambda model: Tokenizer(model, image_size=18),
        r"^image_size 18 is not a multiple of patch_size 4; try 16 or 20$",
    ),
]


@pytest.mark.parametrize("call, message", MISTAKES)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call(build())
    assert "\n" not in str(error.value)


def test_inputs_are_the_images():
    assert [torch.equal(given, pixels()) for given in build().inputs(pixels(), torch.zeros(2))] == [True]


def test_the_cross_entropy_is_that_of_the_library():
    model = build().eval()
    out = model(pixels())
    _, parts = model.loss(out, pixels())
    assert torch.allclose(parts["cross_entropy"], F.cross_entropy(out.logits.flatten(0, 1), out.indices.flatten()))
