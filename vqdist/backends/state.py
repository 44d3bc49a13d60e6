"""The bytes of a checkpointed engine: the same two files from every backend and every number of ranks.

`weights.safetensors` holds the network's state dict, `optimizer.safetensors` one tensor per parameter and kind of
state, named `exp_avg/encoder.0.weight`. Both are whole tensors, so another world size or another backend can read
them. `optimizer.json` beside them says the rest of the optimizer: see `optimizer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vqdist.backends.base import Engine
from vqdist.errors import UserError
from vqdist.files import follow_umask, writing
from vqdist.storage import with_own_storage

T = TypeVar("T")
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, making its folder."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(with_own_storage(tensors), path)
    follow_umask(path)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read the named tensors of one safetensors file onto the device."""
    if not path.is_file():
        raise UserError(f"{path} is missing; this is not a checkpoint of this trainer")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error})") from error


def with_current_names(module: nn.Module, values: Mapping[str, T]) -> dict[str, T]:
    """Return values of a network by the names that it has for them now.

    A network whose tensors had other names in an earlier version has a method `current_name(name)`. In names of an
    optimizer's state, as `exp_avg/encoder.0.weight`, the part behind the slash is the network's.
    """
    rename = getattr(module, "current_name", None)
    if rename is None:
        return dict(values)
    parted = {name: name.rpartition("/") for name in values}
    return {f"{parted[name][0]}{parted[name][1]}{rename(parted[name][2])}": value for name, value in values.items()}


def load_network_tensors(module: nn.Module, path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a network, by the names that it has for them now."""
    return with_current_names(module, load_tensors(path, device))


def load_weights(engine: Engine, path: Path, device: torch.device | str = "cpu") -> None:
    """Fill an engine's network with the tensors of one safetensors file."""
    try:
        engine.fill(load_network_tensors(engine.module, path, device))
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise UserError(f"{path} holds another network than this configuration builds: {reason} ...") from error


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All state of a torch optimizer as {"kind/parameter name": tensor or number}; empty before the first step."""
    return {
        f"{kind}/{name}": value
        for name, parameter in module.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, values: Mapping[str, Any]) -> None:
    """Give a torch optimizer the state that `optimizer_state` returned."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, value in values.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = placed(optimizer, kind, value, parameter.device)


def placed(optimizer: Optimizer, kind: str, value: Any, device: torch.device) -> Any:
    """Return a value of state where the optimizer expects it, for a weight on this device."""
    return place_step(optimizer, value, device) if kind == "step" and torch.is_tensor(value) else value


def place_step(optimizer: Optimizer, step: Tensor, device: torch.device) -> Tensor:
    """Return a copy of the step count of a weight on this device, where Adam expects it.

    That is beside the weight if Adam is fused or capturable, else on the CPU.
    """
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return step.to(device if beside else "cpu", copy=True)
