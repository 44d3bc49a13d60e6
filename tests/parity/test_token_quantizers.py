"""Quantizers of Open-MAGVIT2, TiTok and MaskGIT-VQGAN: codes, losses and moves of the projects' own code."""

from __future__ import annotations

import pytest
import torch
from fixtures import arguments, largest, tensors, values, weights

from vqdist import UserError
from vqdist.models.averaged import averaged_tensors
from vqdist.models.quantizers import CVQ, GradientVQ, MagvitLFQ, build_quantizer


def test_bits_and_entropies_of_magvit2():
    found, expected = tensors("open_magvit2"), values("open_magvit2")
    features, quantizer = found["out.features"], MagvitLFQ(6, 64)
    out = quantizer(features)
    assert largest(out.quantized, found["out.quantized"]) < 1e-6
    assert torch.equal(out.indices, found["out.indices"].long())
    whole = 0.1 * expected["entropy_aux_loss"] + 0.25 * expected["commitment"]
    assert out.aux_loss.item() == pytest.approx(whole, abs=1e-6)
    entropies = quantizer.entropies(features.movedim(1, -1))
    names = ("per_sample_entropy", "codebook_entropy")
    assert list(map(float, entropies)) == pytest.approx([expected[name] for name in names], abs=1e-6)
    apart = MagvitLFQ(6, entropy_weight=0.0, commitment_weight=1.0)(features)
    assert float(apart.aux_loss) == pytest.approx(expected["commitment"], abs=1e-6)


@pytest.mark.parametrize("bits", [[2, 4], [1, 2, 3], [6]])
def test_factors_of_a_code_are_its_bits_in_turn(bits):
    features = tensors("open_magvit2")["out.features"]
    quantizer = MagvitLFQ(6, factorized_bits=bits).eval()
    out = quantizer(features)
    assert quantizer.codebook_size == 2 ** max(bits) and quantizer.num_levels == len(bits)
    assert out.indices.shape == (2, 8, 12, *([len(bits)] if len(bits) > 1 else []))
    factors = out.indices if len(bits) > 1 else out.indices[..., None]
    whole = sum(factors[..., number] << sum(bits[:number]) for number in range(len(bits)))
    assert torch.equal(whole, tensors("open_magvit2")["out.indices"].long())
    assert torch.equal(quantizer.decode_indices(out.indices), out.quantized)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_size": 65536}, "codebook_size 65536 is not 2 .. 8, .* set 256"),
        ({"factorized_bits": [3, 4]}, r"factorized_bits \[3, 4\] is not possible; .* sum is dim 8"),
        ({"entropy_temperature": 0.0}, "entropy_temperature 0.0 must be above 0"),
    ],
)
def test_mistakes_of_magvit2(options, message):
    with pytest.raises(UserError, match=message):
        build_quantizer("magvit2_lfq", dim=8, **options)


@pytest.mark.parametrize("name", ["titok_stage1", "titok_rgb"])
def test_codebook_of_titok(name):
    found, expected, model = tensors(name), values(name), arguments(name)["vq_model"]
    quantizer = GradientVQ(6, 24, beta=model["commitment_cost"], l2_norm=model["use_l2_norm"])
    quantizer.load_state_dict(weights(name, "quantize."))
    out = quantizer(found["out.features"])
    assert torch.equal(out.indices, found["out.indices"].long())
    assert largest(out.quantized, found["out.quantized"]) < 1e-6
    assert out.aux_loss.item() == pytest.approx(expected["quantizer_loss"], abs=1e-6)


def test_codebook_of_maskgit():
    found, quantizer = tensors("maskgit_vqgan"), GradientVQ(12, 24, codebook_loss="legacy")
    quantizer.load_state_dict(weights("maskgit_vqgan", "quantize."))
    out = quantizer(found["out.features"])
    assert torch.equal(out.indices.flatten(1), found["out.indices"].long())
    assert largest(out.quantized, found["out.quantized"]) < 1e-6
    assert out.aux_loss.item() == pytest.approx(values("maskgit_vqgan")["codebook_loss"], abs=1e-6)


def test_codes_that_move_to_the_features():
    found, expected, given = tensors("cvq"), values("cvq"), weights("cvq")
    quantizer = CVQ(6, 24)
    quantizer.embedding.weight.data.copy_(given["embedding.weight"])
    quantizer.embed_prob.copy_(given["embed_prob"])
    for step in range(3):
        out = quantizer(found[f"in.z_{step}"])
        assert torch.equal(out.indices, found[f"out.indices_{step}"].long())
        assert largest(out.quantized, found[f"out.quantized_{step}"]) < 1e-6
        assert out.aux_loss.item() == pytest.approx(expected[f"loss_{step}"], abs=1e-6)
        assert largest(quantizer.vectors(), found[f"out.codebook_after_{step}"]) < 1e-6
        assert largest(quantizer.embed_prob, found[f"out.embed_prob_after_{step}"]) < 1e-6
    before = quantizer.vectors()
    quantizer.eval()(found["in.z_0"])
    assert torch.equal(before, quantizer.vectors())  # nothing moves in use
    assert averaged_tensors(quantizer).keys() == {"embedding.weight", "moved"}


def test_a_decay_that_cannot_be():
    with pytest.raises(UserError, match="decay 1.0 is not possible"):
        build_quantizer("cvq", dim=4, codebook_size=8, decay=1.0)
