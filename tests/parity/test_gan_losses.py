"""Adversarial losses, LeCAM and R1 against those of the field's own code."""

from __future__ import annotations

import pytest
import torch
from fixtures import in_unit_range, tensors, values, weights
from torch import Tensor

from vqdist import UserError, VQGanVAE, losses
from vqdist.models.networks.patchgan import PatchGAN
from vqdist.objectives.adversarial import DISCR_LOSSES, GEN_LOSSES, LeCam

NUMBERS = values("gan_losses")
OF_DISCRIMINATOR = {
    "taming.hinge_d": "hinge",
    "taming.vanilla_d": "vanilla",
    "muse.hinge_d": "hinge_sum",
    "muse.bce_d": "vanilla_sum",
    "seed.non_saturate_d": "non_saturating",
}
OF_GENERATOR = {
    "taming.generator": "hinge",
    "llamagen.hinge_g": "hinge",
    "muse.bce_g": "vanilla",
    "bsqvit.vanilla_g": "vanilla",
    "seed.non_saturate_g": "non_saturating",
}


def logits() -> tuple[Tensor, Tensor]:
    theirs = tensors("gan_losses")
    return theirs["in.logits_real"].requires_grad_(), theirs["in.logits_fake"].requires_grad_()


def assert_is(loss: Tensor, real: Tensor, fake: Tensor, expected: dict) -> None:
    assert loss.item() == pytest.approx(expected["value"], abs=1e-6)
    gradients = torch.autograd.grad(loss, [real, fake], allow_unused=True)
    for gradient, name in zip(gradients, ("grad_norm_real", "grad_norm_fake"), strict=True):
        norm = None if gradient is None else gradient.norm().item()
        assert norm == (None if expected[name] is None else pytest.approx(expected[name], rel=1e-5)), name


@pytest.mark.parametrize("theirs, ours", OF_DISCRIMINATOR.items())
def test_losses_of_the_discriminator(theirs, ours):
    real, fake = logits()
    assert_is(DISCR_LOSSES[ours](real, fake), real, fake, NUMBERS[theirs])


@pytest.mark.parametrize("theirs, ours", OF_GENERATOR.items())
def test_losses_of_the_generator(theirs, ours):
    real, fake = logits()
    assert_is(GEN_LOSSES[ours](fake), real, fake, NUMBERS[theirs])


def test_every_name_has_a_fixture_and_what_is_published_wrongly_has_no_name():
    assert set(OF_DISCRIMINATOR.values()) == set(DISCR_LOSSES) and set(OF_GENERATOR.values()) == set(GEN_LOSSES)


AVERAGES = torch.tensor([0.4, -0.5])


def test_lecam_per_logit_and_of_means():
    real, fake = logits()
    assert_is(losses.lecam_per_logit(real, fake, AVERAGES), real, fake, NUMBERS["seed.lecam_reg_at_0.4_-0.5"])
    of_means = losses.lecam_of_means(real.mean(), fake.mean(), AVERAGES)
    assert_is(of_means, real, fake, NUMBERS["onedtok.lecam_at_0.4_-0.5"])


def test_lecams_averages_move_before_the_loss_or_after_it():
    real, fake = logits()
    lecam = LeCam("per_logit", 0.999, lambda tensor: tensor)
    found = [lecam.loss([real], [fake]).item() for _ in range(3)]
    assert found == pytest.approx(NUMBERS["seed.lecam_three_steps_from_zero"], abs=1e-6)
    means = torch.stack([real.mean(), fake.mean()]).detach()
    assert torch.allclose(lecam.averages, (1 - 0.999**3) * means, rtol=1e-4)
    lecam = LeCam("of_means", 0.9, lambda tensor: tensor)
    lecam.averages.copy_(AVERAGES)
    assert_is(lecam.loss([real], [fake]), real, fake, NUMBERS["onedtok.lecam_at_0.4_-0.5"])
    assert torch.allclose(lecam.averages, 0.9 * AVERAGES + 0.1 * means)


