"""Checks of arguments that many models have; each mistake is a `UserError` of one line."""

from __future__ import annotations

from vqdist.errors import UserError
from vqdist.options import is_whole


def check_whole_numbers(**given: tuple[int, int]) -> None:
    """Raise `UserError` unless each argument, given as `name=(value, least)`, is a whole number from `least` up."""
    for name, (value, least) in given.items():
        if not is_whole(value):
            raise UserError(f"{name} {value!r} is not possible; give a whole number")
        if value < least:
            raise UserError(f"{name} {value} is not possible; it must be at least {least}")


def check_channels(channels: int) -> None:
    """Raise `UserError` unless images are grey, in colour, or in colour with alpha."""
    if channels not in (1, 3, 4):
        raise UserError(f"channels {channels} is not possible; use 1 (grey), 3 (colour) or 4 (colour and alpha)")


def check_generator(num_classes: int, dropout: float) -> None:
    """Raise `UserError` for an argument of a second stage that is not possible."""
    if num_classes < 0:
        raise UserError(f"num_classes {num_classes} is not possible; give the number of classes, 0 for none")
    check_dropout(dropout)


def check_dropout(dropout: float) -> None:
    """Raise `UserError` for a share that cannot be dropped."""
    if not 0 <= dropout < 1:
        raise UserError(f"dropout {dropout} is not possible; it must be at least 0 and below 1")
