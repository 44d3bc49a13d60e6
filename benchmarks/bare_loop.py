"""The trainers against loops without ranks, logging, checkpoints and schedules: the cost of these in a step.

`BareLoop` and `BareDVAELoop` do a trainer's arithmetic in the fewest lines, `TextbookLoop` does it as VQGAN code is
usually written. `tests/unit/test_benchmarks.py` holds them to the trainers' weights, so that equal mathematics is
compared.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    Row,
    Timing,
    build_dvae,
    build_trainer,
    build_vae,
    feed_from_memory,
    image_batches,
    rows_over,
    take_turns,
)
from benchmarks.worker import timed
from vqdist import DiscreteVAE, VQGanVAE, sampling

TARGET = 1.05  # times the bare loop's step
DVAES = {
    "dvae, 1,024 codes": {"num_tokens": 1024},
    "dvae, 8,192 codes": {"num_tokens": 8192, "hidden_dim": 128},
}


class BareLoop:
    """Autoencoder and discriminator with two Adams; the adaptive weight from the graph cut at the reconstruction.

    Args:
        vae: gives the two networks; nothing else of it is used.
        batches: images (b, c, h, w), taken over and over.
        lr: of both networks.
    """

    def __init__(self, vae: VQGanVAE, batches: list[Tensor], lr: float = 3e-4):
        self.autoencoder, self.discriminator = vae.autoencoder.train(), vae.discriminator.train()
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=lr)
        self.discr_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=lr)
        self.batches = itertools.cycle(batches)

    def step(self) -> None:
        """One update of each network."""
        image = next(self.batches)
        out = self.autoencoder(image)
        self.generator_backward(image, out)
        self.optimizer.step()
        self.optimizer.zero_grad()

        real, fake = self.discriminator(torch.cat([image, out.recon.detach()])).chunk(2)
        (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
        self.discr_optimizer.step()
        self.discr_optimizer.zero_grad()

    def generator_backward(self, image: Tensor, out) -> None:
        """Each loss's gradient at the reconstruction, weighed, and one backward pass through the autoencoder."""
        recon = out.recon.detach().requires_grad_()
        (by_image,) = torch.autograd.grad(F.l1_loss(recon, image), recon)
        (by_critic,) = torch.autograd.grad(-self.discriminator(recon).mean(), recon)
        shape = self.autoencoder.last_layer.weight.shape
        norms = [nn.grad.conv2d_weight(out.hidden, shape, gradient).norm() for gradient in (by_image, by_critic)]
        weight = (norms[0] / norms[1].clamp_min(1e-8)).clamp(0, 1e4)
        ((out.recon * (by_image + weight * by_critic)).sum() + out.aux_loss).backward()


class TextbookLoop(BareLoop):
    """Return the same losses as usually written.

    The adaptive weight is by autograd at the last layer, the discriminator passes once for reconstruction and once for
    image, and gets unused gradients by the generator's backward."""

    def step(self) -> None:
        image = next(self.batches)
        out = self.autoencoder(image)
        self.generator_backward(image, out)
        self.optimizer.step()
        self.optimizer.zero_grad()

        self.discr_optimizer.zero_grad()
        real, fake = self.discriminator(image), self.discriminator(out.recon.detach())
        (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
        self.discr_optimizer.step()

    def generator_backward(self, image: Tensor, out) -> None:
        reconstruction = F.l1_loss(out.recon, image)
        adversarial = -self.discriminator(out.recon).mean()
        last = self.autoencoder.last_layer.weight
        norms = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
        ]
        weight = (norms[0] / norms[1].clamp_min(1e-8)).clamp(0, 1e4).detach()
        (reconstruction + weight * adversarial + out.aux_loss).backward()


def draw_relaxed(logits: Tensor) -> Tensor:
    """Return a soft one-hot, with the trainer's noise but for its seed on each image.

    `F.gumbel_softmax` is the line that people write. It takes longer: PyTorch draws exponential numbers one by one.
    """
    return sampling.gumbel_softmax(logits, sampling.gumbel_noise(logits.shape, logits.device), temperature=1.0)


