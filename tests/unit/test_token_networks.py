"""Open-MAGVIT2, MaskGIT-VQGAN and TiTok: options, image range, checkpointing, mistakes; tests/parity has numbers."""

from __future__ import annotations

import pytest
import torch
from scenarios import build_trainer, weights_of
from torch import nn

from vqdist import Tokenizer, UserError, VQGanVAE
from vqdist.models.networks.magvit2 import AdaptiveGroupNorm, DepthToSpace, MagvitDecoder, MagvitEncoder
from vqdist.models.networks.maskgit import MaskGITDecoder, MaskGITEncoder
from vqdist.models.networks.vit import TiTokDecoder, TiTokEncoder, TiTokProxyDecoder

MAGVIT = {"ch": 8, "ch_mult": [1, 2, 1], "num_res_blocks": 1, "groups": 4}
MASKGIT = {"hidden_channels": 8, "channel_mult": [1, 2, 1], "num_res_blocks": 1, "groups": 4}
TITOK = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "heads": 2, "num_latent_tokens": 5}
PIXEL = {**MASKGIT, "dim": 6}
PAIRS = {
    "magvit2": ({**MAGVIT, "z_channels": 4}, "magvit2", MAGVIT),
    "maskgit": ({**MASKGIT, "z_channels": 4}, "maskgit", MASKGIT),
    "titok": ({**TITOK, "token_size": 4}, "titok", TITOK),
    "titok_proxy": ({**TITOK, "token_size": 4}, "titok_proxy", {**TITOK, "proxy_codebook_size": 9, "pixel": PIXEL}),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)


def parts(pair: str, **options) -> dict:
    """Specifications of encoder and decoder."""
    of_encoder, decoder, of_decoder = PAIRS[pair]
    encoder = pair.partition("_")[0]
    return {
        "encoder": {"class_path": encoder, "init_args": {**of_encoder, **options}},
        "decoder": {"class_path": decoder, "init_args": {**of_decoder, **options}},
    }


def build(pair: str, **options) -> VQGanVAE:
    torch.manual_seed(2)
    model = VQGanVAE(**parts(pair, **options), quantizer="lfq", codebook_size=16, use_vgg_and_gan=False)
    with torch.no_grad():  # not the small numbers of the start
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.05)
    return model


@every_pair
def test_a_model_of_them_is_a_tokenizer_and_is_loaded_again(pair, tmp_path):
    model = build(pair).eval()
    model.image_size = 16
    images = torch.rand(2, 3, 16, 16)
    tokenizer = Tokenizer(model)
    codes = tokenizer.encode(images)
    assert codes.shape == ((2, 5) if pair.startswith("titok") else (2, 16))
    assert tokenizer.decode(codes).shape == images.shape
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images), codes) and again.fingerprint() == tokenizer.fingerprint()


@every_pair
def test_checkpointing_changes_no_gradient(pair):
    gradients, counts = [], []
    for checkpointing in (False, True):
        model = build(pair, checkpointing=checkpointing).train()
        calls = []
        for block in model.modules():
            if type(block).__name__.endswith("Block"):
                block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        counts.append(len(calls))
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert counts[1] == 2 * counts[0] > 0
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@every_pair
def test_every_weight_of_them_learns(pair, tmp_path):
    options = {"dim": 16, "encdec_resnet_groups": 16, "layers": 4, **parts(pair)}
    trainer = build_trainer(tmp_path, model={**options, "codebook_size": 16}, num_train_steps=2)
    before = {name: tensor.clone() for name, tensor in trainer.model.autoencoder.named_parameters()}
    trainer.train()
    same = [name for name, tensor in trainer.model.autoencoder.named_parameters() if torch.equal(before[name], tensor)]
    assert same == [] and all(tensor.isfinite().all() for tensor in weights_of(trainer).values())


