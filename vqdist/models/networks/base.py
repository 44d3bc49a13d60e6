"""The contracts of the networks around a quantizer: all that a trainer reads of them.

A network is a `torch.nn.Module` that has these members besides; no base class is needed. Images are in [0, 1].

Shapes: `b` batch, `c` channel, `h w` image, `d` width of the features, `h' w'` map of codes, `n` codes in a row.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.parts import Registry


@runtime_checkable
class Encoder(Protocol):
    """Images (b, c, h, w) -> features (b, d, h', w'), or (b, n, d) of a row of tokens.

    Attributes:
        dim: width of the features, d.
    """

    dim: int

    def code_shape(self, image_size: int) -> tuple[int, ...]:
        """Return the shape of the codes of a square image of this side in pixels: (h', w'), or (n,) of a row.

        Raises:
            UserError: images of this size cannot be encoded.
        """
        ...


@runtime_checkable
class Decoder(Protocol):
    """Features (b, d, h', w') or (b, n, d) -> the input of `last_layer`, whose output is the image (b, c, h, w).

    Attributes:
        last_layer: a convolution, called on what `forward` returns; the adaptive weight of the adversarial loss is
            computed from its input. None where `forward` returns the image: then there is no adaptive weight.
    """

    last_layer: nn.Conv2d | None


@runtime_checkable
class Discriminator(Protocol):
    """Images (b, c, h, w) -> logits with the batch first, positive for real, or a list of such tensors.

    Attributes:
        min_image_size: the smallest side of an image, in pixels, that it takes.
    """

    min_image_size: int


MODULES = "vqdist.models.networks."
# an encoder may ask for `channels`, a decoder for `channels` and `dim`, a discriminator for `channels`
ENCODERS: Registry[Any] = Registry(
    "encoder", Encoder, contract="encoder (vqdist.models.networks.Encoder)", modules=(f"{MODULES}conv",)
)
DECODERS: Registry[Any] = Registry(
    "decoder", Decoder, contract="decoder (vqdist.models.networks.Decoder)", modules=(f"{MODULES}conv",)
)
DISCRIMINATORS: Registry[Any] = Registry(
    "discriminator",
    Discriminator,
    contract="discriminator (vqdist.models.networks.Discriminator)",
    modules=(f"{MODULES}patch",),
)


def require_module(network: Any, kind: str) -> nn.Module:
    """Return the network; raise `UserError` unless it is a `torch.nn.Module`."""
    if not isinstance(network, nn.Module):
        raise UserError(f"{kind} {type(network).__name__} is no torch.nn.Module; derive it from that")
    return network


def logits_of(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Return the tensors of logits that a discriminator gave, as a list."""
    return [output] if isinstance(output, Tensor) else list(output)


def halves(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of the first half of a batch, and those of the second."""
    pairs = [tuple(logits.chunk(2)) for logits in logits_of(output)]
    return [first for first, _ in pairs], [second for _, second in pairs]
