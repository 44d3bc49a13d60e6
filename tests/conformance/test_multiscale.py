"""Multi-scale residual quantization: its algorithm written out, losses, options, digits, two ranks.

Shapes: features (b, 8, 4, 4) unless said otherwise; scales 1, 2, 4, so 21 codes an image.
"""

from __future__ import annotations

import inspect
import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import Cases
from launching import torchrun
from scenarios import build_trainer, build_vae
from torch import Tensor

from vqdist import Tokenizer, UserError, VQGanVAE
from vqdist.data.sources.digits import DigitsSource
from vqdist.models.multiscale import hits_per_scale, nearest_code, phi_of_scale, split_scales
from vqdist.models.quantizers import MultiScaleQuantizer, MultiScaleVQ, build_quantizer

SCALES = (1, 2, 4)
LEARNABLE = {"learnable_codebook": True}
NO_START = {"kmeans_init": False}
WORLD_SIZE = 2
STEPS = 6

both_codebooks = pytest.mark.parametrize("learning", [LEARNABLE, NO_START], ids=["gradient", "ema"])


def build(codebook_size: int = 32, **options) -> MultiScaleQuantizer:
    """Return a quantizer of 8 channels, equal on every call, whose codes are about as long as its features."""
    torch.manual_seed(0)
    options = {"v_patch_nums": SCALES, **options}
    quantizer = build_quantizer("multiscale_vq", dim=8, codebook_size=codebook_size, **options)
    with torch.no_grad():
        codebook_of(quantizer).copy_(torch.randn(codebook_size, 8, generator=torch.Generator().manual_seed(1)))
    return quantizer


def codebook_of(quantizer: MultiScaleQuantizer) -> Tensor:
    """(v, d), the tensor itself."""
    codebook = quantizer.inner.codebook
    return codebook.get_codebook() if hasattr(codebook, "get_codebook") else codebook.inner.embed[0]


def features_of(batch: int = 3, seed: int = 2, side: int = 4) -> Tensor:
    return torch.randn(batch, 8, side, side, generator=torch.Generator().manual_seed(seed))


