"""An optimizer in an engine: which one a runtime can hold, its learning rate, and what a checkpoint says of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from vqdist.backends import state
from vqdist.backends.base import Backend
from vqdist.errors import UserError, an
from vqdist.files import read_json, write_json
from vqdist.parts import is_same

ELEMENTWISE = frozenset([Adadelta, Adagrad, Adam, Adamax, AdamW, ASGD, NAdam, RAdam, RMSprop, Rprop, SGD])
"""Optimizers of torch that treat every number of a weight by itself."""
ADAMS = frozenset(["torch.optim.adam.Adam", "torch.optim.adamw.AdamW"])
"""They keep the same state, and a run may go from one to the other."""
RECORD = "optimizer.json"
OWN_KEYS = frozenset(["params", "lr", "names"])  # of a group: set anew by each run, and each step


def is_elementwise(optimizer: Optimizer) -> bool:
    """Return whether an optimizer treats every number of a weight by itself, so that it may update parts of weights.

    An optimizer says so by an attribute `elementwise`; of torch's own it is known. Of others it is not assumed.
    """
    return bool(getattr(optimizer, "elementwise", type(optimizer) in ELEMENTWISE))


def averages_itself(optimizer: Any) -> bool:
    """Return whether an optimizer, or its class, evaluates other weights than it trains, as schedule-free ones do.

    Its method `eval` puts them in place, and `train` takes them back.
    """
    return callable(getattr(optimizer, "eval", None))


def check_optimizer(optimizer: Optimizer, backend: Backend) -> None:
    """Raise `UserError` for an optimizer that the engines of this backend cannot hold."""
    name = type(optimizer).__name__
    required = [
        parameter.name
        for parameter in inspect.signature(optimizer.step).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if required:
        raise UserError(
            f"optimizer {name} cannot be used: its step needs {', '.join(required)}, since it computes losses itself; "
            "use one whose step takes gradients as they are, as adamw"
        )
    if backend.capabilities.any_optimizer:
        return
    remedy = "use adamw or another elementwise one, or DDP (backend accelerate without FSDP) or ZeRO 0"
    if averages_itself(optimizer):
        raise UserError(
            f"optimizer {name} cannot be used on {backend.title}, where each process updates a part of every weight: "
            f"{name} evaluates other weights than it trains, and makes them of whole ones; {remedy}"
        )
    if not is_elementwise(optimizer):
        said = getattr(optimizer, "elementwise", None) is not None
        why = "needs whole ones" if said else "does not say elementwise = True, that each number is treated by itself"
        raise UserError(
            f"optimizer {name} cannot be used on {backend.title}, where each process updates a part of every weight: "
            f"{name} {why}; {remedy}"
        )
    if optimizer.state:
        raise UserError(
            f"optimizer {name} cannot be used on {backend.title}, where each process updates a part of every weight: "
            f"{name} makes its state when it is built, before weights are cut; {remedy}"
        )


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the rate of the coming update in every group of weights, times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def path_of(optimizer: Optimizer) -> str:
    """Return the import path of an optimizer's class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def kept_alike(saved: str, now: str) -> bool:
    """Return whether the optimizer of one import path goes on with the state of another's."""
    return is_same(saved, now) or {saved, now} <= ADAMS