class BareDVAELoop:
    """Encoder, relaxed draw, decoder and mean squared error with one Adam, at temperature 1 and without KL.

    Args:
        vae: gives the networks and the normalisation.
        batches: images (b, c, h, w), taken over and over.
        lr: of Adam.
        draw: logits (b, h', w', v) -> weights of the codes.
    """

    def __init__(
        self,
        vae: DiscreteVAE,
        batches: list[Tensor],
        lr: float = 1e-3,
        draw: Callable[[Tensor], Tensor] = draw_relaxed,
    ):
        self.vae = vae.train()
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
        self.batches = itertools.cycle(batches)
        self.draw = draw

    def step(self) -> None:
        """One update."""
        image = self.vae.norm(next(self.batches))
        weights = self.draw(self.vae.encoder(image))
        recon = self.vae.decoder((weights @ self.vae.codebook.weight).permute(0, 3, 1, 2))
        F.mse_loss(recon, image).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# --------------------------------------------------------------------------------------- measuring


def measure(
    loops: dict[str, Any], build: Callable[[], VQGanVAE | DiscreteVAE], folder: Path, *, rounds: int, **options: Any
) -> dict[str, Timing]:
    """Time of a step of the loops and of the trainer; all but `trainer, own loader` take the same images from memory.

    All run in one process, so the loops have the allocator that the trainer sets, too.

    Args:
        loops: by name.
        build: makes the trainer's model.
        folder: for runs.
        rounds: turns of each; one step each, since a busy machine changes within seconds.
        **options: of the trainers.
    """
    trainers = {
        "trainer": {"use_ema": False},
        "trainer, a log line each step": {"use_ema": False, "log_every": 1},
        "trainer, EMA": {"use_ema": True},
        "trainer, own loader": {"use_ema": False},
    }
    variants = {name: timed(loop.step) for name, loop in loops.items()}
    for name, settings in trainers.items():
        trainer = build_trainer(build(), folder / name, backend="local", **settings, **options)
        if name != "trainer, own loader":
            feed_from_memory(trainer, image_batches(batch_size=trainer.config.batch_size))
        variants[name] = timed(trainer.train_step)
    return take_turns(variants, steps=1, rounds=rounds, warmup=2)


def measure_vqgan(quantizer: str, folder: Path, *, rounds: int) -> dict[str, Timing]:
    """Return the VQGAN with this quantizer."""
    batches = image_batches()
    loops = {
        "bare loop": BareLoop(build_vae(quantizer), batches),
        "bare loop again": BareLoop(build_vae(quantizer), batches),
        "textbook loop": TextbookLoop(build_vae(quantizer), batches),
    }
    return measure(loops, lambda: build_vae(quantizer), folder, rounds=rounds, apply_grad_penalty_every=0)


def measure_dvae(model: dict[str, int], folder: Path, *, rounds: int) -> dict[str, Timing]:
    """Return the discrete VAE with these arguments, at its trainer's default batch size."""
    batches = image_batches(batch_size=8)
    loops = {
        "bare loop": BareDVAELoop(build_dvae(**model), batches),
        "bare loop again": BareDVAELoop(build_dvae(**model), batches),
        "bare loop with F.gumbel_softmax": BareDVAELoop(build_dvae(**model), batches, draw=F.gumbel_softmax),
    }
    return measure(loops, lambda: build_dvae(**model), folder, rounds=rounds, batch_size=8)


def run(quick: bool = False) -> list[Row]:
    """Rows of the table.

    The default of one log line in ten steps hardly shows in a median: the row with a line each step bounds it.
    """
    rounds = 12 if quick else 40
    rows = []
    for quantizer in ("lfq",) if quick else ("lfq", "vq"):
        with tempfile.TemporaryDirectory() as folder:
            timings = measure_vqgan(quantizer, Path(folder), rounds=rounds)
        rows += rows_over("bare loop", timings, quantizer, {"trainer": TARGET})
    for label, model in DVAES.items():
        with tempfile.TemporaryDirectory() as folder:
            timings = measure_dvae(model, Path(folder), rounds=rounds)
        rows += rows_over("bare loop", timings, label, {"trainer": TARGET})
    return rows
