"""Parts that give other shapes, types and sizes than their contracts promise: each gets one line that names it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vqdist import Quantized, Quantizer, VQGanVAE
from vqdist.errors import UserError

CHANGES = {
    "a tuple": lambda given: (given,),
    "none": lambda given: None,
    "whole numbers": lambda given: given.long(),
    "one image of two": lambda given: given[:1],
    "flat": lambda given: given.flatten(1),
    "too wide": lambda given: torch.cat([given, given], dim=1),
    "too large": lambda given: nn.functional.interpolate(given, scale_factor=2),
}


class Encoder(nn.Module):
    def __init__(self, change=None, codes=None):
        super().__init__()
        self.dim, self.change, self.codes = 8, change, codes
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def code_shape(self, image_size):
        return (image_size // 4, image_size // 4) if self.codes is None else self.codes(image_size)

    def forward(self, image):
        features = self.conv(image)
        return features if self.change is None else self.change(features)


class Decoder(nn.Module):
    def __init__(self, change=None, last_layer=True):
        super().__init__()
        self.change = change
        self.up = nn.ConvTranspose2d(8, 4 if last_layer else 3, 4, stride=4)
        self.last_layer = nn.Conv2d(4, 3, 1) if last_layer else None

    def forward(self, features):
        hidden = self.up(features)
        return hidden if self.change is None else self.change(hidden)


class Signs(Quantizer):
    def __init__(self, change=None):
        super().__init__(8, codebook_size=2)
        self.change = change

    def forward(self, features):
        indices = (features.mean(dim=1) > 0).long()
        given = Quantized(features, indices, torch.zeros(()))
        return given if self.change is None else self.change(given)

    def decode_indices(self, indices):
        return indices[:, None].float().expand(-1, 8, -1, -1)


class Critic(nn.Module):
    min_image_size = 4

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.conv = nn.Conv2d(3, 1, 4, stride=4)

    def forward(self, image):
        return self.change(self.conv(image))


def reconstruct(encoder=None, quantizer=None, decoder=None):
    vae = VQGanVAE(
        encoder=encoder or Encoder(),
        quantizer=quantizer or Signs(),
        decoder=decoder or Decoder(),
        use_gan=False,
        perceptual="none",
    )
    return vae, vae.autoencoder(torch.rand(2, 3, 16, 16))


def refused(words, **parts):
    with pytest.raises(UserError) as raised:
        reconstruct(**parts)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_parts_that_keep_their_promises_are_taken():
    for decoder in (Decoder(), Decoder(last_layer=False)):
        vae, out = reconstruct(decoder=decoder)
        assert out.recon.shape == (2, 3, 16, 16) and out.indices.shape == (2, 4, 4)
        assert vae.autoencoder.tokenize(torch.rand(1, 3, 16, 8)).shape == (1, 4, 2)  # code_shape speaks of squares


@pytest.mark.parametrize("change", CHANGES)
def test_features_of_another_kind_than_promised(change):
    refused(["encoder Encoder gave", "expected" if change != "too large" else "code_shape(16) says (4, 4)"],
            encoder=Encoder(CHANGES[change]))  # fmt: skip


@pytest.mark.parametrize("said", [4, None, (4.0, 4.0), ("4", "4"), (), (4, 4, 4), (0, 4), (-4, 4)], ids=repr)
def test_a_code_shape_that_is_none(said):
    refused(
        ["code_shape(16) of encoder Encoder", repr(said), "whole numbers"], encoder=Encoder(codes=lambda size: said)
    )


@pytest.mark.parametrize("said", [(8, 8), (16,), (4,)], ids=repr)
def test_a_code_shape_that_is_not_that_of_the_features(said):
    refused(["(4, 4)", f"code_shape(16) says {said}"], encoder=Encoder(codes=lambda size: said))
    vae = VQGanVAE(
        encoder=Encoder(codes=lambda size: said),
        quantizer=Signs(),
        decoder=Decoder(),
        use_gan=False,
        perceptual="none",
    )
    with pytest.raises(UserError, match="code_shape"):  # where codes are made for another model, too
        vae.autoencoder.tokenize(torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize("last_layer", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_images_of_another_kind_than_promised(change, last_layer):
    refused(["decoder Decoder"], decoder=Decoder(CHANGES[change], last_layer))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda given: given.quantized, ["Tensor", "Quantized(quantized, indices, aux_loss)"]),
        (lambda given: None, ["NoneType"]),
        (lambda given: given[:2], ["Tensor, Tensor", "Quantized"]),
        (lambda given: given._replace(aux_loss=0.0), ["Tensor, Tensor, float"]),
        (lambda given: given._replace(quantized=given.quantized[:, 1:]), ["(2, 7, 4, 4)", "(2, 8, 4, 4)"]),
        (lambda given: given._replace(indices=given.indices.flatten(1)), ["codes of shape (2, 16)", "(2, 4, 4)"]),
        (lambda given: given._replace(indices=given.indices.float()), ["codes of torch.float32"]),
        (lambda given: given._replace(indices=given.indices > 0), ["codes of torch.bool"]),
        (lambda given: given._replace(aux_loss=torch.zeros(2)), ["aux_loss", "(2,)"]),
    ],
)
def test_codes_of_another_kind_than_promised(change, words):
    refused(["quantizer Signs gave", *words], quantizer=Signs(change))


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda logits: None, "a NoneType"),
        (lambda logits: 1.0, "a float"),
        (lambda logits: [], "an empty list"),
        (lambda logits: {"fine": logits}, "a dict"),
        (lambda logits: [[logits], [logits]], "a list"),
        (lambda logits: logits.mean(), "shape ()"),
        (lambda logits: logits.long(), "int64"),
    ],
)
def test_logits_of_another_kind_than_promised(change, found):
    parts = {"encoder": Encoder(), "quantizer": Signs(), "decoder": Decoder()}
    vae = VQGanVAE(**parts, discriminator=Critic(change), perceptual="none")
    with pytest.raises(UserError, match="the discriminator gave") as raised:
        vae(torch.rand(2, 3, 16, 16), return_discr_loss=True)
    assert found in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [None, "8", 2.5, -1])
def test_a_smallest_image_that_is_no_number(size):
    critic = Critic(lambda logits: logits)
    critic.min_image_size = size
    parts = {"encoder": Encoder(), "quantizer": Signs(), "decoder": Decoder()}
    vae = VQGanVAE(**parts, discriminator=critic, perceptual="none")
    with pytest.raises(UserError, match="min_image_size of discriminator Critic is .*whole number"):
        vae.check_training_size(16)


@pytest.mark.parametrize("dim", ["8", 0, None, 8.0])
def test_a_width_that_is_no_number(dim):
    encoder = Encoder()
    encoder.dim = dim
    with pytest.raises(UserError, match="dim of encoder Encoder is .*whole number"):
        VQGanVAE(encoder=encoder, quantizer="fsq", decoder=Decoder(), use_gan=False, perceptual="none")


def test_features_without_a_gradient_are_refused_unless_the_encoder_is_frozen():
    class Cut(Encoder):
        def forward(self, image):
            return super().forward(image).detach()

    model = VQGanVAE(encoder=Cut(), decoder=Decoder(), quantizer="fsq", codebook_size=256, use_vgg_and_gan=False)
    with pytest.raises(UserError, match="encoder Cut gave features without a gradient, so it would never learn"):
        model(torch.rand(2, 3, 16, 16))
    with torch.no_grad():
        model(torch.rand(2, 3, 16, 16))
    model.autoencoder.encoder.requires_grad_(False)
    model(torch.rand(2, 3, 16, 16))
