"""The contracts of the networks around a quantizer: all that a trainer reads of them.

A network is a `torch.nn.Module` that has these members besides; no base class is needed. Images are in [0, 1].

Shapes: `b` batch, `c` channel, `h w` image, `d` width of the features, `h' w'` map of codes, `n` codes in a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vqdist.errors import UserError, an
from vqdist.options import is_whole
from vqdist.sizes import ImageSize, image_size_of, sides_of


@runtime_checkable
class Encoder(Protocol):
    """Images (b, c, h, w) -> features (b, d, h', w'), or (b, n, d) of a row of tokens.

    Attributes:
        dim: width of the features, d.

    An encoder for images of one size only may say which in an attribute `image_size`: a side, or (height, width). A
    network whose result depends on more than its tensors, as on a number of heads, may say on what in an attribute
    `traits`, a string that is a part of the tokenizer's fingerprint.
    """

    dim: int

    def code_shape(self, image_size: int) -> tuple[int, ...]:
        """Return the shape of the codes of a square image of this side in pixels: (h', w'), or (n,) of a row.

        Of an image that is not square, the height of the map is that of its height and the width that of its width.
        An encoder for which that is not so has a method `code_shape_of_sides(height, width)`, too.

        Raises:
            UserError: images of this size cannot be encoded.
        """
        ...


@runtime_checkable
class Decoder(Protocol):
    """Features (b, d, h', w') or (b, n, d) -> the input of `last_layer`, whose output is the image (b, c, h, w).

    Attributes:
        last_layer: a convolution, called on what `forward` returns; the adaptive weight of the adversarial loss is
            computed from its input. None where `forward` returns the image: then there is no adaptive weight. A class
            of its own may scale what the convolution gives, and says by how much as `image_gain`.

    One that predicts another tokenizer's codes has an attribute `gives_proxy` that is true, `proxy_shape` (h', w') and
    `proxy_codebook_size` v of these codes, and `forward(features, with_proxy=False)`. With `with_proxy` that returns
    two: the input of `last_layer` and the logits (b, v, h', w'). The first is None where `makes_images` is false.
    """

    last_layer: nn.Conv2d | None


@runtime_checkable
class Discriminator(Protocol):
    """Images (b, c, h, w) -> logits with the batch first, positive for real, or a list of such tensors.

    One whose logits of an image depend on the rest of the batch, as BatchNorm makes them, may have an attribute
    `batch_statistics` that is true, and `forward(image, parts=1)`. It is then given real images and reconstructions in
    one batch with `parts=2`, and treats the halves as two batches.

    Attributes:
        min_image_size: the smallest side of an image, in pixels, that it takes.
    """

    min_image_size: int


def require_module(network: Any, kind: str) -> nn.Module:
    """Return the network; raise `UserError` unless it is a `torch.nn.Module`."""
    if not isinstance(network, nn.Module):
        raise UserError(f"{kind} {type(network).__name__} is no torch.nn.Module; derive it from that")
    return network


def whole_number(network: Any, kind: str, attribute: str, least: int = 1) -> int:
    """Return an attribute of a network; raise `UserError` unless it is a whole number, at least the smallest."""
    value = getattr(network, attribute)
    if not is_whole(value) or value < least:
        raise UserError(
            f"the {attribute} of {kind} {type(network).__name__} is {value!r}; give a whole number of at least {least}"
        )
    return value


def code_shape_of(encoder: Any, image_size: ImageSize) -> tuple[int, ...]:
    """Return the shape of the codes of an image of this size, see `Encoder.code_shape`.

    Raises:
        UserError: the encoder does not give one or two whole numbers above 0, or takes no such images.
    """
    height, width = sides_of(image_size)
    if hasattr(encoder, "code_shape_of_sides"):
        return _checked_shape(encoder, encoder.code_shape_of_sides(height, width), image_size)
    of_height = _checked_shape(encoder, encoder.code_shape(height), height)
    if height == width:
        return of_height
    of_width = _checked_shape(encoder, encoder.code_shape(width), width)
    if len(of_height) == 2:
        return of_height[0], of_width[1]
    if of_height != of_width:
        raise UserError(
            f"encoder {type(encoder).__name__} gives rows of {of_height[0]} and {of_width[0]} codes for sides of "
            f"{height} and {width}, so nobody knows how many an image of {height} x {width} has; give it a method "
            "code_shape_of_sides(height, width)"
        )
    return of_height


def _checked_shape(encoder: Any, said: Any, image_size: ImageSize) -> tuple[int, ...]:
    good = isinstance(said, (tuple, list)) and len(said) in (1, 2)
    if not good or not all(isinstance(side, int) and side > 0 for side in said):
        raise UserError(
            f"code_shape({image_size}) of encoder {type(encoder).__name__} gave {said!r}; expected the shape of the "
            "codes, (h, w) or (n,), in whole numbers above 0"
        )
    return tuple(said)


def gives_rows(encoder: Any, sizes: Iterable[ImageSize]) -> bool:
    """Return whether an encoder gives rows of codes and no maps, for the first of these sizes that it takes."""
    for size in sizes:
        with contextlib.suppress(UserError):
            return len(code_shape_of(encoder, size)) == 1
    return False


def own_image_size(encoder: Any) -> ImageSize | None:
    """Return the one size of images that an encoder takes, if it has such an attribute."""
    with contextlib.suppress(UserError):
        return image_size_of(getattr(encoder, "image_size", None))
    return None


def check_features(features: Any, image: Tensor, encoder: Any) -> None:
    """Raise `UserError` unless these are the features that an encoder promises of these images (b, c, h, w)."""
    name, batch = type(encoder).__name__, image.shape[0]
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.ndim not in (3, 4):
        raise UserError(
            f"encoder {name} gave {_described(features)}; expected features (b, d, h, w) or (b, n, d) of floats"
        )
    width_axis = 1 if features.ndim == 4 else 2
    if features.shape[0] != batch or features.shape[width_axis] != encoder.dim:
        of = "(b, d, h, w)" if features.ndim == 4 else "(b, n, d)"
        raise UserError(
            f"encoder {name} gave features of shape {tuple(features.shape)} for {batch} images; expected {of} with "
            f"b = {batch} and its dim, d = {encoder.dim}"
        )
    if torch.is_grad_enabled() and not features.requires_grad and any(w.requires_grad for w in encoder.parameters()):
        raise UserError(
            f"encoder {name} gave features without a gradient, so it would never learn; do not detach them, or freeze "
            "its weights with requires_grad_(False)"
        )
    height, width = image.shape[2:]
    found = tuple(features.shape[2:] if features.ndim == 4 else features.shape[1:2])
    if height == width and found != (said := code_shape_of(encoder, height)):
        raise UserError(
            f"encoder {name} gave features of shape {tuple(features.shape)}, so codes {found}, for images of side "
            f"{height}, and its code_shape({height}) says {said}; make them equal"
        )


def check_reconstruction(recon: Any, image: Tensor, decoder: Any) -> None:
    """Raise `UserError` unless a decoder gave an image for each of these (b, c, h, w)."""
    if not isinstance(recon, Tensor) or not recon.is_floating_point() or recon.shape != image.shape:
        behind = "" if decoder.last_layer is None else " and its last_layer"
        raise UserError(
            f"decoder {type(decoder).__name__}{behind} gave {_described(recon)}; expected images of floats of shape "
            f"{tuple(image.shape)}"
        )


def apply_last_layer(decoder: Any, hidden: Any) -> Tensor:
    """Return the image (b, c, h, w) of what a decoder's `forward` gave; raise `UserError` for another width of it."""
    last = decoder.last_layer
    if last is None:
        return hidden
    good = isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.ndim == 4
    if not good or hidden.shape[1] != last.in_channels:
        raise UserError(
            f"decoder {type(decoder).__name__} gave {_described(hidden)}; its last_layer takes (b, d, h, w) with "
            f"d = {last.in_channels}"
        )
    return last(hidden)