def test_shares_of_a_batch_give_lecams_gradient_of_the_whole():
    """With two ranks, each with its image: the mean of their gradients is that of both images."""
    torch.manual_seed(0)
    real, fake = torch.randn(2, 2, 1, 5, 6, requires_grad=True)
    for form in ("per_logit", "of_means"):
        whole = LeCam(form, 0.5, lambda tensor: tensor)
        whole.averages.copy_(AVERAGES)
        expected = torch.autograd.grad(whole.loss([real], [fake]), [real, fake])
        means = torch.stack([real.mean(), fake.mean()]).detach()
        values_of_ranks, gradients = [], []
        for rank in (0, 1):
            share = LeCam(form, 0.5, lambda tensor, means=means: tensor.copy_(means))
            share.averages.copy_(AVERAGES)
            loss = share.loss([real[rank : rank + 1]], [fake[rank : rank + 1]])
            gradients.append(torch.autograd.grad(loss, [real, fake]))
            values_of_ranks.append(loss.item())
            assert torch.allclose(share.averages, whole.averages)
        for k, gradient in enumerate(expected):
            assert torch.allclose((gradients[0][k] + gradients[1][k]) / 2, gradient, atol=1e-6)


@pytest.mark.parametrize(
    "name, options",
    [("nlayer_discriminator", {}), ("nlayer_discriminator_actnorm", {"layers": 2, "norm": "actnorm"})],
)
def test_r1_is_half_the_weight_times_the_squared_gradient(name, options):
    network = PatchGAN(8, **options)
    network.load_state_dict(weights(name))
    real = in_unit_range(tensors(name)["in.real"])
    penalty = losses.gradient_penalty(network, real, 10.0, "r1").item()
    # of images in [0, 1], in which the gradient is twice that in [-1, 1]
    assert penalty == pytest.approx(4 * 10 / 2 * values(name)["r1"], rel=1e-4)


def test_the_adaptive_weight_of_each_publication():
    reference, adversarial = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2e-4])
    assert losses.adaptive_weight(reference, adversarial, form="taming").item() == 1e4
    assert losses.adaptive_weight(reference / 100, adversarial, form="taming").item() == pytest.approx(0.05 / 3e-4)
    assert losses.adaptive_weight(reference / 100, adversarial).item() == pytest.approx(0.05 / 2e-4)
    assert losses.adaptive_weight(reference / 1e9, 0 * adversarial).item() == pytest.approx(5e-9 / 1e-8)


# By name


SMALL = {"dim": 16, "layers": 2, "discr_layers": 2, "codebook_size": 16, "perceptual": "none"}


@pytest.mark.parametrize("discr, gen", [("hinge", None), (None, "non_saturating"), ("vanilla", "vanilla")])
def test_a_model_takes_the_losses_by_name(discr, gen):
    real, fake = logits()
    vae = VQGanVAE(**SMALL, discr_loss=discr, gen_loss=gen)
    assert torch.equal(vae.discriminator_loss(real, fake), DISCR_LOSSES[discr or "hinge_sum"](real, fake))
    assert torch.equal(vae.adversarial_loss([fake, fake]), GEN_LOSSES[gen or "hinge"](fake))


def test_the_losses_of_before_are_still_the_default():
    real, fake = logits()
    for hinge, names in ((True, ("hinge_sum", "hinge")), (False, ("vanilla_sum", "vanilla"))):
        vae = VQGanVAE(**SMALL, use_hinge_loss=hinge)
        assert torch.equal(vae.discriminator_loss(real, fake), DISCR_LOSSES[names[0]](real, fake))
        assert torch.equal(vae.adversarial_loss(fake), GEN_LOSSES[names[1]](fake))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"discr_loss": "hinges"}, "no discr_loss 'hinges'; nearest: hinge"),
        ({"gen_loss": "wgan"}, "no gen_loss 'wgan'; there are hinge, vanilla, non_saturating"),
        ({"discr_loss": "hinge", "gen_loss": "hinge", "use_hinge_loss": False}, "use_hinge_loss false does nothing"),
        ({"discr_loss": "hinge", "use_gan": False}, "discr_loss or gen_loss is given but there is no discriminator"),
    ],
)
def test_losses_that_cannot_be_are_named(options, message):
    with pytest.raises(UserError, match=message):
        VQGanVAE(**{**SMALL, **options})
