"""The best validation of a run: its weights are kept beside the last ones, and a fall below it is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vqdist.backends import Backend
from vqdist.errors import UserError
from vqdist.export import mend_export, remove_export, step_of_export
from vqdist.files import read_json, write_json
from vqdist.trainers.progress import Progress
from vqdist.trainers.report import Report
from vqdist.trainers.run import Run

FOLDER = "export_best"
RECORD = "best.json"


@dataclass(frozen=True)
class Measure:
    """The number of a validation by which steps are compared.

    Attributes:
        name: of the number, as `evaluate` returns it.
        higher: whether a higher one is better.
        margin: a step that is worse than the best by more is said to be.
        unit: of the number.
        advice: what to do about it.
    """

    name: str
    higher: bool
    margin: float
    unit: str
    advice: str

    def gain(self, new: float, old: float) -> float:
        """Return by how much the new number is better than the old one; negative if it is worse."""
        return new - old if self.higher else old - new


OF_RECONSTRUCTIONS = Measure("psnr", True, 1.0, "dB", "docs/gan.md says what to try")
OF_PREDICTIONS = Measure("nll", False, 0.1, "nats", "the model may be learning its training images by heart")


class Best:
    """Keeps the export of the step with the best validation in `export_best/`, as long as it is not the last.

    A resumed run takes the best step over from best.json, unless that is a step which it has yet to make.

    Args:
        run: the folder and the configuration; with `keep_best` false nothing is kept, but a fall is said.
        backend: every rank of it calls each method.
        progress: of the run.
        report: says what happens.
        measure: None compares nothing, and every method does nothing.
        export: writes the averaged model into a folder.

    Attributes:
        step: of the best validation; -1 before the first.
        value: the number that was measured then.
    """

    def __init__(
        self,
        run: Run,
        backend: Backend,
        progress: Progress,
        report: Report,
        measure: Measure | None,
        export: Callable[[Path], None],
    ):
        self.run = run
        self.backend = backend
        self.progress = progress
        self.report = report
        self.measure = measure
        self._export = export
        self._forget()

    def _forget(self) -> None:
        self.step, self.value = -1, math.nan
        self._written = False  # whether the folder holds the weights of this step

    @property
    def keeps(self) -> bool:
        """True if the weights of the best step are kept."""
        return self.measure is not None and self.run.config.keep_best

    @property
    def folder(self) -> Path:
        """Their place."""
        return self.run.folder / FOLDER

    def restore(self) -> None:
        """Go on from what rank 0 finds in the run folder, for the step that the run is at now."""
        self._forget()
        if not self.keeps:
            return
        self.run.write_on_main(lambda: mend_export(self.folder))
        found = self._found() if self.backend.is_main else (-1, math.nan, False)
        row = torch.tensor(found, dtype=torch.float64, device=self.backend.device)
        step, value, written = self.backend.gather(row)[0].tolist()
        if 0 <= step <= self.progress.step and (written or step == self.progress.step):
            self.step, self.value, self._written = int(step), value, bool(written)

    def _found(self) -> tuple[int, float, bool]:
        """Return step and number of best.json, and whether the folder has the weights of this step."""
        try:
            record = read_json(self.run.folder / RECORD)
            step, value = int(record["step"]), float(record["value"])
        except (UserError, AttributeError, KeyError, TypeError, ValueError):
            return -1, math.nan, False
        return step, value, step_of_export(self.folder) == step

    def hold(self) -> None:
        """Keep the weights of this step if it is the best one: a run that had ended goes on."""
        if self.keeps and self.step == self.progress.step and not self._written:
            self._write()

    def note(self, numbers: Mapping[str, float]) -> None:
        """Keep the weights of this step if its validation is the best so far; say so if it fell.

        Args:
            numbers: of the validation, the same on every rank; without any nothing is compared.
        """
        if self.measure is None or not math.isfinite(value := numbers.get(self.measure.name, math.nan)):
            return
        if self.step >= 0 and self.measure.gain(value, self.value) <= 0:
            self._say_fall(self.measure, value)
            return
        self.step, self.value = self.progress.step, value
        self.report.withdraw("validation")
        if self.keeps:
            self._write()

    def _write(self) -> None:
        self._export(self.folder)
        record = {"step": self.step, "value": self.value}
        self.run.write_on_main(lambda: write_json(self.run.folder / RECORD, record))
        self._written = True

    def _say_fall(self, measure: Measure, value: float) -> None:
        if -measure.gain(value, self.value) <= measure.margin:
            self.report.withdraw("validation")
            return
        kept = f". {self.folder} has the weights of step {self.step}" if self.keeps else ""
        self.report.warn(
            "validation",
            f"valid/{measure.name} is {value:.4g} {measure.unit} at step {self.progress.step}, and was "
            f"{self.value:.4g} at step {self.step}; {measure.advice}{kept}",
        )

    @property
    def is_another(self) -> bool:
        """True if the weights of a better step than the present one are kept."""
        return self._written and self.step != self.progress.step

    def finish(self) -> None:
        """Say which step was the best, or remove its folder where that is the last step: `export/` has it."""
        if self.measure is None or self.step < 0 or not self._written:
            return
        if self.step == self.progress.step:
            self.run.write_on_main(lambda: remove_export(self.folder))
            self._written = False
            return
        self.report.print(
            f"the best validation was that of step {self.step}, with {self.measure.name} {self.value:.4g} "
            f"{self.measure.unit}; {self.folder} has its weights, and export/ those of step {self.progress.step}"
        )
