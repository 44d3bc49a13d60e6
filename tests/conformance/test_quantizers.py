"""Every quantizer on one process and on two real ones: equal codebooks, equal gradients, float32, and what it refuses.

Shapes: features (b, 4, h, w) go through a 1x1 convolution to the quantizer's 8 channels.
"""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from launching import torchrun
from torch import nn
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from vqdist import Tokenizer, VQGanVAE
from vqdist.errors import UserError
from vqdist.models.quantizers import (
    DEFAULT_OPTIONS,
    QUANTIZERS,
    LibraryQuantizer,
    build_quantizer,
    entropy,
    float32_arithmetic,
)

WORLD_SIZE = 2
STEPS = 20

DEAD = {"threshold_ema_dead_code": 4}  # of 32 codes for 64 vectors a batch: many die
NO_START = {"kmeans_init": False}
EUCLIDEAN = {"use_cosine_sim": False}
LEARNABLE = {"learnable_codebook": True, "ema_update": False, **EUCLIDEAN, "orthogonal_reg_weight": 0.1}

# name, codebook size, options, whether dead codes must have been replaced
CASES = {
    "vq": ("vq", 32, {}, False),
    "vq dead codes, rotation, cosine": ("vq", 32, DEAD, True),
    "vq dead codes, no rotation, cosine": ("vq", 32, {**DEAD, "rotation_trick": False}, True),
    "vq dead codes, rotation, euclidean": ("vq", 32, {**DEAD, **EUCLIDEAN}, True),
    "vq dead codes, no rotation, euclidean": ("vq", 32, {**DEAD, **EUCLIDEAN, "rotation_trick": False}, True),
    "vq more codes than vectors": ("vq", 100, {**DEAD, **EUCLIDEAN}, True),
    "vq no start": ("vq", 32, NO_START, False),
    "vq learnable": ("vq", 32, LEARNABLE, False),
    "vq stochastic": ("vq", 32, {"stochastic_sample_codes": True, "sample_codebook_temp": 0.1}, False),
    "lfq": ("lfq", 16, {}, False),
    "lfq two codebooks": ("lfq", 16, {"num_codebooks": 2, "commitment_loss_weight": 0.1}, False),
    "fsq": ("fsq", 256, {}, False),
    "fsq two codebooks": ("fsq", None, {"levels": [5, 4], "num_codebooks": 2}, False),
    "simvq": ("simvq", 32, {}, False),
    "simvq no rotation": ("simvq", 32, {"rotation_trick": False, "frozen_codebook_dim": 4}, False),
    "residual_vq": ("residual_vq", 32, DEAD, True),
    "residual_vq dropout": ("residual_vq", 32, {**DEAD, "num_quantizers": 3, "quantize_dropout": True}, True),
    "residual_vq shared": ("residual_vq", 32, {**DEAD, "num_quantizers": 2, "shared_codebook": True}, True),
    "residual_vq implicit": ("residual_vq", 8, {"num_quantizers": 2, "implicit_neural_codebook": True}, False),
    "gradient_vq": ("gradient_vq", 32, {"codebook_loss": "legacy"}, False),
    "gradient_vq l2, entropy": ("gradient_vq", 32, {"l2_norm": True, "entropy_weight": 0.1}, False),
    "ibq": ("ibq", 32, {}, False),
    "magvit2_lfq": ("magvit2_lfq", 256, {}, False),
    "magvit2_lfq factors": ("magvit2_lfq", None, {"factorized_bits": [3, 5]}, False),
    "cvq": ("cvq", 32, {"decay": 0.9}, False),
    "cvq l2": ("cvq", 100, {"l2_norm": True}, False),
    "gumbel": ("gumbel", 32, {}, False),
    "gumbel soft": ("gumbel", 32, {"temperature": 0.5, "straight_through": False}, False),
    "residual_vq beam": ("residual_vq", 32, {**NO_START, "num_quantizers": 2, "beam_size": 2}, False),
}
# Nothing random in them: two ranks must do what one process does with both batches. Steps for which the comparison
# holds to 1e-6: lfq's entropy, at an inverse temperature of 100, amplifies rounding from step to step.
EXACT = {
    "vq no start": STEPS,
    "lfq": 2,
    "lfq two codebooks": 2,
    "fsq": STEPS,
    "simvq": STEPS,
    "gradient_vq": STEPS,
    "gradient_vq l2, entropy": 2,
    "ibq": 2,
    "magvit2_lfq": 2,
    "magvit2_lfq factors": 2,
    "cvq": STEPS,
    "cvq l2": STEPS,
}