def _described(given: Any) -> str:
    """Return dtype and shape of a tensor, and the type of anything else, for messages."""
    if not isinstance(given, Tensor):
        return f"{an(type(given).__name__)}"
    return f"a tensor of {str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}"


def logits_of(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Return the tensors of logits that a discriminator gave, as a list.

    Raises:
        UserError: it gave anything else.
    """
    if isinstance(output, Tensor):
        output = [output]
    if not isinstance(output, (list, tuple)) or not output:
        found = "an empty list" if isinstance(output, (list, tuple)) else _described(output)
        raise UserError(f"the discriminator gave {found}; expected a tensor of logits, or a list of them")
    for logits in output:
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim == 0:
            raise UserError(
                f"the discriminator gave {_described(logits)}; expected logits of floats with the batch first"
            )
    return list(output)


def logits_of_both(
    critic: Callable[..., Any], network: nn.Module, image: Tensor, recon: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of real images and of reconstructions (b, c, h, w), by one forward.

    Args:
        critic: the discriminator, or its engine.
        network: the discriminator.
        image, recon: of the same shape.
    """
    parts = {"parts": 2} if getattr(network, "batch_statistics", False) is True else {}
    return halves(critic(torch.cat([image, recon]), **parts))


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a network's BatchNorm layers that follow the batches of one rank, by name."""
    return {
        f"{name}.{kind}" if name else kind: statistic
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for kind in ("running_mean", "running_var")
        if (statistic := getattr(module, kind)) is not None
    }


def halves(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of the first half of a batch, and those of the second."""
    pairs = [tuple(logits.chunk(2)) for logits in logits_of(output)]
    return [first for first, _ in pairs], [second for _, second in pairs]
