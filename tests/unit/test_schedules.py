"""Schedules against their formulas, and the state of the random number generators."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
import torch

from vqdist import seeding
from vqdist.errors import UserError
from vqdist.schedules import (
    check_temperature,
    check_weight,
    ever_positive,
    learning_rate,
    linear_ramp,
    temperature,
    weight_at,
)


def rates(schedule: str, warmup_steps: int, steps: int = 100) -> list[float]:
    return [
        learning_rate(step, peak=2.0, schedule=schedule, warmup_steps=warmup_steps, total_steps=steps)
        for step in range(steps + 1)
    ]


def test_constant_rate_rises_linearly_and_stays():
    assert rates("constant", 4)[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert set(rates("constant", 0)) == {2.0}


def test_cosine_rate_is_half_a_cosine_after_the_warm_up():
    values = rates("cosine", 20)
    assert values[20] == 2.0
    assert values[60] == pytest.approx(1.0)
    assert values[40] == pytest.approx(1 + math.cos(math.pi / 4))
    assert values[100] == pytest.approx(0.0)


@pytest.mark.parametrize(
    "warmup_steps, expected", [(0, [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]), (3, [2 / 3, 4 / 3, 2, 1, 0.5, 0.5])]
)
def test_exponential_rate_falls_by_the_epoch_after_the_warm_up(warmup_steps, expected):
    settings = {"peak": 2.0, "schedule": "exponential", "warmup_steps": warmup_steps, "total_steps": 6}
    values = [learning_rate(step, **settings, epoch=step // 2, decay_rate=0.5) for step in range(6)]
    assert values == pytest.approx(expected)
    assert {learning_rate(step, **settings) for step in range(3, 6)} == {2.0}  # nothing falls unless it is asked to


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_epoch_is_of_the_exponential_rate_only(schedule):
    settings = {"peak": 2.0, "schedule": schedule, "warmup_steps": 0, "total_steps": 10}
    assert learning_rate(5, **settings, epoch=3, decay_rate=0.1) == learning_rate(5, **settings)


PARTS = {
    "linear": ({"min_ratio": 0.1}, {0: 2.0, 50: 1.1, 100: 0.2}),
    "cosine": ({"min_ratio": 0.5}, {0: 2.0, 50: 1.5, 100: 1.0}),
    "wsd": ({"decay_share": 0.2, "min_ratio": 0.5}, {0: 2.0, 79: 2.0, 80: 2.0, 90: 1.5, 100: 1.0}),
    "exponential": ({"decay_rate": 0.5}, {0: 0.5, 100: 0.5}),  # of two epochs, whatever the step
    "constant": ({}, {0: 2.0, 100: 2.0}),
    "multistep": ({"steps": [50, 80], "factor": 0.5}, {0: 2.0, 49: 2.0, 50: 1.0, 79: 1.0, 80: 0.5, 100: 0.5}),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_a_schedule_with_arguments_is_its_formula_after_the_warm_up(name, warmup_steps):
    arguments, expected = PARTS[name]
    settings = {"schedule": {"class_path": name, "init_args": arguments}, "warmup_steps": warmup_steps, "epoch": 2}
    for step, rate in expected.items():
        found = learning_rate(step + warmup_steps, peak=2.0, total_steps=100 + warmup_steps, **settings)
        assert found == pytest.approx(rate), step
    rising = [learning_rate(step, peak=2.0, total_steps=120, **settings) for step in range(warmup_steps)]
    assert rising == [2.0 * (step + 1) / 20 for step in range(warmup_steps)]


def test_steps_past_the_end_and_runs_without_steps_have_a_rate():
    for name in PARTS:
        for step, total in ((150, 100), (0, 0), (5, 5)):
            part = {"class_path": name, "init_args": PARTS[name][0]}
            assert 0 <= learning_rate(step, peak=1.0, schedule=part, warmup_steps=5, total_steps=total) <= 1


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_rate_drops_after_epochs_whatever_the_step(warmup_steps):
    part = {"class_path": "multistep", "init_args": {"epochs": [2, 5]}}
    settings = {"peak": 1.0, "schedule": part, "warmup_steps": warmup_steps, "total_steps": 20}
    rates = [learning_rate(step + 3, **settings, epoch=step) for step in range(7)]
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "has neither of epochs and steps; give one"),
        ({"epochs": [1], "steps": [2]}, "has both of epochs and steps; give one"),
        ({"epochs": [3, 3]}, r"epochs \[3, 3\] of lr_schedule are not possible; give growing whole numbers"),
        ({"epochs": [0.5]}, r"epochs \[0.5\] of lr_schedule are not possible"),
        ({"steps": 7}, "steps 7 of lr_schedule are not possible"),
        ({"steps": [7], "factor": 2}, "factor 2 of lr_schedule is not possible"),
    ],
)
def test_drops_that_cannot_be_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        schedule = {"class_path": "multistep", "init_args": arguments}
        learning_rate(0, peak=1.0, schedule=schedule, warmup_steps=0, total_steps=10)


def test_an_own_schedule_is_a_function_of_the_step_by_path_or_as_it_is():
    part = {"class_path": "foreign.my_schedule.halved", "init_args": {"after": 0.8}}
    settings = {"peak": 2.0, "warmup_steps": 10, "total_steps": 110}
    assert [learning_rate(step, schedule=part, **settings) for step in (10, 89, 90)] == [2.0, 2.0, 1.0]
    assert learning_rate(20, schedule=lambda step, total_steps: step / total_steps, **settings) == pytest.approx(0.2)
    assert learning_rate(20, schedule=lambda step, total, epoch: epoch, epoch=3, **settings) == 6.0


@pytest.mark.parametrize(
    "schedule, message",
    [
        (
            {"class_path": "wsd", "init_args": {"decay": 0.1}},
            "lr_schedule wsd has no argument 'decay'; nearest: decay_",
        ),
        ({"class_path": "cosine", "init_args": {"min_ratio": 2}}, "min_ratio 2 of lr_schedule is not possible"),
        ({"class_path": "wsd", "init_args": {"decay_share": 0}}, "decay_share 0 of lr_schedule .* a share above 0"),
        ("foreign.my_schedule.nothing", "lr_schedule foreign.my_schedule has no|has no 'nothing'"),
        (lambda step, total_steps: None, "returned None at step 0 of 10; a schedule returns the factor of the peak"),
        (lambda step, total_steps: -1.0, "returned -1.0 at step 0 of 10"),
        (lambda step, total_steps: float("nan"), "returned nan at step 0 of 10"),
    ],
)
def test_a_schedule_that_gives_no_rate_is_one_line(schedule, message):
    with pytest.raises(UserError, match=message):
        learning_rate(0, peak=1.0, schedule=schedule, warmup_steps=0, total_steps=10)


def test_unknown_schedule_is_refused():
    with pytest.raises(
        UserError, match="there is no lr_schedule 'liner'; nearest: linear; there are constant, cosine"
    ):
        learning_rate(0, peak=1, schedule="liner", warmup_steps=0, total_steps=1)


@pytest.mark.parametrize(
    "given",
    [
        0,
        {"value": 0.9, "start": 5},
        {"value": 0.9, "ramp_steps": 5},
        {"value": 0.9, "decay_start": 0, "decay_steps": 5},
        {"value": 0.9, "decay_start": 0, "decay_steps": 5, "decay": "exponential"},
    ],
)
def test_a_temperature_that_comes_to_0_is_refused(given):
    check_temperature({"value": 0.9, "initial": 0.1, "ramp_steps": 2, "decay_start": 2, "final": 0.1}, "t")
    with pytest.raises(UserError, match="is 0 at some step; it must be above 0|needs a value and a final above 0"):
        check_temperature(given, "t")


def test_ramp_begins_where_it_is_told():
    assert [linear_ramp(step, start=3, length=2) for step in range(7)] == [0, 0, 0, 0.5, 1, 1, 1]
    assert [linear_ramp(step, start=1, length=0) for step in range(3)] == [0, 1, 1]


def test_temperature_is_its_formula():
    for step in (0, 1, 100, 1000, 100_000):
        expected = max(0.9 * math.exp(-1e-4 * step), 0.3)
        assert temperature(step, start=0.9, rate=1e-4, lowest=0.3) == pytest.approx(expected, rel=1e-12)
    assert temperature(10**9, start=1.0, rate=0.0, lowest=0.5) == 1.0
    assert temperature(10**9, start=1.0, rate=10.0, lowest=0.5) == 0.5


def test_dalles_temperature_reaches_its_minimum_when_its_formula_says():
    """ln 2 / 1e-6 = 693,147.2; DALLE-pytorch's own loop is there after 11,800 steps."""
    settings = {"start": 1.0, "rate": 1e-6, "lowest": 0.5}
    assert temperature(11_800, **settings) == pytest.approx(0.98827, abs=1e-5)
    assert temperature(693_147, **settings) > 0.5
    assert temperature(693_148, **settings) == 0.5


