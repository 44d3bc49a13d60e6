"""The networks of a run: the engines that train them, and the average of the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn

from vqdist.backends import Backend, Engine
from vqdist.backends.optimizer import averages_itself
from vqdist.ranks import check_ranks_agree
from vqdist.trainers.average import MovingAverage, OptimizersAverage
from vqdist.trainers.finite import held_tensors


class Networks:
    """All weights of a run, on all ranks.

    Args:
        backend: made the engines.
        engines: by name; the network of the first is averaged, evaluated and exported.
        average: its moving average, or None. An optimizer that averages the weights itself has no other beside it.
        state: tensors beside the networks' on which later steps depend, by name; equal on every rank.
        of_rank: tensors of the networks of which each rank has its own, as statistics of BatchNorm, by dotted name.
    """

    def __init__(
        self,
        backend: Backend,
        engines: Mapping[str, Engine],
        average: MovingAverage | None,
        state: Mapping[str, Tensor] | None = None,
        of_rank: Mapping[str, Tensor] | None = None,
    ):
        self.backend = backend
        self.engines = dict(engines)
        self.average = average
        self._own = OptimizersAverage(self.main) if averages_itself(self.main.optimizer) else None
        self.state = dict(state or {})
        self.of_rank = dict(of_rank or {})

    @property
    def main(self) -> Engine:
        """The engine whose network is averaged, evaluated and exported."""
        return next(iter(self.engines.values()))

    @property
    def has_average(self) -> bool:
        """True where other weights are evaluated and exported than those that are trained."""
        return self.average is not None or self._own is not None

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Return a context of the network to evaluate and export: the average if there is one, else the live one.

        Every rank enters it; within it the weights are whole, and no rank waits for another.
        """
        if self._own is not None:
            return self.main.whole(self._own.network())
        return self.main.whole(None if self.average is None else self.average.ema_model)

    def update_average(self) -> None:
        """Fold the new weights into the average."""
        if self.average is not None:
            self.average.update()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights and buffers, whole, by dotted name; every rank takes all."""
        for name, engine in self.engines.items():
            for key, tensor in engine.named_tensors():
                yield f"{name}.{key}", tensor
        if self.average is not None:
            for key, tensor in self.average.named_tensors():
                yield f"ema.{key}", tensor
        yield from self.state.items()

    def held_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of this rank that goes into a checkpoint, as messages name it; nothing is exchanged."""
        yield from held_tensors(self.engines, None if self.average is None else (self.main, self.average.ema_model))
        yield from self.state.items()

    def check_ranks_agree(self, step: int) -> None:
        """Raise `RanksDiverged` unless all ranks hold the same after this step, but for what is a rank's own."""
        tensors = (item for item in self.named_tensors() if item[0] not in self.of_rank)
        check_ranks_agree(self.backend, tensors, step)
