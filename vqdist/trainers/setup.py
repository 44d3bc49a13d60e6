"""Set-up of a trainer on this machine: the backend, the device, the network's place on it, its average."""

from __future__ import annotations

from typing import Any

import torch

from vqdist import seeding
from vqdist.allocator import keep_freed_memory
from vqdist.backends import Backend, Engine, create_backend
from vqdist.errors import UserError
from vqdist.models.pretrained import PretrainedModel
from vqdist.precision import allow_tf32
from vqdist.trainers.average import MovingAverage
from vqdist.trainers.config import TrainerConfig


def make_backend(config: TrainerConfig) -> Backend:
    """Start the process group, and return the backend that a run asks for."""
    return create_backend(
        config.backend,
        grad_accum_every=config.grad_accum_every,
        precision=config.precision,
        dist_timeout=config.dist_timeout,
        micro_batch_size=config.batch_size,
        accelerate_kwargs=config.accelerate_kwargs,
        deepspeed_config=config.deepspeed_config,
    )


def place_network(model: PretrainedModel, backend: Backend, config: TrainerConfig) -> torch.memory_format:
    """Seed this rank, set up its device, move the model there, and return the layout of images.

    Raises:
        UserError: the backend cannot compile, and `compile` is set.
    """
    seeding.seed_everything(config.seed, "train", backend.rank)
    allow_tf32(backend.device, config.tf32)
    keep_freed_memory(backend.device)
    channels_last = backend.device.type == "cuda" if config.channels_last is None else config.channels_last
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.resample = config.resample  # the export says it
    network: Any = model  # a module, as every model is
    network.to(device=backend.device, memory_format=memory_format).train()
    if config.compile and not backend.capabilities.compiles:
        raise UserError(
            f"compile is not possible on {backend.title}, which swaps weights while a network runs; leave it out, or "
            "use ZeRO 0, 1, 2, DDP or FSDP2"
        )
    return memory_format


def make_average(engine: Engine, config: TrainerConfig) -> MovingAverage | None:
    """Return the moving average of an engine's network, or None where the run has none."""
    if not config.use_ema:
        return None
    return MovingAverage(
        engine,
        beta=config.ema_beta,
        update_after_step=config.ema_update_after_step,
        update_every=config.ema_update_every,
    )