def draws() -> list:
    return [random.random(), float(np.random.normal()), float(np.random.rand()), *torch.rand(3).tolist()]


def test_random_state_comes_back_whole(tmp_path):
    seeding.seed_everything(1, "train", 0)
    draws()
    np.random.normal()  # leaves half a pair of normal numbers behind
    torch.save(seeding.generator_states(), tmp_path / "random.pt")
    expected = draws()
    draws()
    seeding.restore_generator_states(torch.load(tmp_path / "random.pt", weights_only=True))
    assert draws() == expected


def test_seeds_differ_by_every_part():
    seeds = {seeding.derive_seed(*parts) for parts in [(1,), (2,), (1, 2), (2, 1), ("order", 1), ("train", 1)]}
    assert len(seeds) == 6


# Weights


def test_a_weight_starts_ramps_stays_and_decays():
    weight = {
        "value": 0.5,
        "start": 2,
        "ramp_steps": 4,
        "initial": 0.1,
        "decay_start": 8,
        "decay_steps": 4,
        "final": 0.1,
    }
    expected = [0, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
    assert [weight_at(weight, step) for step in range(14)] == pytest.approx(expected)
    assert weight_at({**weight, "decay": "cosine"}, 9) == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi / 4)) / 2)
    assert [weight_at({"value": 1, "decay_start": 2}, step) for step in range(4)] == [1, 1, 0, 0]
    assert weight_at(0.3, 100) == 0.3
    # DALLE-pytorch's exponential is one by equal factors: max(0.9 exp(-0.01 step), 0.3)
    equal = {"value": 0.9, "decay_start": 0, "decay_steps": math.log(3) / 0.01, "decay": "exponential", "final": 0.3}
    equal["decay_steps"] = round(equal["decay_steps"])
    for step in (0, 40, 109, 110, 500):
        expected = temperature(step, start=0.9, rate=math.log(3) / 110, lowest=0.3)
        assert weight_at(equal, step) == pytest.approx(expected), step
    falling = {"value": 0.1, "initial": 0.3, "ramp_steps": 2000}  # bsq-vit's: three times the weight, falling
    assert [weight_at(falling, step) for step in (0, 1000, 2000)] == pytest.approx([0.3, 0.2, 0.1])
    assert ever_positive({"value": 0.0, "initial": 1.0, "ramp_steps": 3}) and not ever_positive({"value": 0.0})


@pytest.mark.parametrize(
    "weight, message",
    [
        ({"value": 1, "warmup": 3}, "w has no key 'warmup'"),
        ({"start": 3}, "w {'start': 3} has no value"),
        ({"value": "much"}, "value of w is 'much'; give a finite number"),
        ({"value": 1, "start": -1}, "start of w is -1; give a whole number"),
        ({"value": 1, "start": 1.5}, "start of w is 1.5; give a whole number"),
        (
            {"value": 1, "start": 5, "ramp_steps": 5, "decay_start": 9},
            "decay_start of w is 9; give a step of at least 10",
        ),
        ({"value": 1, "decay_steps": 5}, "says how it decays but not when"),
        ({"value": 1, "decay_start": 5, "decay": "fast"}, "decay of w is 'fast'; choose one of linear, cosine"),
        ({"value": 1, "initial": 0.5}, "initial 0.5 of w does nothing without ramp_steps"),
        (-1.0, "the w is -1.0; it must be at least 0"),
        (math.inf, "the w is inf; give a finite number"),
        (True, "the w is True; give a finite number"),
    ],
)
def test_a_weight_that_cannot_be_is_one_line(weight, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_weight(weight, "w")