class OptimizerRecord:
    """All that a checkpoint holds of an engine's optimizer.

    Tensors of state go to `optimizer.safetensors`. Everything else goes to `optimizer.json`: the optimizer's class,
    numbers in its state by `kind/parameter name`, and numbers in its groups that training has changed. State of
    another kind cannot be saved and is refused after the first update.

    Args:
        optimizer: as the runtime has prepared it.
        zero_stage: of DeepSpeed; from 1 on the state is that of flat parts, at 3 they are updated one after another.
    """

    def __init__(self, optimizer: Optimizer, *, zero_stage: int = 0):
        self.optimizer = optimizer
        self.zero_stage = zero_stage
        self._at_start = [_settings(group) for group in optimizer.param_groups]
        self._checked = False

    def check_once(self) -> None:
        """Raise `UserError` after the first update if the state that it has made cannot be saved."""
        if self._checked or not self.optimizer.state:
            return
        self._checked = True
        for weight, values in self.optimizer.state.items():
            if not isinstance(weight, Tensor):
                self._refuse(f"keeps state under {weight!r}, which is no weight")
            for kind, value in values.items():
                self._check(weight, kind, value)
        changed = self._changed_settings()
        if self.zero_stage == 3 and any(changed):
            keys = ", ".join(sorted({key for group in changed for key in group}))
            self._refuse(f"counts in its groups ({keys}), and ZeRO 3 calls it several times a step: use ZeRO 0, 1, 2")

    def _check(self, weight: Tensor, kind: Any, value: Any) -> None:
        if not isinstance(kind, str) or "/" in kind:
            self._refuse(f"names a kind of state {kind!r}; a string without / is expected")
        if not isinstance(value, Tensor):
            if value is not None and not isinstance(value, (bool, int, float)):
                self._refuse(
                    f"keeps {an(type(value).__name__)} as its state {kind!r}; tensors and numbers can be saved"
                )
            return
        if not type(value).__module__.split(".")[0] == "torch":
            self._refuse(f"keeps {an(type(value).__name__)} as its state {kind!r}; plain tensors can be saved")
        if self.zero_stage and value.ndim and (value.shape, value.dtype) != (weight.shape, torch.float32):
            self._refuse(f"keeps state {kind!r} that is not float32 or not of the weights' shape, as ZeRO needs it")

    def _refuse(self, reason: str) -> None:
        raise UserError(
            f"the state of optimizer {type(self.optimizer).__name__} cannot be saved: it {reason}; a run could not be "
            "resumed from its checkpoints"
        )

    def _changed_settings(self) -> list[dict[str, Any]]:
        """Return what training has changed in each group."""
        changed = []
        for before, group in zip(self._at_start, self.optimizer.param_groups, strict=True):
            now = {key: value for key, value in _settings(group).items() if key not in before or before[key] != value}
            for key, value in now.items():
                if not _is_plain(value):
                    self._refuse(f"changes {key!r} of a group of weights, which is {an(type(value).__name__)}")
            changed.append(now)
        return changed

    def save(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Write the state of all weights, by `kind/parameter name`, and the record; rank 0 calls this."""
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        state.save_tensors(folder / state.OPTIMIZER, tensors)
        scalars = {key.partition("/")[0] for key, value in tensors.items() if value.ndim == 0 and value.is_cpu}
        record = {
            "optimizer": path_of(self.optimizer),
            "groups": self._changed_settings(),
            "numbers": {key: value for key, value in values.items() if key not in tensors},
            "on_host": sorted(scalars - {"step"}),
        }
        write_json(folder / RECORD, record)

    def load(self, folder: Path, module: nn.Module, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Return the state that `save` wrote and restore the groups' numbers.

        Raises:
            UserError: another optimizer wrote it, or one over other groups.
        """
        # checkpoints from before there was a choice say nothing, and hold Adam's state
        record: dict[str, Any] = {"optimizer": min(ADAMS), "groups": [], "numbers": {}, "on_host": []}
        if (folder / RECORD).is_file():
            record |= read_json(folder / RECORD)
        self._check_same(record["optimizer"], folder)
        self._restore_settings(record["groups"], folder)
        tensors = state.load_tensors(folder / state.OPTIMIZER, device)
        values: dict[str, Any] = state.with_current_names(module, {**tensors, **record["numbers"]})
        for key in values:
            if key.partition("/")[0] in record["on_host"]:
                values[key] = values[key].cpu()
        return values

    def _check_same(self, saved: str, folder: Path) -> None:
        now = path_of(self.optimizer)
        if not kept_alike(saved, now):
            raise UserError(
                f"{folder} holds the state of optimizer {saved} and this run has {now}; resume it with the optimizer "
                "that it began with, or start another run folder"
            )

    def _restore_settings(self, groups: list[dict[str, Any]], folder: Path) -> None:
        if any(groups) and len(groups) != len(self.optimizer.param_groups):
            raise UserError(
                f"{folder} holds numbers of {len(groups)} groups of weights and this run has "
                f"{len(self.optimizer.param_groups)}; resume it with the weight_decay that it began with"
            )
        for saved, group in zip(groups, self.optimizer.param_groups, strict=False):
            for key, value in saved.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = tuple(value) if isinstance(value, list) else value


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of what a group says besides its weights and their rate; 0-d tensors as numbers."""
    return {
        key: value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
        for key, value in group.items()
        if key not in OWN_KEYS
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
