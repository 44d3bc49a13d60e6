"""The discrete VAE: its arguments, shapes, losses against their formulas, codes and back, files and messages."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import Cases
from einops import rearrange
from ema_pytorch import EMA
from safetensors.torch import load_file
from scenarios import build_dvae
from torch import Tensor, nn
from varied_codes import vary_codes

from vqdist import DiscreteVAE, UserError, sampling
from vqdist.models.dvae import ResBlock

# how codes are drawn
DRAWS = {
    "soft": {},
    "straight_through": {"straight_through": True},
    "reinmax": {"straight_through": True, "reinmax": True},
}
every_draw = pytest.mark.parametrize("draw", DRAWS)


def build(**options) -> DiscreteVAE:
    """Return a small model whose codes vary, equal on every call."""
    return vary_codes(build_dvae(**options))


def pixels(batch: int = 2, channels: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


def noise_for(model: DiscreteVAE, batch: int = 2) -> Tensor:
    return sampling.gumbel_noise((batch, *model.noise_shape(16)), generator=torch.Generator().manual_seed(4))


def run(model: DiscreteVAE, image: Tensor | None = None, **options):
    """`forward` with noise that is the same on every call."""
    image = pixels(channels=model.channels) if image is None else image
    return model(image, noise=noise_for(model, len(image)), **options)


def with_and_without(**options) -> tuple[DiscreteVAE, DiscreteVAE]:
    """Two models, one with these options."""
    return build(), build(**options)


# --------------------------------------------------------------------------------------------- the arguments

model_case = MODEL_CASES = Cases("model_")


@model_case
def model_image_size():
    models = [build(image_size=size) for size in (16, 32)]
    assert [(model.image_size, model.num_codes) for model in models] == [(16, 16), (32, 64)]


@model_case
def model_num_tokens():
    for number in (16, 64):
        model = build(num_tokens=number)
        assert model.codebook_size == model.logits(pixels()).shape[-1] == len(model.codebook.weight) == number


@model_case
def model_codebook_dim():
    assert [build(codebook_dim=dim).codebook.weight.shape[1] for dim in (4, 8)] == [4, 8]


@model_case
def model_num_layers():
    for layers in (1, 2, 3):
        model = build(num_layers=layers)
        assert model.tokenize(pixels()).shape[1:] == (16 >> layers, 16 >> layers)
        assert (model.stride, model.num_codes) == (2**layers, (16 >> layers) ** 2)
        assert run(model).shape == pixels().shape


@model_case
def model_num_resnet_blocks():
    for number in (0, 1, 2):
        model = build(num_resnet_blocks=number)
        for part in (model.encoder, model.decoder):
            assert sum(isinstance(module, ResBlock) for module in part) == number


@model_case
def model_hidden_dim():
    for dim in (8, 24):
        model = build(hidden_dim=dim)
        assert model.encoder[-1].in_channels == model.decoder[-1].in_channels == dim


@model_case
def model_channels():
    assert [run(build(channels=c)).shape[1] for c in (1, 3, 4)] == [1, 3, 4]


@model_case
def model_smooth_l1_loss():
    l2, smooth = with_and_without(smooth_l1_loss=True)
    recon, target = run(l2), l2.norm(pixels())
    assert torch.allclose(run(l2, return_loss=True), (recon - target).square().mean())
    assert torch.allclose(run(smooth, return_loss=True), F.smooth_l1_loss(recon, target))
    assert run(l2, return_loss=True) > run(smooth, return_loss=True)


@model_case
def model_temperature():
    default, cold = with_and_without(temperature=0.1)
    assert torch.equal(run(cold), run(default, temp=0.1)) and torch.equal(run(default), run(cold, temp=0.9))
    assert not torch.allclose(run(cold), run(default))


@model_case
def model_straight_through():
    soft, hard = with_and_without(straight_through=True)
    logits = soft.logits(pixels())
    chosen = soft.codebook((logits + noise_for(soft)).argmax(dim=-1))
    assert torch.allclose(hard.draw(logits, noise=noise_for(soft)), chosen)
    assert not torch.allclose(soft.draw(logits, noise=noise_for(soft)), chosen, atol=0.1)


@model_case
def model_reinmax():
    plain, second_order = (build(straight_through=True, reinmax=reinmax) for reinmax in (False, True))
    assert torch.equal(run(plain), run(second_order))
    for model in (plain, second_order):
        run(model, return_loss=True).backward()
    gradients = [model.encoder[-1].weight.grad for model in (plain, second_order)]
    assert not torch.allclose(*gradients, rtol=0.1)
    assert torch.equal(plain.decoder[-1].weight.grad, second_order.decoder[-1].weight.grad)


@model_case
def model_kl_div_loss_weight():
    losses = [run(build(kl_div_loss_weight=weight), return_loss=True) for weight in (0.0, 0.5, 1.0)]
    assert losses[0] < losses[1] < losses[2]
    assert torch.allclose(losses[1] - losses[0], losses[2] - losses[1])


@model_case
def model_kl_reduction():
    means, sums = [], []
    for batch in (2, 4):
        image = pixels(2).repeat(batch // 2, 1, 1, 1)
        for reduction, kls in (("mean", means), ("dalle", sums)):
            model = build(kl_reduction=reduction)
            kls.append(model.kl_loss(model(image, return_logits=True)).item())
    assert means[0] == pytest.approx(means[1])
    assert sums == pytest.approx([32 * means[0], 64 * means[0]])  # 16 positions of 2 and of 4 images


@model_case
def model_normalization():
    other = build(normalization=((0.1, 0.2, 0.3), (1.0, 2.0, 4.0)))
    shades = torch.tensor([0.5, 0.4, 0.7]).view(1, 3, 1, 1)
    assert other.norm(shades).flatten().tolist() == pytest.approx([0.4, 0.1, 0.1])
    assert torch.equal(build(normalization=None).norm(pixels()), pixels())
    assert torch.allclose(build().norm(pixels()), 2 * pixels() - 1)


ARGUMENTS = inspect.signature(DiscreteVAE.__init__).parameters.keys() - {"self"}


def test_every_argument_has_a_case():
    assert MODEL_CASES.keys() == ARGUMENTS


@pytest.mark.parametrize("argument", MODEL_CASES)
def test_argument_has_its_effect(argument):
    MODEL_CASES[argument]()


@pytest.mark.parametrize("documented", [DiscreteVAE, DiscreteVAE.forward], ids=["model", "forward"])
def test_every_argument_says_what_it_is(documented):
    function = documented.__init__ if inspect.isclass(documented) else documented
    for name in inspect.signature(function).parameters.keys() - {"self"}:
        assert f"\n    {name}: " in inspect.getdoc(documented), name


def test_the_defaults_are_those_of_dalle():
    defaults = {n: p.default for n, p in inspect.signature(DiscreteVAE.__init__).parameters.items() if n != "self"}
    assert defaults == {
        "image_size": 256,
        "num_tokens": 512,
        "codebook_dim": 512,
        "num_layers": 3,
        "num_resnet_blocks": 0,
        "hidden_dim": 64,
        "channels": 3,
        "smooth_l1_loss": False,
        "temperature": 0.9,
        "straight_through": False,
        "reinmax": False,
        "kl_div_loss_weight": 0.0,
        "kl_reduction": "mean",
        "normalization": ((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0)),
    }


# --------------------------------------------------------------------------------------------- networks and pixels


def test_the_networks_are_the_ones_that_are_described():
    model = build(num_layers=2, num_resnet_blocks=1, hidden_dim=16, codebook_dim=8, num_tokens=32)
    block = [(16, 16, 3, 3), (16, 16, 3, 3), (16, 16, 1, 1)]
    encoder = [tuple(m.weight.shape) for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert encoder == [(16, 3, 4, 4), (16, 16, 4, 4), *block, (32, 16, 1, 1)]
    decoder = [tuple(m.weight.shape) for m in model.decoder.modules() if hasattr(m, "weight")]
    assert decoder == [(16, 8, 1, 1), *block, (16, 16, 4, 4), (16, 16, 4, 4), (3, 16, 1, 1)]
    without = build(num_layers=2, num_resnet_blocks=0, hidden_dim=16, codebook_dim=8)
    decoder = [tuple(m.weight.shape) for m in without.decoder.modules() if hasattr(m, "weight")]
    assert decoder == [(8, 16, 4, 4), (16, 16, 4, 4), (3, 16, 1, 1)]


def test_a_residual_block_adds_its_input():
    block, x = ResBlock(4), torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    first, _, second, _, last = block.net
    assert torch.allclose(block(x), x + last(second(first(x).relu()).relu()), atol=1e-6)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("blocks", [0, 2])
def test_logits_are_those_of_the_plain_convolutions(blocks):
    model = build(num_resnet_blocks=blocks)
    image = pixels(width=24)
    plain = nn.Sequential(*model.encoder)(2 * image - 1)
    assert torch.allclose(model.logits(image), rearrange(plain, "b v h w -> b h w v"), atol=1e-6)
    assert torch.allclose(model(image, return_logits=True), plain, atol=1e-6)


@every_draw
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shapes(channels, draw):
    model, image = build(channels=channels, **DRAWS[draw]), pixels(channels=channels, height=16, width=24)
    assert model.logits(image).shape == (2, 4, 6, 32)
    assert model(image).shape == image.shape
    codes = model.get_codebook_indices(image)
    assert codes.shape == (2, 24) and codes.dtype == torch.int64
    assert model.tokenize(image).shape == (2, 4, 6)
    assert model.detokenize(model.tokenize(image)).shape == image.shape
    assert model.decode(model.get_codebook_indices(pixels(channels=channels))).shape == (2, channels, 16, 16)
    assert model.noise_shape(16) == model.logits(pixels(channels=channels)).shape[1:]


NORMALIZATIONS = [((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0)), ((0.4, 0.3, 0.2, 0.1), (0.3, 2.0, 0.1, 0.7)), None]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_norm_and_denorm_are_inverse(channels, normalization):
    model = build(channels=channels, normalization=normalization)
    image = pixels(channels=channels)
    assert torch.allclose(model.denorm(model.norm(image)), image, atol=1e-6)
    assert torch.allclose(model.norm(model.denorm(image)), image, atol=1e-6)
    for channel in range(channels if normalization else 0):
        mean, std = normalization[0][channel], normalization[1][channel]
        assert torch.allclose(model.norm(image)[:, channel], (image[:, channel] - mean) / std, atol=1e-6)


def test_alpha_is_left_as_it_is():
    image = pixels(channels=4)
    normed = build(channels=4).norm(image)
    assert torch.equal(normed[:, 3], image[:, 3])
    assert torch.allclose(normed[:, :3], 2 * image[:, :3] - 1, atol=1e-6)


def test_the_normalization_is_no_part_of_the_weights():
    names = {name.partition(".")[0] for name in build().state_dict()}
    assert names == {"codebook", "encoder", "decoder"}


# --------------------------------------------------------------------------------------------- what forward gives


def weights_by_hand(logits: Tensor, noise: Tensor, temperature: float, draw: str) -> Tensor:
    """Return the value of the draw, (b, h', w', v)."""
    if draw == "soft":
        return torch.exp((logits + noise) / temperature) / torch.exp((logits + noise) / temperature).sum(-1, True)
    return F.one_hot((logits + noise).argmax(-1), logits.shape[-1]).float()


@every_draw
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_decoder_gets_the_mixture_of_codes_that_the_draw_weighs(draw, temperature):
    model = build(**DRAWS[draw])
    weights = weights_by_hand(model.logits(pixels()), noise_for(model), temperature, draw)
    mixture = torch.einsum("bhwv,vd->bdhw", weights, model.codebook.weight)
    assert torch.allclose(run(model, temp=temperature), model.decoder(mixture), atol=1e-6)


@every_draw
@pytest.mark.parametrize("smooth_l1", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "dalle"])
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_loss_is_its_formula(draw, smooth_l1, reduction, weight):
    options = {"smooth_l1_loss": smooth_l1, "kl_reduction": reduction, "kl_div_loss_weight": weight}
    model = build(**options, **DRAWS[draw])
    difference = (run(model) - (2 * pixels() - 1)).abs()
    square = difference.square()
    reconstruction = torch.where(difference < 1, square / 2, difference - 0.5) if smooth_l1 else square
    q = model.logits(pixels()).softmax(dim=-1)
    kl = (q * torch.log(q * 32)).sum(dim=-1)
    expected = reconstruction.mean() + weight * (kl.mean() if reduction == "mean" else kl.sum())
    loss, recon = run(model, return_loss=True, return_recons=True)
    assert loss.shape == () and torch.allclose(loss, expected, rtol=1e-5)
    assert torch.equal(loss, run(model, return_loss=True)) and torch.equal(recon, run(model))


@every_draw
def test_logits_come_alone_or_with_the_reconstruction(draw):
    model = build(**DRAWS[draw])
    logits = run(model, return_logits=True)
    assert logits.shape == (2, 32, 4, 4)
    recon, same = run(model, return_logits=True, return_recons=True)
    assert torch.equal(same, logits) and torch.equal(recon, run(model))


def test_logits_alone_draw_nothing():
    model = build()
    state = torch.get_rng_state()
    model(pixels(), return_logits=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_that_is_not_given_is_drawn_anew_from_the_global_generator():
    model = build()
    torch.manual_seed(1)
    recons = [model(pixels()) for _ in range(2)]
    assert not torch.equal(*recons)
    torch.manual_seed(1)
    noise = sampling.gumbel_noise((2, 4, 4, 32))
    assert torch.equal(model(pixels(), noise=noise), recons[0])
    torch.manual_seed(1)
    assert torch.equal(model(pixels()), recons[0])


def test_an_image_is_reconstructed_alike_alone_and_in_a_batch():
    model = build()
    noise = noise_for(model, 3)
    whole = model(pixels(3), noise=noise)
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.allclose(model(pixels(3)[one], noise=noise[one]), whole[one], atol=1e-6)


@every_draw
def test_every_weight_learns(draw):
    model = build(kl_div_loss_weight=0.1, **DRAWS[draw])
    run(model, return_loss=True).backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.abs().sum() > 0), name


def test_codes_that_were_not_drawn_learn_from_soft_draws_only():
    for draw, options in DRAWS.items():
        model = build(**options)
        run(model, return_loss=True).backward()
        drawn = (model.logits(pixels()) + noise_for(model)).argmax(-1).unique()
        learning = model.codebook.weight.grad.abs().sum(dim=1) > 0
        assert bool(learning[drawn].all()) and int(learning.sum()) == (32 if draw == "soft" else len(drawn))
        assert len(drawn) < 32


def test_the_gradient_of_the_loss_is_that_of_its_value():
    sizes = {"num_tokens": 5, "codebook_dim": 3, "hidden_dim": 4, "num_layers": 1, "image_size": 4}
    model = build(kl_div_loss_weight=0.3, **sizes).double()
    image = pixels(1, height=4, width=4).double()
    noise = sampling.gumbel_noise((1, 2, 2, 5), generator=torch.Generator().manual_seed(4))
    names = ["codebook.weight", "encoder.0.0.weight", "encoder.2.weight", "decoder.0.weight"]

    def loss(*weights: Tensor) -> Tensor:
        replaced = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(model, replaced, (image,), {"noise": noise, "return_loss": True})

    assert torch.autograd.gradcheck(loss, [dict(model.named_parameters())[name] for name in names], fast_mode=True)


@every_draw
def test_the_loss_falls(draw):
    model = build(kl_div_loss_weight=0.01, **DRAWS[draw])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = model(pixels(4) * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1), return_loss=True, temp=0.7)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --------------------------------------------------------------------------------------------- codes and back


def test_codes_are_the_likeliest_row_by_row():
    model, image = build(), pixels(width=24)
    logits = model(image, return_logits=True)
    codes = model.get_codebook_indices(image)
    assert not codes.requires_grad and len(codes.unique()) > 16
    for row in range(4):
        for column in range(6):
            assert torch.equal(codes[:, 6 * row + column], logits[:, :, row, column].argmax(dim=1))


def test_codes_give_back_the_reconstruction():
    """Without noise, a draw that is hard takes the likeliest codes."""
    model = build(straight_through=True)
    codes = model.get_codebook_indices(pixels())
    recon = model(pixels(), noise=torch.zeros(2, 4, 4, 32))
    assert torch.allclose(model.decode(codes), recon, atol=1e-6)
    assert torch.allclose(model.detokenize(model.tokenize(pixels())), model.denorm(recon), atol=1e-6)
    from_codes, ids = model.reconstruct(pixels())
    assert torch.allclose(from_codes, model.denorm(recon), atol=1e-6) and torch.equal(ids.flatten(1), codes)
    assert not torch.allclose(model.decode((codes + 1) % 32), recon, atol=1e-3)


# --------------------------------------------------------------------------------------------- precision and layout


@every_draw
def test_autocast_is_close_to_float32(draw):
    model = build(kl_div_loss_weight=0.1, **DRAWS[draw])
    image = pixels(channels=3)
    # on the logits, so that rounding changes no hard draw
    noise = noise_for(model) + 30 * F.one_hot(model.tokenize(image), 32)
    expected = model(image, noise=noise, return_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, recon = model(image, noise=noise, return_loss=True, return_recons=True)
        assert model.logits(image).dtype == recon.dtype == torch.bfloat16
        assert model.detokenize(model.tokenize(image)).dtype == torch.float32
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.02)
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) and p.grad.dtype == torch.float32 for p in model.parameters())


@every_draw
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_precision_run(draw, dtype):
    model = build(**DRAWS[draw]).to(dtype)
    recon = run(model, pixels().to(dtype))
    assert recon.dtype == model.detokenize(model.tokenize(pixels().to(dtype))).dtype == dtype
    loss = run(model, pixels().to(dtype), return_loss=True)
    assert loss.item() == pytest.approx(run(build(**DRAWS[draw]), return_loss=True).item(), rel=0.05)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)


@every_draw
def test_channels_last_gives_the_same(draw):
    model, image = build(kl_div_loss_weight=0.1, **DRAWS[draw]), pixels()
    expected = run(model, return_loss=True)
    expected.backward()
    other = build(kl_div_loss_weight=0.1, **DRAWS[draw]).to(memory_format=torch.channels_last)
    loss, recon = run(other, image.to(memory_format=torch.channels_last), return_loss=True, return_recons=True)
    loss.backward()
    assert torch.allclose(loss, expected) and torch.allclose(recon, run(model), atol=1e-5)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name
    assert torch.equal(other.get_codebook_indices(image), model.get_codebook_indices(image))


# --------------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_equal_and_its_own(duplicate):
    model = build(normalization=NORMALIZATIONS[1])
    twin = duplicate(model)
    assert torch.equal(run(model), run(twin)) and torch.equal(twin.means, model.means)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    assert all(bool(tensor.abs().sum() > 0) for tensor in [*model.parameters(), *model.buffers()])


def test_ema_averages_the_weights():
    model = build()
    average = EMA(model, beta=0.5, update_after_step=0, update_every=1, include_online_model=False)
    average.update()
    before = average.ema_model.codebook.weight.clone()
    with torch.no_grad():
        model.codebook.weight.add_(1)
    average.update()
    moved = average.ema_model.codebook.weight - before
    assert bool((moved > 0).all()) and bool((moved < 1).all())
    assert torch.equal(average.ema_model.means, model.means)
    assert average.ema_model.get_codebook_indices(pixels()).shape == (2, 16)


# an argument of each kind that is not the default
CHANGED = {
    "image_size": 24,
    "num_tokens": 20,
    "codebook_dim": 10,
    "num_layers": 1,
    "num_resnet_blocks": 2,
    "hidden_dim": 12,
    "channels": 4,
    "smooth_l1_loss": True,
    "temperature": 0.3,
    "straight_through": True,
    "reinmax": True,
    "kl_div_loss_weight": 0.5,
    "kl_reduction": "dalle",
    "normalization": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]],
}


def test_every_argument_is_saved_and_comes_back(tmp_path):
    assert CHANGED.keys() == ARGUMENTS
    DiscreteVAE(**CHANGED).save_pretrained(tmp_path / "first")
    loaded = DiscreteVAE.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("first", "again"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config == {**CHANGED, "model_type": "dvae", "buffers": "live"}
    for name in CHANGED.keys() - {"codebook_dim", "num_resnet_blocks", "hidden_dim", "normalization"}:
        assert getattr(loaded, name) == CHANGED[name], name
    assert loaded.means.flatten().tolist() == pytest.approx(CHANGED["normalization"][0])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_what_is_saved_is_loaded(normalization, tmp_path, capfd):
    model = build(normalization=normalization, channels=4)
    model.save_pretrained(tmp_path / "export")
    loaded = DiscreteVAE.from_pretrained(tmp_path / "export")
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded.means, model.means) and torch.equal(loaded.stds, model.stds)
    with torch.no_grad():
        assert torch.equal(run(loaded), run(model))
        assert torch.equal(*(vae.get_codebook_indices(pixels(channels=4)) for vae in (loaded, model)))
    assert capfd.readouterr().out == ""


def test_the_files_of_an_export(tmp_path):
    build().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert load_file(tmp_path / "model.safetensors").keys() == build().state_dict().keys()
    assert "discrete-vae" in (tmp_path / "README.md").read_text()


# names in a vae.pt of DALLE-pytorch with two layers, without and with a residual block
PLAIN_NAMES = {
    *("codebook", "encoder.0.0", "encoder.1.0", "encoder.2"),
    *("decoder.0.0", "decoder.1.0", "decoder.2"),
}
BLOCK_NAMES = {
    *("codebook", "encoder.0.0", "encoder.1.0", "encoder.3"),
    *("encoder.2.net.0", "encoder.2.net.2", "encoder.2.net.4"),
    *("decoder.0", "decoder.2.0", "decoder.3.0", "decoder.4"),
    *("decoder.1.net.0", "decoder.1.net.2", "decoder.1.net.4"),
}


def write_dalle_pytorch(path: Path, model: DiscreteVAE, blocks: int) -> Path:
    """Return the file that DALLE-pytorch's train_vae writes."""
    hparams = {"image_size": 16, "num_layers": 2, "num_tokens": 32, "codebook_dim": 16, "hidden_dim": 16}
    torch.save({"hparams": {**hparams, "num_resnet_blocks": blocks}, "weights": model.state_dict()}, path)
    return path


