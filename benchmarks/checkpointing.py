"""What checkpoints cost: the share of training that waits for them with one every 1,000 steps.

A save is all that stops training for a checkpoint: copies, files, checksums, the flush to the disk, the export, and
the removal of an old one. Measured are single steps and single saves; the disk is that of the temporary folder, and
another process that writes to it shows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import ONLY_STEPS, ROOT, Row, build_vae
from vqdist import ARTrainer, Prior, Tokenizer
from vqdist.cli.models import MODELS
from vqdist.cli.train import make_trainer, train_options
from vqdist.trainers.base import Trainer

EVERY = 1000  # steps
TARGET = 1.0  # percent of the time
GPU_STEP = 0.3  # seconds: about what a step of the large model takes one GPU


def digits_vqgan(folder: Path) -> Trainer:
    """The recipe as it is shipped, with its discriminator from the start."""
    recipe = ROOT / "launch" / "recipes" / "digits_vqgan.yaml"
    options = ["--config", str(recipe), "--out", str(folder), "--backend", "local", "--data.num_workers", "0"]
    return make_trainer(MODELS["vqgan"], train_options("vqgan", options))


def large_prior(folder: Path) -> Trainer:
    """A prior of 71 million weights: with Adam and the average 1.1 GB in a checkpoint, and 0.3 GB in the export."""
    vae = build_vae("vq", use_vgg_and_gan=False)
    prior = Prior(Tokenizer(vae, 64), dim=768, depth=10, heads=12, dim_head=64, num_classes=10)
    options = {**ONLY_STEPS, "folder": "synthetic:64", "num_workers": 0, "batch_size": 4, "num_train_steps": EVERY}
    return ARTrainer(prior, results_folder=str(folder), backend="local", keep_checkpoints=1, **options)


def seconds(function: Callable[[], object], times: int) -> float:
    """The median of so many calls, after one that is not counted."""
    function()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def share(save: float, step: float) -> float:
    """Percent of the time that goes into saves of so many seconds, with steps of so many."""
    return 100 * save / (save + EVERY * step)


def measure(name: str, trainer: Trainer, *, steps: int, saves: int) -> list[Row]:
    """Rows of one trainer; each save replaces a checkpoint."""
    step = seconds(trainer.train_step, steps)
    save = seconds(trainer._save_checkpoint, saves)
    newest = trainer.checkpoints.latest()
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6
    detail = f"a save of {size:.1f} MB takes {save:.3f} s ({size / save:.0f} MB/s), a step {step:.3f} s"
    what = f"{name}: waiting for a checkpoint every {EVERY:,} steps"
    return [Row(what, share(save, step), "%", at_most=TARGET, detail=detail)]


def run(quick: bool = False) -> list[Row]:
    """Rows of the table."""
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows += measure("digits VQGAN", digits_vqgan(Path(folder)), steps=10 if quick else 50, saves=3 if quick else 9)
    with tempfile.TemporaryDirectory() as folder:
        trainer = large_prior(Path(folder))
        rows += measure("prior of 71 million weights", trainer, steps=2 if quick else 6, saves=1 if quick else 5)
        save = seconds(trainer._save_checkpoint, 1)
        rows.append(Row(f"the same with steps of {GPU_STEP} s, as on one GPU", share(save, GPU_STEP), "%"))
    return rows
