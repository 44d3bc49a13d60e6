"""The two players' losses by name, and LeCAM's moving averages of the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vqdist import losses
from vqdist.errors import UserError
from vqdist.names import unknown


def _halved(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda real, fake: 0.5 * loss(real, fake)


# what the discriminator minimises, of logits of real images and of reconstructions (b, ...)
DISCR_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": _halved(losses.hinge_discriminator_loss),  # taming, LlamaGen, SEED-Voken, 1d-tokenizer, bsq-vit
    "vanilla": _halved(losses.bce_discriminator_loss),  # taming, LlamaGen, bsq-vit
    "non_saturating": losses.non_saturating_discriminator_loss,  # SEED-Voken
    "hinge_sum": losses.hinge_discriminator_loss,  # muse
    "vanilla_sum": losses.bce_discriminator_loss,  # muse
}
# what the generator minimises, of logits of reconstructions
GEN_LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "hinge": losses.hinge_generator_loss,  # also of taming's vanilla discriminator
    "vanilla": losses.bce_generator_loss,
    "non_saturating": losses.non_saturating_generator_loss,
}


def names_of_losses(discr_loss: str | None, gen_loss: str | None, use_hinge_loss: bool) -> tuple[str, str]:
    """Return the names of the discriminator's loss and of the generator's.

    Args:
        discr_loss: a name of `DISCR_LOSSES`; None for muse's.
        gen_loss: a name of `GEN_LOSSES`; None for muse's.
        use_hinge_loss: which of muse's losses are meant by None.

    Raises:
        UserError: a name is not known, or `use_hinge_loss` would not be read.
    """
    if not use_hinge_loss and discr_loss is not None and gen_loss is not None:
        raise UserError(
            "use_hinge_loss false does nothing, because discr_loss and gen_loss are both given; leave it out"
        )
    discr_loss = discr_loss or ("hinge_sum" if use_hinge_loss else "vanilla_sum")
    gen_loss = gen_loss or ("hinge" if use_hinge_loss else "vanilla")
    if discr_loss not in DISCR_LOSSES:
        raise unknown("discr_loss", discr_loss, DISCR_LOSSES)
    if gen_loss not in GEN_LOSSES:
        raise unknown("gen_loss", gen_loss, GEN_LOSSES)
    return discr_loss, gen_loss


class LeCam:
    """LeCAM regularisation (arXiv 2104.03310): logits should not leave the moving averages of the other kind.

    Args:
        form: `per_logit` (SEED-Voken): squares of every logit, and the averages move before the loss is computed;
            `of_means` (1d-tokenizer): squares of the two mean logits, and the averages move afterwards.
        decay: of the averages, which begin at 0.
        over_ranks: returns the mean over ranks of a tensor, in place.
        device: where the averages lie.

    Attributes:
        averages: (2,) float32, of the mean logits of real images and of reconstructions; equal on every rank.
    """

    def __init__(
        self,
        form: Literal["per_logit", "of_means"],
        decay: float,
        over_ranks: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ):
        self.form = form
        self.decay = decay
        self.over_ranks = over_ranks
        self.averages = torch.zeros(2, device=device)

    def loss(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """Return the loss (0-d) of one micro-batch's logits, and move the averages; every rank calls this."""
        means = torch.stack([_mean(real), _mean(fake)])
        of_all = self.over_ranks(means.detach().clone())
        if self.form == "per_logit":
            self._move(of_all)
            return losses.over_outputs(partial(losses.lecam_per_logit, averages=self.averages.clone()), real, fake)
        # the value of all ranks, with the gradient of this rank's share: the ranks' gradients average to the whole's
        means = means + (of_all - means).detach()
        loss = losses.lecam_of_means(means[0], means[1], self.averages.clone())
        self._move(of_all)
        return loss

    def _move(self, means: Tensor) -> None:
        self.averages.mul_(self.decay).add_(means, alpha=1 - self.decay)


def _mean(logits: list[Tensor]) -> Tensor:
    return torch.stack([output.to(torch.float32).mean() for output in logits]).mean()
