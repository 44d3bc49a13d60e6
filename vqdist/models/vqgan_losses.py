"""The loss of each player of a VQGAN, for a training loop of one's own; the trainer has the same terms at its cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from vqdist import losses
from vqdist.errors import UserError
from vqdist.models.autoencoder import ForwardPass
from vqdist.models.networks.base import logits_of_both

if TYPE_CHECKING:
    from vqdist.models.vqgan import VQGanVAE


def generator_loss(model: VQGanVAE, image: Tensor, out: ForwardPass, step: int) -> Tensor:
    """Return what encoder, quantizer and decoder minimise, with the adaptive weight; 0-d.

    Args:
        model: with the objective and the discriminator.
        image: (b, c, h, w).
        out: of the model's autoencoder for these images.
        step: finished updates.
    """
    terms = model.objective().whole(out.recon, image, out, step)
    total = terms.loss + out.aux_loss
    if model.discriminator is None or out.recon is None:
        return total
    # with weights held fixed: the generator's loss leaves no gradient in the discriminator
    fixed = {name: weight.detach() for name, weight in model.discriminator.named_parameters()}
    adversarial = model.adversarial_loss(torch.func.functional_call(model.discriminator, fixed, (out.recon,)))
    if model.autoencoder.last_layer is None:
        return total + adversarial
    weight = model.autoencoder.last_layer.weight
    of_reference, of_adversarial = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (terms.reference, adversarial)
    )
    return total + losses.adaptive_weight(of_reference, of_adversarial) * adversarial


def critic_loss(model: VQGanVAE, image: Tensor, out: ForwardPass, add_gradient_penalty: bool) -> Tensor:
    """Return what the discriminator minimises; 0-d. See `generator_loss`.

    Raises:
        UserError: there is none.
    """
    critic = model.discriminator
    if critic is None:
        raise UserError("return_discr_loss is set but this model has no discriminator; build it with use_gan=True")
    recon = cast(Tensor, out.recon).detach()  # there is one, see `VQGanVAE.forward`
    loss = model.discriminator_loss(*logits_of_both(critic, critic, image, recon))
    return loss + losses.gradient_penalty(critic, image) if add_gradient_penalty else loss
