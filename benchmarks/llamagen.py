"""A step of LlamaGen's tokenizer, scaled down, against a bare loop of the same: CPU time and memory.

Both have the published arithmetic: four times the mean squared error, LPIPS, the hinge losses of a PatchGAN with half
of their weight, clipped gradients and Adam. LPIPS is on SqueezeNet with weights at random. `tests/unit/
test_benchmarks.py` holds the two to equal weights.

usage of a process: python -m benchmarks.llamagen bare|trainer STEPS
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

from benchmarks.common import (
    Row,
    Timing,
    build_trainer,
    feed_from_memory,
    image_batches,
    peak_mb,
    ratio,
    run_json,
    take_turns,
)
from benchmarks.worker import timed
from vqdist import VQGanVAE, VQGanVAETrainer
from vqdist.objectives import LPIPS, Reconstruction

CPU_TARGET = 1.03  # times the bare loop's step
MEMORY_TARGET = 1.05  # times the bare loop's peak
NETWORK: dict[str, Any] = {"ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [16]}
NETWORK |= {"resolution": 64, "z_channels": 64}
BETAS = (0.9, 0.95)
LR = 1e-4
# of `launch/recipes/llamagen_vq16.yaml`, with the discriminator from the start
RECIPE = {
    "lr": LR,
    "adam_betas": list(BETAS),
    "max_grad_norm": 1.0,
    "discr_max_grad_norm": 1.0,
    "discr_loss_weight": 0.5,
    "adversarial_weight": 0.5,
    "adaptive_weight": False,
    "apply_grad_penalty_every": 0,
    "use_ema": False,
}


def build_vae(**network: Any) -> VQGanVAE:
    """Return the tokenizer, equal on every call; `network` is laid over NETWORK."""
    torch.manual_seed(0)
    halves = {**NETWORK, **network}
    squeeze = torchvision.models.squeezenet1_1(weights=None).state_dict()
    return VQGanVAE(
        encoder={"class_path": "taming", "init_args": {**halves, "embed_dim": 8}},
        decoder={"class_path": "taming", "init_args": halves},
        quantizer={"class_path": "gradient_vq", "init_args": {"codebook_size": 1024, "l2_norm": True}},
        discriminator={"class_path": "patchgan", "init_args": {"width": 32, "layers": 2}},
        terms=[Reconstruction("l2", weight=4.0), LPIPS(squeeze, net="squeeze")],
        discr_loss="hinge",
        gen_loss="hinge",
    )


def build(folder: Path, *, vae: VQGanVAE | None = None, **options: Any) -> VQGanVAETrainer:
    """Return the trainer of the tokenizer, on one process."""
    trainer = build_trainer(build_vae() if vae is None else vae, folder, backend="local", **{**RECIPE, **options})
    assert isinstance(trainer, VQGanVAETrainer)
    return trainer


class BareLlamaGenLoop:
    """One update of the autoencoder and one of the discriminator, in the fewest lines.

    Args:
        vae: gives the networks and LPIPS; nothing else of it is used.
        batches: images (b, c, h, w), taken over and over.
    """

    def __init__(self, vae: VQGanVAE, batches: list[Tensor]):
        self.autoencoder, self.discriminator = vae.autoencoder.train(), vae.discriminator.train()
        self.lpips = next(term for term in vae.objective().terms if isinstance(term, LPIPS))
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=LR, betas=BETAS)
        self.discr_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=LR, betas=BETAS)
        self.batches = itertools.cycle(batches)

    def step(self) -> None:
        """One update of each network."""
        image = next(self.batches)
        self.discriminator.requires_grad_(False)
        out = self.autoencoder(image)
        loss = 4 * F.mse_loss(out.recon, image) + self.lpips(out.recon, image) + out.aux_loss
        (loss - 0.5 * self.discriminator(out.recon).mean()).backward()
        nn.utils.clip_grad_norm_(self.autoencoder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(image), self.discriminator(out.recon.detach())
        (0.5 * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        self.discr_optimizer.step()
        self.discr_optimizer.zero_grad()


# --------------------------------------------------------------------------------------- measuring


def times(folder: Path, rounds: int) -> dict[str, Timing]:
    """Time steps of the trainer and of two bare loops by turns; all take the same images from memory."""
    batches = image_batches()
    trainer = build(folder)
    feed_from_memory(trainer, batches)
    variants = {
        "bare loop": timed(BareLlamaGenLoop(build_vae(), batches).step),
        "bare loop again": timed(BareLlamaGenLoop(build_vae(), batches).step),
        "trainer": timed(trainer.train_step),
    }
    return take_turns(variants, steps=1, rounds=rounds, warmup=2)


def process(kind: str, steps: int) -> dict[str, float]:
    """Train in this process, and return its peak before and after, in MiB."""
    batches = image_batches(2)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "bare":
            step: Any = BareLlamaGenLoop(build_vae(), batches).step
        else:
            trainer = build(Path(folder))
            feed_from_memory(trainer, batches)
            step = trainer.train_step
        before = peak_mb()
        for _ in range(steps):
            step()
        return {"peak_mb": peak_mb(), "before_mb": before}


def memory(repeats: int, steps: int) -> Row:
    """Return the row of the memory that steps take, in fresh processes by turns, over what is there before them."""
    seen: dict[str, list[dict[str, float]]] = {"bare": [], "trainer": []}
    for _ in range(repeats):
        for kind, results in seen.items():
            results.append(run_json([sys.executable, "-m", "benchmarks.llamagen", kind, str(steps)]))
    peak = {kind: statistics.median(result["peak_mb"] for result in results) for kind, results in seen.items()}
    before = statistics.median(result["before_mb"] for result in seen["bare"])
    grown = (peak["trainer"] - before) / (peak["bare"] - before)
    detail = f"peaks {peak['trainer']:.0f} and {peak['bare']:.0f} MiB, of which libraries and networks {before:.0f}"
    return Row("llamagen: trainer / bare loop, memory of a step", grown, at_most=MEMORY_TARGET, detail=detail)


def run(quick: bool = False) -> list[Row]:
    """Rows of the table: CPU time by pairs of steps, so that what else the machine does moves it least."""
    with tempfile.TemporaryDirectory() as folder:
        timings = times(Path(folder), rounds=4 if quick else 12)
    base = timings["bare loop"]
    rows = []
    for name, bound in (("bare loop again", None), ("trainer", CPU_TARGET)):
        timing = timings[name]
        ours, theirs = (1000 * statistics.median(one.cpu) for one in (timing, base))
        detail = f"{ours:.0f} against {theirs:.0f} ms; on the clock {ratio(timing.wall, base.wall):.3f}"
        what = f"llamagen: {name} / bare loop, CPU time of a step"
        rows.append(Row(what, ratio(timing.cpu, base.cpu), at_most=bound, detail=detail))
    return [*rows, memory(1 if quick else 3, 3 if quick else 6)]


if __name__ == "__main__":
    print(json.dumps(process(sys.argv[1], int(sys.argv[2]))))
