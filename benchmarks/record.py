"""Numbers of docs/results.md as files: what was measured, by which command, on which commit, machine and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "outputs" / "results"
LIBRARIES = ("torch", "accelerate", "deepspeed", "vector-quantize-pytorch", "x-transformers")


def write(name: str, numbers: Any, folder: Path = FOLDER) -> Path:
    """Write what a measurement gave, with all that it was made on.

    Args:
        name: of the file, and of the module of benchmarks/ that measured.
        numbers: what JSON can hold.
        folder: of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    arguments = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    content = {"command": shlex.join(["python", "-m", f"benchmarks.{name}", *arguments]), **circumstances()}
    path.write_text(json.dumps({**content, "numbers": numbers}, indent=1) + "\n", encoding="utf-8")
    return path


def read(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """Return what `write` wrote, or None where nothing was measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def circumstances() -> dict[str, Any]:
    """Return date, commit, machine and versions of a measurement that is made now."""
    return {"date": str(datetime.date.today()), "commit": commit(), "machine": machine(), "versions": versions()}


def commit() -> str:
    """Return the commit of vqdist/ that runs here, marked where a file of it was changed since."""
    changed = _git("status", "--porcelain", "--", "vqdist")
    return _git("log", "-1", "--format=%h", "--", "vqdist") + (" and changes" if changed else "")


def machine() -> str:
    """Return the processor, and how many cores this process may have."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return f"{len(os.sched_getaffinity(0))} cores of {found[1].strip() if found else platform.machine()}, no GPU"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def once_each(lines: Path, keys: Sequence[Any], measure: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure what has no line in a file yet, and return a dictionary for each key, in their order.

    Args:
        lines: the file, JSON; a measurement that was ended goes on where it was.
        keys: of the measurements, what JSON can hold.
        measure: key -> numbers.
    """
    lines.parent.mkdir(parents=True, exist_ok=True)
    known = lines.read_text().splitlines() if lines.is_file() else []
    done = {json.dumps(row["key"]): row for row in map(json.loads, known)}
    for key in keys:
        if json.dumps(key) not in done:
            row = {"key": key, **measure(key)}
            with lines.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done[json.dumps(key)] = row
            print(json.dumps(row), file=sys.stderr, flush=True)
    return [done[json.dumps(key)] for key in keys]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