def by_hand(quantizer: MultiScaleQuantizer, features: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Algorithms 1 and 2 of arXiv 2404.02905 with a convolution a scale: codes, totals, what was coded."""
    codebook, phis = codebook_of(quantizer), quantizer.inner.phis
    residual, total = features, torch.zeros_like(features)
    codes, totals, coded = [], [], []
    for scale, side in enumerate(SCALES):
        small = F.adaptive_avg_pool2d(residual, side)
        rows = small.permute(0, 2, 3, 1).reshape(len(features), side * side, 8)
        codes.append(torch.cdist(rows, codebook.expand(len(features), -1, -1)).argmin(dim=-1))
        vectors = codebook[codes[-1]].transpose(1, 2).reshape(small.shape)
        large = F.interpolate(vectors, size=(4, 4), mode="bicubic", align_corners=False)
        large = 0.5 * large + 0.5 * phis[scale](large)
        residual, total = residual - large, total + large
        totals.append(total)
        coded.append(rows)
    return codes, totals, coded


# --------------------------------------------------------------------------------------------- the algorithm


@both_codebooks
def test_codes_and_features_are_those_of_the_paper(learning):
    quantizer, features = build(**learning).eval(), features_of()
    codes, totals, _ = by_hand(quantizer, features)
    out = quantizer(features)
    assert torch.equal(out.indices, torch.cat(codes, dim=1)) and out.indices.shape == (3, 21)
    assert len(out.indices.unique()) > 10
    torch.testing.assert_close(out.quantized, totals[-1])
    for number, total in enumerate(totals, start=1):
        torch.testing.assert_close(quantizer.decode_indices(torch.cat(codes[:number], dim=1)), total)
    assert torch.equal(quantizer.decode_indices(out.indices), out.quantized)
    assert out.aux_loss.item() == 0 and not out.aux_loss.requires_grad


@both_codebooks
def test_the_loss_is_the_mean_over_scales_of_codebook_and_commitment_loss(learning):
    for beta in (0.25, 1.0):
        quantizer, features = build(beta=beta, **learning), features_of().requires_grad_()
        _, totals, _ = by_hand(quantizer, features.detach())
        expected = sum((1 + beta) * (total - features).square().mean() for total in totals) / 3
        loss = quantizer(features).aux_loss
        torch.testing.assert_close(loss, expected)
        assert loss.dtype == torch.float32 and loss.ndim == 0
        # the commitment alone moves the features, with beta; the codebook loss alone moves what makes the totals
        loss.backward()
        commitment = sum(beta * 2 * (features - total) / features.numel() for total in totals) / 3
        torch.testing.assert_close(features.grad, commitment)
        codebook_loss = sum((total - features.detach()).square().mean() for total in totals) / 3
        phis = list(quantizer.inner.phis.parameters())
        for ours, wanted in zip(phis, torch.autograd.grad(codebook_loss, phis, retain_graph=True)):
            torch.testing.assert_close(ours.grad, wanted)


@both_codebooks
def test_the_gradient_of_the_features_passes_straight_through(learning):
    quantizer, features = build(**learning), features_of().requires_grad_()
    weight = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(5))
    gradient = torch.autograd.grad((quantizer(features).quantized * weight).sum(), features)[0]
    torch.testing.assert_close(gradient, weight)


def test_a_learnable_codebook_has_the_gradient_of_its_loss_and_an_ema_codebook_moves():
    learnable, features = build(**LEARNABLE), features_of()
    _, totals, _ = by_hand(learnable, features)
    expected = sum((total - features).square().mean() for total in totals) / 3
    (wanted,) = torch.autograd.grad(expected, [codebook_of(learnable)])
    before = codebook_of(learnable).clone()
    learnable(features).aux_loss.backward()
    torch.testing.assert_close(codebook_of(learnable).grad, wanted)
    assert torch.equal(codebook_of(learnable), before), "the optimizer moves it, not the forward pass"

    ema = build(decay=0.7, threshold_ema_dead_code=0, **NO_START)
    inner = ema.inner.codebook.inner
    codes, _, coded = (torch.cat(parts, dim=1) for parts in by_hand(ema, features)[:1] + by_hand(ema, features)[::2])
    one_hot = F.one_hot(codes.flatten(), 32).float()
    size = 0.7 * inner.cluster_size[0] + 0.3 * one_hot.sum(dim=0)
    average = 0.7 * inner.embed_avg[0] + 0.3 * one_hot.T @ coded.flatten(0, 1)
    ema(features)
    smoothed = (size + 1e-5) / (size.sum() + 32 * 1e-5) * size.sum()
    torch.testing.assert_close(codebook_of(ema), average / smoothed[:, None])
    assert not any("codebook" in name for name, _ in ema.named_parameters())


def test_k_means_starts_from_what_each_scale_would_have_to_code(monkeypatch):
    quantizer, features = build(), features_of()
    started = []
    monkeypatch.setattr(quantizer.inner.codebook, "start", started.append)
    quantizer(features)
    total = torch.zeros_like(features)
    for side, rows in zip(SCALES, started[0].split([1, 4, 16], dim=1)):
        left = F.adaptive_avg_pool2d(features - total, side)
        torch.testing.assert_close(rows, left.flatten(2).transpose(1, 2))
        total = total + F.interpolate(left, size=(4, 4), mode="bicubic")
    torch.testing.assert_close(total, features)


def test_inputs_of_the_next_scales_are_what_the_codes_so_far_give_at_their_size():
    quantizer, features = build(**NO_START).eval(), features_of()
    codes, totals, _ = by_hand(quantizer, features)
    expected = [
        F.adaptive_avg_pool2d(total, side).flatten(2).transpose(1, 2) for total, side in zip(totals, SCALES[1:])
    ]
    everything = quantizer.next_scale_inputs(torch.cat(codes, dim=1))
    torch.testing.assert_close(everything, torch.cat(expected, dim=1))
    for number in (1, 2):
        some = quantizer.next_scale_inputs(torch.cat(codes[:number], dim=1))
        torch.testing.assert_close(some, torch.cat(expected[:number], dim=1))
    single = build(v_patch_nums=[4], **NO_START).eval()
    assert single.next_scale_inputs(single(features).indices).shape == (3, 0, 8)


def test_inputs_of_a_scale_depend_on_the_scales_before_only():
    quantizer = build(**NO_START).eval()
    codes = quantizer(features_of()).indices
    before = quantizer.next_scale_inputs(codes).split([4, 16], dim=1)
    for place in range(21):
        changed = codes.clone()
        changed[:, place] = (codes[:, place] + 1) % 32
        after = quantizer.next_scale_inputs(changed).split([4, 16], dim=1)
        scale = 0 if place == 0 else 1 if place < 5 else 2
        for number, (old, new) in enumerate(zip(before, after), start=1):
            assert torch.equal(old, new) == (number <= scale)


@both_codebooks
def test_arithmetic_is_float32_under_bf16(learning):
    expected = build(**learning)(features_of().bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = build(**learning)(features_of().bfloat16())
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.aux_loss, expected.aux_loss)
    assert torch.equal(found.quantized, expected.quantized.bfloat16())
    assert all(tensor.dtype != torch.bfloat16 for tensor in build(**learning).bfloat16().state_dict().values())


def test_evaluation_changes_nothing_and_waits_for_k_means():
    fresh = build_quantizer("multiscale_vq", dim=8, codebook_size=8, v_patch_nums=SCALES).eval()
    codes = torch.zeros(1, 21, dtype=torch.long)
    for use in (
        lambda: fresh(features_of()),
        lambda: fresh.decode_indices(codes),
        lambda: fresh.next_scale_inputs(codes),
    ):
        with pytest.raises(UserError, match="no codes yet: .*train at least one step.*kmeans_init=False"):
            use()
    fresh.train()(features_of())
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    fresh.eval()(features_of(seed=3))
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


# --------------------------------------------------------------------------------------------- functions


def test_nearest_by_distance_and_by_angle():
    generator = torch.Generator().manual_seed(3)
    vectors, codebook = (torch.randn(*shape, generator=generator) for shape in ((4, 5, 6), (16, 6)))
    codebook *= torch.linspace(0.2, 3, 16)[:, None]
    by_distance, by_angle = nearest_code(vectors, codebook), nearest_code(vectors, codebook, cosine=True)
    assert torch.equal(by_distance, torch.cdist(vectors, codebook.expand(4, -1, -1)).argmin(dim=-1))
    angles = F.cosine_similarity(vectors[:, :, None], codebook, dim=-1)
    assert torch.equal(by_angle, angles.argmax(dim=-1)) and not torch.equal(by_distance, by_angle)


def test_hits_are_counted_by_scale():
    codes = torch.tensor([[0, 1, 1, 2, 3], [4, 1, 1, 1, 0]])
    hits = hits_per_scale(codes, (1, 2), 6)
    assert hits.tolist() == [[1, 0, 0, 0, 1, 0], [1, 5, 1, 1, 0, 0]]
    parts = [hits_per_scale(row[None], (1, 2), 6) for row in codes]
    assert torch.equal(parts[0] + parts[1], hits)
    assert hits_per_scale(codes[:, :1], (1, 2), 6).sum(dim=1).tolist() == [2, 0]


def test_rows_that_are_no_whole_scales_are_refused():
    assert [part.shape[1] for part in split_scales(torch.zeros(2, 5), SCALES)] == [1, 4]
    for shape in ((2, 6), (2, 0), (2, 4, 4)):
        with pytest.raises(UserError, match=r"^codes of shape .* were given; .* one of 1, 5, 21: .*\[1, 2, 4\]$"):
            split_scales(torch.zeros(shape), SCALES)


# --------------------------------------------------------------------------------------------- options

case = CASES = Cases("option_")


def after_a_step(**options) -> Tensor:
    """Return the codebook after a step of training on features of another scale than the codes."""
    quantizer = build_quantizer("multiscale_vq", dim=8, codebook_size=32, **{"v_patch_nums": SCALES, **options})
    for seed in (2, 3):
        quantizer(9 * features_of(seed=seed))
    return codebook_of(quantizer)


@case
def option_v_patch_nums():
    assert [build(v_patch_nums=sides).scales for sides in ([1, 4], (2, 3, 4))] == [(1, 4), (2, 3, 4)]
    assert build(v_patch_nums=[2, 3, 4], **NO_START)(features_of()).indices.shape == (3, 29)
    default = build_quantizer("multiscale_vq", dim=8, codebook_size=32)
    assert default.scales == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert default(features_of(side=16)).indices.shape == (3, 680)


@case
def option_beta():
    losses = [build(beta=beta, **NO_START)(features_of()).aux_loss.item() for beta in (0.0, 0.25)]
    assert losses[1] == pytest.approx(1.25 * losses[0])


@case
def option_learnable_codebook():
    names = [name for name, _ in build(**LEARNABLE).named_parameters()]
    assert any("codebook" in name for name in names)
    assert not any("codebook" in name for name, _ in build().named_parameters())


@case
def option_use_cosine_sim():
    for learning in (LEARNABLE, NO_START):
        plain, cosine = (build(use_cosine_sim=use, **learning).eval() for use in (False, True))
        codes = cosine(features_of()).indices
        assert torch.equal(codes[:, 0], nearest_code(features_of().mean((2, 3)), codebook_of(cosine), cosine=True))
        assert not torch.equal(codes, plain(features_of()).indices)


@case
def option_decay():
    slow, fast = (after_a_step(decay=decay, kmeans_init=False, threshold_ema_dead_code=0) for decay in (0.99, 0.5))
    assert fast.norm() > 2 * slow.norm()


@case
def option_kmeans_init():
    torch.manual_seed(0)
    assert after_a_step().norm() > 2 * after_a_step(kmeans_init=False, threshold_ema_dead_code=0).norm()


@case
def option_kmeans_iters():
    assert build(kmeans_iters=3).inner.codebook.inner.kmeans_iters == 3
    one, many = (seeded(kmeans_iters=iterations, threshold_ema_dead_code=0) for iterations in (1, 10))
    assert not torch.equal(one, many)


def seeded(**options) -> Tensor:
    torch.manual_seed(4)
    return after_a_step(**options)


@case
def option_threshold_ema_dead_code():
    kept, replaced = (seeded(threshold_ema_dead_code=least, kmeans_init=False) for least in (0, 4))
    assert replaced.norm() > 2 * kept.norm(), "dead codes become features, which are longer than the codes here"


@case
def option_num_phis():
    assert [len(build(num_phis=number).inner.phis) for number in (1, 3)] == [1, 3]
    assert (
        len(build().inner.phis) == 3 and len(build_quantizer("multiscale_vq", dim=8, codebook_size=9).inner.phis) == 4
    )
    shared, own = (build(num_phis=number, **NO_START).eval() for number in (1, 3))
    own.inner.phis[0].load_state_dict(shared.inner.phis[0].state_dict())
    codes = torch.zeros(1, 21, dtype=torch.long)
    assert torch.equal(shared.decode_indices(codes[:, :1]), own.decode_indices(codes[:, :1]))
    assert not torch.allclose(shared.decode_indices(codes), own.decode_indices(codes))


@case
def option_phi_ratio():
    quantizer = build(phi_ratio=0.25, **NO_START).eval()
    code = torch.tensor([[3]])
    large = codebook_of(quantizer)[3][None, :, None, None].expand(1, 8, 4, 4)
    expected = 0.75 * large + 0.25 * quantizer.inner.phis[0](large)
    torch.testing.assert_close(quantizer.decode_indices(code), expected)
    bare = build(phi_ratio=0, **NO_START).eval()
    torch.testing.assert_close(bare.decode_indices(code), large)
    assert not list(bare.parameters())


@case
def option_phi_rule():
    sides = {"v_patch_nums": (1, 2, 3, 4, 5, 6, 8), "num_phis": 4, **NO_START}
    ticks, before = (build(phi_rule=rule, **sides) for rule in ("ticks", "proportional"))
    assert ticks.inner.phi_of == (0, 0, 1, 2, 2, 3, 3) and before.inner.phi_of == (0, 0, 1, 1, 2, 2, 3)
    codes = torch.zeros(1, sum(side**2 for side in sides["v_patch_nums"]), dtype=torch.long)
    assert not torch.allclose(ticks.eval().decode_indices(codes), before.eval().decode_indices(codes))


VAR_SIDES = {
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64): (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
    (1, 2, 4): (0, 1, 2),
    (4,): (0,),
}


@pytest.mark.parametrize("sides", VAR_SIDES)
def test_convolutions_serve_the_scales_by_the_rule_of_var(sides):
    assert phi_of_scale(len(sides), min(4, len(sides))) == VAR_SIDES[sides]
    assert set(phi_of_scale(len(sides), 1)) == {0} and phi_of_scale(len(sides), len(sides)) == tuple(range(len(sides)))


def test_a_convolution_that_serves_no_scale_has_no_gradient():
    """Else DDP would wait for it."""
    quantizer = build(v_patch_nums=range_of(7), num_phis=6, **NO_START)
    assert [phi.weight.requires_grad for phi in quantizer.inner.phis] == [True, True, True, True, False, True]


def range_of(number: int) -> list[int]:
    return list(range(1, number + 1))


def multiscale_of_seven() -> VQGanVAE:
    options = {"v_patch_nums": range_of(7), "num_phis": 4, "kmeans_init": False}
    model = build_vae(quantizer="multiscale_vq", quantizer_kwargs=options, codebook_size=16, use_vgg_and_gan=False)
    model.image_size = 28
    return model.eval()


def test_the_angle_and_the_share_of_the_convolutions_are_in_the_fingerprint(tmp_path):
    """No tensor says them, and codes depend on both; an export that does not say its rule is as it was."""
    found = set()
    for change in ({}, {"use_cosine_sim": True}, {"phi_ratio": 0.25}, {"use_cosine_sim": True, "phi_ratio": 0.25}):
        options = {"v_patch_nums": [1, 2, 4], "num_phis": 3, "kmeans_init": False, **change}
        model = build_vae(quantizer="multiscale_vq", quantizer_kwargs=options, codebook_size=16, use_vgg_and_gan=False)
        model.image_size = 16
        fingerprint = Tokenizer(model.eval()).fingerprint()
        model.save_pretrained(tmp_path)
        assert Tokenizer.from_pretrained(tmp_path).fingerprint() == fingerprint
        found.add(fingerprint)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantizer_kwargs"].pop("phi_rule", None)
        (tmp_path / "config.json").write_text(json.dumps(config))
        found.add(("before", Tokenizer.from_pretrained(tmp_path).fingerprint()))
    assert len([one for one in found if isinstance(one, str)]) == 4
    assert len(found) == 5  # those of before have one and the same


def test_an_export_of_before_keeps_its_rule(tmp_path):
    model = multiscale_of_seven()
    now = Tokenizer(model).fingerprint()
    model.save_pretrained(tmp_path / "now")
    assert Tokenizer.from_pretrained(tmp_path / "now").fingerprint() == now
    config = json.loads((tmp_path / "now" / "config.json").read_text())
    assert config["quantizer_kwargs"].pop("phi_rule") == "ticks"
    (tmp_path / "now" / "config.json").write_text(json.dumps(config))
    before = VQGanVAE.from_pretrained(tmp_path / "now")
    assert before.quantizer.inner.phi_of == (0, 0, 1, 1, 2, 2, 3) and Tokenizer(before).fingerprint() != now
    before.save_pretrained(tmp_path / "before")
    assert "phi_rule" not in json.loads((tmp_path / "before" / "config.json").read_text())["quantizer_kwargs"]
    assert VQGanVAE.from_pretrained(tmp_path / "before").quantizer.inner.phi_rule == "proportional"


def test_a_run_of_before_goes_on_with_its_rule(tmp_path):
    for steps in (1, 2):
        options = {"quantizer_kwargs": {"v_patch_nums": range_of(7), "num_phis": 4, "kmeans_init": False}}
        model = {"codebook_size": 16, "use_vgg_and_gan": False, **options}
        trainer = build_trainer(
            tmp_path, quantizer="multiscale_vq", model=model, num_train_steps=steps, image_size=28, save_model_every=1
        )
        trainer.train()
        rule = trainer.model.quantizer.inner.phi_rule
        trainer.close()
        assert rule == ("ticks" if steps == 1 else "proportional")
        config = json.loads((tmp_path / "config.json").read_text())
        config["model"]["quantizer_kwargs"].pop("phi_rule", None)
        (tmp_path / "config.json").write_text(json.dumps(config))


def test_every_option_has_a_case():
    assert CASES.keys() == inspect.signature(MultiScaleVQ).parameters.keys() - {"dim", "codebook_size"}


@pytest.mark.parametrize("option", CASES)
def test_option_changes_something(option):
    CASES[option]()


GROWING = (
    r"^quantizer multiscale_vq: v_patch_nums .* is not a list of growing integers of at least 1; try \[1, 2, 4, 8\]$"
)
MISTAKES = [
    ({"v_patch_nums": []}, GROWING),
    ({"v_patch_nums": [1, 4, 2]}, GROWING),
    ({"v_patch_nums": [0, 4]}, GROWING),
    ({"v_patch_nums": [1, 2.5]}, GROWING),
    ({"v_patch_nums": "1_2_4"}, GROWING),
    ({"num_phis": 4}, r"num_phis 4 is more than the 3 scales of v_patch_nums; use at most 3$"),
    ({"num_phis": 2, "phi_ratio": 0}, r"num_phis is given but phi_ratio 0 leaves the convolutions out"),
    ({"num_phis": 0}, r"num_phis 0 is out of range; expected an integer of at least 1$"),
    ({"phi_ratio": 1.5}, r"phi_ratio 1.5 is out of range; expected a number of at least 0 and at most 1$"),
    ({"beta": -1}, r"beta -1 is out of range"),
    ({"decay": 1.0}, r"decay 1.0 is out of range"),
    ({**LEARNABLE, "decay": 0.9}, r"decay does nothing with learnable_codebook, which learns by gradient; leave one"),
    ({**LEARNABLE, "threshold_ema_dead_code": 2}, r"threshold_ema_dead_code does nothing with learnable_codebook"),
    ({"kmeans_init": False, "kmeans_iters": 3}, r"kmeans_iters does nothing without kmeans_init"),
    ({"patch_nums": [1]}, r"quantizer multiscale_vq has no option 'patch_nums'; nearest: v_patch_nums"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_a_mistake_is_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_a_feature_map_of_another_side_is_named():
    with pytest.raises(UserError, match=r"v_patch_nums \[1, 2, 4\] ends at 4 but the feature map is 5 by 5; its"):
        build()(features_of(side=5))


# --------------------------------------------------------------------------------------------- in a VQGAN


def build_model(**options) -> VQGanVAE:
    """16x16 images to 4x4 features and 21 codes."""
    kwargs = {"v_patch_nums": [1, 2, 4], **NO_START, **options.pop("quantizer_kwargs", {})}
    settings = {"codebook_size": 32, "use_vgg_and_gan": False, "channels": 1, **options}
    return build_vae("multiscale_vq", quantizer_kwargs=kwargs, **settings)


def pixels(batch: int = 3, side: int = 16) -> Tensor:
    return torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(3))


def test_codes_of_a_vqgan_give_back_its_reconstruction(tmp_path):
    model = build_model().eval()
    model.image_size = 16
    model.save_pretrained(tmp_path)
    tokenizer, images = Tokenizer.from_pretrained(tmp_path), pixels()
    with torch.no_grad():
        recon, codes = model(images), model.encode(images)[1]
        torch.testing.assert_close(model.decode_from_ids(codes), recon)
        assert not torch.allclose(model.decode_from_ids((codes + 1) % 32), recon, atol=1e-3)
        reconstructed, again = model.network.reconstruct(images)
    assert torch.equal(reconstructed, recon) and torch.equal(again, codes)
    assert (tokenizer.num_codes, tokenizer.num_levels, tokenizer.network.scales) == (21, 1, SCALES)
    assert torch.equal(tokenizer.encode(images), codes)
    torch.testing.assert_close(tokenizer.decode(codes), recon.clamp(0, 1))


def test_lists_of_scales_and_rows_of_codes_say_the_same():
    model, images = build_model().eval(), pixels()
    tokenizer = Tokenizer(model, 16)
    scales = tokenizer.img_to_idxBl(images)
    assert [tuple(part.shape) for part in scales] == [(3, 1), (3, 4), (3, 16)]
    assert torch.equal(torch.cat(scales, dim=1), tokenizer.encode(images))
    assert torch.equal(tokenizer.idxBl_to_img(scales), tokenizer.decode(tokenizer.encode(images)))
    with torch.no_grad():
        features = model.quantizer.decode_indices(torch.cat(scales[:2], dim=1))
        assert torch.equal(tokenizer.idxBl_to_img(scales[:2]), model.decode(features).clamp(0, 1))
    var_input = tokenizer.idxBl_to_var_input(scales)
    assert var_input.shape == (3, 20, 32) and var_input.dtype == torch.float32
    assert torch.equal(var_input, tokenizer.idxBl_to_var_input(scales[:2]))
    assert torch.equal(var_input[:, :4], tokenizer.idxBl_to_var_input(scales[:1]))


def test_images_that_make_another_feature_map_are_refused():
    message = (
        r"^v_patch_nums \[1, 2, 4\] ends at 4 but image_size 32 makes a feature map of 8 by 8 \(2 \*\* 2 layers\); "
        r"end v_patch_nums at 8, or use image_size 16$"
    )
    with pytest.raises(UserError, match=message):
        build_model().check_image_size(32)
    with pytest.raises(UserError, match=message):
        Tokenizer(build_model(), 32)
    with pytest.raises(UserError, match="ends at 4 but the feature map is 8 by 8"):
        build_model()(pixels(side=32))


def test_a_tokenizer_of_one_scale_has_no_lists_of_scales():
    tokenizer = Tokenizer(build_vae("lfq", use_vgg_and_gan=False), 16)
    calls = (tokenizer.img_to_idxBl, tokenizer.idxBl_to_img, tokenizer.idxBl_to_var_input)
    for call in calls:
        with pytest.raises(UserError, match=r"^this tokenizer codes images at one scale; train one with quantizer"):
            call(pixels())


def digits(count: int) -> Tensor:
    """Return the first images of the package, (count, 1, 28, 28) in [0, 1]."""
    source = DigitsSource()
    return torch.stack([torch.from_numpy(np.array(source.image(index))) for index in range(count)])[:, None] / 255


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """Return a small tokenizer after 150 steps on digits."""
    torch.manual_seed(0)
    kwargs = {"v_patch_nums": [1, 2, 3, 5, 7]}
    model = VQGanVAE(
        dim=16, channels=1, layers=2, quantizer="multiscale_vq", codebook_size=64, quantizer_kwargs=kwargs,
        use_vgg_and_gan=False,
    )  # fmt: skip
    optimizer, images = torch.optim.Adam(model.parameters(), lr=3e-3), digits(1200)
    for step in range(150):
        batch = images[torch.arange(16 * step, 16 * step + 16) % 1000]
        optimizer.zero_grad()
        model(batch, return_loss=True).backward()
        optimizer.step()
    return Tokenizer(model, 28)


def test_reconstructions_and_features_get_better_with_every_scale(trained):
    images = digits(1200)[1000:]
    scales = trained.img_to_idxBl(images)
    quantizer = trained.network.quantizer
    with torch.no_grad():
        target = trained.network.encoder(images)
        totals = [quantizer.decode_indices(torch.cat(scales[:number], dim=1)) for number in range(1, 6)]
    feature_errors = [float((total - target).square().mean()) for total in totals]
    errors = [float((trained.idxBl_to_img(scales[:number]) - images).square().mean()) for number in range(1, 6)]
    assert all(after < before for before, after in zip(feature_errors, feature_errors[1:])), feature_errors
    assert all(after < before for before, after in zip(errors, errors[1:])), errors
    assert errors[-1] < 0.5 * errors[0] and feature_errors[-1] < 0.5 * feature_errors[0]


def test_a_trained_codebook_is_in_use(trained):
    hits = hits_per_scale(trained.encode(digits(1200)[1000:]), trained.network.scales, 64)
    frequency = hits.sum(dim=0) / hits.sum()
    perplexity = float(torch.exp(-torch.special.xlogy(frequency, frequency).sum()))
    assert (hits.sum(dim=0) > 0).float().mean() > 0.9 and perplexity > 25, perplexity


# --------------------------------------------------------------------------------------------- two ranks

RANK_CASES = {
    "learnable": LEARNABLE,
    "ema": {**NO_START, "threshold_ema_dead_code": 0},
    "ema, k-means and dead codes": {"threshold_ema_dead_code": 6},
}
EXACT = ("learnable", "ema")  # nothing random in them


def rank_model(name: str) -> torch.nn.Sequential:
    options = RANK_CASES[name]
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1), build(**options))


def train(model: torch.nn.Module, rank: int | None) -> dict[str, Tensor]:
    """SGD on all features, or on a rank's share with gradients averaged as DDP does; every tensor at the end."""
    for step in range(STEPS):
        features = features_of(batch=8, seed=step)
        features = features if rank is None else features.chunk(WORLD_SIZE)[rank]
        out = model(features)
        (out.quantized.square().mean() + out.aux_loss).backward()
        with torch.no_grad():
            for weight in model.parameters():
                if rank is not None:
                    dist.all_reduce(weight.grad)
                    weight.grad /= WORLD_SIZE
                weight -= 0.1 * weight.grad
                weight.grad = None
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name in RANK_CASES:
        model = rank_model(name)
        torch.manual_seed(100 + rank)
        results[name] = train(model, rank)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_stay_equal_and_do_what_one_process_does(tmp_path):
    torchrun([__file__, str(tmp_path)], processes=WORLD_SIZE)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD_SIZE))
    for name in RANK_CASES:
        assert first[name].keys() == second[name].keys()
        different = [key for key in first[name] if not torch.equal(first[name][key], second[name][key])]
        assert not different, name
    for name in EXACT:
        alone = train(rank_model(name), None)
        for key, expected in alone.items():
            torch.testing.assert_close(first[name][key], expected, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


if __name__ == "__main__":  # a rank
    run_rank(int(os.environ["RANK"]), sys.argv[1])
