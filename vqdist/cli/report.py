"""`vqdist report RUN ...`: the last numbers of runs in one table, without loading a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vqdist import protocol
from vqdist.cli.parsing import make_parser, parse
from vqdist.errors import UserError, printable
from vqdist.files import METRICS, lines_of_metrics, read_json

VALID, EVALUATE = "valid/", "evaluate/"


def report(arguments: list[str]) -> int:
    """Print the last numbers of runs side by side, of training, validation and evaluation: `vqdist report RUN ...`."""
    parser = make_parser("vqdist report", "The last numbers of runs, one column a run.")
    parser.add_argument("runs", type=str, nargs="+", help="Run folders.")
    options = parse(parser, arguments)
    runs = [Path(run).expanduser() for run in options.runs]
    columns = [_numbers_of(run) for run in runs]
    evaluated = {name: last for name, run in zip(options.runs, runs, strict=True) if (last := protocol.last_of(run))}
    differing = _differences(evaluated)
    if not differing:
        for name, column in zip(options.runs, columns, strict=True):
            column |= _evaluation(evaluated.get(name))
    print(_table(options.runs, columns))
    for line in differing:
        print(line)
    return 0


def _evaluation(found: dict[str, Any] | None) -> dict[str, str]:
    """Return the numbers of an evaluation for a column of the table."""
    numbers = {name: value for name, value in (found or {}).items() if isinstance(value, int | float)}
    step = {"evaluated at step": numbers.pop("step")} if numbers else {}
    return {
        name: _shown(value) for name, value in {**step, **{f"{EVALUATE}{k}": v for k, v in numbers.items()}}.items()
    }


def _differences(evaluated: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each run whose evaluation has another protocol than that of the first one."""
    (first, *others) = [*evaluated] or [""]
    lines = []
    for name in others:
        found = protocol.differences(evaluated[first][protocol.KEY], evaluated[name][protocol.KEY])
        if found:
            said = ", ".join(f"{key} {_shown(a)} and {_shown(b)}" for key, (a, b) in found.items())
            lines.append(f"the evaluations of {first} and {name} cannot be compared: {said}")
    return lines


def _numbers_of(run: Path) -> dict[str, str]:
    """Return the state of a run: its last step, its last validation and its last line of training numbers."""
    file = run / METRICS
    if not file.is_file():
        raise UserError(f"{run} has no {METRICS}; give the folder of a run, as in runs/a")
    validated, trained = {}, {}
    for line in _lines(file):
        step = line.pop("step")
        numbers = {name: value for name, value in line.items() if value is None or isinstance(value, int | float)}
        if any(name.startswith(VALID) for name in numbers):
            validated = {"validated at step": step, **numbers}
        else:
            trained = {"step": step, **numbers}
    if not trained and not validated:
        raise UserError(f"{file} has no log line: the run has not logged a step yet")
    model = read_json(run / "config.json").get("model_type", "")
    return {name: _shown(value) for name, value in {"model": model, **trained, **validated}.items()}


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open("rb") as content:
            return [line for _, line in lines_of_metrics(content)]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _shown(value: object) -> str:
    if value is None:
        return "nan"
    if isinstance(value, str):
        return printable(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(runs: list[str], columns: list[dict[str, str]]) -> str:
    """Return a header of the runs' names, then a row for each number that any of them has."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    titles = [Path(run).name or run for run in runs]
    rows = [["", *titles], *([name, *(column.get(name, "") for column in columns)] for name in names)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(titles) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
