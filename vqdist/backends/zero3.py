"""DeepSpeed's ZeRO 3: each rank holds a part of every weight; a submodule's weights are gathered while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch import Tensor, nn

from vqdist.backends import state
from vqdist.backends.deepspeed_engine import DeepSpeedEngine
from vqdist.backends.distributed import DistributedBackend
from vqdist.backends.sharding import ShardedEngine, Shards


class Zero3Engine(ShardedEngine, DeepSpeedEngine):
    """A `deepspeed.DeepSpeedEngine` of stage 3 behind the contract.

    DeepSpeed flattens a weight, fills it up to a multiple of the number of ranks and gives each rank an equal part.

    Args:
        engine: what `deepspeed.initialize` returned.
        backend: gives the device and the ranks.
        precision: for the forward with frozen weights, which does not go through DeepSpeed.
        empty: the network without weights, from before it was sharded.
    """

    def __init__(self, engine: Any, backend: DistributedBackend, precision: str, empty: nn.Module):
        ShardedEngine.__init__(self, empty)
        DeepSpeedEngine.__init__(self, engine, backend, precision)
        self.parameters: dict[str, Any] = dict(self.module.named_parameters())  # with DeepSpeed's attributes
        shards = {name: parameter.ds_tensor for name, parameter in self.parameters.items()}
        self._local = Shards(shards, dict(self.module.named_buffers()))

    @property
    def local(self) -> Shards:
        """This rank's parts, flat; DeepSpeed writes to the same memory."""
        return self._local

    def gather(self, name: str, shard: Tensor) -> Tensor:
        parts = [torch.empty_like(shard) for _ in range(self.backend.world_size)]
        dist.all_gather(parts, shard.detach().contiguous())
        shape = self.empty.get_parameter(name).shape
        return torch.cat(parts)[: shape.numel()].view(shape)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        size = self.parameters[name].ds_tensor.numel()
        padded = F.pad(whole.flatten(), (0, size * self.backend.world_size - whole.numel()))
        return padded.narrow(0, size * self.backend.rank, size).to(self.backend.device)

    def held_weights(self, weights: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the parts without what fills them up, which nothing ever sets."""
        for key, part in super().held_weights(weights):
            kind, _, name = key.partition(" ")
            if kind == "weight":
                left = self.empty.get_parameter(name).numel() - part.numel() * self.backend.rank
                part = part[: max(0, left)]
            yield key, part

    def fill(self, tensors: Mapping[str, Tensor], weights: nn.Module | None = None) -> None:
        super().fill(tensors, weights)
        if weights is not None:
            return
        for parameter in self.parameters.values():
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, parameter.ds_tensor)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay whole, with their old values
                parameter.partition()

    def named_optimizer_state(self) -> Iterator[tuple[str, Any]]:
        yield from DeepSpeedEngine.named_optimizer_state(self)

    def load(self, folder: Path) -> None:
        state.load_weights(self, folder / state.WEIGHTS)
        values = self.record.load(folder, self.module)
        for key in self.make_states(values):
            kind, _, name = key.partition("/")
            safe_set_local_optimizer_state(self.parameters[name], self.cut(name, values[key]), kind)
