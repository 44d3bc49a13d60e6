"""Engine and Backend: all that a trainer may ask of the runtime.

A network travels with its optimizer: that pair is an `Engine`, and it is what every runtime can express. Two players
(generator and discriminator) are two engines; nothing special happens at two. A `Backend` knows the ranks, makes
engines and averages numbers. Trainers, models and losses know nothing else about Accelerate, DeepSpeed or process
groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Capabilities:
    """Abilities of the engines of a backend; a trainer asks before it relies on it.

    Attributes:
        double_backward: gradients of gradients may be taken through an engine's outputs, as a gradient penalty does.
            Where not, the penalty goes through `Engine.module`, in one backward with the rest.
        trains_bare: a loss through `Engine.module` reaches the weights, which shards do not allow.
        compiles: torch.compile may compile the networks before `Backend.prepare`.
        any_optimizer: an optimizer sees whole weights. Where not, each rank updates a part of them, so the optimizer
            must treat every number by itself: see `vqdist.backends.optimizer.is_elementwise`.
    """

    double_backward: bool = True
    trains_bare: bool = True
    compiles: bool = True
    any_optimizer: bool = True


class Engine(ABC):
    """One network with its optimizer, wrapped by a runtime. Every method but `frozen` is called by every rank.

    Attributes:
        module: the bare network, for its methods and options. Training through it skips the exchange of gradients; use
            the engine itself. Its weights are whole unless the runtime shards them.
        optimizer: of the network, as the runtime has prepared it.
        backend: the runtime that made the engine.
    """

    module: nn.Module
    optimizer: Optimizer
    backend: Backend

    @property
    def capabilities(self) -> Capabilities:
        """The abilities of this engine."""
        return self.backend.capabilities

    @abstractmethod
    def __call__(self, *args, **kwargs):
        """Forward in the run's precision, once per micro-batch, inside `micro_step`."""

    @abstractmethod
    def frozen(self, *args, **kwargs):
        """Forward with the weights held fixed: gradients reach the input only."""

    @abstractmethod
    def micro_step(self, *, last: bool) -> AbstractContextManager:
        """Context of one forward and backward; ranks exchange gradients only where `last` is true."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add grad(loss) / (number of micro-batches) to the gradients."""

    @abstractmethod
    def step(self, *, lr: float, finite: Tensor | None = None) -> Tensor:
        """Clip, update with this learning rate, clear. Without `finite` the device is not waited for.

        Args:
            lr: the learning rate; a group of weights with an `lr_scale` gets it times that.
            finite: whether this rank's losses are finite (0-d, bool). Where it is given, the update is dropped on
                every rank if one rank's losses or the norm are not finite: weights, moments and their step counts
                stay as they are. To know that waits for the device.

        Returns:
            The 2-norm of the gradients before clipping (0-d, on the device), equal on every rank. It is not finite if
            the update was dropped.
        """

    @property
    def local(self) -> nn.Module:
        """The part that lies on this rank, for a moving average to follow: `module` itself, unless it is sharded."""
        return self.module

    def held_tensors(self) -> dict[str, Tensor]:
        """Return the weights and buffers of `local` by the names that they have in the network; nothing is copied."""
        return dict([*self.local.named_parameters(), *self.local.named_buffers()])

    def whole(self, weights: nn.Module | None = None) -> AbstractContextManager[nn.Module]:
        """Context of a plain network with whole weights, to evaluate, draw and export, by any rank on its own.

        Args:
            weights: a copy of `local` with other values, as a moving average is; by default `local` itself.
        """
        return nullcontext(self.local if weights is None else weights)

    def named_tensors(self, weights: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole weights and buffers by name, one after another; every rank takes them all. `weights`: see `whole`."""
        yield from (self.local if weights is None else weights).state_dict().items()

    def fill(self, tensors: Mapping[str, Tensor], weights: nn.Module | None = None) -> None:
        """Give the network, or `weights`, the values that `named_tensors` gave.

        Raises:
            RuntimeError: they are not this network's.
        """
        (self.local if weights is None else weights).load_state_dict(tensors)

    def held_weights(self, weights: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
        """Weights and saved buffers as they lie on this rank, as "weight NAME" and "buffer NAME", with no exchange.

        Names are the same on every rank. `weights`: see `whole`.
        """
        held = self.local if weights is None else weights
        parameters = {name for name, _ in held.named_parameters(remove_duplicate=False)}
        for name, tensor in held.state_dict().items():
            yield f"{'weight' if name in parameters else 'buffer'} {name}", tensor

    def held_moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's state as it lies on this rank, as "KIND of NAME", with no exchange; likewise."""
        yield from ()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights and optimizer state; every rank calls it, rank 0 writes."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, whatever backend and number of ranks wrote it."""


def norm_of_dropped(norm: Tensor) -> Tensor:
    """Return what `Engine.step` returns of a dropped update: the norm where it is not finite, else NaN."""
    return torch.where(norm.isfinite(), torch.nan, norm)


class Backend(ABC):
    """The ranks of a run and how they talk. Every method is called by every rank.

    Attributes:
        name: "local", "accelerate" or "deepspeed".
        rank: index of this process, 0 .. world_size - 1.
        local_rank: index of this process on its node.
        world_size: number of processes.
        device: where this rank's tensors live.
        grad_accum_every: micro-batches per optimizer step, of the engines to come.
    """

    name: str
    grad_accum_every: int
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def capabilities(self) -> Capabilities:
        """The abilities of this backend's engines."""
        return Capabilities()

    @property
    def title(self) -> str:
        """The name, and what of the networks is sharded."""
        return self.name

    @property
    def is_main(self) -> bool:
        """True if this is rank 0 of the whole run: the one that writes files."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True if this is the first rank of its node."""
        return self.local_rank == 0

    @abstractmethod
    def prepare(self, module: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None) -> Engine:
        """Wrap a network and its optimizer. Afterwards weights and buffers are rank 0's on every rank.

        Raises:
            UserError: this runtime cannot hold the optimizer; the message says why.
        """

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; does not wait for the device."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """One tensor of equal shape from each rank, stacked: (world_size, ...)."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""

    @abstractmethod
    def close(self) -> None:
        """Leave the process group, if this backend opened it. Safe to call twice."""

    def average(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, in place; does not wait for the device."""
        return self.sum(tensor).div_(self.world_size)

    def mean(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Mean of each value over ranks: one exchange and one wait for the device, however many values."""
        if not values:
            return {}
        numbers = [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in values.values()]
        return dict(zip(values, self.average(torch.stack(numbers)).tolist(), strict=True))

    @abstractmethod
    def largest_lately(self, number: int) -> int:
        """Return the largest number that any rank gave in its call before this one (of one process, at once).

        Every rank gets the same. The hosts exchange it while training goes on: no device is waited for, and another
        rank only if it is a whole call behind. Called once a step.
        """

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on at least one rank; every rank gets the same answer."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)
