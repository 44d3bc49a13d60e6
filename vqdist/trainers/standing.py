"""The standing of a run: its best validation so far, as a checkpoint holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Standing:
    """Which validation was the best, and how many came after it; equal on every rank.

    Attributes:
        measure: name of the number that is compared; None compares nothing.
        default: name of that of the trainer, by which runs were compared that do not say it.
        protocol: digits that tell apart what the number is measured on; None where nobody says it.
        keeps_checkpoint: whether the checkpoint of the best step stays.
        step: of the best validation; -1 before the first.
        value: the number that was measured then; not finite where the weights of this step stay in place until any
            step is compared.
        compared_at: step of the last validation with such a number; -1 before the first.
        waited: validations after the best one.
        is_known: whether the run holds any of this; the checkpoints of older ones do not.
        is_anew: whether the run was compared by another number so far, or on something else.
    """

    measure: str | None
    default: str | None = None
    protocol: str | None = None
    keeps_checkpoint: bool = False
    step: int = -1
    value: float = math.nan
    compared_at: int = -1
    waited: int = 0
    is_known: bool = True
    is_anew: bool = False

    def forget(self) -> None:
        """Begin anew: no validation was compared."""
        self.step, self.value, self.compared_at, self.waited, self.is_anew = -1, math.nan, -1, 0, False

    def set(self, step: int, value: float) -> None:
        """Let the validation of this step be the best one."""
        self.step, self.value, self.compared_at, self.waited, self.is_anew = step, value, step, 0, False

    def wait_at(self, step: int) -> None:
        """Count a validation that was not better; that of a step which a resumed run makes again counts once."""
        self.waited += step != self.compared_at
        self.compared_at = step

    @property
    def kept_steps(self) -> frozenset[int]:
        """The steps whose checkpoints stay beside the newest."""
        return frozenset({self.step} if self.keeps_checkpoint and self.step >= 0 else ())

    def record(self) -> dict[str, Any]:
        """Return what the manifest of a checkpoint says of it."""
        value = self.value if math.isfinite(self.value) else None
        return {
            "measure": self.measure,
            "protocol": self.protocol,
            "step": self.step,
            "value": value,
            "compared_at": self.compared_at,
            "waited": self.waited,
        }

    def restore(self, record: Mapping[str, Any] | None) -> None:
        """Go on from the record of a checkpoint.

        Numbers of another measure or protocol cannot be compared: of such a record only the step is taken, so that its
        weights stay until the first validation takes their place.
        """
        self.forget()
        self.is_known = record is not None
        if record is None or self.measure is None:
            return
        self.step = record["step"]
        if not self.is_own(record):
            self.is_anew = self.step >= 0
            return
        self.value = math.nan if record["value"] is None else record["value"]
        self.compared_at, self.waited = record["compared_at"], record["waited"]

    def is_own(self, record: Mapping[str, Any]) -> bool:
        """Return whether the number of a record can be compared; those of before do not say what it is."""
        protocols = {record.get("protocol"), self.protocol} - {None}
        return record.get("measure", self.default) == self.measure and len(protocols) < 2
