"""The temperature at which a quantizer draws codes in training: a schedule of the step, logged and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scenarios import build_trainer, weights_of

from vqdist import UserError, VQGanVAETrainer

FALLING = {"value": 2.0, "decay_start": 1, "decay_steps": 2, "decay": "exponential", "final": 0.5}


def build(folder: Path, quantizer: dict | str | None = None, **options) -> VQGanVAETrainer:
    gumbel = {"class_path": "gumbel", "init_args": {"codebook_size": 16}}
    given = {"quantizer_temperature": FALLING, "save_model_every": 2, "num_train_steps": 5, **options}
    return build_trainer(folder, quantizer=quantizer or gumbel, **given)


def test_every_update_has_the_temperature_of_its_step(tmp_path):
    trainer = build(tmp_path, log_every=1)
    seen = []
    quantizer = trainer.generator.module.quantizer
    quantizer.register_forward_pre_hook(lambda module, _: seen.append(module.temperature))
    for _ in range(5):
        trainer.train_step()
    assert seen == pytest.approx([2.0, 2.0, 1.0, 0.5, 0.5])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["temperature"] for line in lines] == pytest.approx(seen)
    assert trainer.run.configuration()["trainer"]["quantizer_temperature"] == FALLING
    trainer.close()


def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path):
    straight = build(tmp_path / "straight")
    straight.train()
    first = build(tmp_path / "killed")
    for _ in range(3):  # the third is lost
        first.train_step()
    first.close()
    resumed = build(tmp_path / "killed")
    assert resumed.step == 2
    resumed.train()
    expected, found = weights_of(straight), weights_of(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], one) for name, one in expected.items())
    with pytest.raises(UserError, match="quantizer_temperature"):
        build(tmp_path / "killed", quantizer_temperature={**FALLING, "final": 0.4})


@pytest.mark.parametrize("straight_through", [True, False])
def test_the_draw_and_the_mixture_train_differently_at_each_temperature(straight_through, tmp_path):
    part = {"class_path": "gumbel", "init_args": {"codebook_size": 16, "straight_through": straight_through}}
    other = {"class_path": "gumbel", "init_args": {"codebook_size": 16, "straight_through": not straight_through}}
    runs = {"plain": (part, 1.0), "cold": (part, 0.2), "other": (other, 1.0)}
    found = {}
    for name, (quantizer, temperature) in runs.items():
        trainer = build(tmp_path / name, quantizer, quantizer_temperature=temperature)
        trainer.train_step()
        found[name] = weights_of(trainer)["generator.quantizer.proj.weight"]
        trainer.close()
    assert not torch.equal(found["plain"], found["cold"]) and not torch.equal(found["plain"], found["other"])


@pytest.mark.parametrize(
    "quantizer, temperature, message",
    [
        ("lfq", 0.5, "quantizer_temperature 0.5 does nothing, because quantizer LFQQuantizer has no temperature"),
        (None, 0.0, "quantizer_temperature 0"),
        (None, {"value": 1.0, "start": 3}, "is 0 at some step; it must be above 0 from step 0 on"),
        (None, {"values": 1.0}, "quantizer_temperature has no key 'values'"),
    ],
)
def test_a_temperature_that_cannot_be_is_one_line(quantizer, temperature, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build(tmp_path, quantizer, quantizer_temperature=temperature)
