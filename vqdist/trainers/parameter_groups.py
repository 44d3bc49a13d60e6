"""The groups of a network's weights that an optimizer gets: by decay, by rate, and as the network itself says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.options import is_number

Group = dict[str, Any]
"""Weights that are updated alike: `params`, their `names`, `weight_decay` and `lr_scale`."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[Group]:
    """Return the groups of a network's trainable weights; matrices and kernels decay, biases and gains do not."""
    names = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups: list[Group] = []
    taken: set[int] = set()
    for owner, part in module.named_modules():
        hook = getattr(part, "parameter_groups", None)
        if not callable(hook) or any(id(parameter) in taken for parameter in part.parameters()):
            continue
        for group in hook():
            given = {**group, "params": [p for p in group["params"] if p.requires_grad]}
            _check_own(given["params"], names, taken, owner)
            taken |= {id(parameter) for parameter in given["params"]}
            groups.append(given)
    rest = [parameter for parameter in module.parameters() if id(parameter) in names and id(parameter) not in taken]
    return [part for group in ({"params": rest}, *groups) for part in _by_decay(group, weight_decay, names)]


def scaled(groups: list[Group], scales: Mapping[str, float]) -> list[Group]:
    """Split groups by the parts that have a factor of the rate, times what the group says itself."""
    if not scales:
        return groups
    found = []
    for group in groups:
        parts: dict[float, dict[str, list[Any]]] = {}
        for parameter, name in zip(group["params"], group["names"], strict=True):
            scale = group["lr_scale"] * scales.get(name.partition(".")[0], 1.0)
            part = parts.setdefault(scale, {"params": [], "names": []})
            part["params"].append(parameter)
            part["names"].append(name)
        found += [{**group, **part, "lr_scale": scale} for scale, part in parts.items()]
    return found


def _check_own(parameters: Iterable[Tensor], names: Mapping[int, str], taken: set[int], owner: str) -> None:
    for parameter in parameters:
        if id(parameter) not in names:
            raise UserError(f"parameter_groups of {owner or 'the network'} names a weight that is not the network's")
        if id(parameter) in taken:
            raise UserError(f"parameter_groups name {names[id(parameter)]} twice; a weight is in one group")
        taken.add(id(parameter))


def _by_decay(group: Group, weight_decay: float, names: Mapping[int, str]) -> list[Group]:
    """Split a group into the weights that decay and those that do not, where it does not say that itself."""
    decay = group.get("weight_decay", weight_decay)
    parts = [(group["params"], decay)]
    if decay and "weight_decay" not in group:
        matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
        parts = [(matrices, decay), ([parameter for parameter in group["params"] if parameter.ndim <= 1], 0.0)]
    scale = group.get("lr_scale", 1.0)
    if not is_number(scale) or not 0 <= scale < float("inf"):
        raise UserError(f"lr_scale {scale!r} of parameter_groups is not possible; give a factor of at least 0")
    return [
        {
            **group,
            "params": params,
            "names": [names[id(p)] for p in params],
            "weight_decay": own_decay,
            "lr_scale": scale,
        }
        for params, own_decay in parts
        if params
    ]
