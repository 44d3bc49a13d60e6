"""Curves as an SVG picture, and drawn live in a notebook; needs no library that draws."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Points = Sequence[tuple[float, float]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 26, 26  # pixels around the curves
MOST = 1000  # points of a drawn curve
LARGEST = 1e290  # number that is drawn: of larger ones the difference may be none


def curves_svg(curves: Mapping[str, Points], title: str = "", *, width: int = 640, height: int = 300) -> str:
    """Return a picture of curves laid over each other, with axes and a legend.

    Args:
        curves: by name: points (x, y) by growing x; those that are not finite, or beyond 1e290, are left out.
        title: above it.
        width, height: in pixels; each line of the legend is beneath.
    """
    drawn = {
        name: _thinned([p for p in points if all(abs(end) <= LARGEST for end in p)]) for name, points in curves.items()
    }
    every = [point for points in drawn.values() for point in points] or [(0.0, 0.0)]
    ends = [_widened([point[axis] for point in every]) for axis in (0, 1)]

    def place(point: tuple[float, float]) -> str:
        x = LEFT + (point[0] - ends[0][0]) / (ends[0][1] - ends[0][0]) * (width - LEFT - RIGHT)
        y = height - BOTTOM - (point[1] - ends[1][0]) / (ends[1][1] - ends[1][0]) * (height - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    lines = [_axes(ends, place, width), *_polylines(drawn, place)]
    legend = [_legend(number, name, height + 6 + 17 * number) for number, name in enumerate(drawn)]
    whole = height + 10 + 17 * len(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" width="{width}" height="{whole}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="17" font-size="13">{escape(title)}</text>{"".join([*lines, *legend])}</svg>\n'
    )


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MOST` points or so, the last one among them."""
    every = -(-len(points) // MOST) if points else 1
    return points[::every] + (points[-1:] if (len(points) - 1) % every else [])


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest of values; a range around them where they are as good as equal."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    margin = 0.0 if high - low > max(1e-9 * size, 1 / LARGEST) else max(0.5, size / 1000)
    return low - margin, high + margin


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high` at equal distances, at least two.

    The distance is 1, 2 or 5 times a power of ten: the smallest of which there are no more than `most`. It is at most
    2.5 times the one before it, of which there are more. Two numbers are left at least, where `most` is 5 or more.
    """
    power = math.floor(math.log10((high - low) / most))
    rounds = (_multiples(low, high, factor, power) for factor in (1, 2, 5, 10, 20))
    return next(found for found in rounds if len(found) <= most)


def _multiples(low: float, high: float, factor: int, power: int) -> list[float]:
    """Return the multiples of `factor` times ten to `power` from `low` to `high`, as they are written in decimals."""
    over, under = factor * 10 ** max(power, 0), 10 ** max(-power, 0)  # the quotient of integers is rounded once
    first, last = (math.floor(end / over * under) for end in (low, high))
    found = (number * over / under for number in range(first - 1, last + 2))
    return [value for value in found if low <= value <= high]


def _axes(ends: Sequence[tuple[float, float]], place: Any, width: int) -> str:
    (left, right), (bottom, top) = ends
    parts = []
    for value in ticks(bottom, top):
        y = place((left, value)).split(",")[1]
        parts.append(f'<path d="M{LEFT} {y}H{width - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end" fill="#444">{value:.4g}</text>')
    for value in ticks(left, right):
        x, y = place((value, bottom)).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 17:.1f}" text-anchor="middle" fill="#444">{value:.4g}</text>')
    return "".join(parts)


def _polylines(drawn: Mapping[str, Points], place: Any) -> list[str]:
    return [
        f'<polyline points="{" ".join(map(place, points))}" fill="none" {_stroke(number)}/>'
        for number, points in enumerate(drawn.values())
    ]


def _stroke(number: int) -> str:
    """Return the colour and dashes of a curve; curves that lie on each other are seen by their dashes."""
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.5" stroke-dasharray="{DASHES[number % 4]}"'


def _legend(number: int, name: str, y: int) -> str:
    return f'<path d="M{LEFT} {y}h30" {_stroke(number)}/><text x="{LEFT + 38}" y="{y + 4}">{escape(name)}</text>'


class LivePlot:
    """Curves of a training that grow in a notebook: `for step, numbers in trainer.steps(LivePlot()): ...`.

    It is called with each log line, as any `log_fn`, and draws in the cell that runs. Elsewhere it only keeps the
    curves, which `svg()` draws.

    Args:
        names: of numbers to draw; by default all that end in `loss`.
        every: log lines between two drawings.

    Attributes:
        curves: points (step, number) by name.
    """

    def __init__(self, *names: str, every: int = 1):
        self.names = names
        self.every = every
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self._lines = 0
        self._shown: Any = None

    def __call__(self, numbers: Mapping[str, float]) -> None:
        """Take in a log line, which has its `step`, and draw."""
        chosen = self.names or [name for name in numbers if name.endswith("loss")]
        for name in chosen:
            if name in numbers:
                self.curves.setdefault(name, []).append((numbers["step"], numbers[name]))
        self._lines += 1
        if self._lines % self.every == 0 or self._lines == 1:
            self._show()

    def svg(self) -> str:
        """Return the picture: one chart for each number, below each other."""
        return "".join(curves_svg({name: points}, width=560, height=150) for name, points in self.curves.items())

    def _repr_html_(self) -> str:
        return f"<div>{self.svg()}</div>"

    def _show(self) -> None:
        display = _display()
        if display is None:
            return
        if self._shown is None:
            self._shown = display(self, display_id=True)
        else:
            self._shown.update(self)


def _display() -> Any:
    """Return IPython's `display` in a notebook; None anywhere else, a terminal of IPython too."""
    ipython: Any = sys.modules.get("IPython")  # a notebook has imported it
    shell = None if ipython is None else ipython.get_ipython()
    return ipython.display.display if hasattr(shell, "kernel") else None
