"""The sum of the terms, twice: cut at the reconstruction for the trainer, and whole for a loop of one's own.

Shapes: `b` batch, `c` channel, `h w` image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.objectives.base import checked
from vqdist.schedules import ever_positive, weight_at


class AtTheCut(NamedTuple):
    """The terms of one micro-batch, with the graph cut at the reconstruction.

    Attributes:
        gradient: (b, c, h, w), of the weighted sum of all terms with respect to the reconstruction; None without one.
        reference: (b, c, h, w), the part of it that the adaptive weight compares with; likewise.
        feature_loss: 0-d, whose gradient is that of the weighted sum of all terms with respect to the features and to
            the logits of proxy codes; its value means nothing. None where no term depends on them.
        parts: each term's loss by `NAME_loss`, unweighted, 0-d; of one with a schedule also its weight, `NAME_weight`.
    """

    gradient: Tensor | None
    reference: Tensor | None
    feature_loss: Tensor | None
    parts: dict[str, Tensor]


class Whole(NamedTuple):
    """The terms of one batch with their graph.

    Attributes:
        loss: the weighted sum of all terms, 0-d.
        reference: the weighted sum of the reference terms, 0-d.
    """

    loss: Tensor
    reference: Tensor


class Objective:
    """The terms that a tokenizer's generator minimises besides the quantizer's and the adversarial loss.

    Args:
        terms: see `vqdist.objectives.Term`; at least one acts on pixels, or on the proxy codes of a decoder that
            predicts these.
    """

    def __init__(self, terms: Iterable[Any]):
        self.terms = [checked(term) for term in terms]
        names = [term.name for term in self.terms]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two terms are called {name!r}; give one of them another name")
        on_pixels = [term for term in self.terms if term.acts_on == "pixels"]
        of_decoder = [term for term in self.terms if term.acts_on != "features"]
        if not any(ever_positive(term.weight) for term in of_decoder):
            raise UserError(
                "no term compares pixels with a weight above 0, so nothing would train the decoder; add "
                "{class_path: reconstruction, init_args: {kind: l1}}"
            )
        self._on_features = len(on_pixels) < len(self.terms)
        for term in self.terms:
            if term.reference and (term.acts_on != "pixels" or not ever_positive(term.weight)):
                why = "its weight is 0" if term.acts_on == "pixels" else f"it acts on {term.acts_on}"
                raise UserError(f"reference of term {term.name} does nothing, because {why}; leave it out")
        chosen = [term for term in on_pixels if term.reference]
        self._reference = {term.name for term in chosen or on_pixels}

    def __iter__(self) -> Iterator[Any]:
        return iter(self.terms)

    def to(self, device: torch.device) -> Objective:
        """Move what the terms hold to a device, in place."""
        for term in self.terms:
            if isinstance(term, nn.Module):
                term.to(device)
        return self

    def check_image_size(self, size: int) -> None:
        """Raise `UserError` if square images of this side (in pixels) are too small for one of the terms."""
        for term in self.terms:
            if hasattr(term, "check_image_size"):
                term.check_image_size(size)

    def at_the_cut(self, recon: Tensor | None, image: Tensor, out: Any, step: int = 0) -> AtTheCut:
        """Return the gradients of the terms at a reconstruction, features and proxy codes, without a graph.

        Each term runs backward through itself alone; see `vqdist.losses.surrogate` for the rest of the way. A term may
        depend on several: what it acts on says what it is checked for, and whether it may be a reference.

        Args:
            recon: (b, c, h, w) float32, a leaf that requires a gradient; None of a network that makes no images.
            image: (b, c, h, w).
            out: what the autoencoder gave.
            step: finished updates, for weights with a schedule.
        """
        cuts, out = _cut(self._ready(recon, image, out))
        leaves = [*([] if recon is None else [recon]), *(cut.leaf for cut in cuts)]
        total: list[Tensor | None] = [None] * len(leaves)
        reference: Tensor | None = None
        parts = {}
        for term in self.terms:
            weight = weight_at(term.weight, step)
            loss = parts[f"{term.name}_loss"] = self._loss(term, weight, recon, image, out)
            if isinstance(term.weight, Mapping):
                parts[f"{term.name}_weight"] = torch.tensor(weight)
            if not weight:
                continue
            own = _gradients(loss, weight, leaves)
            total = [_plus(before, added) for before, added in zip(total, own, strict=True)]
            if term.name in self._reference and recon is not None:
                reference = _plus(reference, own[0])
        feature_loss = _loss_behind(cuts, total[len(total) - len(cuts) :])
        if recon is None:
            return AtTheCut(None, None, feature_loss, parts)
        gradient = torch.zeros_like(recon) if total[0] is None else total[0]  # none has started
        return AtTheCut(gradient, gradient if reference is None else reference, feature_loss, parts)

    def whole(self, recon: Tensor | None, image: Tensor, out: Any, step: int = 0) -> Whole:
        """Return the weighted sums with their graph; weights with a schedule are those of this step."""
        out = self._ready(recon, image, out)
        loss, reference = None, None
        for term in self.terms:
            weight = weight_at(term.weight, step)
            if not weight:
                continue
            own = weight * self._loss(term, weight, recon, image, out)
            loss = own if loss is None else loss + own
            if term.name in self._reference:
                reference = own if reference is None else reference + own
        loss = 0 * (out.proxy if recon is None else recon).sum() if loss is None else loss  # none has started
        return Whole(loss, loss if reference is None else reference)

    def _ready(self, recon: Tensor | None, image: Tensor, out: Any) -> Any:
        """Return `out` in float32 for the terms on features and on the proxy; raise `UserError` if shapes differ.

        Of two images that differ, torch would repeat one along an axis, with a warning.
        """
        if recon is not None and recon.shape != image.shape:
            raise UserError(
                f"the decoder gave images of shape {tuple(recon.shape)} for images of shape {tuple(image.shape)}; "
                "expected equal shapes"
            )
        if not self._on_features:
            return out
        halves = {name: value for name in CUT if (value := _tensor_of(out, name)) is not None}
        return out._replace(**{name: one.float() for name, one in halves.items() if one.dtype == torch.bfloat16})

    def _loss(self, term: Any, weight: float, recon: Tensor | None, image: Tensor, out: Any) -> Tensor:
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            loss = term(recon, image, out)
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"term {term.name} gave {found}; expected a 0-d tensor, the mean over the batch")
        of, on = ("recon", recon)
        if term.acts_on != "pixels":
            of, on = f"out.{term.acts_on}", getattr(out, term.acts_on, recon)
        wanted = weight > 0 and torch.is_grad_enabled() and on is not None and on.requires_grad
        if wanted and not loss.requires_grad:
            raise UserError(f"the loss of term {term.name} does not depend on {of}, so it would train nothing")
        return loss


CUT = ("features", "proxy")
"""Outputs of a network, besides images, that a term may act on."""


class _Cut(NamedTuple):
    """A tensor with its graph, and the leaf that stands in its place for the terms."""

    graph: Tensor
    leaf: Tensor


def _tensor_of(out: Any, name: str) -> Tensor | None:
    found = getattr(out, name, None)
    return found if isinstance(found, Tensor) else None


def _cut(out: Any) -> tuple[list[_Cut], Any]:
    """Return what is cut, and `out` with leaves in its place; what nothing trains is left as it is."""
    graphs = {name: one for name in CUT if (one := _tensor_of(out, name)) is not None and one.requires_grad}
    if not graphs:
        return [], out
    cuts = {name: _Cut(graph, graph.detach().requires_grad_()) for name, graph in graphs.items()}
    return list(cuts.values()), out._replace(**{name: cut.leaf for name, cut in cuts.items()})


def _loss_behind(cuts: list[_Cut], gradients: list[Tensor | None]) -> Tensor | None:
    """Return a loss (0-d) with these gradients at what was cut; None where no term depends on it."""
    losses = [(cut.graph * own).sum() for cut, own in zip(cuts, gradients, strict=True) if own is not None]
    return sum(losses[1:], start=losses[0]) if losses else None


def _gradients(loss: Tensor, weight: float, leaves: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients of `weight` * `loss` at the leaves; None where it has none."""
    if not loss.requires_grad:  # of features that nothing trains
        return [None] * len(leaves)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [own if own is None or weight == 1 else weight * own for own in found]


def _plus(total: Tensor | None, value: Tensor | None) -> Tensor | None:
    if total is None or value is None:
        return value if total is None else total
    return total + value
