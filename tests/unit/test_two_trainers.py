"""Trainers that share a process: each draws the random numbers that it would draw alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scenarios import build_ar_trainer, build_trainer, weights_of

from vqdist.seeding import OwnGenerators
from vqdist.trainers.base import Trainer


def replaces_codes(folder, **options) -> Trainer:
    """Return a training that begins by k-means, and draws in each step which features replace unused codes."""
    codebook = {"codebook_dim": 8, "kmeans_init": True, "threshold_ema_dead_code": 5}
    model = {"vq_kwargs": codebook, "use_gan": False, "codebook_size": 32}
    return build_trainer(folder, quantizer="vq", model=model, **options)


def drops_out(folder, **options) -> Trainer:
    """Return a training whose transformer drops activations in each step."""
    return build_ar_trainer(folder, "prior", model={"dropout": 0.3}, **options)


BUILDERS = {"codes": replaces_codes, "dropout": drops_out}
EQUAL = {"save_model_every": 2, "validate_every": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the weights of each training by itself, after 4 steps."""
    found = {}
    for name, build in BUILDERS.items():
        with build(tmp_path_factory.mktemp(name) / "run", **EQUAL) as trainer:
            trainer.train()
            found[name] = weights_of(trainer)
    return found


def assert_equal(trainer: Trainer, expected: dict) -> None:
    ours = weights_of(trainer)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


def test_what_is_trained_here_depends_on_chance(tmp_path, alone):
    for name, build in BUILDERS.items():
        with build(tmp_path / name, **EQUAL) as trainer:
            trainer.generators = OwnGenerators()
            with trainer.generators:
                torch.rand(1)
            trainer.train()
            ours = weights_of(trainer)
            assert any(not torch.equal(ours[key], alone[name][key]) for key in alone[name])


def test_two_in_turns_are_each_what_it_is_alone(tmp_path, alone):
    """The body of the loop may draw, too."""
    with replaces_codes(tmp_path / "a", **EQUAL) as first, drops_out(tmp_path / "b", **EQUAL) as second:
        for (step, _), (other, _) in zip(first.steps(), second.steps(), strict=True):
            assert step == other
            torch.rand(7), random.random(), np.random.rand()
        assert_equal(first, alone["codes"])
        assert_equal(second, alone["dropout"])


def test_one_within_the_loop_of_the_other(tmp_path, alone):
    with replaces_codes(tmp_path / "a", **EQUAL) as first, drops_out(tmp_path / "b", **EQUAL) as second:
        for step, _ in first.steps():
            if step == 2:
                second.train()
        assert_equal(first, alone["codes"])
        assert_equal(second, alone["dropout"])


@pytest.mark.parametrize("name", BUILDERS)
def test_a_checkpoint_of_one_has_its_own_random_numbers(tmp_path, alone, name):
    """Saved between the steps of the other, and resumed beside a third."""
    build, disturbs = BUILDERS[name], drops_out(tmp_path / "other", **EQUAL)
    with build(tmp_path / "run", **EQUAL) as trainer:
        for step, _ in trainer.steps():
            disturbs.train_step()
            if step == 2:
                break
        trainer.save(tmp_path / "saved")
        disturbs.close()
    with build(tmp_path / "run", **EQUAL) as resumed, replaces_codes(tmp_path / "third", **EQUAL) as third:
        assert resumed.step == 2
        third.train()
        resumed.train()
        assert_equal(resumed, alone[name])
    with build(tmp_path / "loaded", **EQUAL) as loaded:
        loaded.load(tmp_path / "saved")
        torch.rand(3)
        loaded.train()
        assert_equal(loaded, alone[name])


def test_a_training_leaves_the_generators_of_its_process_alone(tmp_path):
    with drops_out(tmp_path / "run") as trainer:
        torch.manual_seed(1), random.seed(2), np.random.seed(3)
        expected = torch.rand(2), random.random(), np.random.rand(2)
        torch.manual_seed(1), random.seed(2), np.random.seed(3)
        trainer.train()
        drawn = torch.rand(2), random.random(), np.random.rand(2)
    assert torch.equal(drawn[0], expected[0]) and drawn[1] == expected[1] and np.array_equal(drawn[2], expected[2])


def test_an_error_within_gives_the_generators_back():
    own = OwnGenerators()
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), own, own:
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), expected)
