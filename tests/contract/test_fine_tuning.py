"""A run that begins from published weights on two real processes, against one process with the same batch.

Run by torchrun, this file is the worker.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun
from safetensors.torch import load_file
from scenarios import QUIET, largest_difference, weights_of
from test_field_networks import backend_of
from torch import Tensor

from vqdist.trainers import initial
from vqdist.trainers.vqgan import VQGanVAETrainer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
FIXTURE = Path(__file__).parent.parent / "data" / "parity" / "taming_vqgan"
BACKENDS = ["accelerate", "zero2", "zero3", "fsdp2"]
STEPS = 3
CRITIC = {"class_path": "patch", "init_args": {"dim": 16, "layers": 2, "groups": 4}}  # normalises no batch
MOMENTUM = {"class_path": "sgd", "init_args": {"momentum": 0.9}}
TRAINING: dict[str, Any] = {**QUIET, "num_train_steps": STEPS, "optimizer": MOMENTUM, "lr": 0.02}
TRAINING |= {"adaptive_weight": False, "adversarial_weight": 0.3, "apply_grad_penalty_every": 0, "use_ema": False}


def begun(folder: Path, name: str, source: str, **options: Any) -> VQGanVAETrainer:
    """Return a trainer of the fixture's network; a discriminator that no source has is drawn from the seed."""
    model = {"perceptual": "none", "discriminator": CRITIC}
    place = {"results_folder": str(folder / name), "init_from": str(folder / source)}
    return VQGanVAETrainer(model, **{**TRAINING, **place, **options})


def trained(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Return the weights after some steps from a published file, and of two runs that begin from there.

    The second begins from the export, and has made no step. The third begins from the run, with its optimizers'
    states, and has made one.
    """
    trainer = begun(folder, "first", "published.ckpt", **options)
    for _ in range(STEPS):
        trainer.train_step()
    found = weights_of(trainer)
    trainer.export(folder / "export")
    trainer.backend.barrier()
    trainer.resume.checkpoint()
    trainer.resume.settle()
    second, third = begun(folder, "second", "export", **options), begun(folder, "third", "first", **options)
    third.train_step()
    for number, other in (("second", second), ("third", third)):
        found |= {f"{number}.{name}": tensor for name, tensor in weights_of(other).items()}
    return found


def published(folder: Path) -> Path:
    """Write the fixture as the project does, and return the folder."""
    tensors = {name: one.float() for name, one in load_file(FIXTURE / "weights.safetensors").items()}
    torch.save({"state_dict": tensors}, folder / "published.ckpt")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, Tensor]:
    return trained(published(tmp_path_factory.mktemp("one")), batch_size=8)


def check_export(weights: dict[str, Tensor], folder: Path) -> None:
    """Compare a run's weights with its export's, and with those of the run that began from that."""
    of_file = load_file(folder / "export" / "discriminator.safetensors")
    assert len(of_file) == 14
    for name, tensor in of_file.items():
        assert torch.equal(tensor, weights[f"discriminator.{name}"]), name
    first = {name: tensor for name, tensor in weights.items() if not name.startswith(("second.", "third."))}
    for name, tensor in first.items():
        assert torch.equal(tensor, weights[f"second.{name}"]), name
    assert len(weights) == 3 * len(first)


def test_momentum_goes_on_where_a_run_begins_from_a_run(reference, tmp_path):
    """The first of its steps is the fourth of the other, and not that of an optimizer which begins anew."""
    trainer = begun(published(tmp_path), "first", "published.ckpt", batch_size=8)
    for _ in range(STEPS):
        trainer.train_step()
    trainer.resume.checkpoint()
    trainer.resume.settle()
    trainer.close()
    anew = begun(tmp_path, "anew", "first", batch_size=8, init_optimizer=False)
    anew.train_step()
    found = weights_of(anew)
    name = "generator.encoder.conv_in.weight"
    moved, before = reference[f"third.{name}"] - reference[name], found[name] - reference[name]
    assert moved.norm() > 1.2 * before.norm()


def test_a_run_from_an_export_begins_where_that_ended(reference, tmp_path):
    begin = load_file(FIXTURE / "weights.safetensors")["encoder.conv_in.weight"].float()
    assert not torch.equal(reference["generator.encoder.conv_in.weight"], begin)
    check_export(trained(published(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    "backend",
    [name if name == "accelerate" else pytest.param(name, marks=pytest.mark.nightly) for name in BACKENDS],
)
def test_two_ranks_are_one_process(backend, tmp_path, reference):
    torchrun([__file__, str(published(tmp_path)), backend], timeout=600)
    found = torch.load(tmp_path / "results.pt")
    difference, tensor = largest_difference(reference, found)
    assert difference <= 1e-6, f"{tensor} differs by {difference}"
    check_export(found, tmp_path)


def main() -> None:
    folder = Path(sys.argv[1])
    if os.environ["RANK"] == "1":  # its host has the exports, and no checkpoint of the run that others begin from
        initial.newest_checkpoint = lambda run: None  # type: ignore[assignment]
    weights = trained(folder, **backend_of(sys.argv[2]))
    if os.environ["RANK"] == "0":
        torch.save(weights, folder / "results.pt")


if __name__ == "__main__":
    main()
