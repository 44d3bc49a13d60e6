"""The best validation of a run: its weights are kept beside the last ones, and a fall below it is said."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vqdist import protocol
from vqdist.backends import Backend
from vqdist.errors import UserError
from vqdist.export import mend_export, remove_export, step_of_export
from vqdist.files import read_json, write_json
from vqdist.trainers.measure import (
    OF_PREDICTIONS,
    OF_RECONSTRUCTIONS,
    OF_SAMPLES,
    VALID,
    Measure,
)
from vqdist.trainers.progress import Progress
from vqdist.trainers.report import Report
from vqdist.trainers.run import Run
from vqdist.trainers.standing import Standing

__all__ = ["FOLDER", "OF_PREDICTIONS", "OF_RECONSTRUCTIONS", "RECORD", "Best", "Measure"]

FOLDER = "export_best"
RECORD = "best.json"


class Best:
    """Keeps the export of the step with the best validation in `export_best/`, as long as it is not the last.

    A checkpoint holds which step was the best until then, so a run that was killed goes on from there. Weights of the
    best step that are not in the folder are taken from its checkpoint, if `keep_best` names a number.

    Args:
        run: the folder and the configuration; with `keep_best` false nothing is kept, but a fall is said.
        backend: every rank of it calls each method.
        progress: of the run.
        report: says what happens.
        measure: None compares nothing, and every method does nothing.
        standing: how the validations compare so far.
        export: writes the averaged model into a folder.
        export_of: writes that of the checkpoint of a step, and goes back to this step; returns whether it could.
    """

    def __init__(
        self,
        run: Run,
        backend: Backend,
        progress: Progress,
        report: Report,
        measure: Measure | None,
        standing: Standing,
        export: Callable[[Path], None],
        export_of: Callable[[int, Path], bool],
    ):
        self.run = run
        self.backend = backend
        self.progress = progress
        self.report = report
        self.measure = measure
        self.standing = standing
        self._export = export
        self._export_of = export_of
        self._written = False  # whether the folder holds the weights of the best step
        self._restored_at = -1

    @property
    def step(self) -> int:
        """Step of the best validation; -1 before the first."""
        return self.standing.step

    @property
    def value(self) -> float:
        """The number that was measured then."""
        return self.standing.value

    @property
    def keeps(self) -> bool:
        """True if the weights of the best step are kept."""
        return self.measure is not None and self.run.config.keep_best is not False

    @property
    def folder(self) -> Path:
        """Their place."""
        return self.run.folder / FOLDER

    # ------------------------------------------------------------------------------------- resumed runs

    def restore(self, *, newest: bool = False) -> None:
        """Go on from what the loaded checkpoint says, and from what rank 0 finds in the run folder.

        Args:
            newest: whether the newest checkpoint of the run was loaded, so that others of it can be, and it again.
        """
        self._written, self._restored_at = False, self.progress.step
        if not self.keeps:
            return
        self.run.write_on_main(lambda: mend_export(self.folder))
        found = self._found() if self.backend.is_main else (-1, math.nan, -1)
        row = torch.tensor(found, dtype=torch.float64, device=self.backend.device)
        step, value, exported = self.backend.gather(row)[0].tolist()
        if self._counts(int(step), int(exported)):
            self.standing.set(int(step), value)
        self._written = self.step >= 0 and exported == self.step
        if self.step >= 0 and not self._written and self.step != self.progress.step:
            self._written = newest and self.standing.keeps_checkpoint and self._export_of(self.step, self.folder)
            if not self._written and exported <= self.progress.step:  # a later one is of a step to be made again
                self._say_lost()
        if self._written and (step, value) != (self.step, self.value):  # of steps that are to be made again, or lost
            self._record()
        if self.standing.is_anew:
            self._say_anew()

    def _counts(self, step: int, exported: int) -> bool:
        """Return whether best.json says more than the checkpoint: an older one, or one from before the validation."""
        if not 0 <= step <= self.progress.step:
            return False
        if not self.standing.is_known:
            return step in (exported, self.progress.step)
        return step == self.progress.step != self.standing.compared_at

    def _found(self) -> tuple[int, float, int]:
        """Return step and number of best.json, -1 where it is of another measure, and the step of the export."""
        exported = step_of_export(self.folder)
        exported = -1 if exported is None else exported
        try:
            record = read_json(self.run.folder / RECORD)
            step, value = int(record["step"]), float(record["value"])
            own = self.standing.is_own(record)
        except (UserError, AttributeError, KeyError, TypeError, ValueError):
            return -1, math.nan, exported
        return step if own else -1, value, exported

    def hold(self) -> None:
        """Keep the weights of this step if it is the best one: a run that had ended goes on."""
        if self.keeps and self.step == self.progress.step and not self._written:
            self._write()

    # ------------------------------------------------------------------------------------- validations

    def note(self, numbers: Mapping[str, float]) -> None:
        """Keep the weights of this step if its validation is the best so far; say so if it fell.

        Args:
            numbers: of the validation; without the one that is compared nothing happens.
        """
        if self.measure is None:
            return
        if (value := self._of_rank_0(numbers)) is None:
            self._say_missing(self.measure.name, numbers)
            return
        if self.standing.is_anew and self.step != self.progress.step == self._restored_at:
            return  # a run at its end, which is only measured once more, keeps the step that was its best
        # any number is better than one that cannot be compared
        if not math.isfinite(value) or self.measure.gain(value, self.value) <= 0:
            self.standing.wait_at(self.progress.step)
            self._say_fall(self.measure, value)
            return
        self.standing.set(self.progress.step, value)
        self.report.withdraw("validation")
        if self.keeps:
            self._write()

    def _of_rank_0(self, numbers: Mapping[str, float]) -> float | None:
        """Return its number on every rank: hosts round differently, and all must come to one decision."""
        name = self.measure.name if self.measure is not None else ""
        found = numbers.get(name)
        row = [float(found is not None), math.nan if found is None else found]
        given, value = self.backend.gather(torch.tensor(row, dtype=torch.float64, device=self.backend.device))[0]
        return float(value) if given else None

    def _write(self) -> None:
        self._export(self.folder)
        self._record()
        self._written = True

    def _record(self) -> None:
        """Say it in best.json, for people and programs; a step that is only held until the next keeps its record."""
        if not math.isfinite(self.value):
            return
        record = {"step": self.step, "value": self.value, "measure": self.standing.measure}
        record["protocol"] = self.standing.protocol
        self.run.write_on_main(lambda: write_json(self.run.folder / RECORD, record))

    def _say_fall(self, measure: Measure, value: float) -> None:
        kept = f". {self.folder} has the weights of step {self.step}" if self._written else ""
        if not math.isfinite(value):
            self.report.warn(
                "validation",
                f"{VALID}{measure.name} is {value} at step {self.progress.step}, which is not better than any; look "
                f"at the losses{kept}",
            )
            return
        if not measure.has_fallen(value, self.value):
            self.report.withdraw("validation")
            return
        self.report.warn(
            "validation",
            f"{VALID}{measure.name} is {measure.shown(value)} at step {self.progress.step}, and was "
            f"{self.value:.4g} at step {self.step}; {measure.advice}{kept}",
        )

    def _say_missing(self, name: str, numbers: Mapping[str, float]) -> None:
        """Say that a number which somebody named is none of a validation; samples are not drawn at each."""
        if isinstance(self.run.config.keep_best, str) and name not in OF_SAMPLES and numbers:
            found = ", ".join(sorted(numbers))
            self.report.warn("keep_best", f"keep_best names {name}, and validations have {found}: no step is kept")

    def _say_lost(self) -> None:
        than = f"better than {self.value:.4g}" if math.isfinite(self.value) else "compared"
        self.report.alert(
            f"{self.folder} does not hold the weights of step {self.step}, the best one, and no checkpoint does; the "
            f"next step that is {than} takes its place"
        )

    def _say_anew(self) -> None:
        """Say that numbers of before cannot be compared with those to come."""
        held = f"; until a later step is validated {self.folder} keeps step {self.step}" if self._written else ""
        self.report.alert(
            f"{VALID}{self.standing.measure} is compared anew from step {self.progress.step} on: so far it was "
            f"another number, or measured on something else, as events.jsonl says{held}"
        )

    @property
    def wants_checkpoint(self) -> bool:
        """True if the checkpoint of this step is to be kept."""
        return self.standing.keeps_checkpoint and self.step == self.progress.step

    # ------------------------------------------------------------------------------------- the end

    @property
    def has_given_up(self) -> bool:
        """True if as many validations as `patience` says were not better than the best one."""
        patience = self.run.config.patience
        return self.measure is not None and patience is not None and self.standing.waited >= patience

    @property
    def reason(self) -> str:
        """The reason for the end of a run that has given up."""
        standing, patience = self.standing, self.run.config.patience
        than = "a finite number"
        if math.isfinite(standing.value):
            than = f"better than {standing.value:.4g}, that of step {standing.step},"
        return f"{VALID}{standing.measure} was not {than} in {standing.waited} validations (patience {patience})"

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
        value = f" {self.measure.shown(self.value)}" if math.isfinite(self.value) else " of before"
        self.report.print(
            f"the best validation was that of step {self.step}, with {self.measure.name}{value}; {self.folder} has "
            f"its weights, and export/ those of step {self.progress.step}"
        )


def standing_of(
    measure: Measure | None, default: Measure | None, keep_best: Any, said: Mapping[str, Any] | None, backend: Backend
) -> Standing:
    """Return the standing of a new run; every rank calls this.

    Args:
        measure: by which steps are compared.
        default: that of the trainer, by which runs from before were compared.
        keep_best: the option; the name of a number keeps the checkpoint, too.
        said: the protocol of validations, of which that of rank 0 counts; None without images to validate on.
        backend: of the run.
    """
    named = measure is not None and isinstance(keep_best, str)
    names = [None if one is None else one.name for one in (measure, default)]
    if said is None:
        return Standing(names[0], names[1], keeps_checkpoint=named)
    words = json.dumps(protocol.of_number(names[0] or "", said), sort_keys=True, default=str)
    mark = torch.tensor([int(hashlib.sha256(words.encode()).hexdigest()[:15], 16)], device=backend.device)
    return Standing(names[0], names[1], f"{int(backend.gather(mark)[0]):015x}", keeps_checkpoint=named)