@pytest.mark.parametrize("blocks, names", [(0, PLAIN_NAMES), (1, BLOCK_NAMES)])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_file_of_dalle_pytorch_is_loaded(blocks, names, channels, tmp_path):
    model = build(num_resnet_blocks=blocks, channels=channels)
    assert {name.rpartition(".")[0] for name in model.state_dict()} == names
    path = write_dalle_pytorch(tmp_path / "vae.pt", model, blocks)
    loaded = DiscreteVAE.from_dalle_pytorch(str(path))
    assert not loaded.training and loaded.kl_reduction == "mean" and loaded.channels == channels
    assert torch.equal(run(loaded), run(model))
    changed = DiscreteVAE.from_dalle_pytorch(path, smooth_l1_loss=True, kl_div_loss_weight=0.1)
    assert changed.smooth_l1_loss and changed.kl_reduction == "dalle"
    loaded.save_pretrained(tmp_path / "export")
    assert torch.equal(run(DiscreteVAE.from_pretrained(tmp_path / "export")), run(model))


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


NOT_DALLES = [
    (["hparams"], r"holds list; a vae\.pt of DALLE-pytorch holds hparams and weights$"),
    ({"weights": {}}, r"holds \['weights'\]; a vae.pt of"),
    ({"hparams": {"num_tokens": 32}, "weights": {}}, r"does not hold the weights of a discrete VAE .*Missing key"),
    ({"hparams": {"num_token": 32}, "weights": {}}, r"does not hold the weights .*unexpected .*'num_token'"),
    ({"hparams": [1], "weights": {}}, r"does not hold the weights of"),
    ({"hparams": {}, "weights": None}, r"does not hold the weights of"),
    ({"hparams": {}, "weights": {"encoder.0.0.weight": 1}}, r"does not hold the weights of"),
    ({"hparams": {"num_tokens": 0}, "weights": {}}, r"^num_tokens 0 is not possible; it must be at least 2$"),
    (Harmful(), r"cannot be read as tensors and plain values"),
]


