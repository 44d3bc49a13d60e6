"""Next-scale prediction: what each scale sees, cache, guidance, classes, options, and what is saved."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from cases import Cases
from scenarios import build_vae
from torch import Tensor
from torch.nn.functional import log_softmax

from vqdist import Tokenizer, UserError
from vqdist.models.pretrained import load_model_of_any_type
from vqdist.models.var import VAR, guidance_at
from vqdist.models.vqvae import SimpleVQVAE
from vqdist.sampling import DrawOptions, draw, uniform_per_image

SCALES = (1, 2, 4)
LENGTHS = (1, 4, 16)
ENDS = (1, 5, 21)


def tokenizer_of(v_patch_nums=SCALES) -> Tokenizer:
    """16x16 grey images to codes of 24, equal on every call."""
    torch.manual_seed(0)
    model = SimpleVQVAE(24, 6, 8, channels=1, v_patch_nums=v_patch_nums)
    torch.nn.init.normal_(model.quantizer.inner.codebook.get_codebook())
    return Tokenizer(model)


def build(tokenizer: Tokenizer | None = None, **options) -> VAR:
    """Return a small model with three classes and weights that have opinions, in eval mode; equal on every call."""
    tokenizer = tokenizer_of() if tokenizer is None else tokenizer
    torch.manual_seed(1)
    model = VAR(tokenizer, **{"depth": 2, "dim": 32, "heads": 2, "num_classes": 3, **options}).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def batch_of(model: VAR, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `forward` takes, for random codes and every class, "none" among them."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(model.codebook_size, (count, model.num_codes), generator=generator)
    return model.inputs(codes, torch.arange(count) % (model.num_classes + 1))


# --------------------------------------------------------------------------------------------- what is predicted


def test_a_code_changes_no_prediction_of_its_own_scale_or_of_scales_before():
    model = build()
    codes, var_input, label = batch_of(model)
    with torch.no_grad():
        before = model(codes, var_input, label).logits
        for place in range(21):
            changed = codes.clone()
            changed[:, place] = (codes[:, place] + 1) % 24
            after = model(*model.inputs(changed, label)).logits
            end = next(end for end in ENDS if place < end)
            assert torch.equal(after[:, :end], before[:, :end])
            assert end == 21 or (after[:, end:] != before[:, end:]).any(dim=(1, 2)).all()


def test_codes_of_a_scale_see_each_other_and_every_scale_before():
    model = build()
    codes, var_input, label = batch_of(model)
    with torch.no_grad():
        before = model(codes, var_input, label).logits
        for place in range(20):
            changed = var_input.clone()
            changed[:, place] += 1
            after = model(codes, changed, label).logits
            first = 1 if place < 4 else 5  # code of the scale whose input it is
            assert torch.equal(after[:, :first], before[:, :first])
            assert (after[:, first:] != before[:, first:]).any(dim=2).all()


def test_the_class_changes_every_prediction():
    model = build()
    codes, var_input, label = batch_of(model)
    with torch.no_grad():
        first, second = (model(codes, var_input, torch.full_like(label, number)).logits for number in (0, 3))
    assert (first != second).any(dim=2).all()


def test_images_become_codes_and_the_features_that_they_add_up_to():
    model = build()
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(4))
    codes, var_input, label = model.inputs(images, torch.zeros(3, dtype=torch.long))
    stored = model.tokenizer.encode(images)
    assert torch.equal(codes, stored)
    expected = model.tokenizer.idxBl_to_var_input(model.tokenizer.img_to_idxBl(images))
    assert torch.equal(var_input, expected) and var_input.shape == (3, 20, 6)
    assert var_input.dtype == torch.float32 and not var_input.requires_grad
    assert torch.equal(model.inputs(stored, label)[1], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(model.inputs(images, label), (codes, expected, label)))
    assert torch.equal(model.decode_codes(codes), model.tokenizer.decode(stored))


def test_the_loss_is_the_mean_negative_log_likelihood_and_reaches_every_weight():
    model = build()
    inputs = batch_of(model)
    out = model(*inputs)
    assert out.indices is inputs[0] and out.logits.shape == (4, 21, 24)
    loss, parts = model.loss(out, *inputs)
    by_hand = -log_softmax(out.logits, dim=-1).gather(-1, inputs[0][..., None]).mean()
    torch.testing.assert_close(loss, by_hand)
    assert parts.keys() == {"cross_entropy"} and loss.dtype == torch.float32
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_training_learns_the_codes_of_each_class():
    torch.manual_seed(0)
    model = VAR(tokenizer_of(), depth=1, dim=32, heads=2, num_classes=3)
    codes = torch.randint(24, (3, 21), generator=torch.Generator().manual_seed(5))
    inputs = model.inputs(codes, torch.arange(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(model(*inputs), *inputs)[0].backward()
        optimizer.step()
    drawn = model.eval().draw_codes(torch.zeros(3, 21), torch.arange(3), DrawOptions(temperature=0))
    assert torch.equal(drawn, codes)


# --------------------------------------------------------------------------------------------- drawing

WAYS = [
    {"temperature": 0.0},
    {},
    {"cfg": 2.5},
    {"cfg": 3.0, "temperature": 0.0},
    {"top_k": 5, "top_p": 0.9, "cfg": 0.5},
]


@pytest.mark.parametrize("scales", [SCALES, (2, 4), (4,)], ids=str)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_cache_changes_no_code(options, scales):
    model = build(tokenizer_of(scales))
    uniform, label = uniform_per_image(model.num_codes, range(6)), torch.arange(6) % 4
    with_cache, without = (
        model.draw_codes(uniform, label, DrawOptions(**options), use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without) and with_cache.shape == (6, model.num_codes)
    assert len(with_cache.unique()) > 3


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 7, "temperature": 1.2}, {"cfg": 2.5}], ids=str)
def test_codes_are_drawn_from_what_forward_predicts_of_them(options):
    """Guided logits are unconditional + s * (conditional - unconditional), s from 1 at the first scale to cfg."""
    model, options = build(), DrawOptions(**options)
    uniform, label = uniform_per_image(21, range(5)), torch.arange(5) % 3
    codes = model.draw_codes(uniform, label, options)
    with torch.no_grad():
        logits = model(*model.inputs(codes, label)).logits
        if options.cfg != 1:
            unconditional = model(*model.inputs(codes, torch.full_like(label, 3))).logits
            ramp = torch.tensor([1.0, 1.75, 2.5]).repeat_interleave(torch.tensor(LENGTHS))[:, None]
            logits = unconditional + ramp * (logits - unconditional)
    assert torch.equal(draw(logits, uniform, options), codes)


def test_guidance_rises_linearly_and_translates_from_vars_formula():
    for cfg in (0.0, 1.0, 2.5, 4.0):
        assert [guidance_at(cfg, scale, 5) for scale in range(5)] == pytest.approx(
            [1 + (cfg - 1) * scale / 4 for scale in range(5)]
        )
    assert guidance_at(3.0, 0, 1) == 3.0
    conditional, unconditional, t = 2.0, -1.0, 1.5
    for scale in range(10):
        theirs = (1 + t * scale / 9) * conditional - t * scale / 9 * unconditional
        ours = unconditional + guidance_at(1 + t, scale, 10) * (conditional - unconditional)
        assert ours == pytest.approx(theirs)


def test_an_image_belongs_to_its_numbers_whatever_else_is_drawn():
    model = build()
    uniform, label = uniform_per_image(21, range(6)), torch.arange(6) % 3
    together = model.draw_codes(uniform, label, DrawOptions(cfg=2))
    apart = [model.draw_codes(uniform[i : i + 2], label[i : i + 2], DrawOptions(cfg=2)) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(apart), together)


def test_samples_are_images_and_the_model_is_as_before():
    model = build(dropout=0.5).train()
    first, again, other = (model.sample(5, label=1, generator=torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert first.shape == (5, 1, 16, 16) and 0 <= float(first.min()) and float(first.max()) <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert model.training and not model.transformer.causal
    with pytest.raises(RuntimeError):
        model.draw_codes(torch.zeros(2, 21), torch.zeros(3, dtype=torch.long), DrawOptions())
    assert not model.transformer.causal


# --------------------------------------------------------------------------------------- saving, options, mistakes


@pytest.mark.parametrize("kind", ["simple_vqvae", "vqgan"])
def test_the_tokenizer_is_frozen_and_saved_beside_the_model(tmp_path, kind):
    tokenizer = tokenizer_of()
    if kind == "vqgan":
        kwargs = {"v_patch_nums": [1, 2, 4], "kmeans_init": False}
        vae = build_vae("multiscale_vq", codebook_size=24, channels=1, quantizer_kwargs=kwargs, use_vgg_and_gan=False)
        tokenizer = Tokenizer(vae, 16)
    model = build(tokenizer)
    assert not any("tokenizer" in name or "_held" in name for name in model.state_dict())
    assert copy.deepcopy(model).tokenizer is model.tokenizer
    assert not any(weight.requires_grad for weight in model.tokenizer.parameters())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tokenizer"] == tokenizer.fingerprint() and config["model_type"] == "var"
    for loaded in (VAR.from_pretrained(tmp_path), load_model_of_any_type(tmp_path)):
        assert loaded.tokenizer.fingerprint() == tokenizer.fingerprint()
        assert (loaded.image_size, loaded.num_classes, loaded.scale_lengths) == (16, 3, LENGTHS)
        assert torch.equal(loaded(*batch_of(loaded)).logits, model(*batch_of(model)).logits)


case = CASES = Cases("option_")


def attention_of(model: VAR) -> list[torch.nn.Module]:
    return [module for module in model.transformer.modules() if type(module).__name__ == "Attention"]


@case
def option_depth():
    assert [len(attention_of(build(depth=depth))) for depth in (1, 3)] == [1, 3]


@case
def option_dim():
    assert [build(dim=dim).to_logits.in_features for dim in (16, 32)] == [16, 32]
    assert VAR(tokenizer_of(), depth=3).to_logits.in_features == 192


@case
def option_heads():
    assert [attention_of(build(heads=heads))[0].heads for heads in (1, 4)] == [1, 4]
    assert attention_of(build(heads=4))[0].to_q.out_features == 32
    assert attention_of(VAR(tokenizer_of(), depth=3))[0].heads == 3


@case
def option_num_classes():
    assert [build(num_classes=number).classes.num_embeddings for number in (0, 10)] == [1, 11]
    none = build(num_classes=0)
    assert none.sample(2).shape == (2, 1, 16, 16)
    for options, message in (
        ({"label": 1}, "class 1 is asked for but the model"),
        ({"cfg": 2.0}, "cfg 2 is given but"),
    ):
        with pytest.raises(UserError, match=message):
            none.sample(2, **options)


@case
def option_dropout():
    for dropout, same in ((0.0, True), (0.5, False)):
        model = build(dropout=dropout).train()
        assert torch.equal(*(model(*batch_of(model)).logits for _ in range(2))) == same
        model.eval()
        assert torch.equal(*(model(*batch_of(model)).logits for _ in range(2)))


def test_every_option_has_a_case():
    assert CASES.keys() == inspect.signature(VAR).parameters.keys() - {"tokenizer"}


@pytest.mark.parametrize("option", CASES)
def test_option_changes_something(option):
    CASES[option]()


def test_the_defaults_are_vars():
    parameters = inspect.signature(VAR).parameters
    assert {name: parameters[name].default for name in CASES} == {
        "depth": 16, "dim": None, "heads": None, "num_classes": 0, "dropout": 0.0
    }  # fmt: skip


MISTAKES = [
    ({"depth": 0}, r"^depth 0 is not possible; it must be at least 1$"),
    ({"heads": 0}, r"^heads 0 is not possible; it must be at least 1$"),
    ({"dim": 0}, r"^dim 0 is not possible; it must be at least 1$"),
    ({"dim": 30, "heads": 4}, r"^dim 30 is not a multiple of heads 4; try 28$"),
    ({"num_classes": -1}, r"^num_classes -1 is not possible; give the number of classes, 0 for none$"),
    ({"dropout": 1.0}, r"^dropout 1.0 is not possible; it must be at least 0 and below 1$"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_a_mistake_is_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_one_scale_is_refused():
    tokenizer = Tokenizer(build_vae("lfq", use_vgg_and_gan=False), 16)
    with pytest.raises(UserError, match=r"^the tokenizer codes images at one scale.* multiscale_vq, or .* prior"):
        VAR(tokenizer)
