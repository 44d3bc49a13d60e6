"""Sinks of numbers and pictures: metrics.jsonl (the source of truth), TensorBoard, Weights & Biases, sinks of users.

Everything here runs on rank 0 only; the trainer makes no `Tracker` on other ranks. `Sink` says how to write one's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vqdist.errors import UserError
from vqdist.parts import PartSpec, Spec, called
from vqdist.registries import SINKS
from vqdist.tracking.base import Sink, one_line, warn
from vqdist.tracking.events import EventLog, environment
from vqdist.tracking.jsonl import JsonlSink
from vqdist.tracking.memory import memory_gb
from vqdist.tracking.pictures import chart_numbers, make_sheet, save_bars, save_sheet
from vqdist.tracking.tensorboard import TensorBoardSink
from vqdist.tracking.wandb import WandbSink

__all__ = [
    "SINKS",
    "EventLog",
    "JsonlSink",
    "Sink",
    "TensorBoardSink",
    "Tracker",
    "WandbSink",
    "check_trackers",
    "environment",
    "make_sheet",
    "memory_gb",
    "save_bars",
    "save_sheet",
]


def check_trackers(trackers: Sequence[PartSpec | Sink]) -> None:
    """Raise `UserError` for a tracker that is unknown, not installed, or given arguments that it does not take.

    Every rank calls this before the ranks know of each other, so that all of them end with the same line.
    """
    for given in trackers:
        SINKS.verify(given, **_context(Path(), {}, 0))
        factory = SINKS.factory(Spec.of(given).target) if isinstance(given, (str, Mapping)) else type(given)
        for package in getattr(factory, "packages", ()):
            if not _is_installed(package):
                extra = getattr(factory, "extra", None)
                install = f"'vqdist[{extra}]'" if extra else package
                raise UserError(f"tracker {called(given)!r} is not installed; install it with pip install {install}")


class Tracker:
    """Writes one run's numbers and pictures, and passes them on to the sinks.

    A failure of metrics.jsonl or of a picture's file raises. A failure of any other sink is one warning, and from then
    on the sink is off: a tracker never decides over training.

    Args:
        folder: the run folder; `metrics.jsonl` and `results/` are made in it.
        trackers: sinks besides the file: names, import paths, `class_path` with `init_args`, or objects.
        config: the resolved configuration, shown by the trackers.
        resumed_step: numbers of later steps, left by a run that died, are removed from the file.

    Attributes:
        file: metrics.jsonl.
        sinks: those that are on, by what they are called in messages.
    """

    def __init__(
        self, folder: Path, trackers: Sequence[PartSpec | Sink], config: dict[str, Any], resumed_step: int = 0
    ):
        self.folder = folder
        self._lines = JsonlSink(folder, resumed_step)
        self.file = self._lines.file
        self.sinks: list[tuple[str, Sink]] = []
        for number, given in enumerate(trackers):
            if given in trackers[:number]:  # said twice, it is meant once
                continue
            try:
                sink = SINKS.build(given, **_context(folder, config, resumed_step))
            except Exception as error:  # of any library, or of a user's code
                warn(f"tracker {called(given)} cannot start and is left out ({one_line(error)}); training goes on")
                continue
            self.sinks.append((called(given), sink))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and tell the sinks; nothing for a line that the resumed run had written."""
        if self._lines.has(step, values):
            return
        self._lines.log(step, values)
        self._tell(lambda sink: sink.log(step, dict(values)))

    def picture(self, step: int, name: str, rows: Tensor, path: Path, columns: int = 2) -> None:
        """Save a sheet: `rows` (n, k, c, h, w) in [0, 1] gives n groups of k images, `columns` groups in a row."""
        save_sheet(rows, path, columns)
        self._tell(lambda sink: sink.picture(step, name, rows, path, columns))

    def histogram(self, step: int, name: str, counts: Tensor, path: Path) -> None:
        """Save a bar chart of how often each code occurred: `counts` (v,), several codes a bar if many.

        The file holds the numbers, too, for `vqdist report`.
        """
        numbers = chart_numbers(counts)
        save_bars(np.array(numbers["bars"]), path, numbers=numbers)
        self._tell(lambda sink: sink.histogram(step, name, counts, path))

    def artifact(self, folder: Path) -> None:
        """Pass on the folder with the exported model, which must stay as it is until `close`."""
        self._tell(lambda sink: sink.artifact(folder))

    def close(self) -> None:
        """Flush and close the sinks; what is logged afterwards goes to the file only."""
        self._tell(lambda sink: sink.close())
        self.sinks = []

    def _tell(self, call: Callable[[Sink], None]) -> None:
        for entry in list(self.sinks):
            name, sink = entry
            try:
                call(sink)
            except Exception as error:  # of any library, or of a user's code
                warn(f"tracker {name} failed and is off from here on ({one_line(error)}); training goes on")
                self.sinks.remove(entry)
                with suppress(Exception):
                    sink.close()


def _context(folder: Path, config: dict[str, Any], resumed_step: int) -> dict[str, Any]:
    """Return what the constructor of a sink may ask for."""
    return {"run_folder": folder, "config": config, "resumed_step": resumed_step}


def _is_installed(package: str) -> bool:
    """Return whether a package is there; a folder of that name, as W&B's own `wandb/`, is none."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None
