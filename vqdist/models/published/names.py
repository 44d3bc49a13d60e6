"""Tables of names: how a tensor of vqdist's is called in another project, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Names:
    """A table of the beginnings of names, ours and theirs.

    In a beginning `{level}` stands for a number that both have, and `{reversed}` for theirs that counts the levels
    from the other end. `{half}` is `encoder` or `decoder`. The first that fits is taken; other names are the same.

    Args:
        beginnings: pairs, ours and theirs.
        parts: pairs of words between dots, ours and theirs, that are replaced wherever they stand in the names that
            `within` matches.
        within: ours and theirs, of the names whose parts are replaced.
    """

    def __init__(
        self,
        beginnings: Iterable[tuple[str, str]],
        parts: Iterable[tuple[str, str]] = (),
        within: tuple[str, str] = ("", ""),
    ):
        self.beginnings = [(_pattern(ours), ours, _pattern(theirs), theirs) for ours, theirs in beginnings]
        self.parts = list(parts)
        self.within = within

    def theirs(self, name: str, levels: int) -> str:
        """Return their name of a tensor of ours, in a network of so many resolutions."""
        if re.search(self.within[0], name):
            name = _replaced(name, self.parts)
        for ours, _, _, template in self.beginnings:
            found = ours.match(name)
            if found:
                return _filled(template, found, levels) + name[found.end() :]
        return name

    def ours(self, name: str, levels: int) -> str:
        """Return our name of a tensor of theirs."""
        if re.search(self.within[1], name):
            name = _replaced(name, [(theirs, ours) for ours, theirs in self.parts])
        for _, template, theirs, _ in self.beginnings:
            found = theirs.match(name)
            if found:
                return _filled(template, found, levels) + name[found.end() :]
        return name


_FIELDS = {"level": r"\d+", "reversed": r"\d+", "half": "encoder|decoder"}


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for field, values in _FIELDS.items():
        escaped = escaped.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{values})")
    return re.compile(escaped)


def _filled(template: str, found: re.Match[str], levels: int) -> str:
    fields = dict(found.groupdict())
    if "level" in fields:
        fields["reversed"] = str(levels - 1 - int(fields["level"]))
    elif "reversed" in fields:
        fields["level"] = str(levels - 1 - int(fields["reversed"]))
    return template.format(**fields)


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for before, after in pairs:
        name = re.sub(rf"(?<=\.){re.escape(before)}(?=\.)", after, name)
    return name


def levels_of(names: Iterable[str], pattern: str) -> int:
    """Return how many resolutions there are: one more than the largest number that a group of the pattern matches."""
    numbers = [int(found[1]) for found in (re.match(pattern, name) for name in names) if found]
    return max(numbers, default=-1) + 1
