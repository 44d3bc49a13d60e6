"""The prior's trainer against a bare loop on the same codes: tokens per second, from stored codes and from images.

The bare loop is a forward pass, the cross-entropy, a backward pass and Adam; its weights are the trainer's
(`tests/unit/test_benchmarks.py`), so that equal mathematics is compared.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ONLY_STEPS, Row, build_vae, feed_from_memory, image_batches, ratio, take_turns
from benchmarks.worker import timed
from vqdist import ARTrainer, Prior, Tokenizer

TARGET = 0.95  # of the bare loop's tokens per second
BATCH_SIZE = 16


def build_prior() -> Prior:
    """Return the prior of this benchmark, equal on every call: 64 codes of 1,024, ten classes."""
    tokenizer = Tokenizer(build_vae("vq", use_vgg_and_gan=False), 64)
    torch.manual_seed(0)
    return Prior(tokenizer, dim=256, depth=4, heads=4, dim_head=64, num_classes=10)


def code_batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Codes (b, 64) and classes (b,), drawn at random."""
    generator = torch.Generator().manual_seed(0)
    draw = [
        torch.randint(high, (count, *shape), generator=generator) for high, shape in ((1024, (16, 64)), (10, (16,)))
    ]
    return list(zip(*draw, strict=True))


class BarePriorLoop:
    """One network, one Adam.

    Args:
        prior: gives the network.
        batches: codes (b, n) and classes (b,), taken over and over.
        lr: of Adam.
        encode: also makes the codes, of images that the batches hold in their place.
    """

    def __init__(self, prior: Prior, batches: list[tuple[Tensor, Tensor]], lr: float = 3e-4, encode: bool = False):
        self.prior = prior.train()
        self.optimizer = torch.optim.Adam(prior.parameters(), lr=lr)
        self.batches = itertools.cycle(batches)
        self.encode = encode

    def step(self) -> None:
        """One update."""
        codes, label = next(self.batches)
        if self.encode:
            codes = self.prior.tokenizer.encode(codes)
        out = self.prior(codes, label)
        F.cross_entropy(out.logits.transpose(1, 2), codes).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_trainer(folder: Path, **options) -> ARTrainer:
    """Return the trainer on one process, with everything at its default that is not about saving or hiding classes."""
    settings = {"folder": "synthetic:512", "batch_size": BATCH_SIZE, "num_train_steps": 1_000_000, "backend": "local"}
    settings |= {"label_dropout": 0.0, "use_ema": False, "results_folder": str(folder), **ONLY_STEPS, **options}
    return ARTrainer(build_prior(), **settings)


def run(quick: bool = False) -> list[Row]:
    """Rows of the table."""
    codes = code_batches()
    images = [(image, label) for image, (_, label) in zip(image_batches(), codes, strict=True)]
    rows = []
    for what, batches in (("codes", codes), ("images", images)):
        with tempfile.TemporaryDirectory() as folder:
            variants = {"bare loop": timed(BarePriorLoop(build_prior(), batches, encode=what == "images").step)}
            for name, options in {"trainer": {}, "trainer, a log line each step": {"log_every": 1}}.items():
                trainer = build_trainer(Path(folder) / name, **options)
                feed_from_memory(trainer, batches)
                variants[name] = timed(trainer.train_step)
            timings = take_turns(variants, steps=1, rounds=12 if quick else 40, warmup=2)
        for name in list(variants)[1:]:
            value = ratio(timings["bare loop"].wall, timings[name].wall)
            detail = f"{timings[name].milliseconds:.1f} against {timings['bare loop'].milliseconds:.1f} ms a step"
            bound = TARGET if name == "trainer" else None
            rows.append(Row(f"prior on {what}: {name} / bare loop, tokens/s", value, at_least=bound, detail=detail))
    return rows
