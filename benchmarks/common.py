"""Common code of the benchmarks: the networks and images that are measured, timing by turns, and rows of the table."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.worker import Turn
from vqdist import DiscreteVAE, DiscreteVAETrainer, VQGanVAE, VQGanVAETrainer
from vqdist.data.loader import Batch
from vqdist.data.sources import SyntheticSource
from vqdist.trainers.base import Trainer

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SIZE = 64
BATCH_SIZE = 16

QUANTIZERS: dict[str, dict[str, Any]] = {
    "lfq": {"quantizer": "lfq", "codebook_size": 1024},
    "vq": {"quantizer": "vq", "codebook_size": 1024, "vq_kwargs": {"codebook_dim": 32, "kmeans_init": False}},
}

# A trainer that does nothing but train: what is saved, drawn and validated when is the user's choice, not overhead.
ONLY_STEPS = {"save_results_every": 0, "save_model_every": 0, "validate_every": 0, "check_ranks_every": 0}


def build_vae(quantizer: str = "lfq", **options: Any) -> VQGanVAE:
    """Return the VQGAN of every benchmark, equal on every call: 64x64 colour, GAN on, no perceptual loss."""
    torch.manual_seed(0)
    settings = {"dim": 32, "layers": 3, "perceptual": "none", **QUANTIZERS[quantizer], **options}
    return VQGanVAE(**settings)


def build_dvae(**options: Any) -> DiscreteVAE:
    """Return the discrete VAE of every benchmark, equal on every call: 64x64 colour, train_vae's depth."""
    torch.manual_seed(0)
    settings = {"image_size": IMAGE_SIZE, "num_tokens": 1024, "codebook_dim": 256, "num_resnet_blocks": 2, **options}
    return DiscreteVAE(**settings)


def build_trainer(vae: VQGanVAE | DiscreteVAE, folder: Path, **options: Any) -> VQGanVAETrainer | DiscreteVAETrainer:
    """Return the model's trainer on synthetic images, with everything at its default that is not about saving."""
    settings = {
        "folder": "synthetic:512",
        "image_size": IMAGE_SIZE,
        "batch_size": BATCH_SIZE,
        "num_train_steps": 1_000_000,
        "results_folder": str(folder),
        **ONLY_STEPS,
        **options,
    }
    return (VQGanVAETrainer if isinstance(vae, VQGanVAE) else DiscreteVAETrainer)(vae, **settings)


def image_batches(count: int = 8, batch_size: int = BATCH_SIZE) -> list[Tensor]:
    """Return decoded batches (b, 3, 64, 64) in [0, 1], so that neither side spends time on data."""
    source = SyntheticSource(f"synthetic:{count * batch_size}")
    images = [source.tensor(index, image_size=IMAGE_SIZE, channels=3) for index in range(count * batch_size)]
    return list(torch.stack(images).split(batch_size))


def feed_from_memory(trainer: Trainer, batches: list[Tensor] | list[tuple[Tensor, Tensor]]) -> None:
    """Let a trainer take these batches, over and over, in place of its loader's.

    Args:
        trainer: whose `take` is called once for each batch, before anything is timed.
        batches: images or codes (b, ...), or pairs of them and their classes (b,).
    """
    pairs = [batch if isinstance(batch, tuple) else (batch, torch.full((len(batch),), -1)) for batch in batches]
    taken = [trainer.take(Batch(item, label, bad=[], places=range(len(item)))) for item, label in pairs]
    endless = itertools.cycle(taken)
    trainer.next_micro_batches = lambda: [next(endless) for _ in range(trainer.config.grad_accum_every)]


# --------------------------------------------------------------------------------------- timing


@dataclass
class Timing:
    """Seconds of a step, one number per turn: on the clock, and of this process's CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """The median on the clock."""
        return 1000 * statistics.median(self.wall)


def take_turns(variants: dict[str, Turn], *, steps: int, rounds: int, warmup: int) -> dict[str, Timing]:
    """Time steps of each variant by turns, A B C C B A ..., so that what else the machine does meets all alike.

    Args:
        variants: by name; see `benchmarks.worker.timed`.
        steps: of a turn.
        rounds: turns of each variant.
        warmup: steps of each before the first turn.
    """
    timings = {name: Timing() for name in variants}
    for turn in variants.values():
        turn(warmup)
    for number in range(rounds):
        order = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in order:
            seconds = variants[name](steps)
            timings[name].wall.append(seconds["wall"] / steps)
            timings[name].cpu.append(seconds["cpu"] / steps)
    return timings


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of one variant's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def peak_mb(pid: int | str = "self") -> float:
    """Return the largest resident memory of a process so far, in MiB; by default this one's."""
    status = Path(f"/proc/{pid}/status")
    if status.is_file():  # Linux's ru_maxrss also holds the peak of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# --------------------------------------------------------------------------------------- the table


@dataclass
class Row:
    """One line of the table: a number, and the bound that it has to keep, if any."""

    what: str
    value: float
    unit: str = "x"
    at_most: float | None = None
    at_least: float | None = None
    detail: str = ""

    @property
    def target(self) -> str:
        """The bound in words."""
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return "" if self.at_least is None else f">= {self.at_least:g}"

    @property
    def verdict(self) -> str:
        """True if the bound is kept."""
        if self.at_most is not None:
            return "yes" if self.value <= self.at_most else "NO"
        return "" if self.at_least is None else ("yes" if self.value >= self.at_least else "NO")

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def rows_over(base: str, timings: dict[str, Timing], label: str, at_most: dict[str, float]) -> list[Row]:
    """Each variant's time of a step over that of the variant `base`, with the bounds that some of them have."""
    under = timings[base]
    rows = []
    for name, timing in timings.items():
        if name == base:
            continue
        detail = (
            f"{timing.milliseconds:.1f} against {under.milliseconds:.1f} ms; fastest steps "
            f"{min(timing.wall) / min(under.wall):.3f}, CPU time {ratio(timing.cpu, under.cpu):.3f}"
        )
        value = ratio(timing.wall, under.wall)
        rows.append(Row(f"{label}: {name} / {base}, time of a step", value, at_most=at_most.get(name), detail=detail))
    return rows


# --------------------------------------------------------------------------------------- processes


def environment(threads: int = 1) -> dict[str, str]:
    """Return this environment without a launcher's variables, so many threads a process, the repository importable."""
    launchers = ("ACCELERATE_", "TORCHELASTIC_", "OMPI_", "SLURM_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers) and key not in names}
    search = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PATH": search}


def run_json(command: list[str], *, timeout: float = 600) -> Any:
    """Run a command and parse the last line of its standard output.

    Raises:
        RuntimeError: it failed; the end of what it printed is in the message.
    """
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def torchrun(arguments: list[str], *, processes: int = 2) -> list[str]:
    """Return the command that starts these ranks on this machine, on a free port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*launcher, "--master_port", str(port), *arguments]
