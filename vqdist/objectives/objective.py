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
        gradient: (b, c, h, w), of the weighted sum of all terms with respect to the reconstruction.
        reference: (b, c, h, w), the part of it that the adaptive weight compares with.
        feature_loss: 0-d, whose gradient is that of the weighted sum of all terms with respect to the features; its
            value means nothing. None where no term depends on them.
        parts: each term's loss by `NAME_loss`, unweighted, 0-d; of one with a schedule also its weight, `NAME_weight`.
    """

    gradient: Tensor
    reference: Tensor
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
        terms: see `vqdist.objectives.Term`; at least one acts on pixels.
    """

    def __init__(self, terms: Iterable[Any]):
        self.terms = [checked(term) for term in terms]
        names = [term.name for term in self.terms]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two terms are called {name!r}; give one of them another name")
        on_pixels = [term for term in self.terms if term.acts_on == "pixels"]
        if not any(ever_positive(term.weight) for term in on_pixels):
            raise UserError(
                "no term compares pixels with a weight above 0, so nothing would train the decoder; add "
                "{class_path: reconstruction, init_args: {kind: l1}}"
            )
        self._on_features = len(on_pixels) < len(self.terms)
        for term in self.terms:
            if term.reference and (term.acts_on == "features" or not ever_positive(term.weight)):
                why = "its weight is 0" if term.acts_on == "pixels" else "it acts on features"
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

    def at_the_cut(self, recon: Tensor, image: Tensor, out: Any, step: int = 0) -> AtTheCut:
        """Return the gradients of the terms at a reconstruction, and at the features, without a graph.

        Each term runs backward through itself alone; see `vqdist.losses.surrogate` for the rest of the way. A term may
        depend on both: what it acts on says what it is checked for, and whether it may be a reference.

        Args:
            recon: (b, c, h, w) float32, a leaf that requires a gradient.
            image: (b, c, h, w).
            out: what the autoencoder gave.
            step: finished updates, for weights with a schedule.
        """
        out = self._ready(recon, image, out)
        features, out = _cut_at_features(out)
        gradient: Tensor | None = None
        reference: Tensor | None = None
        at_features: Tensor | None = None
        parts = {}
        for term in self.terms:
            weight = weight_at(term.weight, step)
            loss = parts[f"{term.name}_loss"] = self._loss(term, weight, recon, image, out)
            if isinstance(term.weight, Mapping):
                parts[f"{term.name}_weight"] = torch.tensor(weight)
            if not weight:
                continue
            own, of_features = _gradients(loss, weight, recon, None if features is None else out.features)
            gradient, at_features = _plus(gradient, own), _plus(at_features, of_features)
            if term.name in self._reference:
                reference = _plus(reference, own)
        gradient = torch.zeros_like(recon) if gradient is None else gradient  # none has started
        feature_loss = None if features is None or at_features is None else (features * at_features).sum()
        return AtTheCut(gradient, gradient if reference is None else reference, feature_loss, parts)

    def whole(self, recon: Tensor, image: Tensor, out: Any, step: int = 0) -> Whole:
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
        loss = 0 * recon.sum() if loss is None else loss  # none has started
        return Whole(loss, loss if reference is None else reference)

    def _ready(self, recon: Tensor, image: Tensor, out: Any) -> Any:
        """Return `out` with features in float32 for the terms on them; raise `UserError` if the images' shapes differ.

        Of two that differ, torch would repeat one along an axis, with a warning.
        """
        if recon.shape != image.shape:
            raise UserError(
                f"the decoder gave images of shape {tuple(recon.shape)} for images of shape {tuple(image.shape)}; "
                "expected equal shapes"
            )
        if not self._on_features or out.features.dtype != torch.bfloat16:
            return out
        return out._replace(features=out.features.float())

    def _loss(self, term: Any, weight: float, recon: Tensor, image: Tensor, out: Any) -> Tensor:
        with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
            loss = term(recon, image, out)
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"term {term.name} gave {found}; expected a 0-d tensor, the mean over the batch")
        of, on = ("recon", recon) if term.acts_on == "pixels" else ("out.features", getattr(out, "features", recon))
        if weight > 0 and torch.is_grad_enabled() and on.requires_grad and not loss.requires_grad:
            raise UserError(f"the loss of term {term.name} does not depend on {of}, so it would train nothing")
        return loss


def _cut_at_features(out: Any) -> tuple[Tensor | None, Any]:
    """Return the features with their graph, and `out` with a leaf in their place; None where nothing trains them."""
    features = getattr(out, "features", None)
    if features is None or not features.requires_grad:
        return None, out
    return features, out._replace(features=features.detach().requires_grad_())


def _gradients(
    loss: Tensor, weight: float, recon: Tensor, features: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `weight` * `loss` at the reconstruction and at the features; None where it has none."""
    if not loss.requires_grad:  # of features that nothing trains
        return None, None
    leaves = [recon] if features is None else [recon, features]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    weighted = [own if own is None or weight == 1 else weight * own for own in found]
    return weighted[0], None if features is None else weighted[1]


def _plus(total: Tensor | None, value: Tensor | None) -> Tensor | None:
    if total is None or value is None:
        return value if total is None else total
    return total + value
