"""No value that is not finite is committed: numbers are watched on the device, tensors looked at before a save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqdist.backends import Backend, Engine
from vqdist.errors import UserError


class FirstNotFinite:
    """For each quantity of a run, the first step at which it was not finite, kept on the device.

    Args:
        backend: its ranks compare what they saw.
        owners: which engine a quantity belongs to, by name; for messages, and filled by whoever knows.
    """

    def __init__(self, backend: Backend, owners: Mapping[str, str]):
        self.backend = backend
        self.owners = owners
        # by device and names, which differ from step to step: rows of steps (infinity: never) and of values
        self._seen: dict[tuple[torch.device, tuple[str, ...]], Tensor] = {}

    def add(self, step: int, numbers: Mapping[str, Tensor]) -> None:
        """Look at 0-d tensors of this rank; waits for no device."""
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, value in numbers.items():
            by_device.setdefault(value.device, {})[name] = value.detach()
        for device, group in by_device.items():
            values = torch.stack(list(group.values()))
            key = device, tuple(group)
            if key not in self._seen:
                self._seen[key] = torch.full((2, len(group)), torch.inf, dtype=torch.float64, device=device)
            seen = self._seen[key]
            now = torch.stack([torch.full_like(seen[0], step), values.to(seen.dtype)])
            self._seen[key] = torch.where(values.isfinite() | seen[0].isfinite(), seen, now)

    def read(self) -> str | None:
        """Name what was not finite first, or None; one exchange, and every rank gets the same.

        Of several quantities of one step it is the one that was added first: a loss, not the norm that it spoilt.
        """
        if not self._seen:
            return None
        names = [name for _, group in self._seen for name in group]
        mine = torch.cat([seen.to(self.backend.device) for seen in self._seen.values()], dim=1)
        table = self.backend.gather(mine).cpu()
        steps, values = table[:, 0], table[:, 1]
        step = float(steps.min())
        if step == torch.inf:
            return None
        column = int((steps == step).any(dim=0).nonzero()[0])
        rank = int((steps[:, column] == step).nonzero()[0])
        owner = f" in the {self.owners[names[column]]}" if names[column] in self.owners else ""
        where = owner + (f" (rank {rank})" if self.backend.world_size > 1 else "")
        return f"{names[column]} is {float(values[rank, column])}{where} at step {int(step)}"


class FiniteGuard:
    """Keeps values that are not finite out of checkpoints, and with `skip` out of the weights.

    Without `skip` nothing here waits for the device but `numbers` and `tensors`, which a trainer calls where a line or
    a checkpoint is due. With it each update is looked at before it is made, which waits for the device.

    Args:
        backend: every rank of it calls each method.
        skip: drop an update whose losses or gradient norm are not finite, and go on.
        max_skipped_steps: give up after so many dropped updates of one engine in a row.

    Attributes:
        skipped_steps: steps so far in which an update was dropped.
    """

    def __init__(self, backend: Backend, *, skip: bool, max_skipped_steps: int):
        self.backend = backend
        self.skip = skip
        self.max_skipped_steps = max_skipped_steps
        self._constants: frozenset[str] = frozenset()
        self.restore(None)

    # ------------------------------------------------------------------------------------- numbers of a step

    def begin(self, engines: Mapping[str, Engine]) -> None:
        """Begin a step; what its forwards may move is kept if the update may be dropped."""
        self._dropped: set[str] = set()
        if self.skip:
            self._moved = {name: _moved_by_forward(engine) for name, engine in engines.items()}
            self._before = {name: [tensor.clone() for tensor in moved] for name, moved in self._moved.items()}

    def step(self, name: str, engine: Engine, numbers: Mapping[str, Tensor], *, lr: float) -> Tensor:
        """Make or drop the update of an engine; see `Engine.step`.

        Args:
            name: of the engine.
            engine: after its last micro-batch.
            numbers: losses and whatever else must be finite of this engine's step, 0-d, of this rank.
            lr: its learning rate.

        Returns:
            The gradient norm before clipping.

        Raises:
            UserError: a factor of the update is beyond float32, on every rank alike.
        """
        try:
            return self._step(name, engine, numbers, lr=lr)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise UserError(
                f"the update of {name} goes beyond float32 with a learning rate of {lr:g}; lower the rate or the "
                "weight decay"
            ) from error

    def _step(self, name: str, engine: Engine, numbers: Mapping[str, Tensor], *, lr: float) -> Tensor:
        self._owners.update(dict.fromkeys(numbers, name))
        if not self.skip:
            return engine.step(lr=lr)
        finite = [value.detach().isfinite().to(self.backend.device) for value in numbers.values()]
        norm = engine.step(lr=lr, finite=torch.stack(finite).all() if finite else torch.tensor(True))
        if bool(norm.isfinite()):
            self._in_a_row[name] = 0
            return norm
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
        self._dropped.add(name)
        with torch.no_grad():
            for tensor, before in zip(self._moved[name], self._before[name], strict=True):
                tensor.copy_(before)
        return norm

    def owned(self, quantity: str, engine: str) -> None:
        """Note which engine a quantity belongs to."""
        self._owners[quantity] = engine

    def dropped(self, name: str) -> bool:
        """Return whether the update of this engine was dropped in this step."""
        return name in self._dropped

    def end(self, step: int, numbers: Mapping[str, Tensor]) -> None:
        """End a step: watch all of its numbers, those of dropped updates apart."""
        spoilt = {name: value for name, value in numbers.items() if self._owners.get(name) in self._dropped}
        self._watched.add(step, {name: value for name, value in numbers.items() if name not in spoilt})
        if not any(self._in_a_row.values()):
            self._drops = FirstNotFinite(self.backend, self._owners)
        if self._dropped:
            self.skipped_steps += 1
            self._drops.add(step, spoilt)

    def gives_up(self) -> str | None:
        """Name the engine and the first cause once too many of its updates in a row were dropped."""
        for name, count in self._in_a_row.items():
            if count >= self.max_skipped_steps:
                cause = self._drops.read() or "another rank's losses are not finite"
                return f"{count} updates of the {name} in a row were skipped, as max_skipped_steps allows: {cause}"
        return None

    def numbers(self) -> str | None:
        """Name the first number of this run that was not finite, or None; see `FirstNotFinite.read`."""
        return self._watched.read()

    # ------------------------------------------------------------------------------------- tensors

    def except_constants(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Leave out buffers that are infinite from the start: masks that are added to logits."""
        infinite = (
            (name, tensor.isinf().any() & ~tensor.isnan().any())
            for name, tensor in tensors
            if name.startswith("buffer ") and tensor.is_floating_point()
        )
        self._constants = frozenset(name for name, flag in infinite if bool(flag))

    def tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
        """Name the first tensor that is not finite, or None: one reduction on the device, one exchange.

        Args:
            tensors: this rank's, by names that are the same on every rank.
        """
        checked = {
            name: tensor.isfinite().all().to(self.backend.device)
            for name, tensor in tensors
            if tensor.is_floating_point() and name not in self._constants
        }
        if not checked:
            return None
        broken = ~torch.stack(list(checked.values()))
        first = torch.where(broken.any(), broken.int().argmax(), -1)
        found = [index for index in self.backend.gather(first[None]).flatten().tolist() if index >= 0]
        return f"the {list(checked)[min(found)]} is not finite" if found else None

    # ------------------------------------------------------------------------------------- save and load

    def state(self) -> dict[str, Any]:
        """Return the part of a checkpoint that `restore` takes."""
        return {"steps": self.skipped_steps, "in_a_row": dict(self._in_a_row)}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint, which is finite; None begins anew."""
        self.skipped_steps: int = 0 if state is None else state["steps"]
        self._in_a_row: dict[str, int] = {} if state is None else dict(state["in_a_row"])
        self._owners: dict[str, str] = {}
        self._watched = FirstNotFinite(self.backend, self._owners)
        self._drops = FirstNotFinite(self.backend, self._owners)
        self._dropped = set()


def held_tensors(
    engines: Mapping[str, Engine], average: tuple[Engine, nn.Module] | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of this rank that goes into a checkpoint, as messages name it.

    Args:
        engines: by name.
        average: the engine that is averaged, and its average; or None.
    """
    for name, engine in engines.items():
        for key, tensor in (*engine.held_weights(), *engine.held_moments()):
            yield f"{key} of the {name}", tensor
    if average is not None:
        engine, averaged = average
        for key, tensor in engine.held_weights(averaged):
            yield f"{key} of the average", tensor


def how_to_go_on(newest: Path | None, *, resumed: bool) -> str:
    """Say what a user does after values that are not finite.

    Args:
        newest: the newest checkpoint, which is finite, or None.
        resumed: whether this run went on from it and saved none since, so that to do so again may lead here again.
    """
    kept = "there is no checkpoint yet: start" if newest is None else f"the newest checkpoint is {newest}: resume"
    again = f", and if that was done, remove {newest} to go on from before it" if resumed else ""
    return (
        f"{kept} with a lower lr or max_grad_norm, and --trainer.allow_config_change true to do so in the same run "
        f"folder{again}"
    )


def _moved_by_forward(engine: Engine) -> list[Tensor]:
    """Return all that a forward in training mode may move.

    These are buffers (EMA codebooks, running statistics), and weights of modules with buffers of their own (the
    k-means start of a learned codebook), where weights are whole.
    """
    moved = list(engine.module.buffers())
    if engine.local is engine.module:
        for module in engine.module.modules():
            if next(module.buffers(recurse=False), None) is not None:
                moved += module.parameters(recurse=False)
    return moved