@pytest.mark.parametrize("encoder", [MagvitEncoder(**MAGVIT, z_channels=4), MaskGITEncoder(**MASKGIT, z_channels=4)])
def test_any_size_that_the_stride_divides(encoder):
    assert encoder(torch.rand(1, 3, 8, 24)).shape == (1, 4, 2, 6) and encoder.code_shape(16) == (4, 4)
    with pytest.raises(UserError, match="image side 18 is not a multiple of 4"):
        encoder(torch.rand(1, 3, 16, 18))
    with pytest.raises(UserError, match="image_size 18 is not a multiple of 4 .* try 16 or 20"):
        encoder.code_shape(18)


def test_images_of_magvit2_are_in_0_1():
    encoder, decoder, seen = MagvitEncoder(**MAGVIT, z_channels=4), MagvitDecoder(4, **MAGVIT), []
    encoder.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image, hidden, last = torch.rand(1, 3, 8, 8), torch.randn(1, 8, 8, 8), decoder.last_layer
    encoder(image)
    assert torch.equal(seen[0], image * 2 - 1)
    by_hand = nn.functional.conv2d(hidden, last.weight, last.bias, padding=1)
    torch.testing.assert_close(last(hidden), (by_hand + 1) / 2)


def test_a_pixel_of_depth_to_space_keeps_its_channels_together():
    layer = DepthToSpace(2)
    x = torch.randn(1, 2, 3, 4)
    found, deep = layer(x), layer.conv1(x)
    for row in (0, 1):
        for column in (0, 1):
            first = (2 * row + column) * 2
            assert torch.equal(found[:, :, row::2, column::2], deep[:, first : first + 2])


def test_the_norm_of_one_position_is_finite():
    norm = AdaptiveGroupNorm(3, 4, 2)
    assert norm(torch.randn(2, 4, 4, 4), torch.randn(2, 3, 1, 1)).isfinite().all()


def test_titok_takes_images_of_one_size_which_need_not_be_square():
    options = {**TITOK, "image_size": [8, 16]}
    model = VQGanVAE(
        encoder=TiTokEncoder(**options, token_size=4),
        decoder=TiTokDecoder(4, **options),
        codebook_size=16,
        use_vgg_and_gan=False,
    ).eval()
    assert model.image_size == (8, 16)
    tokenizer, images = Tokenizer(model), torch.rand(2, 3, 8, 16)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 5) and tokenizer.decode(codes).shape == images.shape
    assert torch.equal(model.decode_from_ids(codes), model.network.detokenize(codes))
    model.image_size = None
    with pytest.raises(UserError, match="images of 16 x 8 pixels were given; this encoder titok takes 8 x 16 only"):
        model.network.features(images.mT)
    with pytest.raises(UserError, match="image_size 16 is not possible"):
        Tokenizer(model, 16)


def test_a_decoder_of_the_first_stage_gives_codes_and_no_images():
    decoder = TiTokProxyDecoder(4, **TITOK, proxy_codebook_size=9)
    features = torch.randn(2, 5, 4)
    assert decoder.proxy(features).shape == (2, 9, 4, 4) and decoder.last_layer is None
    with pytest.raises(UserError, match="first stage gives codes of its proxy tokenizer and no images"):
        decoder(features)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MagvitEncoder(**{**MAGVIT, "ch": 9}), "ch is 9, which 4 groups do not divide"),
        (lambda: MaskGITEncoder(**{**MASKGIT, "channel_mult": []}), r"channel_mult \[\] is not possible"),
        (lambda: MagvitEncoder(**{**MAGVIT, "ch_mult": ["1", 2]}), r"ch_mult \['1', 2\] is not possible"),
        (lambda: MaskGITEncoder(**MASKGIT, dropout=1.5), "dropout 1.5 is not possible"),
        (lambda: MaskGITDecoder(4, **{**MASKGIT, "num_res_blocks": 0}), "num_res_blocks 0 is not possible"),
        (lambda: TiTokEncoder(**{**TITOK, "width": 15}), "width 15 is not a multiple of heads 2"),
        (lambda: TiTokEncoder(**{**TITOK, "image_size": 18}), "image_size 18 is not a multiple of patch_size 4"),
        (lambda: TiTokProxyDecoder(4, **TITOK, pixel={"width": 3}), "pixel of decoder titok_proxy: .*'width'"),
    ],
)
def test_mistakes_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
