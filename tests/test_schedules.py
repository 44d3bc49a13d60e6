"""Schedules against their formulas, and the state of the random number generators."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from vqdist import seeding
from vqdist.errors import UserError
from vqdist.schedules import learning_rate, linear_ramp


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


def test_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="'linear' is not known; choose one of constant, cosine"):
        learning_rate(0, peak=1, schedule="linear", warmup_steps=0, total_steps=1)


def test_ramp_begins_where_it_is_told():
    assert [linear_ramp(step, start=3, length=2) for step in range(7)] == [0, 0, 0, 0.5, 1, 1, 1]
    assert [linear_ramp(step, start=1, length=0) for step in range(3)] == [0, 1, 1]


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
