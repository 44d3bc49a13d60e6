"""The prior over a frozen tokenizer: causality, cache, classes, guidance, and what is saved."""

from __future__ import annotations

import copy

import pytest
import torch
from scenarios import build_prior, build_tokenizer
from torch.nn.functional import log_softmax

from vqdist import Prior, Tokenizer, UserError
from vqdist.sampling import DrawOptions, uniform_per_image

LEVELS = {"one": {}, "residual": {"quantizer": "residual_vq", "vq_kwargs": {"num_quantizers": 2, "codebook_dim": 8}}}
BY_LEVELS = pytest.mark.parametrize("levels", LEVELS)


def prior_of(levels: str = "one", **options) -> Prior:
    """Return a prior with random weights large enough to have opinions, in eval mode."""
    model = build_prior(tokenizer=build_tokenizer(**LEVELS[levels]), **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.15 * torch.randn(weight.shape, generator=generator))
    return model


def codes_and_labels(model: Prior, count: int = 4):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(model.codebook_size, (count, model.num_codes), generator=generator)
    return codes, torch.arange(count) % (model.num_classes + 1)


@BY_LEVELS
def test_a_code_changes_no_prediction_of_itself_or_of_codes_before(levels):
    model = prior_of(levels)
    codes, label = codes_and_labels(model)
    with torch.no_grad():
        before = model(codes, label).logits
        for place in range(model.num_codes):
            changed = codes.clone()
            changed[:, place] = (codes[:, place] + 1) % model.codebook_size
            after = model(changed, label).logits
            assert torch.equal(after[:, : place + 1], before[:, : place + 1])
            if place + 1 < model.num_codes:
                assert (after[:, place + 1 :] != before[:, place + 1 :]).any(dim=(1, 2)).all()


@BY_LEVELS
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 7, "temperature": 1.2}, {"cfg": 2.5}], ids=str)
def test_the_cache_changes_no_code(levels, options):
    model = prior_of(levels)
    uniform = uniform_per_image(model.num_codes, range(6))
    label = torch.arange(6) % (model.num_classes + 1)
    drawn = {
        cache: model.draw_codes(uniform, label, DrawOptions(**options), use_cache=cache) for cache in (True, False)
    }
    assert torch.equal(drawn[True], drawn[False])
    assert len(drawn[True].unique()) > 3


def test_greedy_codes_are_the_most_probable_ones_one_after_the_other():
    model = prior_of()
    _, label = codes_and_labels(model)
    found = model.draw_codes(torch.zeros(4, model.num_codes), label, DrawOptions(temperature=0.0))
    with torch.no_grad():
        logits = model(found, label).logits
    assert torch.equal(logits.argmax(dim=-1), found)


def test_guidance_moves_from_the_unconditional_to_the_conditional_prediction():
    model = prior_of()
    uniform, label = uniform_per_image(model.num_codes, range(4)), torch.arange(4) % model.num_classes
    none = torch.full_like(label, model.num_classes)
    for scale, same_as in ((0.0, none), (1.0, label)):
        guided = model.draw_codes(uniform, label, DrawOptions(cfg=scale))
        assert torch.equal(guided, model.draw_codes(uniform, same_as, DrawOptions()))
    codes = model.draw_codes(uniform, label, DrawOptions(cfg=3.0, temperature=0.0))
    with torch.no_grad():
        conditional, unconditional = model(codes, label).logits, model(codes, none).logits
    assert torch.equal((unconditional + 3 * (conditional - unconditional)).argmax(dim=-1), codes)


def test_the_loss_is_the_mean_negative_log_likelihood():
    model = prior_of("residual")
    codes, label = codes_and_labels(model)
    out = model(codes, label)
    loss, parts = model.loss(out, codes, label)
    by_hand = -log_softmax(out.logits, dim=-1).gather(-1, codes[..., None]).mean()
    torch.testing.assert_close(loss, by_hand)
    assert parts.keys() == {"cross_entropy"}


