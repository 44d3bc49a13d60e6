"""A name that is not known: the one error for it, which tells the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vqdist.errors import UserError

FEW, MANY = 12, 40  # names that a message lists, where some are near and where none is
MOST_NEAR = 5  # names in one message


def unknown(
    what: str,
    name: str,
    known: Iterable[str],
    hint: str = "",
    *,
    of: str = "",
    like: str | None = None,
    written: str | None = None,
) -> UserError:
    """Return the one error for a name that is not known: it tells the nearest, and lists all where they are few.

    Args:
        what: kind of thing: "option", "model".
        name: as given.
        known: names that there are.
        hint: added at the end.
        of: owner of the names: "quantizer vq has no option 'decai'"; without one, "there is no option 'decai'".
        like: compared with the names in place of `name`, where only a part of it is one.
        written: how the message writes the name, as `--lr`; by default in quotes.
    """
    known = list(known)
    close = near(name if like is None else like, known)
    listed = ", ".join(known) if len(known) <= (FEW if close else MANY) else ""
    lacks = f"{of} has no" if of else "there is no"
    return UserError(f"{lacks} {what} {written or repr(name)}{close}{f'; there are {listed}' if listed else ''}{hint}")


def near(name: str, known: Iterable[str]) -> str:
    """Return "; nearest: " and the names that are most like this one; empty if none is.

    Names are compared without case, and dotted ones also by their last part: `lr` is near `trainer.lr`.
    """
    known = list(known)
    close: list[str] = []
    for form in (str.lower, _last_part):
        by_form: dict[str, list[str]] = {}
        for option in known:
            by_form.setdefault(form(option), []).append(option)
        for match in difflib.get_close_matches(form(name), by_form, n=3):
            close += by_form[match]
    return f"; nearest: {', '.join(list(dict.fromkeys(close))[:MOST_NEAR])}" if close else ""


def _last_part(name: str) -> str:
    return name.lower().rpartition(".")[2]
