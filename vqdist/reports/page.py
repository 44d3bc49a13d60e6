"""The page of a report: one file of HTML that holds its style, its program, its numbers and its pictures."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vqdist import protocol
from vqdist.errors import UserError, printable, shortened
from vqdist.reports.history import Curve
from vqdist.reports.record import MOST_EVENTS, Picture, RunRecord, as_data
from vqdist.reports.table import numbers_of, shown
from vqdist.reports.validations import Difference, differing_validations
from vqdist.version import __version__

TEMPLATE = Path(__file__).resolve().parent / "page"
MARK = "vqdist report"
"""Generator that the page names in its head, by which one is known that may be written over."""
POINTS, LEAST, MOST = 300_000, 200, 2000
"""Points of all curves of a page together, and those of one curve."""
PICTURES = 20

Source = Callable[[Picture], str]


def embedded(picture: Picture) -> str:
    """Return an address that holds a picture itself."""
    return as_data(*picture.content())


def data_of(runs: list[RunRecord], pictures: int = PICTURES, source: Source = embedded) -> dict[str, Any]:
    """Return all that the page shows, as JSON has it; every text is printable and of bounded length.

    Args:
        runs: which were read.
        pictures: most sheets of one run, and likewise charts.
        source: gives the address of a picture; raises `UserError` where it cannot be read.
    """
    sheets = [_sheets(run, pictures, source) for run in runs]
    charts = [_charts(run, pictures, source) for run in runs]
    return {
        "version": __version__,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "runs": [_run(run) for run in runs],
        "curves": _curves(runs),
        "numbers": _rows([numbers_of(run) for run in runs]),
        "differing": [_difference(found) for found in differing_validations(runs)],
        "pictures": sheets,
        "charts": charts,
        "evaluations": _evaluations(runs),
        "configuration": _rows([run.options for run in runs]),
        "environment": _rows([_environment(run) for run in runs]),
        "events": [_events(run) for run in runs],
    }


def clean(text: object, longest: int = 300) -> str:
    """Return a text of a run for the page."""
    return shortened(printable(str(text)), longest)


def _run(run: RunRecord) -> dict[str, Any]:
    history = run.history
    hours, reached = history.hours.points(1000)
    images = None
    if history.images_at is not None:
        steps = sorted({0.0, float(run.last_step), *(float(start["step"]) for start in run.starts)})
        images = [steps, [float(at) for step in steps for at in history.images_at(_array(step))]]
    return {
        "name": clean(run.name),
        "path": clean(run.folder),
        "model": clean(run.model),
        "step": run.last_step,
        "lines": history.lines,
        "images": images,
        "hours": [hours.tolist(), [float(f"{hour:.6g}") for hour in reached]] if len(hours) else None,
        "problems": [clean(problem) for problem in run.problems],
    }


def _array(value: float) -> Any:
    import numpy as np

    return np.array([value])


def _curves(runs: list[RunRecord]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for run in runs for name in run.history.names))
    most = max(LEAST, min(MOST, POINTS // max(1, sum(len(run.history.curves) for run in runs))))
    found = [run.history.curves for run in runs]
    return [
        {"name": clean(name), "runs": [_points(curves[name], most) if name in curves else None for curves in found]}
        for name in names
    ]


def _points(curve: Curve, most: int) -> dict[str, Any]:
    steps, values = curve.points(most)
    rounded = [float(f"{value:.6g}") for value in values.tolist()]
    points: dict[str, Any] = {"steps": steps.astype(int).tolist(), "values": rounded, "count": curve.count}
    return points | ({"bad": curve.at, "bads": curve.not_finite} if curve.not_finite else {})


def _rows(columns: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a row for each name that any column has; None where one has it not."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [
        {"name": clean(name), "cells": [clean(column[name]) if name in column else None for column in columns]}
        for name in names
    ]


def _difference(found: Difference) -> dict[str, Any]:
    """Return numbers that cannot be compared: a line for the table, and a note for the curve of each."""
    names, note = [clean(name) for name in found.names], clean(f"{found.of} {found.reason}", 600)
    return {"names": names, "runs": list(found.runs), "note": note, "line": clean(found.line, 900)}


def _sheets(run: RunRecord, most: int, source: Source) -> list[dict[str, Any]]:
    found, broken = [], []
    for picture in run.pictures(most):
        try:
            found.append({"step": picture.step, "src": source(picture)})
        except UserError as error:
            broken.append(str(error))
    run.note_unreadable(broken)
    return found


def _charts(run: RunRecord, most: int, source: Source) -> list[dict[str, Any]]:
    """Return the charts of codes: their numbers, or the picture where it is from before it held them."""
    found: list[dict[str, Any]] = []
    broken = []
    for picture in run.pictures(most, charts=True):
        try:
            found.append({"step": picture.step, **(picture.numbers or {"src": source(picture)})})
        except UserError as error:
            broken.append(str(error))
    run.note_unreadable(broken)
    return found


def _evaluations(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Return a table for each protocol: the last evaluation of each run that has it."""
    tables: list[tuple[dict[str, Any], list[dict[str, Any] | None]]] = []
    for number, run in enumerate(runs):
        for line in run.evaluations:
            said = line[protocol.KEY]
            for known, cells in tables:
                if not protocol.differences(known, said):
                    cells[number] = line
                    break
            else:
                tables.append((said, [line if place == number else None for place in range(len(runs))]))
    return [
        {
            "protocol": [[clean(name), clean(shown(value))] for name, value in said.items()],
            "rows": _rows([{k: shown(v) for k, v in (line or {}).items() if k != protocol.KEY} for line in cells]),
        }
        for said, cells in tables
    ]


def _environment(run: RunRecord) -> dict[str, str]:
    """Return what the last start of a run was on; nothing of a run from before it was kept."""
    if not run.starts:
        return {}
    start = run.starts[-1]
    said = {name: start[name] for name in ("backend", "processes", "images_per_step") if name in start}
    environment = start.get("environment")
    return {k: str(v) for k, v in {**said, **(environment if isinstance(environment, dict) else {})}.items()}


def _events(run: RunRecord) -> dict[str, Any]:
    kept = run.events[-MOST_EVENTS:]
    rows = [
        {name: clean(event[name]) for name in ("time", "event", "message") if event.get(name) is not None}
        | {"step": event["step"]}
        for event in kept
    ]
    return {"rows": rows, "left_out": len(run.events) - len(kept)}


# ----------------------------------------------------------------------------------------- the file


def page_of(data: dict[str, Any], *, live: bool = False) -> str:
    """Return the page.

    Nothing in it is fetched. No text of a run is markup: the data is JSON without angle brackets, and the program sets
    texts only. The policy lets no other program run, too.

    Args:
        data: as `data_of` gives it.
        live: whether it asks the server that gave it for newer data.
    """
    style, script = ((TEMPLATE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    sources = "'self' data:" if live else "data:"
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src {sources}; "
        f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": html.escape(policy),
        "mark": MARK,
        "title": html.escape(", ".join(run["name"] for run in data["runs"])),
        "style": style,
        "script": script,
        "live": "true" if live else "false",
        "data": as_json(data),
    }
    template = (TEMPLATE / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def as_json(data: dict[str, Any]) -> str:
    """Return data as JSON that may stand within a page: ASCII, and without what ends a script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def is_ours(path: Path) -> bool:
    """Return whether a file is a page that this module wrote."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{MARK}'.encode() in file.read(2048)