def test_images_become_codes_in_the_order_of_rows_and_levels():
    model = prior_of("residual")
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    codes, label = model.inputs(images, torch.zeros(3, dtype=torch.long))
    stored = model.tokenizer.encode(images)
    assert torch.equal(codes, stored.reshape(3, -1)) and codes.shape == (3, 32)
    assert torch.equal(model.inputs(stored, label)[0], codes)
    torch.testing.assert_close(model.decode_codes(codes), model.tokenizer.decode(stored))


def test_samples_are_images_and_belong_to_the_generator():
    model = prior_of().train()
    first, again, other = (model.sample(5, label=1, generator=torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert first.shape == (5, 3, 16, 16) and 0 <= float(first.min()) and float(first.max()) <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert model.training, "sampling left the model in eval mode"


def test_the_tokenizer_is_frozen_held_once_and_saved_beside_the_model(tmp_path):
    model = prior_of()
    names = [name for name, _ in model.named_parameters()]
    assert not any("tokenizer" in name or "_held" in name for name in names)
    assert copy.deepcopy(model).tokenizer is model.tokenizer
    assert not any(weight.requires_grad for weight in model.tokenizer.parameters())
    model.save_pretrained(tmp_path / "saved")
    loaded = Prior.from_pretrained(tmp_path / "saved")
    assert loaded.tokenizer.fingerprint() == model.tokenizer.fingerprint()
    assert loaded._hub_mixin_config == model._hub_mixin_config
    codes, label = codes_and_labels(model)
    with torch.no_grad():
        assert torch.equal(loaded(codes, label).logits, model(codes, label).logits)
    with pytest.raises(UserError, match="holds a Prior, which is no image tokenizer"):
        Tokenizer.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("option", ["dim", "depth", "heads", "dim_head", "num_classes"])
def test_every_size_changes_the_weights(option):
    larger = {"dim": 48, "depth": 2, "heads": 3, "dim_head": 64, "num_classes": 5}
    count = {True: build_prior(**{option: larger[option]}), False: build_prior()}
    sizes = {changed: sum(weight.numel() for weight in model.parameters()) for changed, model in count.items()}
    assert sizes[True] > sizes[False]


def test_dropout_acts_in_training_only():
    model = build_prior(dropout=0.5)
    codes, label = codes_and_labels(model)
    assert not torch.equal(model(codes, label).logits, model(codes, label).logits)
    model.eval()
    assert torch.equal(model(codes, label).logits, model(codes, label).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim 0 is not possible; it must be at least 1"),
        ({"depth": -1}, "depth -1 is not possible"),
        ({"dim_head": 16}, "dim_head 16 is not possible; rotary positions need an even number of at least 32"),
        ({"dim": 64, "heads": 1}, "dim 64 does not go with heads 1 and dim_head 32; a single head must be as wide as"),
        ({"dim": 1}, "dim 1 does not go with heads 2"),
        ({"num_classes": -1}, "num_classes -1 is not possible"),
        ({"dropout": 1.0}, "dropout 1.0 is not possible"),
        ({"tokenizer": "runs/a"}, "the tokenizer is a str; give a vqdist.Tokenizer"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        build_prior(**options)
    assert message in str(error.value)


def test_wrong_requests_are_one_line():
    model = build_prior()
    with pytest.raises(UserError, match="class 3 is asked for; the model knows 0 to 2"):
        model.sample(2, label=3)
    with pytest.raises(UserError, match="num_samples 0 is not possible"):
        model.sample(0)
    unconditional = build_prior(num_classes=0)
    with pytest.raises(UserError, match="class 1 is asked for but the model knows no classes"):
        unconditional.sample(2, label=1)
    with pytest.raises(UserError, match="cfg 2 is given but the model knows no classes"):
        unconditional.sample(2, cfg=2.0)
