"""The numbers of a run, read from metrics.jsonl in one pass: curves of bounded length, and the last lines."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vqdist.errors import UserError
from vqdist.files import LONGEST_METRICS, METRICS, lines_of_metrics
from vqdist.reports.lines import Rows, blocks_of, parse

VALID, SPEED = "valid/", "images_per_second"
BLOCK = 2**20
KEPT = 8192
"""Points of a curve that are kept at least; a curve of fewer is whole."""
MOST_CURVES = 1000
NOT_FINITE_SHOWN = 100

Numbers = NDArray[np.float64]


def thinned(steps: Numbers, values: Numbers, most: int) -> tuple[Numbers, Numbers]:
    """Return at most so many points of a curve: of each stretch the lowest and the highest, and the ends of the curve.

    Args:
        steps: (n,) in order.
        values: (n,) finite.
        most: points, at least 4.
    """
    if len(steps) <= most:
        return steps, values
    inner, count = values[1:-1], (most - 2) // 2
    # by steps and not by points: what was thinned before is as far from its neighbours as what is new
    share = (steps[1:-1] - steps[0]) / (steps[-1] - steps[0] or 1)
    begin = np.flatnonzero(np.diff(np.minimum((share * count).astype(np.int64), count - 1), prepend=-1))
    stretch = np.repeat(np.arange(len(begin)), np.diff(np.append(begin, len(inner))))
    kept = np.zeros(len(steps), dtype=bool)
    kept[[0, -1]] = True
    for extreme in (np.minimum, np.maximum):
        equal = np.flatnonzero(inner == extreme.reduceat(inner, begin)[stretch])
        kept[equal[np.diff(stretch[equal], prepend=-1) > 0] + 1] = True
    return steps[kept], values[kept]


class Curve:
    """One number over the steps of a run; of many points the lowest and highest of each stretch are kept.

    Attributes:
        count: lines that have the number.
        not_finite: how many of them are not finite.
        at: the first steps of those.
    """

    def __init__(self) -> None:
        self.count = self.not_finite = 0
        self.at: list[int] = []
        self._parts: list[tuple[Numbers, Numbers]] = []
        self._held = 0

    def add(self, steps: Numbers, values: Numbers) -> None:
        """Take in points (n,); NaN for those that are not finite."""
        finite = np.isfinite(values)
        self.count += len(values)
        if not finite.all():
            self.not_finite += int((~finite).sum())
            self.at = sorted([*self.at, *steps[~finite].astype(int).tolist()])[:NOT_FINITE_SHOWN]
            steps, values = steps[finite], values[finite]
        self._parts.append((steps, values))
        self._held += len(steps)
        if self._held > 4 * KEPT:
            self._parts = [self.points(2 * KEPT)]
            self._held = len(self._parts[0][0])

    def points(self, most: int) -> tuple[Numbers, Numbers]:
        """Return steps and values of at most so many points, in the order of their steps."""
        steps, values = (np.concatenate([part[side] for part in self._parts] or [np.empty(0)]) for side in (0, 1))
        order = np.argsort(steps, kind="stable")
        return thinned(steps[order], values[order], most)


class History:
    """The log lines of a run.

    `read` goes on from where it was, so a run that trains may be looked at again and again.

    Args:
        run: its folder.
        images_at: images that were used up to steps (n,), or None where it is not known.

    Attributes:
        curves: by the names of the numbers.
        hours: of training up to a step, without validations, pictures and checkpoints; without points if not known.
        lines: log lines so far.
        passed_over: lines that are none, as one torn by a kill.
        trained: the last line of training numbers, as it stands in the file; empty if there is none.
        validated: likewise of a validation.
    """

    def __init__(self, run: Path, images_at: Callable[[Numbers], Numbers] | None = None):
        self.file = run / METRICS
        self.images_at = images_at
        self._forget()

    def _forget(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.hours = Curve()
        self.lines = self.passed_over = 0
        self.trained: dict[str, Any] = {}
        self.validated: dict[str, Any] = {}
        self._position, self._identity = 0, (0, 0)
        self._last_step = self._hours = 0.0
        self._speeds: list[tuple[Numbers, Numbers]] = []  # of the block that is read

    def read(self, *, to_the_end: bool = True) -> None:
        """Take in the lines that are new; all of them again where the file is another one, as of a resumed run.

        Args:
            to_the_end: whether a last line without an end counts; while a run trains it may be half written.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            with self.file.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = status.st_dev, status.st_ino
                if identity != self._identity or status.st_size < self._position:
                    self._forget()
                self._identity = identity
                self._read(file, to_the_end)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read: {error.strerror}") from error

    def _read(self, file: BinaryIO, to_the_end: bool) -> None:
        file.seek(self._position)
        for block, position in blocks_of(file, BLOCK, LONGEST_METRICS, to_the_end=to_the_end):
            self._position = position
            rows, others, lines = parse(block)
            raw = {int(place): block[slice(*lines[place])] for place in others}
            odd = {place: line for place, text in raw.items() if (line := _line(text)) is not None}
            self.passed_over += sum(bool(text.strip()) for text in raw.values()) - len(odd)
            for part in rows:
                self._add_rows(part)
            self._add_lines(list(odd.values()))
            self._add_hours()
            self._note_last(rows, odd, {place: block[slice(*lines[place])] for place in _last_places(rows)})

    def _note_last(self, rows: list[Rows], odd: dict[int, dict[str, Any]], raw: dict[int, bytes]) -> None:
        """Keep the last lines of training and of validation."""
        last: dict[bool, int] = {}
        for names, place in [
            *((part.names, place) for part in rows for place in _last_places([part])),
            *((list(line), place) for place, line in odd.items()),
        ]:
            kind = any(name.startswith(VALID) for name in names)
            last[kind] = max(place, last.get(kind, -1))
        for kind, place in last.items():
            line = odd[place] if place in odd else _line(raw[place]) or {}
            if kind:
                self.validated = line
            else:
                self.trained = line

    def _add_rows(self, rows: Rows) -> None:
        self.lines += len(rows.values)
        steps = rows.values[:, rows.names.index("step")]
        for number, name in enumerate(rows.names):
            if name != "step":
                self._add(name, steps, rows.values[:, number])

    def _add_lines(self, lines: list[dict[str, Any]]) -> None:
        self.lines += len(lines)
        found: dict[str, list[tuple[float, float]]] = {}
        for line in lines:
            step = _number(line.pop("step"))
            for name, value in line.items():
                number = _number(value)
                if step is not None and number is not None:
                    found.setdefault(name, []).append((step, number))
            line["step"] = int(step or 0)
        for name, points in found.items():
            steps, values = np.array(points).T
            self._add(name, steps, values)

    @property
    def names(self) -> list[str]:
        """The names of the curves, those of validations last."""
        return sorted(self.curves, key=lambda name: name.startswith(VALID))

    def _add(self, name: str, steps: Numbers, values: Numbers) -> None:
        if name == SPEED:
            self._speeds.append((steps, values))
        if name not in self.curves and len(self.curves) >= MOST_CURVES:
            return
        self.curves.setdefault(name, Curve()).add(steps, values)

    def _add_hours(self) -> None:
        """Add up the hours of a block in the order of steps: its lines were taken in by their keys.

        A step that is not past the last one adds nothing.
        """
        steps, speed = (np.concatenate([part[side] for part in self._speeds] or [np.empty(0)]) for side in (0, 1))
        self._speeds = []
        steps, first = np.unique(steps, return_index=True)
        speed, steps = speed[first][steps > self._last_step], steps[steps > self._last_step]
        if self.images_at is None or not len(steps):
            return
        images = np.diff(self.images_at(np.concatenate([[self._last_step], steps])))
        with np.errstate(divide="ignore", invalid="ignore"):
            hours = np.where((speed > 0) & (images > 0), images / speed / 3600, 0.0)
        total = self._hours + np.cumsum(hours)
        self.hours.add(steps, total)
        self._last_step, self._hours = steps[-1], total[-1]


def _last_places(rows: list[Rows]) -> list[int]:
    return [int(part.places[-1]) for part in rows if len(part.places)]


def _line(raw: bytes) -> dict[str, Any] | None:
    """Return a line of a run, or None for anything else."""
    return next((line for _, line in lines_of_metrics(io.BytesIO(raw))), None)


def _number(value: Any) -> float | None:
    """Return a number of a log line, NaN for null, None for what is no number."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < float("inf") else float("nan")
