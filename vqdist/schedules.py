"""Schedules are functions of the step: nothing to step, nothing to save, nothing that a world size can multiply.

A schedule of the learning rate is a part. It is called with the finished updates since the warm-up and the updates
from the warm-up to the end of the run, and returns the factor of the peak rate. One that has a parameter `epoch` gets
the finished passes over the images too. Its other parameters are its `init_args`:

    def halved(step, total_steps, after: float = 0.5):
        return 0.5 if step >= after * total_steps else 1.0

    lr_schedule: {class_path: my_schedules.halved, init_args: {after: 0.8}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vqdist.errors import UserError
from vqdist.options import is_number, is_whole
from vqdist.parts import PartSpec, Registry, arguments_of, unknown

Schedule = Callable[..., float]
SCHEDULES: Registry[Any] = Registry("lr_schedule")


@SCHEDULES.add("constant")
def constant(step: int, total_steps: int) -> float:
    """Return 1."""
    return 1.0


@SCHEDULES.add("cosine")
def cosine(step: int, total_steps: int, *, min_ratio: float = 0.0) -> float:
    """Return half a cosine from 1 to `min_ratio` (SGDR, arXiv 1608.03983, without restarts)."""
    return _between(min_ratio, 0.5 * (1 + math.cos(math.pi * _progress(step, total_steps))))


@SCHEDULES.add("linear")
def linear(step: int, total_steps: int, *, min_ratio: float = 0.0) -> float:
    """Return a line from 1 to `min_ratio`."""
    return _between(min_ratio, 1 - _progress(step, total_steps))


@SCHEDULES.add("exponential")
def exponential(step: int, total_steps: int, *, epoch: int = 0, decay_rate: float = 0.98) -> float:
    """Return decay_rate ** epoch, of the finished passes over the images since the run began."""
    _check_share("decay_rate", decay_rate, above_zero=True)
    return decay_rate**epoch


@SCHEDULES.add("wsd")
def warmup_stable_decay(step: int, total_steps: int, *, min_ratio: float = 0.0, decay_share: float = 0.2) -> float:
    """Return 1, and over the last `decay_share` of the steps a line to `min_ratio` (arXiv 2404.06395)."""
    _check_share("decay_share", decay_share, above_zero=True)
    left = max(0, total_steps - step) / max(1.0, decay_share * total_steps)
    return _between(min_ratio, min(1.0, left))


@SCHEDULES.add("multistep")
def multistep(
    step: int,
    total_steps: int,
    *,
    epoch: int = 0,
    epochs: Sequence[int] = (),
    steps: Sequence[int] = (),
    factor: float = 0.1,
) -> float:
    """Return `factor` to the power of the drops so far, as SEED-Voken trains (IBQ, Open-MAGVIT2).

    A drop follows so many finished passes over the images as `epochs` says, or so many updates since the warm-up as
    `steps` says. One of the two is given.
    """
    _check_share("factor", factor)
    drops, name = (epochs, "epochs") if epochs else (steps, "steps")
    if bool(epochs) == bool(steps):
        found = "both" if epochs else "neither"
        raise UserError(f"lr_schedule multistep has {found} of epochs and steps; give one, as epochs: [250, 300]")
    growing = isinstance(drops, (list, tuple)) and all(is_whole(drop) and drop > 0 for drop in drops)
    if not growing or any(first >= second for first, second in zip(drops, drops[1:])):
        raise UserError(f"{name} {drops!r} of lr_schedule are not possible; give growing whole numbers, as [250, 300]")
    done = epoch if epochs else step
    return float(factor ** sum(done >= drop for drop in drops))


def _progress(step: int, total_steps: int) -> float:
    return min(1.0, step / max(1, total_steps))


def _between(min_ratio: float, factor: float) -> float:
    _check_share("min_ratio", min_ratio)
    return min_ratio + (1 - min_ratio) * factor


def _check_share(name: str, value: float, *, above_zero: bool = False) -> None:
    possible = is_number(value) and 0 <= value <= 1
    if not possible or (above_zero and value == 0):
        lowest = "above 0" if above_zero else "of at least 0"
        raise UserError(f"{name} {value!r} of lr_schedule is not possible; give a share {lowest} and at most 1")


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: PartSpec | Schedule,
    warmup_steps: int,
    total_steps: int,
    epoch: int = 0,
    decay_rate: float = 1.0,
) -> float:
    """Return the learning rate of the update that follows `step` finished ones.

    It rises linearly over the first `warmup_steps` updates to `peak`; then it is `peak` times what the schedule says.

    Args:
        step: finished updates.
        peak: the highest rate.
        schedule: a name, an import path, both keys of a part, or a function: see `SCHEDULES`.
        warmup_steps: updates of the warm-up.
        total_steps: updates of the whole run.
        epoch: finished passes over the images.
        decay_rate: of the schedule `exponential`, where its init_args do not say it.

    Raises:
        UserError: there is no such schedule, its arguments are wrong, or it returns no rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "exponential":
        schedule = {"class_path": "exponential", "init_args": {"decay_rate": decay_rate}}
    return peak * factor_of(schedule, step - warmup_steps, total_steps - warmup_steps, epoch)


def factor_of(schedule: PartSpec | Schedule, step: int, total_steps: int, epoch: int = 0) -> float:
    """Return the factor of the peak rate that a schedule says.

    Args:
        schedule: see `learning_rate`.
        step: finished updates since the warm-up.
        total_steps: updates from the warm-up to the end.
        epoch: finished passes over the images.

    Raises:
        UserError: there is no such schedule, its arguments are wrong, or it returns no finite number of at least 0.
    """
    if callable(schedule):
        takes_epoch = any(parameter.name == "epoch" for parameter in arguments_of(schedule))
        factor = schedule(step, total_steps, **({"epoch": epoch} if takes_epoch else {}))
    else:
        factor = SCHEDULES.build(schedule, step, total_steps, epoch=epoch)
    if not is_number(factor) or not 0 <= factor < math.inf:
        raise UserError(
            f"lr_schedule {schedule!r} returned {factor!r} at step {step} of {total_steps}; a schedule returns the "
            "factor of the peak rate, a finite number of at least 0"
        )
    return factor


