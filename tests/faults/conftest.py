"""The table of the campaign: tests say with `tried` what they tried how often, and it is printed at the end.

With VQDIST_WRITE_RELIABILITY set, docs/reliability.md gets the rows of the tests that passed, as `make
reliability-table` has it.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
WRITE = "VQDIST_WRITE_RELIABILITY"
PROPERTY = "campaign"
HEAD = "| tried | times | seen | on |\n| --- | --- | --- | --- |\n"
ROW = re.compile(r"^\| (?!tried |---)(.+?) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)

# when the tests begin
COMMIT = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
).stdout.strip()

Tried = Callable[[str, int, str], None]


@pytest.fixture
def tried(record_property) -> Tried:
    """Say what was tried, how often, and what came of it: a row of the table, if the test passes."""
    return lambda kind, times, seen: record_property(PROPERTY, json.dumps([kind, str(times), seen]))


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the rows of the tests that passed, and write them if it is asked for."""
    rows = [
        json.loads(value)
        for report in terminalreporter.stats.get("passed", [])
        for name, value in getattr(report, "user_properties", [])
        if name == PROPERTY
    ]
    if not rows:
        return
    terminalreporter.section("the campaign of faults")
    for kind, times, seen in rows:
        terminalreporter.line(f"{times:>5}  {kind}: {seen}")
    if os.environ.get(WRITE):
        write(rows)


def write(rows: list[list[str]]) -> None:
    """Put rows into the table of the page in place of those of the same kind; the others stay."""
    text = PAGE.read_text(encoding="utf-8")
    on = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, {COMMIT or 'no commit'}"
    table = {match[1]: list(match.groups()) for match in ROW.finditer(text)}
    table |= {kind: [kind, times, seen, on] for kind, times, seen in rows}
    lines = "".join(f"| {' | '.join(row)} |\n" for row in table.values())
    begin = text.index(HEAD)
    end = begin + len(HEAD) + sum(len(match[0]) + 1 for match in ROW.finditer(text))
    PAGE.write_text(text[:begin] + HEAD + lines + text[end:], encoding="utf-8")
