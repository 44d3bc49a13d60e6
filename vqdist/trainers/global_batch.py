"""The images of an optimizer step when a run goes on with another number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import read_json

NEEDED_TO_RESUME = ("position", "world_size", "backend")  # entries of every manifest of a run


@dataclass(frozen=True)
class GlobalBatch:
    """Images that a run takes in one optimizer step, as its options said it, on the processes that it had then.

    Attributes:
        batch_size: images of one micro-batch of one process.
        grad_accum_every: micro-batches of one step.
        images: of one step, over all processes.
    """

    batch_size: int
    grad_accum_every: int
    images: int

    @classmethod
    def of(cls, batch_size: int, grad_accum_every: int, processes: int) -> GlobalBatch:
        """Return what these options mean on so many processes."""
        return cls(batch_size, grad_accum_every, batch_size * grad_accum_every * processes)

    def resumed(self, told: GlobalBatch, processes: int) -> tuple[GlobalBatch, int]:
        """Return the same run on so many processes now, with the same options as before or with others.

        Only the number of images matters to what is learnt: options that keep it are taken as they are, and with
        unchanged options accumulation follows the number of processes, as near as it can.

        Args:
            told: by the options of this start.
            processes: of this start.

        Returns:
            What the run is to take, for its next start to compare with, and the accumulation of this one.

        Raises:
            UserError: the options have changed, and the number of images with them.
        """
        if told.images == self.images:
            return told, told.grad_accum_every
        if (told.batch_size, told.grad_accum_every) != (self.batch_size, self.grad_accum_every):
            raise UserError(
                f"batch_size {told.batch_size} x grad_accum_every {told.grad_accum_every} x processes {processes} is "
                f"{told.images} images an optimizer step, and the run has taken {self.images}; {self._advice(told)}"
                f"--trainer.allow_config_change true goes on with {told.images}"
            )
        return self, max(1, round(self.images / (self.batch_size * processes)))

    def _advice(self, told: GlobalBatch) -> str:
        of_one = told.images // told.grad_accum_every
        return "" if self.images % of_one else f"--trainer.grad_accum_every {self.images // of_one} keeps that, "


def global_batch_of(path: Path, manifest: dict[str, Any]) -> GlobalBatch | None:
    """Return what the run of a checkpoint was told to take in one step, or None if nothing says it.

    Manifests did not say it at first; there the run's configuration does.
    """
    if "global_batch" in manifest:
        return GlobalBatch(**manifest["global_batch"])
    configuration = path.parent.parent / "config.json"
    if not configuration.is_file() or "world_size" not in manifest:
        return None
    trainer = read_json(configuration).get("trainer", {})
    if not {"batch_size", "grad_accum_every"} <= trainer.keys():
        return None
    return GlobalBatch.of(trainer["batch_size"], trainer["grad_accum_every"], manifest["world_size"])
