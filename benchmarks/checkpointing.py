"""The cost of checkpoints: the share of training that goes into them with one every 1,000 steps.

Training waits while the files of a checkpoint and the export are written; checksums, the flush to the disk and the
removal of an old checkpoint go on beside the next steps and may slow them. Measured are single steps, the wait, and
how much longer than usual the steps took until the checkpoint was complete. The disk is that of the temporary folder;
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
from vqdist.completion import is_completing
from vqdist.trainers.base import Trainer

EVERY = 1000  # steps
TARGET = 1.0  # percent of the time
GPU_STEP = 0.3  # seconds: about what a step of the large model takes one GPU


def digits_vqgan(folder: Path) -> Trainer:
    """Return the recipe as it is shipped, with its discriminator from the start."""
    recipe = ROOT / "launch" / "recipes" / "digits_vqgan.yaml"
    options = ["--config", str(recipe), "--out", str(folder), "--backend", "local", "--data.num_workers", "0"]
    return make_trainer(MODELS["vqgan"], train_options("vqgan", options))


def large_prior(folder: Path) -> Trainer:
    """Return a prior of 71 million weights: 1.1 GB in a checkpoint with Adam and average, 0.3 GB in the export."""
    vae = build_vae("vq", use_vgg_and_gan=False)
    prior = Prior(Tokenizer(vae, 64), dim=768, depth=10, heads=12, dim_head=64, num_classes=10)
    options = {**ONLY_STEPS, "folder": "synthetic:64", "num_workers": 0, "batch_size": 4, "num_train_steps": EVERY}
    return ARTrainer(prior, results_folder=str(folder), backend="local", keep_checkpoints=1, **options)


def seconds(function: Callable[[], object], times: int) -> float:
    """Return the median of so many calls, after one that is not counted."""
    function()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def save(trainer: Trainer, step: float) -> tuple[float, float, float]:
    """Return three durations in seconds.

    Training waits for one checkpoint so long, loses so much by it, with steps that else take `step` seconds, and it
    takes so long until it is complete."""
    began, made = time.perf_counter(), 0
    trainer.resume.checkpoint()
    waited = time.perf_counter() - began
    while is_completing():
        trainer.train_step()
        made += 1
    trainer.checkpoints.settle()
    passed = time.perf_counter() - began
    return waited, max(waited, passed - made * step), passed


def share(lost: float, step: float) -> float:
    """Percent of the time that goes into checkpoints that cost so many seconds, with steps of so many."""
    return 100 * lost / (lost + EVERY * step)


def measure(name: str, trainer: Trainer, *, steps: int, saves: int) -> tuple[Row, float]:
    """Return the row of one trainer, and the seconds that it waits for a checkpoint."""
    step = seconds(trainer.train_step, steps)
    save(trainer, step)  # the first one is not counted
    waited, lost, passed = (statistics.median(column) for column in zip(*(save(trainer, step) for _ in range(saves))))
    newest = trainer.checkpoints.latest()
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6
    detail = (
        f"{size:.1f} MB: training waits {waited:.3f} s and loses {lost:.3f} s, the checkpoint is complete after "
        f"{passed:.3f} s; a step takes {step:.3f} s"
    )
    what = f"{name}: lost to a checkpoint every {EVERY:,} steps"
    return Row(what, share(lost, step), "%", at_most=TARGET, detail=detail), waited


def run(quick: bool = False) -> list[Row]:
    """Rows of the table."""
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = digits_vqgan(Path(folder))
        row, _waited = measure("digits VQGAN", trainer, steps=10 if quick else 50, saves=3 if quick else 9)
        rows.append(row)
    with tempfile.TemporaryDirectory() as folder:
        trainer = large_prior(Path(folder))
        row, waited = measure("prior of 71 million weights", trainer, steps=2 if quick else 6, saves=3)
        # a GPU leaves the host's processors time for what goes on beside the steps
        what = f"the same with steps of {GPU_STEP} s, as on one GPU"
        rows += [row, Row(what, share(waited, GPU_STEP), "%", at_most=TARGET)]
    return rows
