"""The sum of the terms, twice: cut at the reconstruction for the trainer, and whole for a loop of one's own.

Shapes: `b` batch, `c` channel, `h w` image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.objectives.base import checked


class AtTheCut(NamedTuple):
    """The terms of one micro-batch, with the graph cut at the reconstruction.

    Attributes:
        gradient: (b, c, h, w), of the weighted sum of the terms on pixels with respect to the reconstruction.
        reference: (b, c, h, w), the part of it that the adaptive weight compares with.
        feature_loss: the weighted sum of the terms on features, 0-d, with its graph; None where there are none.
        parts: each term's loss by `NAME_loss`, unweighted, 0-d.
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
        if not any(term.weight > 0 for term in on_pixels):
            raise UserError(
                "no term compares pixels with a weight above 0, so nothing would train the decoder; add "
                "{class_path: reconstruction, init_args: {kind: l1}}"
            )
        self._on_features = len(on_pixels) < len(self.terms)
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

    def at_the_cut(self, recon: Tensor, image: Tensor, out: Any) -> AtTheCut:
        """Return the gradients of the terms at a reconstruction without a graph.

        Each term on pixels runs backward through itself alone; see `vqdist.losses.surrogate` for the rest of the way.

        Args:
            recon: (b, c, h, w) float32, a leaf that requires a gradient.
            image: (b, c, h, w).
            out: what the autoencoder gave.
        """
        out = self._ready(recon, image, out)
        gradient: Tensor | None = None
        reference: Tensor | None = None
        feature_loss: Tensor | None = None
        parts = {}
        for term in self.terms:
            loss = parts[f"{term.name}_loss"] = self._loss(term, recon, image, out)
            if not term.weight:
                continue
            if term.acts_on == "features":
                feature_loss = _plus(feature_loss, term.weight * loss)
                continue
            (own,) = torch.autograd.grad(loss, recon)
            own = own if term.weight == 1 else term.weight * own
            gradient = _plus(gradient, own)
            if term.name in self._reference:
                reference = _plus(reference, own)
        assert gradient is not None  # of a term on pixels, which __init__ asks for
        return AtTheCut(gradient, gradient if reference is None else reference, feature_loss, parts)

    def whole(self, recon: Tensor, image: Tensor, out: Any) -> Whole:
        """Return the weighted sums with their graph."""
        out = self._ready(recon, image, out)
        loss, reference = None, None
        for term in self.terms:
            if not term.weight:
                continue
            own = term.weight * self._loss(term, recon, image, out)
            loss = _plus(loss, own)
            if term.name in self._reference:
                reference = _plus(reference, own)
        assert loss is not None
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

    def _loss(self, term: Any, recon: Tensor, image: Tensor, out: Any) -> Tensor:
        with torch.set_grad_enabled(term.weight > 0 and torch.is_grad_enabled()):
            loss = term(recon, image, out)
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"term {term.name} gave {found}; expected a 0-d tensor, the mean over the batch")
        of, on = ("recon", recon) if term.acts_on == "pixels" else ("out.features", getattr(out, "features", recon))
        if term.weight > 0 and torch.is_grad_enabled() and on.requires_grad and not loss.requires_grad:
            raise UserError(f"the loss of term {term.name} does not depend on {of}, so it would train nothing")
        return loss


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value
