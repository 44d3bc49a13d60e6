"""The table and the small curves that `vqdist report` prints."""

from __future__ import annotations

from typing import Any

import numpy as np

from vqdist import protocol
from vqdist.errors import printable
from vqdist.reports.history import VALID, Numbers
from vqdist.reports.record import RunRecord
from vqdist.reports.validations import differing_validations

EVALUATE = "evaluate/"
BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"
WIDEST, NARROWEST = 40, 8


def shown(value: object) -> str:
    """Return a number, or what stands in its place, for a table."""
    if value is None:
        return "nan"
    if isinstance(value, str):
        return printable(value)
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def numbers_of(run: RunRecord) -> dict[str, str]:
    """Return the state of a run: its last step, its last validation and its last line of training numbers."""
    found: dict[str, Any] = {"model": run.model}
    for line, step in ((run.history.trained, "step"), (run.history.validated, "validated at step")):
        if line:
            numbers = {k: v for k, v in line.items() if v is None or isinstance(v, int | float)}
            found |= {step: numbers.pop("step"), **numbers}
    return {name: shown(value) for name, value in found.items()}


def evaluation_of(found: dict[str, Any] | None) -> dict[str, str]:
    """Return the numbers of an evaluation for a column of the table."""
    numbers = {name: value for name, value in (found or {}).items() if isinstance(value, int | float)}
    step = {"evaluated at step": numbers.pop("step")} if numbers else {}
    named = {f"{EVALUATE}{name}": value for name, value in numbers.items()}
    return {name: shown(value) for name, value in {**step, **named}.items()}


def differing(evaluated: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each run whose evaluation has another protocol than that of the first one."""
    (first, *others) = [*evaluated] or [""]
    lines = []
    for name in others:
        found = protocol.differences(evaluated[first][protocol.KEY], evaluated[name][protocol.KEY])
        if found:
            said = ", ".join(f"{key} {shown(a)} and {shown(b)}" for key, (a, b) in found.items())
            lines.append(f"the evaluations of {first} and {name} cannot be compared: {said}")
    return [printable(line) for line in lines]


def table_of(runs: list[RunRecord]) -> tuple[list[dict[str, str]], list[str]]:
    """Return a column for each run, and the lines that say which of their numbers cannot be compared.

    Evaluations that cannot be are not among the numbers.
    """
    columns = [numbers_of(run) for run in runs]
    evaluated = {str(run.folder): run.evaluations[-1] for run in runs if run.evaluations}
    lines = differing(evaluated)
    if not lines:
        for run, column in zip(runs, columns, strict=True):
            column |= evaluation_of(evaluated.get(str(run.folder)))
    return columns, [*(found.line for found in differing_validations(runs)), *lines]


def printed(titles: list[str], columns: list[dict[str, str]]) -> str:
    """Return a header of the runs' names, then a row for each number that any of them has."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [["", *titles], *([name, *(column.get(name, "") for column in columns)] for name in names)]
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in rows) for place in range(len(titles) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def sparkline(
    steps: Numbers, values: Numbers, span: tuple[float, float], bounds: tuple[float, float], width: int, marks: str
) -> str:
    """Return a curve in so many characters; a blank where it has no points yet, or no more.

    Args:
        steps: (n,) in order.
        values: (n,) finite.
        span: first and last step of the line.
        bounds: lowest and highest value; the marks are spread between them.
        width: characters.
        marks: from low to high.
    """
    if not len(steps):
        return " " * width
    edges = np.linspace(span[0], span[1], width)
    inside = (edges >= steps[0] - (edges[1] - edges[0])) & (edges <= steps[-1] + (edges[1] - edges[0]))
    low, high = bounds
    # by the size of the numbers: the difference of two huge ones is infinite
    scale = max(abs(low), abs(high)) or 1.0
    height = np.interp(edges, steps, values / scale)
    share = (height - low / scale) / ((high / scale - low / scale) or 1.0)
    places = np.clip((share * len(marks)).astype(int), 0, len(marks) - 1)
    return "".join(marks[place] if seen else " " for place, seen in zip(places, inside, strict=True))


def curves(titles: list[str], runs: list[RunRecord], room: int, marks: str) -> str:
    """Return a row for each number that has a curve: one of each run, on one scale, and its lowest and highest value.

    Args:
        titles: of the runs.
        runs: to draw.
        room: characters of a line.
        marks: `BLOCKS`, or `PLAIN` where there is ASCII only.
    """
    names = [name for run in runs for name in run.history.names]
    names = [name for name in dict.fromkeys(names) if any(_has_curve(run, name) for run in runs)]
    if not names:
        return ""
    shown_names = [printable(name) for name in names]
    first = max(map(len, shown_names))
    width = max(NARROWEST, min(WIDEST, (room - first - 24) // len(runs) - 2))
    last = max(run.last_step for run in runs)
    head = "  ".join(["".ljust(first), *(_cut(printable(title), width).ljust(width) for title in titles)])
    rows = [f"{head}  lowest .. highest, from step 1 to {last}"]
    for name, text in zip(names, shown_names, strict=True):
        points = [_points(run, name) for run in runs]
        values = np.concatenate([part[1] for part in points])
        bounds = float(values.min()), float(values.max())
        lines = [sparkline(*part, (1.0, max(2.0, float(last))), bounds, width, marks) for part in points]
        rows.append("  ".join([text.ljust(first), *lines, f"{bounds[0]:.4g} .. {bounds[1]:.4g}"]))
    return "\n".join(rows)


def _has_curve(run: RunRecord, name: str) -> bool:
    steps, _ = _points(run, name)
    return len(steps) > 1 and name != f"{VALID}images"


def _points(run: RunRecord, name: str) -> tuple[Numbers, Numbers]:
    curve = run.history.curves.get(name)
    return (np.empty(0), np.empty(0)) if curve is None else curve.points(512)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"
