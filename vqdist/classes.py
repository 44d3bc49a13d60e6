"""Classes by name: folders of images number theirs in an order of their own, and a model must know which is which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vqdist.errors import UserError

SHOWN = 8  # names in a message
MOST_NAMES = 1_000_000
MOST_DIGITS = 9  # of a number of a class


def in_order(names: Sequence[str]) -> list[str]:
    """Return names of class folders in the order of their numbers: 2 before 10 where all are numbers, else as text."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    return sorted(names)


def numbers_among(own: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return, for each class of some images, its number among those that a model knows.

    Raises:
        UserError: the model does not know one of them.
    """
    numbers = {name: number for number, name in enumerate(known)}
    unknown = [name for name in own if name not in numbers]
    if unknown:
        raise UserError(
            f"the images have the class {listed(unknown)}, which the model does not know; it knows {listed(known)}: "
            "give images of these, each class in a folder of its name"
        )
    return [numbers[name] for name in own]


def missing(own: Sequence[str], known: Sequence[str]) -> str | None:
    """Return a line about the classes of a model of which there are no images, or None."""
    absent = [name for name in known if name not in set(own)]
    return f"warning: no images of {len(absent)} of {len(known)} classes: {listed(absent)}" if absent else None


def number_of(given: str, names: Sequence[str] | None, num_classes: int) -> int:
    """Return the number of the class that a user names, by its name or its number; a name goes first.

    Raises:
        UserError: there is none.
    """
    if names and given in names:
        return list(names).index(given)
    if given.isascii() and given.isdecimal() and len(given) <= MOST_DIGITS and int(given) < num_classes:
        return int(given)
    known = f"0 to {num_classes - 1}" + (f", by name {listed(names)}" if names else "")
    raise UserError(f"class {given} is asked for; the model knows {known}")


def checked_names(names: Any, where: Any) -> list[str] | None:
    """Return the names of classes that a file holds; raise `UserError` unless they are different names, or none."""
    if names is None:
        return None
    right = isinstance(names, list) and len(names) <= MOST_NAMES and all(isinstance(name, str) for name in names)
    if not right or len(set(names)) != len(names):
        raise UserError(f"the class names in {where} are no list of different names; the file is damaged")
    return names


def listed(names: Sequence[str]) -> str:
    """Return names for a message."""
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
