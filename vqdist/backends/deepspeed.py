"""DeepSpeed: one native engine per network, ZeRO 0, 1 and 2 (`deepspeed_engine.py`) and 3 (`zero3.py`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from vqdist.backends.base import Capabilities, Engine
from vqdist.backends.build_ops import find_stale_lock
from vqdist.backends.deepspeed_config import read_config
from vqdist.backends.deepspeed_engine import DeepSpeedEngine, deepspeed  # imported there, after its environment is set
from vqdist.backends.distributed import DistributedBackend, group_timeout
from vqdist.backends.optimizer import check_optimizer
from vqdist.backends.sharding import without_weights
from vqdist.backends.zero3 import Zero3Engine
from vqdist.errors import UserError


class DeepSpeedBackend(DistributedBackend):
    """One process per device, one DeepSpeed engine per network.

    Args:
        grad_accum_every: micro-batches per optimizer step.
        precision: "fp32" or "bf16".
        dist_timeout: minutes that a rank waits for a peer that is silent.
        exchange_timeout: minutes that an exchange may take, where ranks wait for one that has more to do; by default
            `dist_timeout`.
        micro_batch_size: images per process and micro-batch.
        config: path of a DeepSpeed JSON file or its content: what only DeepSpeed decides. None is ZeRO stage 0.
    """

    name = "deepspeed"

    def __init__(
        self,
        *,
        grad_accum_every: int = 1,
        precision: str = "fp32",
        dist_timeout: float = 10.0,
        exchange_timeout: float | None = None,
        micro_batch_size: int = 1,
        config: str | dict | None = None,
    ):
        self.config = read_config(config)
        self.grad_accum_every = grad_accum_every
        self.precision = precision
        self.micro_batch_size = micro_batch_size
        timeout = group_timeout(dist_timeout, exchange_timeout)
        _refuse_stale_build_lock()
        for logger in ("DeepSpeed", "deepspeed"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        on_gpu = torch.cuda.is_available()
        self.meet(dist_timeout)
        for variable, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(variable, value)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        with _without_shared_buffers():
            deepspeed.init_distributed(
                dist_backend="nccl" if on_gpu else "gloo",
                auto_mpi_discovery=False,
                timeout=timeout,
                verbose=False,
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        self.adopt_group(device, timeout)

    def prepare(self, module: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None) -> Engine:
        check_optimizer(optimizer, self)
        self.broadcast_from_main(module)
        empty = without_weights(module) if self.zero_stage == 3 else None
        config = self._config_for(max_grad_norm)
        check_values(config)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
        if empty is None:
            return DeepSpeedEngine(engine, self, self.precision)
        return Zero3Engine(engine, self, self.precision, empty)

    @property
    def title(self) -> str:
        return f"{self.name} (ZeRO {self.zero_stage})"

    @property
    def capabilities(self) -> Capabilities:
        # through its hooks on outputs gradients of gradients raise, or at stage 1 give wrong weights without a word
        whole = self.zero_stage < 3
        return Capabilities(
            double_backward=False, trains_bare=whole, compiles=whole, any_optimizer=self.zero_stage == 0
        )

    @property
    def zero_stage(self) -> int:
        """Return the stage: at 1 the state of optimizers is partitioned, at 2 gradients too, at 3 weights too."""
        return self.config.get("zero_optimization", {}).get("stage", 0)

    def _config_for(self, max_grad_norm: float | None) -> dict[str, Any]:
        return {
            **self.config,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.grad_accum_every,
            "gradient_clipping": max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,  # `check_optimizer` says which can be held
            "zero_force_ds_cpu_optimizer": False,  # with offload torch's own Adam runs on the host, nothing is built
            # no lower_precision_safe_modules: gradients are exchanged in float32, as on every other backend
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }


def check_values(config: dict[str, Any]) -> None:
    """Raise `UserError` for a value that DeepSpeed does not take."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except (AssertionError, TypeError, ValueError) as error:  # of pydantic a ValueError
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"DeepSpeed does not take the values of deepspeed_config: {reason}") from error


def _refuse_stale_build_lock() -> None:
    lock = find_stale_lock()
    if lock is not None:
        raise UserError(
            f"a DeepSpeed build was killed and left {lock}, on which every start would wait for ever; remove it: "
            f"rm {lock}"
        )


@contextmanager
def _without_shared_buffers() -> Iterator[None]:
    """Keep DeepSpeed, within this context, from making a buffer in /dev/shm for each rank of a single host.

    DeepSpeed makes them on a CPU where LOCAL_SIZE is the number of processes, as its own launcher says. They are for
    exchanges of its inference engine alone. Nothing removes those of a killed run, 66 MiB for each rank. A rank would
    also wait for the buffer of another without an end, in a loop that no signal reaches.
    """
    size = os.environ.pop("LOCAL_SIZE", None)
    try:
        yield
    finally:
        if size is not None:
            os.environ["LOCAL_SIZE"] = size


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
