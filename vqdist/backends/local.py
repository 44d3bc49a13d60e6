"""One process, plain PyTorch: the reference that every other backend is tested against. Read this one first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqdist.backends import state
from vqdist.backends.base import Backend, Capabilities, Engine, norm_of_dropped
from vqdist.backends.environment import world_size_of_launcher
from vqdist.backends.optimizer import OptimizerRecord, check_optimizer, set_learning_rate
from vqdist.errors import UserError


@contextmanager
def frozen_weights(module: nn.Module):
    """Within this context no weight of the module asks for a gradient."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def autocast_for(device: torch.device, precision: str):
    """Return the context of the forward's precision: float32 weights throughout; bf16 runs matrix products in it."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def capabilities_of_torch(precision: str) -> Capabilities:
    """Return what plain PyTorch can do; bf16 takes the gradient penalty bare, as that is always float32."""
    return Capabilities(double_backward=precision == "fp32")


class TorchEngine(Engine):
    """A network, its optimizer, and `wrapped`: the callable that the forward of training goes through.

    Args:
        module: the bare network, already on its device.
        optimizer: made over `module.parameters()`.
        backend: gives the device and the ranks.
        wrapped: what training calls; the bare network here, its DDP wrapper in the accelerate backend.
        max_grad_norm: gradients with a larger 2-norm are scaled down to it; None does not clip.
        grad_accum_every: micro-batches per optimizer step.
        precision: "fp32" or "bf16".
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        backend: Backend,
        *,
        wrapped: nn.Module | None = None,
        max_grad_norm: float | None,
        grad_accum_every: int,
        precision: str,
    ):
        self.module = module
        self.optimizer = optimizer
        self.backend = backend
        self.wrapped: Any = module if wrapped is None else wrapped  # of DDP it has no_sync
        self.max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self.grad_accum_every = grad_accum_every
        self.precision = precision
        self.record = OptimizerRecord(optimizer)

    def __call__(self, *args, **kwargs):
        with autocast_for(self.backend.device, self.precision):
            return self.wrapped(*args, **kwargs)

    def frozen(self, *args, **kwargs):
        with frozen_weights(self.module), autocast_for(self.backend.device, self.precision):
            return self.module(*args, **kwargs)

    def micro_step(self, *, last: bool):
        # DDP decides in the forward whether the coming backward exchanges, so this surrounds both.
        return nullcontext() if last or self.wrapped is self.module else self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        (loss / self.grad_accum_every).backward()

    def step(self, *, lr: float, finite: Tensor | None = None) -> Tensor:
        norm = self.clip()  # by a norm that is not finite it spoils all gradients, which are dropped then
        dropped = finite is not None and self.backend.any(not bool(norm.isfinite() & finite.to(norm.device)))
        if not dropped:
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.record.check_once()
        self.optimizer.zero_grad(set_to_none=True)
        return norm_of_dropped(norm) if dropped else norm

    def clip(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm`; return their 2-norm before (0-d)."""
        return nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm).detach()

    def held_moments(self) -> Iterator[tuple[str, Tensor]]:
        for key, value in state.optimizer_state(self.module, self.optimizer).items():
            if torch.is_tensor(value):
                yield key.replace("/", " of ", 1), value

    def save(self, folder: Path) -> None:
        if self.backend.is_main:
            state.save_tensors(folder / state.WEIGHTS, self.module.state_dict())
            self.record.save(folder, state.optimizer_state(self.module, self.optimizer))

    def load(self, folder: Path) -> None:
        state.load_weights(self, folder / state.WEIGHTS, self.backend.device)
        values = self.record.load(folder, self.module, self.backend.device)
        state.load_optimizer_state(self.module, self.optimizer, values)


class LocalBackend(Backend):
    """One process on one device.

    Args:
        grad_accum_every: micro-batches per optimizer step.
        precision: "fp32" or "bf16".
        device: where to run; by default the first CUDA device, else the CPU.
    """

    name = "local"
    rank = local_rank = 0
    world_size = 1

    def __init__(self, *, grad_accum_every: int = 1, precision: str = "fp32", device: str | None = None):
        launched = world_size_of_launcher()
        if launched > 1:
            raise UserError(
                f"backend 'local' under a launcher of {launched} processes would train {launched} separate models; "
                "use --backend accelerate or --backend deepspeed, or start one process"
            )
        self.grad_accum_every = grad_accum_every
        self.precision = precision
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def capabilities(self) -> Capabilities:
        return capabilities_of_torch(self.precision)

    def prepare(self, module: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None) -> Engine:
        check_optimizer(optimizer, self)
        return TorchEngine(
            module,
            optimizer,
            self,
            max_grad_norm=max_grad_norm,
            grad_accum_every=self.grad_accum_every,
            precision=self.precision,
        )

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def largest_lately(self, number: int) -> int:
        return number

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass
