"""Run by torchrun, or in one process: trainings up to a step in given folders, and which images each step took.

usage: elastic_worker.py BACKEND ZERO_STAGE FOLDER STEPS NAME...   (ZERO_STAGE is - for the accelerate backend)

For every NAME and kind of model FOLDER/NAME_KIND is begun or resumed, and trained up to STEPS; NAME:N stops at N.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from scenarios import AR_PARITY, DVAE_EVERYTHING, build_ar_trainer, build_dvae_trainer
from torch import Tensor
from torch.utils.data import Dataset

from vqdist.trainers.base import Trainer

IMAGES = 100
# 75 to train on, 8 a step: the 10th step takes images of two epochs
STEPS = 12
OPTIONS = {"batch_size": 2, "grad_accum_every": 2, "num_train_steps": STEPS, "folder": None, "augment": False}


class Numbered(Dataset):
    """Images (3, 16, 16), each with its number in its first pixel."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        image[:, 0, 0] = index / 255
        return image, index % 10


def build(kind: str, folder: Path, **options) -> Trainer:
    """Return a trainer whose losses are linear in the batch, and whose noise belongs to the image."""
    if kind == "dvae":
        return build_dvae_trainer(folder, dataset=Numbered(), **{**DVAE_EVERYTHING, **OPTIONS, **options})
    return build_ar_trainer(folder, kind, dataset=Numbered(), **{**AR_PARITY[kind], **OPTIONS, **options})


KINDS = ("dvae", "prior")


def train_to(trainer: Trainer, steps: int) -> None:
    """Train up to this step, save, and note in `seen.jsonl` which images each step took on all ranks."""
    seen = []

    def noting(batch):
        seen.append((batch.item[:, 0, 0, 0] * 255).round().long())
        return type(trainer).take(trainer, batch)

    trainer.take = noting
    while trainer.step < steps:
        seen.clear()
        trainer.train_step()
        images = trainer.backend.gather(torch.cat(seen)).flatten().tolist()
        if trainer.is_main:
            with (trainer.run_folder / "seen.jsonl").open("a") as file:
                file.write(json.dumps({"step": trainer.step, "images": images}) + "\n")
    trainer.checkpoints.save(trainer.step, trainer.resume.write_state, trainer.resume.state_info())


def main() -> None:
    name, stage, folder, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    backend = {"backend": name}
    if name == "deepspeed":
        backend["deepspeed_config"] = str(Path(__file__).parents[2] / "deepspeed_configs" / f"zero{stage}.json")
    for run in sys.argv[5:]:
        for kind in KINDS:
            run_name, _, until = run.partition(":")
            train_to(build(kind, folder / f"{run_name}_{kind}", **backend), int(until or steps))


if __name__ == "__main__":
    main()
