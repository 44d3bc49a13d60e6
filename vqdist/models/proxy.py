"""The codes of another tokenizer as what a decoder learns: the first stage of TiTok (arXiv 2406.07550).

Shapes: `b` batch, `c` channel, `h w` image, `v` codes of the other tokenizer, `h' w'` their map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.autoencoder import VQAutoencoder
from vqdist.models.tokenizer import Tokenizer, TokenizerNetwork
from vqdist.objectives.base import Term
from vqdist.objectives.frozen import HoldsFrozen
from vqdist.schedules import Weight


class ProxyCodes(HoldsFrozen, Term):
    """Cross-entropy of the codes that another tokenizer, the target, gives to the images; nats, the mean over codes.

    The decoder gives logits of these codes, as `titok_proxy` does. The target is no part of the model: neither a
    checkpoint nor an export holds it.

    Args:
        tokenizer: the target: a published file, an export or a run; in Python also a `Tokenizer`, frozen in place.
        weight, name: see `Term`.
        fingerprint: of what makes the target's codes; another target is refused. A run records it.
    """

    acts_on: ClassVar[Literal["pixels", "features", "proxy"]] = "proxy"

    def __init__(
        self,
        tokenizer: str | Path | Tokenizer,
        *,
        weight: Weight = 1.0,
        fingerprint: str | None = None,
        name: str = "proxy",
    ):
        super().__init__(weight, name=name)
        target = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.from_pretrained(tokenizer)
        self.fingerprint = target.codes_fingerprint()
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise UserError(
                f"term proxy_codes was begun with a tokenizer of fingerprint {fingerprint[:12]}, and {tokenizer} has "
                f"{self.fingerprint[:12]}: its codes are others; give the one from before"
            )
        self._model = (target._model[0],)  # in a tuple, which nn.Module does not look into
        self.hide(target.network)

    @property
    def target(self) -> TokenizerNetwork:
        """The other tokenizer's network."""
        return cast(TokenizerNetwork, self._hidden[0])

    def recorded_arguments(self) -> dict[str, Any]:
        """Return what the record of the run says besides the arguments that were given."""
        return {"fingerprint": self.fingerprint}

    def check_network(self, network: VQAutoencoder, image_size: int) -> None:
        """Raise `UserError` unless a network's decoder has a logit for each code of the target.

        Args:
            network: with the decoder.
            image_size: side of the images in pixels.
        """
        decoder, target = network.decoder, self.target
        if not network.gives_proxy:
            raise UserError(
                f"term proxy_codes needs a decoder that predicts codes, and {type(decoder).__name__} does not; give "
                "decoder titok_proxy, or another term"
            )
        if target.num_levels != 1 or target.scales is not None:
            raise UserError("the tokenizer of term proxy_codes has several codes a position; give one with one")
        there = (tuple(self._model[0].code_shape(image_size)), target.codebook_size, target.channels)
        here = (tuple(decoder.proxy_shape), decoder.proxy_codebook_size, network.channels)
        if there != here:
            raise UserError(
                f"the tokenizer of term proxy_codes gives {_described(*there)} for images of {image_size} pixels, and "
                f"decoder {type(decoder).__name__} predicts {_described(*here)}; make them equal"
            )

    def forward(self, recon: Tensor | None, image: Tensor, out: Any) -> Tensor:
        """Images (b, c, h, w) in [0, 1] and `out` with its logits `proxy` (b, v, h', w') -> the loss, 0-d."""
        return F.cross_entropy(out.proxy, self.codes(image))

    @torch.no_grad()
    def codes(self, image: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> the target's codes (b, h', w')."""
        return self.target.tokenize(image)


class ByTarget(TokenizerNetwork):
    """A tokenizer network whose images the target makes, of the likeliest of its codes.

    So the first stage of TiTok is measured and drawn, whose own decoder makes no images.

    Args:
        network: the first stage.
        term: with the target.

    Attributes:
        hits: (2,) float64 on the device of the images: codes of the target that were predicted, and all codes.
        loss: sum of the cross-entropy over the codes, 0-d float64.
    """

    def __init__(self, network: VQAutoencoder, term: ProxyCodes):
        super().__init__()
        self.inner = network
        self.term = (term,)  # in a tuple: it stays in eval mode
        self.quantizer = network.quantizer
        self.training = network.training
        self.hits = torch.zeros(2, dtype=torch.float64)
        self.loss = torch.zeros((), dtype=torch.float64)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.inner.channels

    @property
    def codebook_size(self) -> int:
        """Codes of the first stage."""
        return self.inner.codebook_size

    @property
    def num_levels(self) -> int:
        """Codes a position of the first stage."""
        return self.inner.num_levels

    @property
    def scales(self) -> tuple[int, ...] | None:
        """Sides of the maps of codes, where the first stage has several."""
        return self.inner.scales

    def tokenize(self, image: Tensor) -> Tensor:
        return self.inner.tokenize(image)

    def detokenize(self, ids: Tensor) -> Tensor:
        return self.inner.detokenize(ids)

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, c, h, w) -> those of the predicted codes, and the codes of the first stage; counts hits."""
        out, (term,) = self.inner(image), self.term
        logits, codes = cast(Tensor, out.proxy).float(), term.codes(image)
        predicted = logits.argmax(dim=1)
        found = (predicted == codes).sum(dtype=torch.float64)
        self.hits = self.hits.to(found.device) + torch.stack([found, torch.full_like(found, codes.numel())])
        self.loss = self.loss.to(found.device) + F.cross_entropy(logits, codes, reduction="sum").double()
        return term.target.detokenize(predicted), out.indices


def _described(shape: tuple[int, ...], codes: int, channels: int) -> str:
    return f"{' x '.join(map(str, shape))} of {codes} codes for {channels} channels"
