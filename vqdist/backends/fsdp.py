"""FSDP2: torch's `fully_shard` for each network, inside the accelerate backend.

Accelerate itself does FSDP for one model only, and on a CPU it takes the request and silently trains with DDP. So
vqdist reads what the Accelerate configuration asks for and shards by itself, on the CPU as on GPUs: each rank holds a
part of every weight, gradient and optimizer state, and the weights of one block at a time are gathered while it runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vqdist.backends import state
from vqdist.backends.base import Backend
from vqdist.backends.local import TorchEngine
from vqdist.backends.sharding import ShardedEngine, Shards, without_weights
from vqdist.errors import UserError

ASKED = "ACCELERATE_USE_FSDP"
# What `accelerate launch` exports for each key of fsdp_config that is not followed here, and the value that asks for
# nothing. Not fsdp_cpu_ram_efficient_loading, fsdp_sync_module_states, fsdp_use_orig_params: true by default, and what
# they say holds (weights are rank 0's, the optimizer sees each by itself).
NEUTRAL = {
    "FSDP_SHARDING_STRATEGY": ("fsdp_sharding_strategy", "full_shard"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false"),
    "FSDP_BACKWARD_PREFETCH": ("fsdp_backward_prefetch", "no_prefetch"),
    "FSDP_FORWARD_PREFETCH": ("fsdp_forward_prefetch", "false"),
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", "full_state_dict"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("fsdp_activation_checkpointing_offload", "false"),
    "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", "none"),
}


@dataclass(frozen=True)
class Sharding:
    """The cut of networks into the blocks whose weights are gathered together.

    Args:
        reshard_after_forward: give a block's weights back after its forward and gather them again for its backward;
            without, they stay from forward to backward: more memory, less traffic.
        min_num_params: a member of a module list with at least so many weights is a block; the rest of the network is
            gathered as one. None makes no blocks.
        classes: in place of that, names of the classes whose instances are blocks.
    """

    reshard_after_forward: bool = True
    min_num_params: int | None = None
    classes: tuple[str, ...] = ()

    def blocks(self, network: nn.Module) -> Iterator[nn.Module]:
        """Yield the blocks of a network, inner ones first; a weight belongs to the innermost."""
        yield from self._blocks(network, taken=set())

    def _blocks(self, network: nn.Module, taken: set[nn.Parameter]) -> Iterator[nn.Module]:
        for child in network.children():
            yield from self._blocks(child, taken)
            own = set(child.parameters()) - taken
            if self._is_block(child, network, sum(parameter.numel() for parameter in own)):
                taken |= own
                yield child

    def _is_block(self, module: nn.Module, inside: nn.Module, own_weights: int) -> bool:
        if self.classes:
            return type(module).__name__ in self.classes
        if self.min_num_params is None or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return False
        # not of a subclass with a forward of its own, which may read the weights of a child that it does not call
        in_turn = type(inside) is nn.ModuleList or type(inside).forward is nn.Sequential.forward
        return in_turn and own_weights >= self.min_num_params


def sharding_asked_for() -> Sharding | None:
    """Return what the Accelerate configuration says of FSDP, or None where it asks for none.

    Raises:
        UserError: naming what is asked for and is not done here.
    """
    if os.environ.get(ASKED, "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"the Accelerate configuration says fsdp_version {version}; vqdist shards by FSDP2: set fsdp_version: 2"
        )
    for variable, (key, neutral) in NEUTRAL.items():
        if os.environ.get(variable, neutral).lower() != neutral:
            raise UserError(
                f"the Accelerate configuration says {key} {os.environ[variable]}, which vqdist does not do; remove it"
            )
    return Sharding(_reshard_after_forward(), *_blocks())


def _reshard_after_forward() -> bool:
    said = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if said not in ("true", "false"):
        raise UserError(f"fsdp_reshard_after_forward is {said} in the Accelerate configuration; use true or false")
    return said == "true"


def _blocks() -> tuple[int | None, tuple[str, ...]]:
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy == "NO_WRAP":
        return None, ()
    if policy == "SIZE_BASED_WRAP":
        least = os.environ.get("FSDP_MIN_NUM_PARAMS", "0")
        if not least.isdecimal() or int(least) < 1:
            raise UserError(
                f"fsdp_min_num_params is {least} in the Accelerate configuration; SIZE_BASED_WRAP needs a whole "
                "number of at least 1, as 1000000"
            )
        return int(least), ()
    if policy == "TRANSFORMER_BASED_WRAP":
        names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
        classes = tuple(name.strip() for name in names.split(",") if name.strip())
        if not classes:
            raise UserError(
                "fsdp_auto_wrap_policy is TRANSFORMER_BASED_WRAP in the Accelerate configuration but "
                "fsdp_transformer_layer_cls_to_wrap names no class; name the classes of the blocks"
            )
        return None, classes
    raise UserError(
        f"fsdp_auto_wrap_policy is {policy} in the Accelerate configuration; use SIZE_BASED_WRAP, "
        "TRANSFORMER_BASED_WRAP or NO_WRAP"
    )


@contextmanager
def not_by_accelerate() -> Iterator[None]:
    """Within this context Accelerate does not see that FSDP is asked for."""
    asked = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[ASKED] = asked


class FullyShardedEngine(ShardedEngine, TorchEngine):
    """A network sharded by `fully_shard`.

    Args:
        module: the bare network, already on its device, equal on every rank.
        optimizer: made over `module.parameters()`; it is given the shards in their place.
        backend: gives the device and the ranks.
        sharding: how the network is cut.
        **options: see `TorchEngine`.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, backend: Backend, *, sharding: Sharding, **options: Any
    ):
        ShardedEngine.__init__(self, without_weights(module))
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        mesh = init_device_mesh(backend.device.type, (backend.world_size,))
        blocks = list(sharding.blocks(module))
        if sharding.classes and not blocks:
            raise UserError(
                f"no module of {type(module).__name__} is a {' or '.join(sharding.classes)}, as "
                "fsdp_transformer_layer_cls_to_wrap of the Accelerate configuration says; name others, or use "
                "SIZE_BASED_WRAP"
            )
        # of x-transformers' layer scale; nothing is added to it in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for part in (*blocks, module):
            fully_shard(part, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
        self.sharded = cast("dict[str, DTensor]", dict(module.named_parameters()))
        for group in optimizer.param_groups:
            group["params"] = [self.sharded[names[id(parameter)]] for parameter in group["params"]]
        TorchEngine.__init__(self, module, optimizer, backend, **options)
        shards = {name: tensor.to_local().detach() for name, tensor in self.sharded.items()}
        self._local = Shards(shards, dict(module.named_buffers()))
        self._check_sharded()

    def _check_sharded(self) -> None:
        """Raise `UserError` unless each weight is in parts: nobody would see that what was asked for is not done."""
        whole = [name for name, tensor in self.sharded.items() if not isinstance(tensor, DTensor)]
        if whole:
            raise UserError(f"FSDP2 left weights whole on every rank: {', '.join(whole[:3])}; train without FSDP")

    @property
    def local(self) -> Shards:
        """This rank's shards; the optimizer writes to the same memory."""
        return self._local

    def micro_step(self, *, last: bool):
        cast(FSDPModule, self.module).set_requires_gradient_sync(last)
        return super().micro_step(last=True)

    def clip(self) -> Tensor:
        norm = super().clip()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def held_moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().held_moments():
            yield name, tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gather(self, name: str, shard: Tensor) -> Tensor:
        return self._as_sharded(name, shard).full_tensor().detach()

    def cut(self, name: str, whole: Tensor) -> Tensor:
        like = self.sharded[name]
        whole = whole.to(like.device)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()

    def named_optimizer_state(self) -> Iterator[tuple[str, Any]]:
        for name, value in state.optimizer_state(self.module, self.optimizer).items():
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def load(self, folder: Path) -> None:
        state.load_weights(self, folder / state.WEIGHTS)
        values = self.record.load(folder, self.module, self.backend.device)
        state.load_optimizer_state(self.module, self.optimizer, self._sharded_state(values))

    def _sharded_state(self, values: Mapping[str, Any]) -> dict[str, Any]:
        sharded = {}
        for key, value in values.items():
            name = key.partition("/")[2]
            whole = isinstance(value, Tensor) and value.ndim > 0  # `fully_shard` takes no weight of a single number
            sharded[key] = self._as_sharded(name, self.cut(name, value)) if whole else value
        return sharded

    def _as_sharded(self, name: str, shard: Tensor) -> DTensor:
        """Return a shard as a part of a whole that is cut like the weight of this name."""
        like = self.sharded[name]
        return DTensor.from_local(
            shard, like.device_mesh, like.placements, run_check=False, shape=like.size(), stride=like.stride()
        )
