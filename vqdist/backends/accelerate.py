"""Accelerate: data parallel training with DDP or FSDP2 under torchrun, `accelerate launch` or mpirun.

Accelerate starts the process group, picks the device and wraps the network. All else that it would do is left to the
engine, because its versions do not hold for two networks with accumulation: its accumulation counter is shared by
both networks, its `zero_grad` does nothing on some micro-steps, and a prepared scheduler advances once per process.
"""

from __future__ import annotations

import inspect
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.optim import Optimizer

from vqdist.backends.base import Capabilities, Engine
from vqdist.backends.distributed import DistributedBackend, group_timeout, require_address
from vqdist.backends.fsdp import FullyShardedEngine, not_by_accelerate, sharding_asked_for
from vqdist.backends.local import TorchEngine, capabilities_of_torch
from vqdist.backends.optimizer import check_optimizer
from vqdist.errors import UserError
from vqdist.names import unknown

OWNED_BY_THE_RUN = {
    "gradient_accumulation_steps": "grad_accum_every",
    "gradient_accumulation_plugin": "grad_accum_every",
    "mixed_precision": "precision",
    "cpu": "the device of the machine",
    "deepspeed_plugin": "backend='deepspeed'",
    "deepspeed_plugins": "backend='deepspeed'",
    "fsdp_plugin": "distributed_type FSDP in a configuration of `accelerate launch`, as accelerate_configs/fsdp2.yaml",
    "dynamo_backend": "compile",
    "dynamo_plugin": "compile",
    "log_with": "trackers",
}


class AccelerateBackend(DistributedBackend):
    """One process per device: gradients averaged by DDP, or weights sharded by FSDP2.

    The Accelerate configuration asks for FSDP2.

    Args:
        grad_accum_every: micro-batches per optimizer step.
        precision: "fp32" or "bf16".
        dist_timeout: minutes that a rank waits for a peer that is silent.
        exchange_timeout: minutes that an exchange may take, where ranks wait for one that has more to do; by default
            `dist_timeout`.
        accelerate_kwargs: further arguments of `accelerate.Accelerator`; keys that the run owns are refused.
    """

    name = "accelerate"

    def __init__(
        self,
        *,
        grad_accum_every: int = 1,
        precision: str = "fp32",
        dist_timeout: float = 10.0,
        exchange_timeout: float | None = None,
        accelerate_kwargs: dict[str, Any] | None = None,
    ):
        accelerate_kwargs = dict(accelerate_kwargs or {})
        require_address()
        _refuse_owned(accelerate_kwargs)
        self.sharding = sharding_asked_for()
        self.grad_accum_every = grad_accum_every
        self.precision = precision
        timeout = group_timeout(dist_timeout, exchange_timeout)
        handlers = [
            # Not static_graph: with a gradient penalty it silently drops the exchange. Buffers are codebooks, which
            # are synchronised where they change.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timeout),
            *accelerate_kwargs.pop("kwargs_handlers", []),
        ]
        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        # on a CPU Accelerate starts a process group only if it is told cpu=True; otherwise each rank trains alone
        self.meet(dist_timeout)
        with not_by_accelerate():
            self.accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="no",
                gradient_accumulation_steps=1,
                kwargs_handlers=handlers,
                **accelerate_kwargs,
            )
        self.adopt_group(self.accelerator.device, timeout)

    @property
    def title(self) -> str:
        return f"{self.name} (FSDP2)" if self.shards else self.name

    @property
    def shards(self) -> bool:
        """True if weights are cut: FSDP2 is asked for, and there is more than one process."""
        return self.sharding is not None and self.world_size > 1

    @property
    def capabilities(self) -> Capabilities:
        if self.shards:
            return Capabilities(double_backward=False, trains_bare=False, any_optimizer=False)
        return capabilities_of_torch(self.precision)

    def prepare(self, module: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None) -> Engine:
        check_optimizer(optimizer, self)
        self.broadcast_from_main(module)
        options: dict[str, Any] = {
            "max_grad_norm": max_grad_norm,
            "grad_accum_every": self.grad_accum_every,
            "precision": self.precision,
        }
        if self.sharding is not None and self.shards:
            return FullyShardedEngine(module, optimizer, self, sharding=self.sharding, **options)
        # of 1x1 convolutions, whose few weights may lie either way
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers; torch 2.5 knows the old name only
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            wrapped = self.accelerator.prepare_model(module) if self.world_size > 1 else module
        if self.world_size > 1 and not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            raise UserError(
                f"Accelerate returned {type(wrapped).__name__} instead of DistributedDataParallel: gradients would "
                f"not be averaged; its distributed_type is {self.accelerator.distributed_type}"
            )
        return TorchEngine(module, optimizer, self, wrapped=wrapped, **options)

    def close(self) -> None:
        super().close()
        AcceleratorState._reset_state(True)


def _refuse_owned(accelerate_kwargs: dict[str, Any]) -> None:
    """Two places must not say the same thing: arguments of Accelerate that belong to the run are errors."""
    known = inspect.signature(Accelerator).parameters
    for key in accelerate_kwargs:
        if key not in known:
            raise unknown("argument", key, known, of="accelerate.Accelerator")
    for key, owner in OWNED_BY_THE_RUN.items():
        if key in accelerate_kwargs:
            raise UserError(f"accelerate_kwargs sets {key!r}, which belongs to the run; use {owner} instead")
