"""The difference of pixels."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from vqdist import losses
from vqdist.errors import UserError
from vqdist.objectives.base import Term
from vqdist.schedules import Weight

KINDS = ("l1", "l2", "smooth_l1", "both")


class Reconstruction(Term):
    """Mean difference of reconstruction and image; see `vqdist.losses.reconstruction_loss`.

    Args:
        kind: `l1`, `l2`, `smooth_l1`, or `both`, the sum of the first two.
        weight, reference, name: see `Term`.
    """

    def __init__(
        self,
        kind: Literal["l1", "l2", "smooth_l1", "both"] = "l1",
        weight: Weight = 1.0,
        *,
        reference: bool = False,
        name: str = "recon",
    ):
        super().__init__(weight, reference=reference, name=name)
        if kind not in KINDS:
            raise UserError(f"the kind of reconstruction loss {kind!r} is not known; choose one of {', '.join(KINDS)}")
        self.kind = kind

    def forward(self, recon: Tensor, image: Tensor, out: Any = None) -> Tensor:
        return losses.reconstruction_loss(recon, image, self.kind)
