"""The average of a network's weights, which is evaluated and exported: a moving one, or the optimizer's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from ema_pytorch import EMA
from torch import Tensor, nn

from vqdist.backends import Engine
from vqdist.models.averaged import averaged_tensors

COUNTERS = ("step", "initted")


class MovingAverage:
    """An exponential moving average of the weights that learn by gradient; every other tensor is the live one.

    A codebook that follows the encoder by itself is no weight: the mean of its past positions is near no feature, and
    k-means or the replacement of a dead code moves it in one step. Such tensors are copied after every update of the
    network, see `averaged_tensors`.

    Args:
        engine: of the network; the average follows what lies on this rank (`Engine.local`).
        beta: decay after its warm-up, which is ema-pytorch's: 1 - (1 + n) ** (-2 / 3).
        update_after_step: steps in which the weights are copied, too.
        update_every: steps from one update of the weights' average to the next.

    Attributes:
        average: ema-pytorch's, of the weights alone.
        followed_names: the tensors of `Engine.local` that are copied.
    """

    def __init__(self, engine: Engine, *, beta: float, update_after_step: int, update_every: int):
        averaged = averaged_tensors(engine.module).keys()
        held = engine.held_tensors()
        followed = {id(held[name]) for name in held.keys() - averaged}
        names = [name for name, tensor in _named(engine.local) if id(tensor) in followed]
        # counters stay on the CPU: ema-pytorch reads them on every step, and a device would have to be waited for
        self.average = EMA(
            engine.local,
            beta=beta,
            update_after_step=update_after_step,
            update_every=update_every,
            ignore_names=set(names),
            include_online_model=False,
            use_foreach=True,
        )
        self.engine = engine
        self.followed_names = names

    @property
    def ema_model(self) -> nn.Module:
        """A copy of `Engine.local` with the averaged weights."""
        return self.average.ema_model

    @property
    def step(self) -> Tensor:
        """Updates so far, 0-d on the CPU."""
        return self.average.step

    def update(self) -> None:
        """Fold the weights of one more step into the average, and copy what follows by itself."""
        self.average.update()
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Make every tensor that is not averaged equal to the live one."""
        if self.followed_names:
            averages, lives = zip(*self._followed(), strict=True)
            torch._foreach_copy_(averages, lives)

    def follows(self) -> bool:
        """Return whether every tensor that is not averaged equals the live one on this rank; waits for the device."""
        return all(torch.equal(average, live) for average, live in self._followed())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the average, whole, by the network's names, one after another; every rank takes them all."""
        return self.engine.named_tensors(self.ema_model)

    def counters(self) -> dict[str, Tensor]:
        """Return the counters of updates, by their names in a checkpoint."""
        return {f"ema_{name}": getattr(self.average, name) for name in COUNTERS}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `named_tensors` and `counters` gave.

        Raises:
            RuntimeError: the tensors are not those of this network.
        """
        tensors = dict(tensors)
        for name, counter in self.counters().items():
            counter.copy_(tensors.pop(name))
        self.engine.fill(tensors, self.ema_model)

    def _followed(self) -> Iterator[tuple[Tensor, Tensor]]:
        averages, lives = dict(_named(self.ema_model)), dict(_named(self.engine.local))
        return ((averages[name].data, lives[name].data) for name in self.followed_names)


class OptimizersAverage:
    """The weights that an optimizer evaluates in place of those that it trains, as a schedule-free one does.

    The optimizer's `eval` puts them in place and `train` takes them back, but that rounds. So both are left as they
    are: a copy of the network gets the weights, and a copy of the optimizer over these is told to evaluate. All of it
    is a function of the live network and its optimizer, so a checkpoint holds nothing of it.

    Args:
        engine: of the network, whose weights are whole on this rank.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._copy = deepcopy(engine.local)  # now: a network that has run may hold what cannot be copied
        averaged = averaged_tensors(engine.module).keys()
        self._followed = [name for name, _ in _named(engine.local) if name not in averaged]

    @torch.no_grad()
    def network(self) -> nn.Module:
        """Return the copy with the weights of this moment; tensors that learn by no gradient are the live ones."""
        lives, copies = dict(_named(self.engine.local)), dict(_named(self._copy))
        _copy_tensors(lives, copies, lives)
        twin = self._twin({id(live): copies[name] for name, live in lives.items()})
        twin.eval()
        _copy_tensors(lives, copies, self._followed)
        return self._copy

    def _twin(self, copies: dict[int, Any]) -> Any:
        """Return a copy of the optimizer over copies of the weights, given by the weights' ids."""
        optimizer = self.engine.optimizer
        twin = object.__new__(type(optimizer))  # `Optimizer.__getstate__` leaves a subclass's own attributes out
        twin.__dict__ = deepcopy(vars(optimizer), copies)
        return twin


def _copy_tensors(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], names: Iterable[str]) -> None:
    for name in names:
        targets[name].copy_(sources[name])


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
