"""Shared by FSDP2 and ZeRO 3: a network of which each rank holds a part of every weight.

Nothing outside the engine's own forward may touch such a network: its weights are empty or partial there. So
evaluation, pictures, the export and a discriminator that is held fixed get a plain copy of the network with whole
weights, gathered when it is needed and given back afterwards; and the moving average follows the rank's own shards.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqdist.backends import state
from vqdist.backends.base import Engine
from vqdist.backends.local import autocast_for
from vqdist.backends.optimizer import OptimizerRecord


class Shards(nn.Module):
    """This rank's part of a network: its shard of every weight and all of its buffers, not copied.

    A copy of it holds a moving average of the same part.

    Args:
        weights: shards by the weights' names; of a weight that has two names, by the first.
        buffers: whole buffers by their names, likewise.
    """

    def __init__(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]):
        super().__init__()
        self.weight_names, self.buffer_names = list(weights), list(buffers)
        for number, shard in enumerate(weights.values()):
            self.register_parameter(f"weight_{number}", nn.Parameter(shard, requires_grad=False))
        for number, buffer in enumerate(buffers.values()):
            self.register_buffer(f"buffer_{number}", buffer)

    def named_shards(self) -> dict[str, Tensor]:
        """Return this rank's shards by the weights' names."""
        return dict(zip(self.weight_names, self.parameters(), strict=True))

    def named_whole_buffers(self) -> dict[str, Tensor]:
        """Return the buffers by the names that they have in the network."""
        return dict(zip(self.buffer_names, self.buffers(), strict=True))


class ShardedEngine(Engine):
    """An engine whose weights lie in shards; a runtime says how they are cut and gathered.

    Args:
        empty: a plain copy of the network from before it was sharded, see `without_weights`.

    Attributes:
        precision: of the forward with frozen weights; a runtime sets it.
        record: of the optimizer; likewise.
    """

    precision: str
    record: OptimizerRecord

    def __init__(self, empty: nn.Module):
        self.empty = empty
        named = [
            *self.empty.named_parameters(remove_duplicate=False),
            *self.empty.named_buffers(remove_duplicate=False),  # a codebook that residual levels share
        ]
        first = {id(tensor): name for name, tensor in reversed(named)}
        self.first_names = {name: first[id(tensor)] for name, tensor in named}
        self._fixed: nn.Module | None = None  # whole weights for `frozen`, until they change

    @property
    @abstractmethod
    def local(self) -> Shards:
        """This rank's part of the network, not copied."""

    def _held(self, weights: nn.Module | None) -> Shards:
        return self.local if weights is None else cast(Shards, weights)  # a copy of the former, see `Engine.whole`

    @abstractmethod
    def gather(self, name: str, shard: Tensor) -> Tensor:
        """Return the whole weight of this name of which every rank gives its shard; every rank calls this."""

    @abstractmethod
    def cut(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's shard of a whole tensor that is shaped like the weight of this name."""

    @abstractmethod
    def named_optimizer_state(self) -> Iterator[tuple[str, Any]]:
        """Whole optimizer state, tensors and numbers, by `kind/parameter name`; every rank calls this."""

    def held_tensors(self) -> dict[str, Tensor]:
        return {**self.local.named_shards(), **self.local.named_whole_buffers()}

    def named_tensors(self, weights: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
        held = self._held(weights)
        shards, buffers = held.named_shards(), held.named_whole_buffers()
        for name in self.empty.state_dict():
            first = self.first_names[name]
            yield name, self.gather(first, shards[first]) if first in shards else buffers[first]

    def fill(self, tensors: Mapping[str, Tensor], weights: nn.Module | None = None) -> None:
        _check_layout(self.empty, tensors)
        held = self._held(weights)
        buffers = held.named_whole_buffers()
        with torch.no_grad():
            for name, shard in held.named_shards().items():
                shard.copy_(self.cut(name, tensors[name]))
            for name in tensors.keys() & buffers.keys():
                buffers[name].copy_(tensors[name])
        self._fixed = None

    @contextmanager
    def whole(self, weights: nn.Module | None = None) -> Iterator[nn.Module]:
        yield self._whole_copy(self._held(weights))

    def frozen(self, *args, **kwargs):
        if self._fixed is None:
            self._fixed = self._whole_copy(self.local)
        with autocast_for(self.backend.device, self.precision):
            return self._fixed(*args, **kwargs)

    def step(self, *, lr: float, finite: Tensor | None = None) -> Tensor:
        self._fixed = None
        runtime: Any = super()  # of the engine that this class stands before
        return runtime.step(lr=lr, finite=finite)

    def held_weights(self, weights: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
        held = self._held(weights)
        saved = self.empty.state_dict().keys()
        for kind, tensors in (("weight", held.named_shards()), ("buffer", held.named_whole_buffers())):
            for name, tensor in tensors.items():
                if name in saved:
                    yield f"{kind} {name}", tensor

    def save(self, folder: Path) -> None:
        is_main = self.backend.is_main
        weights = {name: tensor.cpu() for name, tensor in self.named_tensors() if is_main}
        optimizer = {name: _kept(value) for name, value in self.named_optimizer_state() if is_main}
        if is_main:  # all exchanges are over: nobody waits for a rank that cannot write
            state.save_tensors(folder / state.WEIGHTS, weights)
            self.record.save(folder, optimizer)

    def _whole_copy(self, held: Shards) -> nn.Module:
        """Return a plain network with the whole of these weights, held fixed; every rank calls this."""
        buffers = held.named_whole_buffers()
        shards = held.named_shards()
        whole: dict[int, Tensor] = {  # cloned: what is gathered may be a part of a larger, padded tensor
            id(parameter): nn.Parameter(self.gather(name, shards[name]).clone(), requires_grad=False)
            for name, parameter in self.empty.named_parameters()
        }
        whole |= {id(buffer): buffers[name].clone() for name, buffer in self.empty.named_buffers()}
        return deepcopy(self.empty, whole).train(self.module.training)


def without_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters have shapes but no memory.

    The network's own weights are put into contiguous order, as `fully_shard` and DeepSpeed cut no others.
    """
    module.to(memory_format=torch.contiguous_format)
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    return deepcopy(module, empty)


def _kept(value: Any) -> Any:
    """Return a whole value of state in the host's memory, since a device would not hold all of them beside its own.

    A single number stays where it is, since a checkpoint says where that was.
    """
    return value.cpu() if isinstance(value, Tensor) and value.ndim else value


def _check_layout(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise `RuntimeError`, as `load_state_dict` does, unless these tensors are those of the network."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise RuntimeError(f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'nothing')}")
