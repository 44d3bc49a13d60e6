"""The optimizers' states that a run takes over from the run that it begins from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqdist.backends import Backend, Engine
from vqdist.backends.optimizer import RECORD, averages_itself, kept_alike, path_of
from vqdist.backends.state import OPTIMIZER, WEIGHTS, load_tensors, save_tensors, with_current_names
from vqdist.checkpoint import checkpoint_path, complete_steps
from vqdist.files import read_json, write_json
from vqdist.ranks import everywhere, on_main

Shapes = Mapping[str, tuple[int, ...]]
SCRATCH = "init_optimizer.partial"
"""Folder within the run folder, for as long as the states are taken over."""


class NotTaken(Exception):
    """No state of an optimizer can be taken over; the message says why."""


def newest_checkpoint(run: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run; None of anything else, as an export or a file."""
    folder = Path(run).expanduser() / "checkpoints"
    steps = complete_steps(folder)
    return checkpoint_path(folder, steps[-1]) if steps else None


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's weights by name, before a runtime cuts them."""
    return {name: tuple(weight.shape) for name, weight in module.named_parameters()}


def take_optimizers(
    checkpoint: Path | None, engines: Mapping[str, Engine], shapes: Mapping[str, Shapes], backend: Backend, run: Path
) -> list[str]:
    """Give each engine's optimizer the state that another run's checkpoint has of its weights; every rank calls it.

    Rank 0 alone reads the checkpoint: other hosts may lack it, or see a newer one.

    A weight takes the state of the weight of its name and shape; others begin without. Where a runtime keeps one count
    of steps for many weights, all of them take theirs or none does.

    Args:
        checkpoint: of the other run, or None; that of rank 0 counts.
        engines: of this run, by name.
        shapes: of their weights.
        backend: of this run.
        run: folder of this run.

    Returns:
        One line for each engine, for rank 0 to say what was taken; none where there is no checkpoint.

    Raises:
        UserError: on every rank, if rank 0 could not read or write the states, or one not read what it wrote.
    """
    if not backend.any(backend.is_main and checkpoint is not None):
        return []
    checkpoint = checkpoint or Path()  # of another rank, which does not read it
    return [_take(checkpoint, name, engine, shapes[name], backend, run / SCRATCH) for name, engine in engines.items()]


def _take(checkpoint: Path, name: str, engine: Engine, shapes: Shapes, backend: Backend, scratch: Path) -> str:
    problem: str | None = None
    record: dict[str, Any] = {}
    taken: set[str] = set()
    trained = {weight for weight, tensor in engine.module.named_parameters() if tensor.requires_grad}
    with everywhere(backend, f"the state of the {name}'s optimizer cannot be read"):
        try:
            if backend.is_main:
                record = _record_of(checkpoint / name, engine)
                taken = _same_weights(checkpoint / name, engine.module, {key: shapes[key] for key in trained})
                _check_enough(taken, trained, engine)
        except NotTaken as reason:
            problem = str(reason)
    if backend.any(problem is not None):
        return f"the optimizer of the {name} begins anew: {problem}"
    weights = {key: tensor.cpu() for key, tensor in engine.named_tensors() if backend.is_main}
    on_main(
        backend, lambda: _write(scratch, weights, checkpoint / name, record, taken, engine), f"{scratch} is needed"
    )
    with everywhere(backend, f"{scratch} cannot be read"):
        engine.load(scratch)
    on_main(backend, lambda: shutil.rmtree(scratch, ignore_errors=True), f"{scratch} is left")
    return f"the optimizer of the {name} goes on from {checkpoint}, for {len(taken)} of {len(trained)} weights"


def _record_of(folder: Path, engine: Engine) -> dict[str, Any]:
    """Return what a checkpoint says of an optimizer; raise `NotTaken` where it is another than the engine's."""
    if not (folder / OPTIMIZER).is_file() or not (folder / RECORD).is_file():
        raise NotTaken(f"{folder} holds no state of one")
    record, optimizer = read_json(folder / RECORD), engine.optimizer
    if averages_itself(optimizer):
        raise NotTaken(f"{type(optimizer).__name__} keeps weights in its state, and these are others")
    if not kept_alike(str(record.get("optimizer")), path_of(optimizer)):
        raise NotTaken(f"it is {path_of(optimizer)}, and that of {folder} is {record.get('optimizer')}")
    groups = record.get("groups") or []
    if any(groups) and len(groups) != len(optimizer.param_groups):
        raise NotTaken(f"it has {len(optimizer.param_groups)} groups of weights, and that of {folder} {len(groups)}")
    return record


def _same_weights(folder: Path, module: nn.Module, shapes: Shapes) -> set[str]:
    """Return the names of the weights that have a state in a checkpoint, and had the same shape there."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            before = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        with safe_open(folder / OPTIMIZER, "pt") as file:
            kept = with_current_names(module, dict.fromkeys(file.keys()))
    except (OSError, SafetensorError) as error:
        raise NotTaken(f"{folder} cannot be read ({error})") from error
    with_state = {key.partition("/")[2] for key in kept}
    before = with_current_names(module, before)
    return {name for name, shape in shapes.items() if before.get(name) == shape and name in with_state}


def _check_enough(taken: set[str], trained: set[str], engine: Engine) -> None:
    if not taken:
        raise NotTaken("no weight that is trained has the name and shape of one with a state")
    missing = sorted(trained - taken)
    if missing and not engine.capabilities.any_optimizer:
        raise NotTaken(f"{len(missing)} weights have no state, as {missing[0]}, and {engine.backend.title} needs all")


def _write(
    scratch: Path, weights: dict[str, Tensor], folder: Path, record: dict[str, Any], taken: set[str], engine: Engine
) -> None:
    """Write a checkpoint of one engine: its own weights, and the states of some of them."""
    shutil.rmtree(scratch, ignore_errors=True)
    states = with_current_names(engine.module, load_tensors(folder / OPTIMIZER))
    numbers = with_current_names(engine.module, record.get("numbers") or {})
    save_tensors(scratch / WEIGHTS, weights)
    save_tensors(scratch / OPTIMIZER, {key: one for key, one in states.items() if key.partition("/")[2] in taken})
    numbers = {key: value for key, value in numbers.items() if key.partition("/")[2] in taken}
    write_json(scratch / RECORD, {**record, "numbers": numbers})
