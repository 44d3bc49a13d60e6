"""Validations of runs side by side: which of their numbers were measured on different things, and in what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vqdist import protocol
from vqdist.errors import printable, shortened
from vqdist.reports.history import VALID
from vqdist.reports.record import RunRecord

MEASURES_NOTHING = tuple(f"{VALID}{name}" for name in ("images", "seconds", "time_share"))
LONGEST_VALUE, LONGEST_NAMES = 80, 300


@dataclass(frozen=True)
class Difference:
    """Numbers that cannot be compared.

    Attributes:
        names: of the numbers, as `valid/rfid`.
        runs: places of the two runs; the same one twice where it was measured otherwise after a resume.
        of: the runs in words.
        reason: in words.
    """

    names: list[str]
    runs: tuple[int, int]
    of: str
    reason: str

    @property
    def line(self) -> str:
        """The sentence on it, as one line of visible characters."""
        return printable(f"{shortened(', '.join(self.names), LONGEST_NAMES)} of {self.of} {self.reason}")


def differing_validations(runs: list[RunRecord]) -> list[Difference]:
    """Return which numbers of validations differ in what they were measured on, those of equal reasons together."""
    found: dict[tuple[tuple[int, int], str, str], list[str]] = {}
    names = dict.fromkeys(name for run in runs for name in run.history.names if name.startswith(VALID))
    for name in names:
        if name not in MEASURES_NOTHING:
            for pair in _pairs(runs, name):
                found.setdefault(pair, []).append(name)
    return [Difference(names, *pair) for pair, names in found.items()]


def _pairs(runs: list[RunRecord], name: str) -> Iterator[tuple[tuple[int, int], str, str]]:
    """Yield the runs, and the reason, of which a number differs: within a run, then from the first that says it."""
    measured = [run.validated_on(name) for run in runs]
    for number, parts in enumerate(measured):
        for (_, before), (step, after) in pairwise(parts):
            if reason := _reason(name, before, after):
                yield (number, number), f"{runs[number].name} until step {step} and after it", reason
    last = {number: parts[-1][1] for number, parts in enumerate(measured) if parts}
    first = next((number for number, said in last.items() if said), None)
    for number, said in last.items():
        if first is None or number == first:
            continue
        of = f"{runs[first].name} and {runs[number].name}"
        if not said:
            yield (first, number), of, f"may differ: {runs[number].name} does not say what it was validated on"
        elif reason := _reason(name, last[first], said):
            yield (first, number), of, reason


def _reason(name: str, first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return in what the protocols of a number differ; empty where they agree, or where one is not known."""
    differing = {} if not first or not second else protocol.differences_of(name.removeprefix(VALID), first, second)
    said = ", ".join(f"{key} {_shown(a)} and {_shown(b)}" for key, (a, b) in differing.items())
    return f"cannot be compared: {said}" if said else ""


def _shown(value: object) -> str:
    return "none" if value is None else shortened(printable(str(value)), LONGEST_VALUE)