def build_model(case):
    name, codebook_size, options, _ = CASES[case]
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 1), build_quantizer(name, dim=8, codebook_size=codebook_size, **options))


def batches(rank=None):
    """Return STEPS x (4 * WORLD_SIZE, 4, 4, 4), or a rank's share of each."""
    generator = torch.Generator().manual_seed(7)
    data = [torch.randn(4 * WORLD_SIZE, 4, 4, 4, generator=generator) for _ in range(STEPS)]
    return data if rank is None else [batch.chunk(WORLD_SIZE)[rank] for batch in data]


def average(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def train(model, data):
    """SGD with gradients averaged over ranks, as DDP does; returns the averaged losses and the first gradients."""
    aux_losses, first_grads = [], None
    for features in data:
        out = model(features)
        (out.quantized.square().mean() + out.aux_loss).backward()
        aux_losses.append(out.aux_loss.detach().clone())
        average(aux_losses[-1])
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            average(parameter.grad)
        first_grads = first_grads or [parameter.grad.clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return torch.stack(aux_losses), first_grads


def tensors_of(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def run_rank(rank, folder):
    torch.set_num_threads(1)
    replaced, replace = [], Codebook.replace
    Codebook.replace = lambda self, *args, **kwargs: (replaced.append(True), replace(self, *args, **kwargs))[1]
    VectorQuantize(dim=4, codebook_size=4)  # makes the library remember that nothing is distributed
    early = {case: build_model(case) for case in list(CASES)[::2]}
    dist.init_process_group("gloo")
    results = {}
    for case in CASES:
        model = early.get(case) or build_model(case)
        torch.manual_seed(100 + rank)
        replaced.clear()
        train(model, batches(rank))
        results[case] = {"state": tensors_of(model), "replaced": len(replaced)}
        if rank == 0:  # alone: a collective would hang
            out = model.eval()(batches(rank)[0])
            results[case]["decoded"] = (out.quantized - model[1].decode_indices(out.indices)).abs().max()
    for case, steps in EXACT.items():
        model = build_model(case)
        aux_losses, first_grads = train(model, batches(rank)[:steps])
        results[case]["exact"] = {"aux": aux_losses, "grads": first_grads, "state": tensors_of(model)}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what each rank ended with, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun([__file__, str(folder)], processes=WORLD_SIZE)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_ranks_stay_equal_on_different_data(ranks, case):
    first, second = (results[case] for results in ranks)
    assert all(torch.isfinite(tensor).all() for tensor in first["state"].values())
    different = [name for name in first["state"] if not torch.equal(first["state"][name], second["state"][name])]
    assert not different
    before = tensors_of(build_model(case))
    assert any(not torch.equal(before[name], tensor) for name, tensor in first["state"].items())
    assert first["replaced"] == second["replaced"]
    assert first["decoded"] <= 1e-6
    if CASES[case][3]:
        assert first["replaced"] > 0
    initialised = [tensor for name, tensor in first["state"].items() if name.endswith("initted")]
    assert all(initialised)


@pytest.mark.distributed
@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_equal_one_process_on_the_whole_batch(ranks, case):
    model = build_model(case)
    aux_losses, first_grads = train(model, batches()[: EXACT[case]])
    found = ranks[0][case]["exact"]
    assert torch.allclose(found["aux"], aux_losses, rtol=0, atol=1e-6)
    for ours, expected in zip(found["grads"], first_grads):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-6)
    for name, expected in tensors_of(model).items():
        assert torch.allclose(found["state"][name], expected, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_forward_and_decoding_agree(case):
    model = build_model(case)
    train(model, batches())
    features = batches()[0].requires_grad_()
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    out = model.eval()(features)
    quantizer = model[1]
    levels = () if quantizer.num_levels == 1 else (quantizer.num_levels,)
    assert out.quantized.shape == (8, 8, 4, 4) and out.indices.shape == (8, 4, 4, *levels)
    assert out.indices.dtype == torch.int64 and 0 <= out.indices.min() <= out.indices.max() < quantizer.codebook_size
    assert out.aux_loss.item() == 0 and out.aux_loss.ndim == 0 and not out.aux_loss.requires_grad
    assert (quantizer.decode_indices(out.indices) - out.quantized).abs().max() <= 1e-6
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize("case", CASES)
def test_training_gives_a_gradient_and_a_float32_loss(case):
    quantizer = build_model(case)[1]
    features = torch.randn(4, 8, 4, 4, requires_grad=True)
    out = quantizer(features)
    (out.quantized.square().sum() + out.aux_loss).backward()
    assert features.grad.abs().sum() > 0
    assert out.aux_loss.dtype == torch.float32 and out.aux_loss.ndim == 0 and out.indices.dtype == torch.int64


@pytest.mark.parametrize("case", [case for case in CASES if case != "vq stochastic"])
def test_arithmetic_is_float32_under_bf16(case):
    results = []
    for autocast, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        quantizer = build_model(case)[1]
        torch.manual_seed(1)
        for features in batches()[:3]:
            features = torch.cat([features, features.roll(1, 0)], 1).bfloat16().to(dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = quantizer(features)
            assert out.quantized.dtype == dtype
        results.append((out, dict(quantizer.named_buffers())))
    (expected, buffers), *others = results
    for out, other_buffers in others:
        assert torch.equal(out.indices, expected.indices)
        assert torch.equal(out.aux_loss, expected.aux_loss)
        assert torch.equal(out.quantized, expected.quantized.to(out.quantized.dtype))
        assert all(torch.equal(buffers[name], buffer) for name, buffer in other_buffers.items())
        assert not any(buffer.dtype == torch.bfloat16 for buffer in other_buffers.values())


def test_a_model_in_bfloat16_keeps_its_codebook():
    model = build_model("residual_vq").bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert not any(tensor.dtype == torch.bfloat16 for tensor in tensors_of(model[1]).values())
    assert model(batches()[0].bfloat16()).quantized.dtype == torch.bfloat16


def test_matrix_products_are_not_rounded_within_and_as_before_without():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with float32_arithmetic(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["vq", "residual_vq"])
def test_k_means_start_waits_for_training(name):
    quantizer = build_quantizer(name, dim=8, codebook_size=16).eval()
    features = torch.randn(2, 8, 4, 4)
    for use in (lambda: quantizer(features), lambda: quantizer.decode_indices(torch.zeros(2, 4, 4).long())):
        with pytest.raises(UserError, match="no codes yet: .*train at least one step.*kmeans_init=False"):
            use()
    quantizer.train()(features)
    quantizer.eval()(features)
    fresh = build_quantizer(name, dim=8, codebook_size=16).eval()
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(features).indices, quantizer(features).indices)


def test_defaults_are_the_ancestors():
    vq = build_quantizer("vq", dim=8, codebook_size=16).inner
    assert vq.project_in.out_features == 256 and vq._codebook.decay == 0.8 and vq.commitment_weight == 1
    assert vq.use_cosine_sim and not vq._codebook.initted
    assert build_quantizer("lfq", dim=8, codebook_size=16).inner.diversity_gamma == 4
    level = build_quantizer("residual_vq", dim=8, codebook_size=16).inner.layers[0]
    assert level.codebook_size == 16 and not level.use_cosine_sim and not level.rotation_trick
    of_library = {name for name, cls in QUANTIZERS.items() if issubclass(cls, LibraryQuantizer)}
    assert set(DEFAULT_OPTIONS) == of_library < set(QUANTIZERS)


@pytest.mark.parametrize("case", ["ibq", "gradient_vq l2, entropy"])
def test_chunks_of_positions_give_the_same_losses_and_gradients(case, monkeypatch):
    """Products with all codes are made of some positions at a time, and made anew in the backward pass."""
    results, sizes = [], []
    checkpointed = entropy.checkpoint
    monkeypatch.setattr(
        entropy, "checkpoint", lambda *given, **options: sizes.append(1) or checkpointed(*given, **options)
    )
    for chunk in (entropy.CHUNK, 5 * 32):  # 5 of 128 positions
        monkeypatch.setattr(entropy, "CHUNK", chunk)
        quantizer, features = build_model(case)[1], torch.cat([batches()[0]] * 2, dim=1).requires_grad_()
        out = quantizer(features)
        (out.quantized.sin().sum() + out.aux_loss).backward()
        results.append((out.indices, out.quantized, out.aux_loss, features.grad, quantizer.embedding.weight.grad))
    assert len(sizes) in (26, 2 * 26)  # for the entropies, and for ibq also for the codes
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)
    quantizer.eval()
    with torch.no_grad():
        assert torch.equal(quantizer(features).indices, results[0][0])


def test_what_no_tensor_says_is_in_the_fingerprint():
    def tokenizer(**options) -> Tokenizer:
        torch.manual_seed(0)
        quantizer = {"class_path": "gradient_vq", "init_args": {"codebook_size": 8, **options}}
        model = VQGanVAE(dim=16, layers=1, quantizer=quantizer, use_vgg_and_gan=False)
        torch.nn.init.ones_(model.quantizer.embedding.weight)
        return Tokenizer(model, 8)

    prints = [tokenizer(**options).fingerprint() for options in ({}, {"l2_norm": True}, {"l2_norm_output": True})]
    assert len(set(prints)) == 3 and tokenizer(beta=1.0).fingerprint() == prints[0]


def test_fsq_levels_by_table_and_by_hand():
    sizes = {
        size: build_quantizer("fsq", dim=8, codebook_size=size).codebook_size for size in (2**8, 2**10, 2**12, 2**14)
    }
    assert sizes == {2**8: 240, 2**10: 1000, 2**12: 4375, 2**14: 15360}
    assert build_quantizer("fsq", dim=8, codebook_size=2**16).codebook_size == 64000
    assert build_quantizer("fsq", dim=8, levels=[7, 5]).codebook_size == 35
    assert build_quantizer("fsq", dim=8, codebook_size=35, levels=(7, 5)).codebook_size == 35


def test_options_reach_the_library():
    assert build_quantizer("vq", dim=8, codebook_size=16, decay=0.5).inner._codebook.decay == 0.5
    assert build_quantizer("lfq", dim=8, codebook_size=16, entropy_loss_weight=0.3).inner.entropy_loss_weight == 0.3
    assert build_quantizer("fsq", dim=8, codebook_size=256, bound_hard_clamp=True).inner.bound_hard_clamp
    assert build_quantizer("simvq", dim=8, codebook_size=16, commitment_weight=0.5).inner.commitment_weight == 0.5
    assert build_quantizer("residual_vq", dim=8, codebook_size=16, decay=0.5).inner.layers[3]._codebook.decay == 0.5


MISTAKES = [
    ("vqq", 16, {}, "there is no quantizer 'vqq'; nearest: .*vq.*there are vq, lfq, fsq, simvq, residual_vq"),
    ("vq", 16, {"decai": 0.9}, "no option 'decai'; nearest: decay"),
    ("lfq", 16, {"decay": 0.9}, "quantizer lfq has no option 'decay'"),
    ("vq", None, {}, "codebook_size None is not an integer of at least 2"),
    ("vq", 16.0, {}, "codebook_size 16.0 is not an integer"),
    ("vq", 16, {"sync_codebook": True}, "does not take sync_codebook: ranks would drift apart"),
    ("vq", 16, {"sync_kmeans": False}, "does not take sync_kmeans: ranks would drift apart"),
    ("vq", 16, {"affine_param": True}, "does not take affine_param: .*changes state during evaluation"),
    ("vq", 16, {"heads": 2}, "does not take heads: .*use residual_vq"),
    ("vq", 16, {"accept_image_fmap": True}, "does not take accept_image_fmap: the layout is fixed"),
    ("residual_vq", 16, {"sync_codebook": False}, "does not take sync_codebook"),
    ("residual_vq", 16, {"diveq": True}, "does not take diveq"),
    ("fsq", 256, {"scale": 2.0}, "does not take scale: the library reads it nowhere"),
    ("vq", 16, {"decay": 1.0}, "decay 1.0 is out of range"),
    ("vq", 16, {"decay": "0.9"}, "decay '0.9' is out of range; expected a number"),
    ("vq", 16, {"commitment_weight": -1}, "commitment_weight -1 is out of range; expected a number of at least 0"),
    ("vq", 16, {"codebook_dim": 2.5}, "codebook_dim 2.5 is out of range; expected an integer of at least 1"),
    ("vq", 16, {"learnable_codebook": True}, "both move the codebook; set ema_update=False and use_cosine_sim=False"),
    ("vq", 16, {"learnable_codebook": True, "ema_update": False}, "set use_cosine_sim=False"),
    (
        "vq",
        16,
        {"orthogonal_reg_weight": 0.1},
        "EMA would overwrite; set learnable_codebook=True and ema_update=False",
    ),
    ("vq", 16, {"straight_through": True}, "straight_through and rotation_trick are both on.*rotation_trick=False"),
    (
        "vq",
        16,
        {"directional_reparam": True, "rotation_trick": False, "use_cosine_sim": False},
        "directional_reparam needs dead codes replaced; set threshold_ema_dead_code",
    ),
    ("vq", 16, {"kmeans_init": False, "kmeans_iters": 5}, "kmeans_iters does nothing without kmeans_init"),
    ("vq", 16, {"sample_codebook_temp": 0.5}, "sample_codebook_temp does nothing without stochastic_sample_codes"),
    (
        "vq",
        16,
        {"codebook_dim": 8, "layernorm_after_project_in": True},
        "layernorm_after_project_in has no projection",
    ),
    ("vq", 16, {"sync_update_v": 0.5}, "sync_update_v does nothing without learnable_codebook"),
    ("lfq", 1000, {}, "codebook_size 1000 is no power of 2.*try 512 or 1024"),
    ("lfq", 16, {"has_projections": False}, "features as wide as the code, 4, but dim is 8"),
    ("lfq", 256, {"projection_has_bias": True}, "projection_has_bias does nothing: dim 8"),
    ("lfq", 16, {"soft_clamp_input_value": 0.5}, "soft_clamp_input_value 0.5 is below codebook_scale 1.0"),
    ("lfq", 16, {"frac_per_sample_entropy": 0}, "frac_per_sample_entropy 0 is out of range"),
    ("lfq", 16, {"entropy_loss_offset": 1.0}, "does nothing without experimental_softplus_entropy_loss"),
    ("fsq", 1000, {}, r"codebook_size 1000 has no levels.*256 \(levels \[8, 6, 5\]\).*65536 .*or give levels"),
    (
        "fsq",
        256,
        {"levels": [8, 5]},
        r"levels \[8, 5\] make 40 codes but codebook_size is 256; set codebook_size to 40",
    ),
    ("fsq", None, {"levels": [2, 5]}, "integers of at least 3 .2 needs preserve_symmetry=True"),
    ("fsq", None, {"levels": "8,5"}, "levels 8,5 is not a list of integers"),
    ("fsq", 256, {"noise_dropout": 0.5}, "noise_dropout does nothing without preserve_symmetry"),
    ("residual_vq", 16, {"num_quantizers": 0}, "num_quantizers 0 is out of range"),
    ("residual_vq", 16, {"num_quantizers": 1, "quantize_dropout": True}, "quantize_dropout has no level to drop"),
    ("residual_vq", 16, {"quantize_dropout_cutoff_index": 1}, "does nothing without quantize_dropout"),
    ("residual_vq", 16, {"beam_size": 2}, "beam_size does not work with kmeans_init"),
    (
        "residual_vq",
        16,
        {"implicit_neural_codebook": True, "ema_update": True},
        "contradicts implicit_neural_codebook",
    ),
]


@pytest.mark.parametrize("name, codebook_size, options, message", MISTAKES)
def test_mistakes_are_said_in_one_line(name, codebook_size, options, message):
    with pytest.raises(UserError, match=message) as error:
        build_quantizer(name, dim=8, codebook_size=codebook_size, **options)
    assert "\n" not in str(error.value)


def test_features_of_another_width_are_named():
    with pytest.raises(UserError, match=r"quantizer fsq got features of shape \(2, 4, 4, 4\); expected \(batch, 8,"):
        build_quantizer("fsq", dim=8, codebook_size=256)(torch.zeros(2, 4, 4, 4))


def test_a_library_without_the_repaired_function_is_named(monkeypatch):
    from vector_quantize_pytorch import lookup_free_quantization

    monkeypatch.delattr(lookup_free_quantization, "maybe_distributed_mean")
    with pytest.raises(UserError, match="no lookup_free_quantization.maybe_distributed_mean.*pip install"):
        build_quantizer("lfq", dim=8, codebook_size=16)


def test_what_only_the_library_refuses_becomes_a_user_error(monkeypatch):
    monkeypatch.setattr(QUANTIZERS["vq"], "check_options", lambda *args: None)
    with pytest.raises(UserError, match="vq does not work with .*learnable_codebook=True: cosine sim distance"):
        build_quantizer("vq", dim=8, codebook_size=16, learnable_codebook=True)


if __name__ == "__main__":  # a rank
    run_rank(int(os.environ["RANK"]), sys.argv[1])
