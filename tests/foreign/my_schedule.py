"""An own schedule of the learning rate: a function of the step that returns the factor of the peak."""

from __future__ import annotations


def halved(step: int, total_steps: int, after: float = 0.5) -> float:
    """Return 1, and a half after this share of the steps that follow the warm-up."""
    return 0.5 if step >= after * total_steps else 1.0
