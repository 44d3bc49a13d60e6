"""metrics.jsonl: every log line of a run as JSON, the one sink that is always on and must not fail."""

from __future__ import annotations

import filecmp
import json
import math
from pathlib import Path
from typing import Any

from vqdist.files import METRICS, CannotWrite, lines_of_metrics, writing
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
        self._logged = {frozenset(line) - {"step"} for line in kept}

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
        """Return the lines of the resumed step itself."""
        partial = self.file.with_name(self.file.name + ".partial")
        last = []
        try:
            with self.file.open("rb") as file, partial.open("wb") as cleaned:
                for raw, line in lines_of_metrics(file):
                    if line["step"] <= self._resumed_step:
                        cleaned.write(raw + b"\n")
                    if line["step"] == self._resumed_step:
                        last.append(line)
            if filecmp.cmp(self.file, partial, shallow=False):
                partial.unlink()
            else:
                partial.replace(self.file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CannotWrite(f"{self.file} cannot be read and cleaned: {error.strerror}") from error
        return last
