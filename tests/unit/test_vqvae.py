"""The smallest multi-scale tokenizer, and its vector quantizer against its formula."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import Cases
from torch import Tensor

from vqdist import Tokenizer, UserError
from vqdist.models.vqvae import SimpleVQVAE, VectorQuantizer


def build(**options) -> SimpleVQVAE:
    """Return a small model for 16x16 images with 21 codes, equal on every call, whose codes vary."""
    torch.manual_seed(0)
    settings = {"embedding_dim": 8, "hidden_dim": 12, "v_patch_nums": (1, 2, 4), **options}
    model = SimpleVQVAE(**settings)
    weight = model.quantizer.inner.codebook.get_codebook()
    with torch.no_grad():
        weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


def pixels(batch: int = 3, channels: int = 3, side: int = 16) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(2))


# --------------------------------------------------------------------------------------------- the vector quantizer


def features_of() -> Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(3))


def quantizer_of(**options) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, **options)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def test_codes_are_nearest_and_the_loss_is_its_formula():
    for beta in (0.25, 1.0):
        quantizer, z = quantizer_of(beta=beta), features_of().requires_grad_()
        quantized, loss, indices = quantizer(z)
        distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.get_codebook())
        assert torch.equal(indices.flatten(), distances.argmin(dim=1)) and indices.shape == (2, 3, 5)
        codes = quantizer.get_codebook()[indices].permute(0, 3, 1, 2)
        torch.testing.assert_close(quantized, codes)
        torch.testing.assert_close(loss, (1 + beta) * (codes - z).square().mean())
        loss.backward()
        torch.testing.assert_close(z.grad, beta * 2 * (z - codes).detach() / z.numel())
        (expected,) = torch.autograd.grad((codes - z.detach()).square().mean(), [quantizer.get_codebook()])
        torch.testing.assert_close(quantizer.get_codebook().grad, expected)


def test_gradients_pass_straight_through():
    quantizer, z = quantizer_of(), features_of().requires_grad_()
    weight = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(4))
    (quantizer(z)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    assert quantizer.get_codebook().grad is None


def test_codes_start_uniform_between_minus_and_plus_one_over_their_number():
    weight = VectorQuantizer(50, 200).get_codebook()
    assert weight.shape == (50, 200)
    assert weight.abs().max() <= 0.02
    assert weight.std().item() == pytest.approx(0.02 / 3**0.5, rel=0.02)


def test_the_nearest_by_angle_where_asked_for():
    plain, cosine = (quantizer_of(use_cosine_sim=use)(features_of())[2] for use in (False, True))
    angles = torch.cosine_similarity(
        features_of()[:, None], quantizer_of().get_codebook()[None, :, :, None, None], dim=2
    )
    assert torch.equal(cosine, angles.argmax(dim=1)) and not torch.equal(plain, cosine)


# --------------------------------------------------------------------------------------------- the model


def test_the_defaults_are_the_ancestors_with_the_scales_of_var():
    model = SimpleVQVAE()
    assert (model.codebook_size, model.quantizer.dim, model.encoder[0].out_channels) == (16, 64, 128)
    assert model.scales == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16) and model.image_size == 64
    decoded, vq_loss, indices = model(pixels(side=64))
    assert decoded.shape == (3, 3, 64, 64) and vq_loss.ndim == 0 and indices.shape == (3, 680)


def test_forward_gives_what_the_codes_say_and_every_weight_a_gradient():
    model, images = build(), pixels()
    decoded, vq_loss, indices = model(images)
    torch.testing.assert_close(model.detokenize(indices), decoded)
    assert torch.equal(model.tokenize(images), indices) and len(indices.unique()) > 3
    quantized, _, loss = model.quantizer(model.encoder(images))
    torch.testing.assert_close(model.decoder(quantized), decoded)
    torch.testing.assert_close(loss, vq_loss)
    ((decoded - images).square().mean() + vq_loss).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_it_is_a_tokenizer_and_its_lists_of_scales_come_back_as_images(tmp_path):
    model, images = build().eval(), pixels()
    model.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.fingerprint() == Tokenizer(model).fingerprint()
    assert (tokenizer.num_codes, tokenizer.image_size, tokenizer.codebook_size) == (21, 16, 16)
    scales = tokenizer.img_to_idxBl(images)
    assert [tuple(part.shape) for part in scales] == [(3, 1), (3, 4), (3, 16)]
    assert torch.equal(tokenizer.idxBl_to_img(scales), tokenizer.decode(tokenizer.encode(images)))
    assert torch.equal(tokenizer.idxBl_to_img(scales), model.idxBl_to_img(model.img_to_idxBl(images)))
    var_input = tokenizer.idxBl_to_var_input(scales)
    assert var_input.shape == (3, 20, 8) and not var_input.requires_grad
    first = model.quantizer.decode_indices(scales[0])
    torch.testing.assert_close(var_input[:, 0], first[:, :, :2, :2].mean(dim=(2, 3)))


def test_training_makes_reconstructions_better_scale_by_scale():
    torch.manual_seed(0)
    model = SimpleVQVAE(32, 16, 32, channels=1, v_patch_nums=(1, 2, 4))
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        images = blobs(16, generator)
        decoded, vq_loss, _ = model(images)
        optimizer.zero_grad()
        ((decoded - images).square().mean() + vq_loss).backward()
        optimizer.step()
    images, tokenizer = blobs(64, generator), Tokenizer(model)
    scales = tokenizer.img_to_idxBl(images)
    errors = [float((tokenizer.idxBl_to_img(scales[:number]) - images).square().mean()) for number in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.3 * float(images.var()), errors


def blobs(number: int, generator: torch.Generator) -> Tensor:
    """Bright discs on dark ground, (number, 1, 16, 16)."""
    centre, radius = (
        torch.rand(number, 2, 1, 1, generator=generator) * 12 + 2,
        torch.rand(number, 1, 1, generator=generator),
    )
    place = torch.arange(16.0)
    distance = (place[:, None] - centre[:, 0]).square() + (place[None, :] - centre[:, 1]).square()
    return torch.sigmoid(2 * (2 + 4 * radius - distance.sqrt()))[:, None]


case = CASES = Cases("option_")


@case
def option_vocab_size():
    assert [build(vocab_size=size).codebook_size for size in (8, 32)] == [8, 32]
    assert build(vocab_size=4)(pixels())[2].max() < 4


@case
def option_embedding_dim():
    assert [build(embedding_dim=dim).idxBl_to_var_input([torch.zeros(1, 1).long()]).shape[2] for dim in (4, 8)] == [
        4,
        8,
    ]


@case
def option_hidden_dim():
    assert [build(hidden_dim=dim).decoder[2].in_channels for dim in (4, 8)] == [4, 8]


@case
def option_channels():
    assert [build(channels=c)(pixels(channels=c))[0].shape[1] for c in (1, 3, 4)] == [1, 3, 4]


@case
def option_image_size():
    assert build(image_size=16).image_size == build().image_size == 16
    with pytest.raises(UserError, match="image_size 32"):
        build(image_size=32)


@case
def option_v_patch_nums():
    model = build(v_patch_nums=[2, 6])
    assert (model.scales, model.image_size) == ((2, 6), 24)
    assert model(pixels(side=24))[2].shape == (3, 40)


@case
def option_beta():
    losses = [build(beta=beta)(pixels())[1].item() for beta in (0.0, 0.5)]
    assert losses[1] == pytest.approx(1.5 * losses[0])


def test_every_option_has_a_case():
    assert CASES.keys() == inspect.signature(SimpleVQVAE).parameters.keys()


@pytest.mark.parametrize("option", CASES)
def test_option_changes_something(option):
    CASES[option]()


MISTAKES = [
    ({"channels": 2}, r"^channels 2 is not possible; use 1 \(grey\), 3 \(colour\) or 4"),
    ({"vocab_size": 1}, r"^vocab_size 1 is not possible; it must be at least 2$"),
    ({"embedding_dim": 0}, r"^embedding_dim 0 is not possible; it must be at least 1$"),
    ({"hidden_dim": 0}, r"^hidden_dim 0 is not possible; it must be at least 1$"),
    ({"image_size": 18}, r"^image_size 18 is not a multiple of 4 \(2 \*\* 2 stride-2 convolutions\); try 16 or 20$"),
    (
        {"image_size": 32},
        r"^v_patch_nums \[1, 2, 4\] ends at 4 but image_size 32 makes a feature map of 8 by 8 \(2",
    ),
    ({"v_patch_nums": [4, 2]}, r"v_patch_nums \[4, 2\] is not a list of growing integers"),
    ({"beta": -1.0}, r"beta -1.0 is out of range"),
]


@pytest.mark.parametrize("options, message", MISTAKES)
def test_a_mistake_is_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        SimpleVQVAE(**{"v_patch_nums": (1, 2, 4), **options})
    assert "\n" not in str(error.value)


def test_images_of_another_kind_are_named():
    for images, message in (
        (pixels(channels=1), r"images of shape \(3, 1, 16, 16\) were given; \(batch, 3, height, width\) is expected"),
        (pixels(side=32), "ends at 4 but the feature map is 8 by 8"),
        (pixels().byte(), "pixels of type torch.uint8 were given"),
    ):
        with pytest.raises(UserError, match=message):
            build()(images)
