"""Shared by the accelerate and the deepspeed backend: collectives of torch.distributed, and equal starts."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqdist.backends import peers
from vqdist.backends.base import Backend
from vqdist.backends.environment import local_rank_of_launcher, world_size_of_launcher
from vqdist.errors import UserError

EXPECTED = {"cpu": "gloo", "cuda": "nccl"}  # what exchanges between tensors of these devices


class DistributedBackend(Backend):
    """Collectives over the default process group; with one process and no group they do nothing.

    A subclass calls `meet`, starts the group and then calls `adopt_group`.
    """

    def meet(self, dist_timeout: float) -> None:
        """Wait for all ranks and see that they reach each other: while a group starts, that takes until its time-out.

        Args:
            dist_timeout: minutes to wait for a rank, here and wherever one is silent.
        """
        require_address()
        peers.meet(timedelta(minutes=dist_timeout))

    def adopt_group(self, device: torch.device, timeout: timedelta) -> None:
        """Take rank and size from the group that was started, and make sure that it is the one asked for.

        Args:
            device: where this rank's tensors live.
            timeout: see `group_timeout`.
        """
        self.device = torch.device("cpu") if device.type == "cpu" else device  # Accelerate says cpu:0
        self.in_group = dist.is_initialized()
        self.rank = dist.get_rank() if self.in_group else 0
        self.world_size = dist.get_world_size() if self.in_group else 1
        self.local_rank = local_rank_of_launcher()
        expected = world_size_of_launcher()
        if self.world_size != expected:
            raise UserError(
                f"the launcher started {expected} processes but the {self.name} process group has {self.world_size}: "
                f"this would train {expected} separate models; start with `torchrun --nproc_per_node {expected} ...`"
            )
        self._check_group(timeout)
        self._exchange: tuple[Tensor, dist.Work] | None = None  # of `largest_lately`
        self._host_group: dist.ProcessGroup | None = None  # the default one
        if self.world_size > 1 and self.device.type != "cpu":
            self._host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))

    def _check_group(self, timeout: timedelta) -> None:
        """Check that the group talks as it should on this device, and at all."""
        if self.world_size == 1:
            return
        expected, found = EXPECTED.get(self.device.type), dist.get_backend_config()
        if expected is not None and f"{self.device.type}:{expected}" not in found:
            raise UserError(
                f"the process group talks by {found}, and {self.device.type}:{expected} was expected; let this "
                "backend start the group"
            )
        if self.device.type == "cuda":
            peers.first_exchange(self.device, timeout)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def largest_lately(self, number: int) -> int:
        if self.world_size == 1:
            return number
        # in the host's memory: to read a tensor of the device is to wait for all that the device has to do before
        before, value = self._exchange, torch.full((1,), number)
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._host_group, async_op=True)
        self._exchange = value, work
        if before is None:
            return 0
        value, work = before
        work.wait()
        return int(value)

    def barrier(self) -> None:
        if self.world_size > 1:
            # an all-reduce rather than dist.barrier: NCCL's barrier guesses a device and warns
            self.any(False)

    def close(self) -> None:
        peers.part()
        if dist.is_initialized():
            dist.destroy_process_group()
        self.in_group = False

    def broadcast_from_main(self, module: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0.

        DDP without buffer broadcast and DeepSpeed leave buffers (EMA codebooks) as each rank drew them.
        """
        if self.world_size == 1:
            return
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                value = tensor.detach().contiguous()
                dist.broadcast(value, src=0)
                tensor.copy_(value)


def require_address() -> None:
    """Several processes must know which they are and where to meet; launchers say it in torch's variables."""
    port = os.environ.get("MASTER_PORT") or "1"
    if not port.isdecimal() or not 0 < int(port) < 65_536:
        raise UserError(f"the environment says MASTER_PORT={port}, which is no port; give a number from 1 to 65535")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size_of_launcher() > 1 and missing:
        raise UserError(
            f"the environment says {world_size_of_launcher()} processes but not {' and '.join(missing)}; start with "
            "torchrun, or unset WORLD_SIZE for one process"
        )


def group_timeout(dist_timeout: float, exchange_timeout: float | None) -> timedelta:
    """Return the time that a collective of the process group may take; both in minutes, see the backends."""
    return timedelta(minutes=dist_timeout if exchange_timeout is None else exchange_timeout)
