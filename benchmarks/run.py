"""Run the benchmarks and print one table: `make bench`, or `python -m benchmarks.run --only bare_loop --quick`.

Every number that has a bound is a ratio of two things measured in one run, or a count; none is a time, so a busy or
slow machine widens the scatter and moves no verdict by itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.common import Row

# Modules beside this one, each with `run(quick, **options) -> list[Row]`; imported when they run.
BENCHMARKS = (
    *("bare_loop", "muse", "dalle", "prior", "vq_ar", "encode", "traffic", "memory", "profile_step"),
    *("checkpointing", "startup", "llamagen", "busy", "rfid"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="run this one; may be given several times")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and fewer variants, for a first look")
    parser.add_argument("--out", type=Path, help="also write the results here, as JSON")
    parser.add_argument("--muse-python", help="interpreter of an environment that has muse-maskgit-pytorch 0.3.5")
    parser.add_argument("--dalle-python", help="interpreter of an environment that has dalle-pytorch 1.6.6")
    return parser.parse_args()


def print_table(name: str, rows: list[Row]) -> None:
    """One benchmark's rows: what was measured, its value and bound, and what is behind it."""
    print(f"\n{name}")
    for row in rows:
        value = f"{row.value:.3f} {row.unit}" if row.unit == "x" else f"{row.value:.1f} {row.unit}"
        bound = f"{row.target} {row.verdict}".strip()
        print(f"  {value:>12}  {bound:<12}  {row.what}")
        if row.detail:
            print(f"  {'':>12}  {'':<12}    {row.detail}")


def main() -> int:
    arguments = parse_arguments()
    import torch

    # one thread, as each side has in a process of its own: so the rest of the machine disturbs least
    torch.set_num_threads(1)
    options = {"muse": {"python": arguments.muse_python}, "dalle": {"python": arguments.dalle_python}}
    results: dict[str, list[Row]] = {}
    for name in arguments.only or BENCHMARKS:
        began = time.perf_counter()
        results[name] = importlib.import_module(f"benchmarks.{name}").run(arguments.quick, **options.get(name, {}))
        print_table(f"{name} ({time.perf_counter() - began:.0f} s)", results[name])
        if arguments.out is not None:
            write_results(arguments.out, results)
    missed = sum(row.verdict == "NO" for rows in results.values() for row in rows)
    print(f"\n{missed} bounds missed" if missed else "\nevery bound kept")
    return 0


def write_results(path: Path, results: dict[str, list[Row]]) -> None:
    """All rows so far, with what they were measured on."""
    import torch

    machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}
    rows = {name: [row.as_json() for row in rows] for name, rows in results.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