DECAYS = ("linear", "cosine", "exponential")


@dataclass(frozen=True)
class WeightSchedule:
    """A weight as a function of the step: 0 until it starts, then a ramp, then its value, then a decay.

    Attributes:
        value: after the ramp and before the decay.
        start: the first step at which it is not 0.
        initial: at `start`, where there is a ramp.
        ramp_steps: steps over which it goes from `initial` to `value` in a line.
        decay_start: step at which the decay begins; None for none.
        decay_steps: steps over which it goes to `final`; 0 does so at once.
        decay: `linear`, `cosine` (half of one), or `exponential` (by equal factors, `final` is above 0).
        final: after the decay.
    """

    value: float
    start: int = 0
    initial: float = 0.0
    ramp_steps: int = 0
    decay_start: int | None = None
    decay_steps: int = 0
    decay: str = "linear"
    final: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, Any], what: str) -> WeightSchedule:
        """Read a weight from a configuration; `what` it is called in messages.

        Raises:
            UserError: a key is unknown or missing, or a value is not possible.
        """
        names = [field.name for field in fields(cls)]
        for key in given:
            if key not in names:
                raise unknown("key", str(key), names, of=what)
        if "value" not in given:
            raise UserError(f"{what} {dict(given)} has no value; give one, as {{value: 0.1, start: 1000}}")
        schedule = cls(**given)
        schedule._check(what)
        return schedule

    def _check(self, what: str) -> None:
        for name in ("value", "initial", "final"):
            check_weight(getattr(self, name), f"{name} of {what}")
        for name in ("start", "ramp_steps", "decay_steps"):
            steps = getattr(self, name)
            if not is_whole(steps) or steps < 0:
                raise UserError(f"{name} of {what} is {steps!r}; give a whole number of at least 0")
        if self.decay not in DECAYS:
            raise UserError(f"decay of {what} is {self.decay!r}; choose one of {', '.join(DECAYS)}")
        if self.decay == "exponential" and not (self.value > 0 and self.final > 0):
            raise UserError(f"decay exponential of {what} needs a value and a final above 0; give them, or linear")
        after_ramp = self.start + self.ramp_steps
        if self.decay_start is None:
            if self.decay_steps or self.final or self.decay != "linear":
                raise UserError(f"{what} says how it decays but not when; give decay_start, or leave the rest out")
        elif (
            isinstance(self.decay_start, bool)
            or not isinstance(self.decay_start, int)
            or self.decay_start < after_ramp
        ):
            raise UserError(
                f"decay_start of {what} is {self.decay_start!r}; give a step of at least {after_ramp}, where its ramp "
                "ends"
            )
        if self.initial and not self.ramp_steps:
            raise UserError(f"initial {self.initial:g} of {what} does nothing without ramp_steps; give these")

    def at(self, step: int) -> float:
        """Return the weight of the update that follows `step` finished ones."""
        if step < self.start:
            return 0.0
        if step < self.start + self.ramp_steps:
            return self.initial + (self.value - self.initial) * (step - self.start) / self.ramp_steps
        if self.decay_start is None or step < self.decay_start:
            return self.value
        share = min(1.0, (step - self.decay_start) / self.decay_steps) if self.decay_steps else 1.0
        if self.decay == "exponential":
            return self.value * (self.final / self.value) ** share
        left = 0.5 * (1 + math.cos(math.pi * share)) if self.decay == "cosine" else 1 - share
        return self.final + (self.value - self.final) * left


Weight = float | Mapping[str, Any]
"""A number, or the fields of `WeightSchedule` by name."""


def check_weight(given: Any, what: str = "weight") -> None:
    """Raise `UserError` unless this is a finite number of at least 0, or the fields of a `WeightSchedule`."""
    if isinstance(given, Mapping):
        WeightSchedule.of(given, what)
        return
    if not is_number(given) or not math.isfinite(given):
        raise UserError(f"the {what} is {given!r}; give a finite number, or a schedule as {{value: 0.1, start: 1000}}")
    if given < 0:
        raise UserError(f"the {what} is {given}; it must be at least 0")


def weight_at(given: Weight, step: int, what: str = "weight") -> float:
    """Return a weight at a step."""
    return WeightSchedule.of(given, what).at(step) if isinstance(given, Mapping) else given


def ever_positive(given: Weight) -> bool:
    """Return whether a weight is above 0 at some step."""
    if not isinstance(given, Mapping):
        return given > 0
    schedule = WeightSchedule.of(given, "weight")
    return max(schedule.value, schedule.initial, schedule.final) > 0


def check_temperature(given: Any, what: str) -> None:
    """Raise `UserError` unless this is a number above 0, or a schedule that is above 0 at every step."""
    check_weight(given, what)
    schedule = WeightSchedule.of(given, what) if isinstance(given, Mapping) else WeightSchedule(given)
    lowest = [schedule.value]
    lowest += [schedule.initial] if schedule.ramp_steps else []
    lowest += [schedule.final] if schedule.decay_start is not None else []
    if schedule.start or min(lowest) <= 0:
        raise UserError(
            f"{what} {given!r} is 0 at some step; it must be above 0 from step 0 on, as {{value: 0.9, decay_start: 0, "
            "decay_steps: 1000000, decay: cosine, final: 1.0e-6}"
        )


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