@pytest.mark.parametrize("content, message", NOT_DALLES)
def test_a_file_that_is_not_of_dalle_pytorch_is_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "vae.pt")
    with pytest.raises(UserError, match=message) as error:
        DiscreteVAE.from_dalle_pytorch(tmp_path / "vae.pt")
    assert "\n" not in str(error.value)


def test_a_file_that_is_absent_or_damaged_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^no such file: .*vae.pt; expected a vae.pt of DALLE-pytorch$"):
        DiscreteVAE.from_dalle_pytorch(tmp_path / "vae.pt")
    whole = write_dalle_pytorch(tmp_path / "whole.pt", build(), 1).read_bytes()
    (tmp_path / "vae.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"vae.pt cannot be read as tensors and plain values \(") as error:
        DiscreteVAE.from_dalle_pytorch(tmp_path / "vae.pt")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- messages

LOWEST = {
    "image_size": 1,
    "num_tokens": 2,
    "codebook_dim": 1,
    "num_layers": 1,
    "num_resnet_blocks": 0,
    "hidden_dim": 1,
}
WRONG_ARGUMENTS = [
    *(
        ({name: low - 1}, rf"^{name} {low - 1} is not possible; it must be at least {low}$")
        for name, low in LOWEST.items()
    ),
    *(({name: None}, rf"^{name} None is not possible; give a whole number$") for name in LOWEST),
    ({"hidden_dim": 6.5}, r"^hidden_dim 6.5 is not possible; give a whole number$"),
    ({"channels": 2}, r"^channels 2 is not possible; use 1 \(grey\), 3 \(colour\) or 4 \(colour and alpha\)$"),
    ({"image_size": 18}, r"^image_size 18 is not a multiple of 4 \(2 \*\* 2 num_layers\); try 16 or 20$"),
    ({"image_size": 2}, r"^image_size 2 is not a multiple of 4 .*; try 4$"),
    *(
        ({"temperature": value}, r"^temperature \S+ is not possible; it must be above 0 and finite$")
        for value in (0.0, float("nan"), float("inf"))
    ),
    ({"reinmax": True}, r"^reinmax is a gradient for hard draws; set straight_through true as well$"),
    *(
        ({"kl_div_loss_weight": value}, r"^kl_div_loss_weight \S+ is not possible; it must be at least 0 and finite$")
        for value in (-0.5, float("nan"), float("inf"))
    ),
    ({"kl_reduction": "sum"}, r"^kl_reduction 'sum' is not known; choose one of mean, dalle$"),
    *(
        ({"normalization": given}, r"^normalization .* is not possible; give 3 means and 3 standard deviations$")
        for given in (0.5, (0.5, 0.5), ((0.5,) * 3,), ((0.5, 0.5), (0.5, 0.5)), "imagenet", (("a",) * 3, (1,) * 3))
    ),
    *(
        (
            {"normalization": ((0.5,) * 3, (0.5, std, 0.5))},
            r"^normalization has .* \[0.5, .*, 0.5\]; each must be above 0 and finite$",
        )
        for std in (0.0, -1.0, float("nan"), float("inf"))
    ),
    *(
        (
            {"normalization": ((0.5, mean, 0.5), (0.5,) * 3)},
            r"^normalization has the means \[0.5, .*, 0.5\]; each must be a finite number$",
        )
        for mean in (float("nan"), float("-inf"))
    ),
]


@pytest.mark.parametrize("arguments, message", WRONG_ARGUMENTS, ids=str)
def test_a_wrong_argument_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        build(**arguments)
    assert "\n" not in str(error.value)


MISTAKES = [
    (
        lambda vae: vae(torch.zeros(2, 1, 16, 16)),
        r"^images of shape \(2, 1, 16, 16\) were given; \(batch, 3, height, w",
    ),
    (
        lambda vae: vae(torch.zeros(3, 16, 16)),
        r"^images of shape \(3, 16, 16\) were given; \(batch, 3, height, width\)",
    ),
    (lambda vae: vae(torch.zeros(2, 3, 16, 18)), r"^image side 18 is not a multiple of 4 \(2 \*\* 2 num_layers\)$"),
    (
        lambda vae: vae.get_codebook_indices(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)),
        r"^pixels of type torch.uint8 were given; floating-point numbers in \[0, 1\] are expected$",
    ),
    (
        lambda vae: vae.decode(torch.zeros(2, 15, dtype=torch.long)),
        r"^15 codes do not make a square; give codes of sha",
    ),
    (
        lambda vae: vae.decode(torch.tensor([[0, 1, 2, 32]])),
        r"^codes from 0 to 32 were given; the model has 0 to 31$",
    ),
    (
        lambda vae: vae.decode(torch.tensor([[-1, 1, 2, 31]])),
        r"^codes from -1 to 31 were given; the model has 0 to 31$",
    ),
    (lambda vae: vae(pixels(), temp=0), r"^temp 0 is not possible; it must be above 0 and finite$"),
    (lambda vae: vae(pixels(), temp=float("inf")), r"^temp inf is not possible; it must be above 0 and finite$"),
    (
        lambda vae: vae(pixels(), return_loss=True, return_logits=True),
        r"^return_loss and return_logits are both set; ask for one of them at a time$",
    ),
    (lambda vae: vae.check_image_size(30), r"^image_size 30 is not a multiple of 4 .*; try 28 or 32$"),
]


@pytest.mark.parametrize("call, message", MISTAKES)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call(build())
    assert "\n" not in str(error.value)
