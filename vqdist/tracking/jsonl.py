"""metrics.jsonl: every log line of a run as JSON, the one sink that is always on and must not fail."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import METRICS, lines_of_metrics, writing
from vqdist.tracking.base import Sink


class JsonlSink(Sink):
    """Appends each call of `log` as one line to metrics.jsonl.

    Args:
        run_folder: holds the file.
        resumed_step: lines of later steps, left by a run that died, are removed, and so is what is no line of a run.
    """

    def __init__(self, run_folder: Path, resumed_step: int = 0):
        self.file = run_folder / METRICS
        self._resumed_step = resumed_step
        kept = self._drop_later_steps() if self.file.exists() else []
        self._logged = {frozenset(line) - {"step"} for line in kept if line["step"] == resumed_step}

    def has(self, step: int, values: dict[str, float]) -> bool:
        """Return whether an earlier part of the run has written this line.

        A finished run that is started again measures its last step again, and so does one that was killed after a
        validation which its checkpoint did not hold. The file ends as that of an undisturbed run all the same.
        """
        return step == self._resumed_step and frozenset(values) in self._logged

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line. NaN and infinity become null: JSON has neither.

        Raises:
            CannotWrite: the file cannot be written.
        """
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        with writing(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _drop_later_steps(self) -> list[dict[str, Any]]:
        """Return the lines that are kept."""
        try:
            content = self.file.read_bytes()
            kept = [(raw, line) for raw, line in lines_of_metrics(content) if line["step"] <= self._resumed_step]
            cleaned = b"".join(raw + b"\n" for raw, _ in kept)
            if cleaned != content:
                partial = self.file.with_name(self.file.name + ".partial")
                partial.write_bytes(cleaned)
                partial.replace(self.file)
        except OSError as error:
            raise UserError(
                f"{self.file} cannot be read and cleaned: {error.strerror}; mend its permissions"
            ) from error
        return [line for _, line in kept]
