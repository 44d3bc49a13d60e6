"""One interface to every image tokenizer: images to rows of codes and back, whatever is inside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from scenarios import build_dvae, build_dvae_trainer, build_trainer, build_vae
from torch import Tensor, nn
from varied_codes import vary_codes

from vqdist import DiscreteVAE, Tokenizer, UserError, VQGanVAE
from vqdist.models.tokenizer import TokenizerNetwork

VQ = {"codebook_dim": 8, "kmeans_init": False}
VQGANS = {
    "lfq": {"quantizer": "lfq", "codebook_size": 32},
    "vq": {"quantizer": "vq", "codebook_size": 32, "vq_kwargs": VQ},
    "residual_vq": {"quantizer": "residual_vq", "codebook_size": 32, "vq_kwargs": {**VQ, "num_quantizers": 3}},
}
KINDS = [*VQGANS, "dvae"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, **options) -> VQGanVAE | DiscreteVAE:
    """Return a small model of 32 codes (a level) for images of 16 pixels, four of them a code."""
    if kind == "dvae":
        return vary_codes(build_dvae(**options))
    model = build_vae(**{**VQGANS[kind], **options})
    model.image_size = 16
    with torch.no_grad():
        model.autoencoder.last_layer.bias += 0.5  # so that few pixels of an untrained decoder are clamped
    return model


def pixels(batch: int = 3, channels: int = 3, side: int = 16) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(3))


def levels(kind: str) -> tuple[int, ...]:
    return (3,) if kind == "residual_vq" else ()


# --------------------------------------------------------------------------------------------- codes and back


@every_kind
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_become_rows_of_codes_and_images_again(kind, channels):
    tokenizer, images = Tokenizer(build(kind, channels=channels)), pixels(channels=channels)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, 16, *levels(kind)) and codes.dtype == torch.int64
    assert 0 <= int(codes.min()) and int(codes.max()) < 32 and len(codes.unique()) > 4
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert 0 <= float(decoded.min()) < float(decoded.max()) <= 1
    assert not decoded.requires_grad


@every_kind
def test_facts(kind):
    tokenizer = Tokenizer(build(kind))
    assert (tokenizer.codebook_size, tokenizer.num_codes, tokenizer.channels) == (32, 16, 3)
    assert tokenizer.num_levels == (levels(kind) or (1,))[0]
    assert (tokenizer.image_size, tokenizer.code_side) == (16, 4)


@every_kind
def test_decoded_codes_are_the_networks_reconstruction(kind):
    model = build(kind)
    tokenizer = Tokenizer(model)
    with torch.no_grad():
        recon, ids = model.network.reconstruct(pixels())
    assert torch.equal(tokenizer.encode(pixels()), rearrange(ids, "b h w ... -> b (h w) ..."))
    assert torch.allclose(tokenizer.decode(tokenizer.encode(pixels())), recon.clamp(0, 1), atol=1e-6)
    other = (tokenizer.encode(pixels()) + 1) % 32
    assert not torch.allclose(tokenizer.decode(other), recon.clamp(0, 1), atol=1e-3)


def test_a_code_is_where_its_pixels_are():
    """Row by row: what is far from a change at the bottom right keeps its codes, which are the first."""
    tokenizer, changed = Tokenizer(build("dvae"), 64), pixels(side=64)
    before = tokenizer.encode(changed)
    changed[..., 48:, 48:] = 0
    moved = (before != tokenizer.encode(changed)).view(3, 16, 16, -1).any(dim=-1).any(dim=0)
    rows, columns = moved.nonzero().unbind(dim=1)
    assert len(rows) > 0 and int(rows.min()) >= 8 and int(columns.min()) >= 8


@every_kind
def test_an_overshoot_is_clamped(kind):
    model = build(kind)
    last = model.decoder[-1] if kind == "dvae" else model.autoencoder.last_layer
    with torch.no_grad():
        last.bias += torch.tensor([5.0, -5.0, 0.0])
    tokenizer = Tokenizer(model)
    decoded = tokenizer.decode(tokenizer.encode(pixels()))
    assert bool((decoded[:, 0] == 1).all()) and bool((decoded[:, 1] == 0).all())


@every_kind
def test_a_model_in_training_is_taken_as_it_is_in_use(kind):
    """Codebooks that learn in training stay, and codes are those of eval mode."""
    model = build(kind).train()
    tokenizer = Tokenizer(model)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    tokenizer.decode(tokenizer.encode(pixels()))
    assert not any(module.training for module in tokenizer.network.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.state_dict().items())


@every_kind
def test_codes_of_an_image_do_not_depend_on_the_batch(kind):
    tokenizer = Tokenizer(build(kind))
    assert torch.equal(tokenizer.encode(pixels())[1:2], tokenizer.encode(pixels()[1:2]))


@pytest.mark.parametrize(
    "kind", ["lfq", "vq", "dvae"]
)  # vector-quantize-pytorch's residual levels take no empty batch
def test_no_images_are_no_codes(kind):
    tokenizer = Tokenizer(build(kind))
    assert tokenizer.encode(pixels()[:0]).shape == (0, 16)
    assert tokenizer.decode(tokenizer.encode(pixels()[:0])).shape == (0, 3, 16, 16)


@every_kind
def test_images_are_float32_under_autocast(kind):
    tokenizer = Tokenizer(build(kind))
    codes = tokenizer.encode(pixels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = tokenizer.decode(codes)
    assert decoded.dtype == torch.float32
    assert torch.allclose(decoded, tokenizer.decode(codes), atol=0.05)


# --------------------------------------------------------------------------------------------- the image size


@every_kind
def test_another_image_size_can_be_asked_for(kind):
    tokenizer = Tokenizer(build(kind), image_size=32)
    assert (tokenizer.image_size, tokenizer.num_codes) == (32, 64)
    codes = tokenizer.encode(pixels(side=32))
    assert codes.shape == (3, 64, *levels(kind)) and tokenizer.decode(codes).shape == (3, 3, 32, 32)


@every_kind
def test_the_image_size_is_written_and_read_back(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == 16
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.image_size == 16
    assert torch.equal(tokenizer.encode(pixels()), Tokenizer(build(kind)).encode(pixels()))
    assert Tokenizer.from_pretrained(str(tmp_path), image_size=32).num_codes == 64


@pytest.mark.parametrize("build_any", [build_trainer, build_dvae_trainer])
def test_a_trainers_export_is_a_tokenizer(build_any, tmp_path):
    trainer = build_any(tmp_path / "run", ema_update_after_step=0)
    trainer.train_step()
    trainer.export(tmp_path / "export")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "export")
    assert (tokenizer.image_size, tokenizer.num_codes) == (16, 16)
    with trainer.averaged_network() as network:
        expected = network.eval().reconstruct(pixels())[0].clamp(0, 1)
    assert torch.allclose(tokenizer.decode(tokenizer.encode(pixels())), expected, atol=1e-6)


# --------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind, model_class", [("lfq", "VQAutoencoder"), ("dvae", "DiscreteVAE")])
def test_the_class_is_the_one_that_the_file_says(kind, model_class, tmp_path):
    build(kind).save_pretrained(tmp_path)
    assert type(Tokenizer.from_pretrained(tmp_path).network).__name__ == model_class


def test_options_of_loading_reach_the_model(tmp_path):
    build("dvae").save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path, temperature=0.2).network.temperature == 0.2


# --------------------------------------------------------------------------------------------- the network's side


@every_kind
def test_a_network_has_what_trainers_and_metrics_need(kind):
    network = build(kind).network.eval()
    assert isinstance(network, TokenizerNetwork)
    assert (network.channels, network.codebook_size) == (3, 32)
    assert network.num_levels == (levels(kind) or (1,))[0]
    with torch.no_grad():
        ids = network.tokenize(pixels())
        recon, same = network.reconstruct(pixels())
        assert ids.shape == (3, 4, 4, *levels(kind)) and torch.equal(ids, same)
        assert torch.allclose(network.detokenize(ids), recon, atol=1e-6)


def test_a_network_reconstructs_through_its_codes_unless_it_says_how():
    class Halves(TokenizerNetwork):
        channels, codebook_size, num_levels = 1, 2, 1

        def tokenize(self, image: Tensor) -> Tensor:
            return (image[:, 0] > 0.5).long()

        def detokenize(self, ids: Tensor) -> Tensor:
            return ids[:, None] * 0.5 + 0.25

    recon, ids = Halves().reconstruct(torch.tensor([0.1, 0.9]).view(1, 1, 1, 2))
    assert recon.flatten().tolist() == [0.25, 0.75] and ids.flatten().tolist() == [0, 1]


def test_a_network_without_codes_is_none():
    class Nothing(TokenizerNetwork):
        pass

    with pytest.raises(TypeError, match="detokenize.*tokenize"):
        Nothing()
    assert issubclass(TokenizerNetwork, nn.Module)


# --------------------------------------------------------------------------------------------- messages


def long(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value)


MISTAKES = [
    (
        "dvae",
        lambda it: it.encode(pixels(channels=1)),
        r"^images of shape \(3, 1, 16, 16\) were given; \(batch, 3, 16, 16\) is expected$",
    ),
    (
        "lfq",
        lambda it: it.encode(pixels(side=32)),
        r"^images of shape \(3, 3, 32, 32\) were given; \(batch, 3, 16, 16\)",
    ),
    (
        "vq",
        lambda it: it.encode(pixels()[0]),
        r"^images of shape \(3, 16, 16\) were given; \(batch, 3, 16, 16\) is ex",
    ),
    *(
        (
            kind,
            lambda it: it.encode(long(2, 3, 16, 16).byte()),
            r"^pixels of type torch.uint8 were given; floating-point",
        )
        for kind in ("lfq", "dvae")
    ),
    ("dvae", lambda it: it.decode(long(2, 15)), r"^codes of shape \(2, 15\) were given; \(batch, 16\) is expected$"),
    (
        "dvae",
        lambda it: it.decode(long(2, 4, 4)),
        r"^codes of shape \(2, 4, 4\) were given; \(batch, 16\) is expected$",
    ),
    (
        "vq",
        lambda it: it.decode(long(2, 16, 3)),
        r"^codes of shape \(2, 16, 3\) were given; \(batch, 16\) is expected$",
    ),
    (
        "residual_vq",
        lambda it: it.decode(long(2, 16)),
        r"^codes of shape \(2, 16\) were given; \(batch, 16, 3\) is exp",
    ),
    (
        "residual_vq",
        lambda it: it.decode(long(2, 16, 2)),
        r"^codes of shape \(2, 16, 2\) were given; \(batch, 16, 3\)",
    ),
    *(
        (
            kind,
            lambda it: it.decode(long(2, 16, *levels_of(it), value=32)),
            r"^codes from 32 to 32 were given; there are 32$",
        )
        for kind in KINDS
    ),
    (
        "dvae",
        lambda it: it.decode(torch.arange(-1, 15).view(1, 16)),
        r"^codes from -1 to 14 were given; there are 32$",
    ),
    (
        "dvae",
        lambda it: Tokenizer(it.network, 18),
        r"^image_size 18 is not a multiple of 4 \(2 \*\* 2 num_layers\); try 16 or",
    ),
    (
        "lfq",
        lambda it: Tokenizer(build("lfq"), 2),
        r"^image_size 2 is not a multiple of 4 \(2 \*\* 2 layers\); try 4$",
    ),
    (
        "lfq",
        lambda it: Tokenizer(build("lfq"), -8),
        r"^image_size -8 is not a multiple of 4 \(2 \*\* 2 layers\); try 4$",
    ),
    (
        "lfq",
        lambda it: Tokenizer(build_vae()),
        r"^the model does not say on which image size it was trained; give image_size, or ",
    ),
]


def levels_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    return (tokenizer.num_levels,) if tokenizer.num_levels > 1 else ()


@pytest.mark.parametrize("kind, call, message", MISTAKES)
def test_a_mistake_is_one_line(kind, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(Tokenizer(build(kind)))
    assert "\n" not in str(error.value)


def test_an_export_without_an_image_size_asks_for_one(tmp_path):
    build_vae().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"^the model does not say on which image size it was trained; give image_size, or "
    ):
        Tokenizer.from_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(Path(tmp_path), image_size=16).num_codes == 16
