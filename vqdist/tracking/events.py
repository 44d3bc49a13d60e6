"""events.jsonl: the history of a run by the clock: starts, resumes, warnings, skipped images, stops, its end."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vqdist.files import EVENTS, reason_of
from vqdist.tracking.base import warn
from vqdist.version import __version__

LIBRARIES = ("accelerate", "deepspeed", "numpy")


class EventLog:
    """Appends events to events.jsonl, each with its step and time (UTC).

    A resumed run removes nothing from the file: of steps that a kill lost, it says that they were made twice. A
    failure is one warning, and nothing is written from then on: no weight and no number depends on the file.

    Args:
        folder: of the run, which exists.
    """

    def __init__(self, folder: Path):
        self.file = folder / EVENTS
        self._is_on = True

    def note(self, step: int, event: str, **said: Any) -> None:
        """Append an event.

        Args:
            step: finished optimizer steps.
            event: its kind: `start`, `resume`, `warning`, `skipped image`, `stop`, `error` or `end`.
            **said: what else there is to say of it, as JSON has it; None is left out.
        """
        if not self._is_on:
            return
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = {"step": step, "time": time, "event": event, **{k: v for k, v in said.items() if v is not None}}
        try:
            self._append(json.dumps(line).encode("ascii") + b"\n")
        except OSError as error:
            self._is_on = False
            warn(f"{self.file} cannot be written ({reason_of(error)}); training goes on, without a history of events")

    def _append(self, line: bytes) -> None:
        with self.file.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"  # by a kill; it must not take this line with it
                line = b"\n" + line if torn else line
            file.write(line)


def environment(device: torch.device) -> dict[str, str]:
    """Return what a run is trained with, in words: versions, system and device."""
    versions = {name: found for name in LIBRARIES if (found := _version(name)) is not None}
    ours = {"vqdist": __version__, "python": platform.python_version(), "torch": torch.__version__}
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return {**ours, **versions, "system": system, "device": _described(device)}


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{device.type}, {os.cpu_count()} cores"
