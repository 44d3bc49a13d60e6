"""One term of the generator's objective: its contract, and the registry of those that have a name."""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.registries import TERMS
from vqdist.schedules import Weight, check_weight


class Term(nn.Module):
    """A loss with its weight; a subclass says in `forward` which.

    `forward(recon, image, out)` returns a 0-d float32 tensor, the mean over the batch. `recon` and `image` are
    (b, c, h, w) in [0, 1], `recon` but for overshoot; `out` is all that the autoencoder gave, a
    `vqdist.models.autoencoder.ForwardPass` with `features`, `indices`, `hidden`. Every rank calls a term on its own
    share.

    A term on pixels is a function of `recon`. The graph is cut there, so that its gradient is taken once and the
    autoencoder is not run backward for each term. A term on features is a function of `out.features`, where the graph
    is cut, too; one that reads both gets its gradient at both. A term on the proxy is a function of `out.proxy`, the
    logits of another tokenizer's codes; where the network makes no images, `recon` is None. A term has no weights that
    are trained: those belong into a network.

    Example:
        class EdgeLoss(Term):
            def forward(self, recon, image, out):
                edges = recon.diff(dim=-1) - image.diff(dim=-1)
                return edges.abs().mean()

    Args:
        weight: factor of the loss, a number or a schedule as `{value: 0.1, start: 1000, ramp_steps: 500}` (see
            `vqdist.schedules.WeightSchedule`); 0 measures it only.
        reference: whether the adaptive weight of the adversarial loss compares with this term. Where no term says so,
            all terms on pixels are the reference.
        name: what the loss is logged as, with `_loss` behind; by default the name of the class in lower case.

    Attributes:
        acts_on: "pixels", "features" or "proxy".
    """

    acts_on: ClassVar[Literal["pixels", "features", "proxy"]] = "pixels"

    def __init__(self, weight: Weight = 1.0, *, reference: bool = False, name: str | None = None):
        super().__init__()
        self.weight = weight
        self.reference = reference
        self.name = name or default_name(type(self))

    def check_image_size(self, size: int) -> None:
        """Raise `UserError` if square images of this side (in pixels) are too small for this term."""

    def forward(self, recon: Tensor, image: Tensor, out: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward(recon, image, out)")


RESERVED = ("aux", "adversarial", "discr", "lecam", "adaptive", "quantizer")
"""Names that no term has: the trainer logs a loss or a weight of its own under each."""


def default_name(cls: Any) -> str:
    """Return a class's or function's name as logs write it: `EdgeLoss` is "edge"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    return re.sub(r"_(loss|term)$", "", words)


def checked(term: Any) -> Any:
    """Return a term with all attributes of the contract; raise `UserError` for what cannot be a term.

    A callable that is no `Term` is taken with weight 1 and the name of its class (or its own, of a function) where it
    says nothing else.
    """
    if inspect.isclass(term):
        raise UserError(f"term {term.__name__} is a class; give an object of it, or its import path")
    if not callable(term):
        raise UserError(f"{type(term).__name__} is no {TERMS.contract}")
    named_after = term if inspect.isroutine(term) else type(term)
    defaults = {"weight": 1.0, "reference": False, "name": default_name(named_after), "acts_on": "pixels"}
    for attribute, value in defaults.items():
        if not hasattr(term, attribute):
            setattr(term, attribute, value)
    check_weight(term.weight, f"weight of term {term.name}")
    if term.name in RESERVED:
        raise UserError(
            f"a term is called {term.name!r}, and the trainer logs a loss or weight of that name; give it another"
        )
    if term.acts_on not in ("pixels", "features", "proxy"):
        raise UserError(f"term {term.name} acts on {term.acts_on!r}; it must be pixels, features or proxy")
    if isinstance(term, nn.Module):
        trained = [name for name, weight in term.named_parameters() if weight.requires_grad]
        if trained:
            raise UserError(
                f"term {term.name} has weights that nothing would train ({', '.join(trained[:3])}); freeze them with "
                "requires_grad_(False), or make them part of a network"
            )
        term.eval()  # a frozen network within it has no statistics to move
    return term
