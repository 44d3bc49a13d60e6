"""The size of images: one side of square ones, or height and width."""

from __future__ import annotations

from typing import Any

from vqdist.errors import UserError
from vqdist.options import is_whole, plain

ImageSize = int | tuple[int, int]
"""The side of square images in pixels, or (height, width) of others."""


def sides_of(image_size: ImageSize) -> tuple[int, int]:
    """Return height and width in pixels."""
    return image_size if isinstance(image_size, tuple) else (image_size, image_size)


def pixels(image_size: ImageSize) -> str:
    """Return a size as people write it: "256 x 384 pixels"."""
    height, width = sides_of(image_size)
    return f"{height} x {width} pixels"


def in_thousands(number: int) -> str:
    """Return a number in four characters or so: "831", "12.3 K", "1.4 G"."""
    value, unit = float(number), ""
    for larger in "KMGT":
        if value < 999.5:
            break
        value, unit = value / 1000, f" {larger}"
    return f"{value:.3g}{unit}"


def image_size_of(given: Any) -> ImageSize:
    """Return an image size in its one form: an integer where the sides are equal, else a tuple.

    Args:
        given: a whole number, or two, as configurations have them.

    Raises:
        UserError: it is anything else. The networks say which single sides are possible.
    """
    pair = isinstance(given, (list, tuple))
    sides = tuple(plain(given)) if pair else (plain(given), plain(given))
    whole = all(is_whole(side) for side in sides)
    if len(sides) != 2 or not whole or (pair and min(sides) < 1):
        raise UserError(
            f"image_size {given!r} is not possible; give the side in pixels, or height and width, as [256, 384]"
        )
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])
