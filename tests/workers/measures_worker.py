"""Validations with further measures, on two ranks or in one process: the numbers of each trainer go into a file.

usage: measures_worker.py FOLDER BACKEND   (run by torchrun)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import build_ar_trainer, build_trainer
from test_field_networks import backend_of
from torch import nn

from vqdist import UserError
from vqdist.trainers.base import Trainer

OF_RECONSTRUCTIONS = "rfid,rkid,rprecision,rrecall"
OF_SAMPLES = "fid,kid,precision,recall"
# of 9 images rank 0 has one more than rank 1, and of the blocks of 2 samples it has three and rank 1 two
VALID = {"valid": "synthetic:30", "valid_frac": 0.05, "valid_images": 9, "validate_every": 1}


class Means(nn.Module):
    """Six numbers of an image: mean and deviation of each colour."""

    def forward(self, images):
        return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


def write_extractor(folder: Path) -> dict[str, Any]:
    """Write a feature extractor as a program, and return the options that name it."""
    folder.mkdir(exist_ok=True)
    path = folder / "features.pt"
    if not path.is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.jit.script(Means()).save(str(path))
    return {"features": str(path), "trust_features": True}


def build(folder: Path, kind: str, **options: Any):
    """Return a trainer of two steps; SGD, as Adam makes full steps of gradients that are rounding."""
    extractor = write_extractor(folder)
    given = {"num_train_steps": 2, "optimizer": "sgd", "lr": 0.01, "grad_accum_every": 1, **VALID, **extractor}
    run = folder / f"{kind}_{options.get('backend', 'local')}"
    if kind == "vqgan":
        given |= {"apply_grad_penalty_every": 0, "adaptive_weight": False, "validate_with": OF_RECONSTRUCTIONS}
        return build_trainer(run, quantizer="vq", **{**given, **options})
    words = {"prior": {"validate_with": OF_SAMPLES, "label_dropout": 0.0}}
    given |= words.get(kind, {"validate_with": f"{OF_SAMPLES},{OF_RECONSTRUCTIONS}"})
    return build_ar_trainer(run, kind, **{**given, "validate_samples": 9, **options})


def measured(trainer: Trainer) -> dict[str, float]:
    """Train, and return the numbers of the last validation, which every rank gets alike."""
    looks: list[int] = []
    extractor = trainer.further.extractor
    outputs = extractor.outputs
    extractor.outputs = lambda images: looks.append(len(images)) or outputs(images)
    numbers = trainer.train()
    mine = torch.tensor([sum(looks), *numbers.values()], dtype=torch.float64)
    rows = trainer.backend.gather(mine)
    assert torch.equal(rows[:, 1:], rows[:1, 1:].expand_as(rows[:, 1:])), "equal on every rank"
    return {**numbers, "looks": float(rows[:, 0].sum())}


def refuse_other_weights(folder: Path, rank: str, **options: Any) -> None:
    """Assert that every rank ends with one line where rank 1 has another extractor in its file."""
    path = folder / f"of_rank_{rank}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = Means() if rank == "0" else nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
        torch.jit.script(network).save(str(path))
    with pytest.raises(UserError, match="^ranks read other weights for validate_with, or another reference"):
        build(folder / "differing", "vqgan", features=str(path), trust_features=True, **options)


def take_other_paths(folder: Path, rank: str, **options: Any) -> None:
    """Assert that extractor and reference may lie at other paths on each rank, as on each host's own disk."""
    own = folder / f"disk_{rank}" / f"named_{rank}"
    own.mkdir(parents=True)
    features = shutil.copy(write_extractor(folder)["features"], own / f"{rank}.pt")
    reference = own / f"{rank}.npz"
    np.savez(reference, mu=np.zeros(6), sigma=np.eye(6))
    given = {"validate_with": "rfid", "features": str(features), "reference": str(reference)}
    trainer = build(folder / "copied", "vqgan", **given, num_train_steps=1, **options)
    assert trainer.evaluate()["rfid"] > 0


def main() -> None:
    folder, name, *kinds = Path(sys.argv[1]), sys.argv[2], *sys.argv[3:]
    if name == "accelerate":
        refuse_other_weights(folder, os.environ["RANK"], batch_size=2, **backend_of(name))
        take_other_paths(folder, os.environ["RANK"], batch_size=2, **backend_of(name))
    for kind in kinds:
        trainer = build(folder, kind, batch_size=2, **backend_of(name))
        found = measured(trainer)
        (folder / f"{kind}_{name}.json").write_text(json.dumps(found))
    trainer.close()


if __name__ == "__main__":
    main()
