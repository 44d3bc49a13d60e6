"""Taming's network: its shapes, image range, options and mistakes; tests/parity compares it with the field's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from scenarios import build_trainer, weights_of

from vqdist import UserError, VQGanVAE
from vqdist.models.networks.taming import TamingDecoder, TamingEncoder

SMALL = {"ch": 32, "ch_mult": (1, 2, 1), "num_res_blocks": 1, "attn_resolutions": (4,), "resolution": 16, "groups": 8}
encoder_of = partial(TamingEncoder, **SMALL, z_channels=6)
decoder_of = partial(TamingDecoder, **SMALL, z_channels=6)


def names(module: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in module.named_parameters()}


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (4, 40)])
def test_any_size_that_the_stride_divides(size):
    encoder, decoder = encoder_of(embed_dim=5), decoder_of(5)
    features = encoder(torch.rand(2, 3, *size))
    assert features.shape == (2, 5, size[0] // 4, size[1] // 4) and encoder.dim == 5
    assert decoder.last_layer(decoder(features)).shape == (2, 3, *size)


def test_a_side_that_the_stride_does_not_divide():
    with pytest.raises(UserError, match="image side 18 is not a multiple of 4, the stride of encoder taming"):
        encoder_of()(torch.rand(1, 3, 16, 18))
    with pytest.raises(UserError, match="image_size 18 is not a multiple of 4 .*try 16 or 20"):
        encoder_of().code_shape(18)
    assert encoder_of().code_shape(20) == (5, 5)


def test_images_are_in_0_1_and_the_network_sees_minus_1_to_1():
    encoder, decoder = encoder_of(), decoder_of(6)
    seen = []
    encoder.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 16, 16)
    encoder(image)
    assert torch.equal(seen[0], image * 2 - 1)
    hidden = torch.randn(1, 32, 16, 16)
    last = decoder.last_layer
    by_hand = torch.nn.functional.conv2d(hidden, last.weight, last.bias, padding=1)
    torch.testing.assert_close(last(hidden), (by_hand + 1) / 2)


def test_attention_is_where_the_nominal_side_says():
    assert {name for name in names(encoder_of()) if "attn" in name and name.endswith(".q")} == {
        "down.2.attn.0.q",
        "mid.attn_1.q",
    }
    found = {name for name in names(decoder_of(6)) if "attn" in name and name.endswith(".q")}
    assert found == {"up.2.attn.0.q", "up.2.attn.1.q", "mid.attn_1.q"}
    both = encoder_of(attn_resolutions=(16, 8), mid_attention=False)
    assert {name for name in names(both) if name.endswith(".q")} == {"down.0.attn.0.q", "down.1.attn.0.q"}
    odd = {"resolution": 18, "attn_resolutions": (18, 8)}  # 18, 9, 4 on the way down and 4, 8, 16 on the way up
    assert {name for name in names(encoder_of(**odd)) if name.endswith("0.q")} == {"down.0.attn.0.q"}
    assert {name for name in names(decoder_of(6, **odd)) if name.endswith("0.q")} == {"up.1.attn.0.q"}


def test_options_of_the_ends_and_of_resampling():
    assert encoder_of(double_z=True).conv_out.out_channels == 12 and encoder_of(double_z=True, embed_dim=4).dim == 4
    assert encoder_of(quant_conv_kernel=3).quant_conv.kernel_size == (3, 3)
    assert encoder_of(quant_conv_kernel=0).quant_conv is None
    plain = encoder_of(resamp_with_conv=False), decoder_of(6, resamp_with_conv=False)
    assert not [name for half in plain for name in names(half) if "sample" in name]
    assert plain[1](plain[0](torch.rand(1, 3, 16, 24))).shape == (1, 32, 16, 24)
    assert encoder_of(num_res_blocks=3).down[0].block[2].norm1.num_groups == 8
    assert len(decoder_of(6, num_res_blocks=3).up[0].block) == 4
    assert encoder_of(channels=1).conv_in.in_channels == 1 and decoder_of(6, channels=4).last_layer.out_channels == 4


def test_dropout_is_for_training():
    encoder, image = encoder_of(dropout=0.5), torch.rand(1, 3, 16, 16)
    assert not torch.equal(encoder(image), encoder(image))
    encoder.eval()
    assert torch.equal(encoder(image), encoder(image))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(dropout):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder, decoder = (
            half(checkpointing=checkpointing, dropout=dropout) for half in (encoder_of, lambda **o: decoder_of(6, **o))
        )
        torch.manual_seed(1)
        decoder.last_layer(decoder(encoder(torch.rand(2, 3, 16, 24)))).square().mean().backward()
        results.append([p.grad for half in (encoder, decoder) for p in half.parameters()])
    for kept, anew in zip(*results, strict=True):
        torch.testing.assert_close(kept, anew, rtol=1e-4, atol=1e-7)


def test_checkpointing_runs_blocks_twice():
    calls = []
    encoder = encoder_of(checkpointing=True)
    encoder.mid.block_1.register_forward_pre_hook(lambda *_: calls.append(1))
    encoder(torch.rand(1, 3, 16, 16)).sum().backward()
    assert len(calls) == 2
    encoder.eval()(torch.rand(1, 3, 16, 16)).sum().backward()
    assert len(calls) == 3


PARTS = {
    "encoder": {"class_path": "taming", "init_args": {**SMALL, "z_channels": 6, "embed_dim": 4}},
    "decoder": {"class_path": "taming", "init_args": {**SMALL, "z_channels": 6}},
    "codebook_size": 16,
}


@pytest.mark.parametrize("quantizer", ["gradient_vq", "ibq", "gumbel"])
def test_it_is_trained_saved_and_loaded(quantizer, tmp_path):
    none = dict.fromkeys(["dim", "layers", "discr_layers", "encdec_resnet_groups"])
    options = {"layers": 4, "discr_layers": 4, "encdec_resnet_groups": 16, "use_vgg_and_gan": False}
    trainer = build_trainer(tmp_path, quantizer=quantizer, model={**none, **options, **PARTS}, num_train_steps=2)
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    assert all(not torch.equal(before[name], after[name]) for name in after if "conv1.weight" in name)
    assert any(not torch.equal(before[name], after[name]) for name in after if "quantizer." in name)
    trainer.close()
    loaded, image = VQGanVAE.from_pretrained(tmp_path), torch.rand(1, 3, 16, 24)
    _, ids, _ = loaded.encode(image)
    assert ids.shape == (1, 4, 6) and loaded.decode_from_ids(ids).shape == image.shape


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ch": 20}, "ch is 20, which 8 groups do not divide; give a multiple of 8"),
        ({"ch_mult": (1, 1.3)}, r"ch \* ch_mult\[1\] is 41.6, which 8 groups do not divide"),
        ({"ch_mult": ()}, r"ch_mult \(\) is not possible"),
        ({"num_res_blocks": 0}, "num_res_blocks 0 is not possible; it must be at least 1"),
        ({"dropout": 1.0}, "dropout 1.0 is not possible"),
        ({"quant_conv_kernel": 2}, "quant_conv_kernel 2 is even"),
        ({"quant_conv_kernel": 0, "embed_dim": 4}, "quant_conv_kernel 0, so 6 channels cannot become embed_dim 4"),
        ({"channels": 2}, "channels 2 is not possible"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        encoder_of(**options)
