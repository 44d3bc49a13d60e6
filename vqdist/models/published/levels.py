"""Sizes of networks of several resolutions, from the shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from vqdist.errors import UserError


def blocks_of(tensors: Mapping[str, Tensor], place: str) -> tuple[list[int], int]:
    """Return the width of each resolution and the number of blocks of each, of those at `PLACE.LEVEL.block.NUMBER`.

    Raises:
        KeyError: there is no first block.
    """
    pattern = re.compile(rf"{re.escape(place)}\.(\d+)\.block\.(\d+)\.")
    found = {(int(match[1]), int(match[2])) for match in map(pattern.match, tensors) if match}
    first = f"{place}.0.block.0.conv2.weight"
    if not found:
        raise KeyError(first)
    levels = 1 + max(level for level, _ in found)
    widths = [tensors[f"{place}.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    return widths, 1 + max(number for _, number in found)


def multiples(widths: Sequence[int], width: int, option: str) -> list[int]:
    """Return widths as multiples of one; raise `UserError` that names the option if they are none."""
    if any(one % width for one in widths):
        raise UserError(f"the widths {list(widths)} are no multiples of {width}, so {option} cannot be told")
    return [one // width for one in widths]


def number_of(tensors: Mapping[str, Tensor], place: str) -> int:
    """Return how many modules there are at `PLACE.NUMBER`."""
    pattern = re.compile(rf"{re.escape(place)}\.(\d+)\.")
    return 1 + max((int(match[1]) for match in map(pattern.match, tensors) if match), default=-1)
