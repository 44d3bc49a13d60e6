"""The trainer against a loop without any of it: what do ranks, logging, checkpoints and schedules cost a step?

`BareLoop` does the trainer's arithmetic in the fewest lines, `TextbookLoop` does it as VQGAN code is usually written.
`tests/test_benchmarks.py` holds the bare loop to the trainer's weights, so that equal mathematics is compared.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    Row,
    Timing,
    build_trainer,
    build_vae,
    feed_from_memory,
    image_batches,
    ratio,
    take_turns,
)
from vqdist import VQGanVAE

TARGET = 1.05  # times the bare loop's step


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
    """The same losses as usually written: adaptive weight by autograd at the last layer, one discriminator pass each
    for reconstruction and image, and the discriminator's unused gradients of the generator's backward."""

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


def measure(quantizer: str, folder: Path, *, rounds: int) -> dict[str, Timing]:
    """Time of a step of each loop; all but `trainer, own loader` take the same tensors from memory."""
    batches = image_batches()
    loops = {
        "bare": BareLoop(build_vae(quantizer), batches),
        "bare again": BareLoop(build_vae(quantizer), batches),
        "textbook": TextbookLoop(build_vae(quantizer), batches),
    }
    trainers = {
        "trainer": {"use_ema": False},
        "trainer, a log line each step": {"use_ema": False, "log_every": 1},
        "trainer, EMA": {"use_ema": True},
        "trainer, own loader": {"use_ema": False},
    }
    variants = {name: loop.step for name, loop in loops.items()}
    for name, settings in trainers.items():
        options = {"backend": "local", "apply_grad_penalty_every": 0, **settings}
        trainer = build_trainer(build_vae(quantizer), folder / name, **options)
        if name != "trainer, own loader":
            feed_from_memory(trainer, batches)
        variants[name] = trainer.train_step
    return take_turns(variants, steps=1, rounds=rounds, warmup=2)


def run(quick: bool = False) -> list[Row]:
    """Rows of the table; turns of one step each, since a busy machine changes within seconds.

    The default of one log line in ten steps hardly shows in a median: the row with a line each step bounds it.
    """
    rows = []
    for quantizer in ("lfq",) if quick else ("lfq", "vq"):
        with tempfile.TemporaryDirectory() as folder:
            timings = measure(quantizer, Path(folder), rounds=12 if quick else 40)
        bare = timings.pop("bare")
        for name, timing in timings.items():
            detail = (
                f"{timing.milliseconds:.1f} against {bare.milliseconds:.1f} ms; fastest steps "
                f"{min(timing.wall) / min(bare.wall):.3f}, CPU time {ratio(timing.cpu, bare.cpu):.3f}"
            )
            target = TARGET if name == "trainer" else None
            what = f"{quantizer}: {name} / bare loop, time of a step"
            rows.append(Row(what, ratio(timing.wall, bare.wall), at_most=target, detail=detail))
    return rows
