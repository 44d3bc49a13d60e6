"""One network in DeepSpeed at ZeRO 0, 1 or 2: an engine behind the contract. Stage 3 is in `zero3.py`.

DeepSpeed 0.19 hooks the outputs of its engines, so a gradient may pass an engine's output once per forward. Losses
that need more (adaptive weight, gradient penalty, the generator's loss through the discriminator) are written so that
they never do: see `VQGanVAETrainer`. Weights stay float32 and bf16 is autocast, so every checkpoint holds the same
tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqdist.backends import state
from vqdist.backends.base import Engine, norm_of_dropped
from vqdist.backends.build_ops import prepare_environment
from vqdist.backends.distributed import DistributedBackend
from vqdist.backends.local import autocast_for, frozen_weights
from vqdist.backends.optimizer import OptimizerRecord, set_learning_rate
from vqdist.errors import UserError

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
prepare_environment()

try:
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
except ModuleNotFoundError as error:
    raise UserError(
        f"backend 'deepspeed' needs a package that is not installed ({error.name}); install it with "
        "pip install 'vqdist[deepspeed]'"
    ) from error


class DeepSpeedEngine(Engine):
    """A `deepspeed.DeepSpeedEngine` behind the contract.

    Args:
        engine: what `deepspeed.initialize` returned; it divides the loss by the accumulation and clips by itself.
        backend: gives the device and the ranks.
        precision: for the forward with frozen weights, which does not go through DeepSpeed.
    """

    def __init__(self, engine: Any, backend: DistributedBackend, precision: str):
        self.engine = engine
        self.backend = backend
        self.precision = precision
        self.module = engine.module
        self.zero_stage = engine.zero_optimization_stage()
        self.optimizer = engine.basic_optimizer  # which DeepSpeed's own, from ZeRO 1 on, gives parts of the weights
        self.record = OptimizerRecord(self.optimizer, zero_stage=self.zero_stage)

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    def frozen(self, *args, **kwargs):
        with frozen_weights(self.module), autocast_for(self.backend.device, self.precision):
            return self.module(*args, **kwargs)

    def micro_step(self, *, last: bool):
        # ZeRO 2 partitions gradients and so exchanges on every micro-batch whatever is said here
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, *, lr: float, finite: Tensor | None = None) -> Tensor:
        norm = self._stage_0_norm() if self.zero_stage == 0 else None
        good = finite if finite is None or norm is None else norm.isfinite() & finite.to(norm.device)
        dropped = good is not None and self.backend.any(not bool(good))
        set_learning_rate(self.engine.optimizer, lr)
        with self._discarding() if dropped else nullcontext():
            self.engine.step()
        self.record.check_once()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        norm = torch.as_tensor(float("nan") if norm is None else norm, device=self.backend.device).detach()
        if finite is not None and self.zero_stage > 0:
            self._check_discarded(norm)
        return norm_of_dropped(norm) if dropped else norm

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        """Within this context DeepSpeed's step clears gradients and updates nothing.

        Where it partitions, it discards an update whose norm is not finite; so it is given such a norm.
        """
        optimizer, nan = self.engine.optimizer, torch.full((), torch.nan, device=self.backend.device)
        name, replaced = {
            0: ("step", lambda *_args, **_kwargs: None),
            1: ("scaled_global_norm", lambda *_args, **_kwargs: nan),
            2: ("scaled_global_norm", lambda *_args, **_kwargs: nan),
            3: ("_get_norm_groups", lambda: [nan]),
        }[self.zero_stage]
        setattr(optimizer, name, replaced)  # of this object, before that of its class
        try:
            yield
        finally:
            delattr(optimizer, name)

    def _check_discarded(self, norm: Tensor) -> None:
        """Raise `UserError` if the update of a norm that is not finite was made: other versions may do so."""
        if not bool(norm.isfinite()) and not self.engine.optimizer.overflow:
            raise UserError(
                f"DeepSpeed {deepspeed.__version__} makes updates whose gradient norm is not finite, so on_nonfinite "
                "skip is not possible; use on_nonfinite raise, or the version of DeepSpeed that vqdist was tried with"
            )

    def _stage_0_norm(self) -> Tensor:
        gradients = [p.grad.norm() for p in self.module.parameters() if p.grad is not None]
        return torch.stack(gradients).norm()

    def held_moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield them by weight where they are whole, else by partition."""
        if self.zero_stage == 0:
            for key, value in state.optimizer_state(self.module, self.engine.basic_optimizer).items():
                if torch.is_tensor(value):
                    yield key.replace("/", " of ", 1), value
            return
        for number, partition in enumerate(self.engine.basic_optimizer.state.values()):
            for kind, value in partition.items():
                if torch.is_tensor(value):
                    yield f"{kind} of partition {number}", value

    def save(self, folder: Path) -> None:
        optimizer = dict(self.named_optimizer_state())
        if self.backend.is_main:
            state.save_tensors(folder / state.WEIGHTS, self.module.state_dict())
            self.record.save(folder, optimizer)

    def load(self, folder: Path) -> None:
        device = self.backend.device
        state.load_weights(self, folder / state.WEIGHTS, device)
        values = self.record.load(folder, self.module, device)
        if self.zero_stage == 0:
            state.load_optimizer_state(self.module, self.engine.basic_optimizer, values)
            return
        for parameter in self.module.parameters():
            safe_set_full_fp32_param(parameter, parameter.detach())
        if values:
            self._load_partitions(values)

    def partitions(self) -> Iterator[tuple[Tensor, list[tuple[str, nn.Parameter]]]]:
        """Yield this rank's flat parts of the weights, each with the weights that it is of, by name."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        zero = self.engine.optimizer
        flat, weights = (
            (zero.fp32_partitioned_groups_flat, zero.fp16_groups)
            if self.zero_stage == 3
            else (zero.single_partition_of_fp32_groups, zero.bit16_groups)
        )
        for partition, group in zip(flat, weights, strict=True):
            yield partition, [(names[id(parameter)], parameter) for parameter in group]

    def named_optimizer_state(self) -> Iterator[tuple[str, Any]]:
        """Whole optimizer state by `kind/parameter name`, gathered from the ranks' parts; every rank calls this."""
        basic = self.engine.basic_optimizer
        if self.zero_stage == 0:
            yield from state.optimizer_state(self.module, basic).items()
            return
        if not basic.state:
            return
        if self.zero_stage < 3:
            self._link_states()
        for partition, weights in self.partitions():
            for name, parameter in weights:
                for kind, value in basic.state[partition].items():
                    is_part = isinstance(value, Tensor) and value.ndim > 0
                    yield f"{kind}/{name}", safe_get_full_optimizer_state(parameter, kind) if is_part else value

    def _link_states(self) -> None:
        """Let each parameter know its part of the optimizer's state.

        DeepSpeed does so when the first group of parameters has made its first step. Others, as weight decay makes
        them, have no state then.
        """
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_partitions(self, values: dict[str, Any]) -> None:
        """Fill this rank's partitions of the optimizer state."""
        cut = self.make_states(values)
        self._link_states()
        for key in cut:
            kind, _, name = key.partition("/")
            safe_set_full_optimizer_state(self.module.get_parameter(name), values[key], kind)

    def make_states(self, values: Mapping[str, Any]) -> list[str]:
        """Make the optimizer's state of this rank's parts, which DeepSpeed makes on the first step only.

        Args:
            values: whole state by `kind/parameter name`.

        Returns:
            The keys of what lies in parts, for which there are zeros now; the rest is in place.
        """
        optimizer = self.engine.optimizer.optimizer
        shared = _kinds_in_one_piece(values)
        for partition, weights in self.partitions():
            names = {name for name, _ in weights}
            found = {key.partition("/")[0]: value for key, value in values.items() if key.partition("/")[2] in names}
            optimizer.state[partition] = {
                kind: state.placed(optimizer, kind, value, partition.device)
                if kind in shared
                else torch.zeros_like(partition)
                for kind, value in found.items()
            }
        return [key for key in values if key.partition("/")[0] not in shared]


def _kinds_in_one_piece(values: Mapping[str, Any]) -> set[str]:
    """Kinds of state of which a weight has a number and not a tensor like itself, as Adam's count of steps."""
    like_weights = {key.partition("/")[0] for key, value in values.items() if isinstance(value, Tensor) and value.ndim}
    return {key.partition("/")[0] for key in values} - like_weights
