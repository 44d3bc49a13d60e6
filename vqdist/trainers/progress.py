"""Progress of a run: the two numbers that a step advances."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Shared by all that count in steps or images.

    Attributes:
        step: finished optimizer steps.
        position: images of the data order that were used, over all ranks.
    """

    step: int = 0
    position: int = 0

    def advance(self, images: int) -> None:
        """Count one step of so many images."""
        self.step += 1
        self.position += images
