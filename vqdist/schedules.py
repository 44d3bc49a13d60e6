"""Schedules are functions of the step: nothing to step, nothing to save, nothing that a world size can multiply."""

from __future__ import annotations

import math

from vqdist.errors import UserError

LR_SCHEDULES = ("constant", "cosine", "exponential")


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: str,
    warmup_steps: int,
    total_steps: int,
    epoch: int = 0,
    decay_rate: float = 1.0,
) -> float:
    """Return the learning rate of the update that follows `step` finished ones.

    It rises linearly over the first `warmup_steps` updates to `peak`; then it is constant, or falls to 0 at
    `total_steps` along half a cosine (SGDR, arXiv 1608.03983, without restarts), or is `peak * decay_rate ** epoch`
    with `epoch` finished passes over the images (`exponential`; the decay counts from the first epoch on).
    """
    if schedule not in LR_SCHEDULES:
        raise UserError(f"lr_schedule {schedule!r} is not known; choose one of {', '.join(LR_SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "exponential":
        return peak * decay_rate**epoch
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def linear_ramp(step: int, *, start: int, length: int) -> float:
    """0 before `start`, rising linearly to 1 over `length` steps; a step function when `length` is 0."""
    if step < start:
        return 0.0
    return 1.0 if length <= 0 else min(1.0, (step - start + 1) / length)


def temperature(step: int, *, start: float, rate: float, lowest: float) -> float:
    """Return the Gumbel-softmax temperature of the update that follows `step` finished ones.

    max(start * exp(-rate * step), lowest)
    """
    return max(start * math.exp(-rate * step), lowest)
