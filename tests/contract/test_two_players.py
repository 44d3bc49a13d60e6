"""Discriminators and losses of the field on two real processes, against one process with the same batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import ADVERSARIES, build_adversary, largest_difference, weights_of

WORKER = str(ROOT / "tests" / "workers" / "adversary_worker.py")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
ALIKE = [name for name in ADVERSARIES if name != "patchgan"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    return of_one_process(tmp_path_factory.mktemp("one"), ADVERSARIES)


def of_one_process(folder: Path, names: Iterable[str], **options) -> dict:
    found = {}
    for name in names:
        trainer = build_adversary(folder / name, name, batch_size=8, **options)
        for _ in range(4):
            numbers = trainer.train_step()
        found[name], found[f"logs_{name}"] = weights_of(trainer), trainer.backend.mean(numbers)
    return found


def check(results: dict, reference: dict, names: list[str]) -> None:
    for name in names:
        difference, tensor = largest_difference(reference[name], results[name])
        assert difference <= 1e-6, f"{name}: {tensor} differs by {difference}"
        ours, theirs = results[f"logs_{name}"], reference[f"logs_{name}"]
        assert ours.keys() == theirs.keys()
        for key in {"lecam_loss", "adversarial_weight", "recon_loss"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (name, key)
    # batch statistics are those of each rank's images, so two ranks are not one process
    assert largest_difference(reference["patchgan"], results["patchgan"])[0] > 1e-6
    assert results["statistics_differ"] and results["resumed_to_the_bit"]


def test_two_ranks_are_one_process(tmp_path, reference):
    torchrun([WORKER, str(tmp_path)], timeout=600)
    check(torch.load(tmp_path / "results.pt"), reference, ALIKE)


@pytest.mark.nightly  # the same steps; the contract of the engines is tested on every push
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_of_deepspeed_are_one_process(stage, tmp_path, reference):
    torchrun([WORKER, str(tmp_path), f"zero{stage}"], timeout=600)
    check(torch.load(tmp_path / "results.pt"), reference, [name for name in ALIKE if name != "actnorm"])


@pytest.mark.nightly
def test_two_ranks_of_fsdp2_are_one_process(tmp_path):
    without = {"apply_grad_penalty_every": 0, "grad_penalty": "unit_norm"}
    torchrun([WORKER, str(tmp_path), "fsdp2"], timeout=600)
    reference = of_one_process(tmp_path / "one", [name for name in ADVERSARIES if name != "actnorm"], **without)
    check(torch.load(tmp_path / "results.pt"), reference, [name for name in ALIKE if name != "actnorm"])
