"""Exports of before a moving average copied the codebook: they hold an average of it, which was never trained.

An export of now says `"buffers": "live"` in its config.json. One that does not say it is compared with the
checkpoints of its run: the one that holds the same average has the live codebook beside it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.files import read_json
from vqdist.models.averaged import averaged_tensors

LIVE = {"buffers": "live"}  # in config.json
AVERAGE = "ema.safetensors"
WEIGHTS = "weights.safetensors"


class Mended(NamedTuple):
    """One line for the user about an old export, and whether the network has its live codebook now."""

    message: str
    is_live: bool


def mend_codebook(network: nn.Module, location: str) -> Mended | None:
    """Give a loaded network the codebook that was trained with it, where that can be found.

    Args:
        network: its tensors are named as in the checkpoints of its run.
        location: the folder or repository that it was loaded from.

    Returns:
        None if nothing was wrong.
    """
    names = _moving_names(network)
    export = Path(location)
    if not names or _was_never_averaged(export.parent):
        return None
    loaded = {name: tensor for name, tensor in network.state_dict().items() if name in names}
    for checkpoint in _checkpoints(export.parent):
        live = _live_tensors(checkpoint, loaded)
        if live is None:
            continue
        if _equal(live, loaded):
            return None
        with torch.no_grad():
            for name, tensor in loaded.items():
                tensor.copy_(live[name])
        return Mended(
            f"{location} holds an average of the codebook, as an older vqdist wrote it; the codebook that was trained "
            f"is taken from {checkpoint}",
            is_live=True,
        )
    return Mended(
        f"{location} was written by an older vqdist: its codebook may be an average, which was never trained; load it "
        "from the folder of its run, beside the checkpoints, or train anew",
        is_live=False,
    )


def _moving_names(network: nn.Module) -> set[str]:
    """Return the names of saved tensors of codebooks that follow the training by themselves."""
    averaged = {id(tensor) for tensor in averaged_tensors(network).values()}
    moving = {
        id(tensor)
        for module in network.modules()
        if getattr(module, "ema_update", False)  # the library's codebook, the only one there was then
        for tensor in module.buffers()
    }
    every_name = dict(network.named_buffers(remove_duplicate=False))  # a codebook that residual levels share
    names = {name for name, tensor in every_name.items() if id(tensor) in moving - averaged}
    return names & network.state_dict().keys()


def _was_never_averaged(run: Path) -> bool:
    with contextlib.suppress(UserError, AttributeError):
        return (run / "config.json").is_file() and read_json(run / "config.json")["trainer"]["use_ema"] is False
    return False


def _checkpoints(run: Path) -> Iterator[Path]:
    """Complete checkpoints of a run, the newest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    yield from sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _live_tensors(checkpoint: Path, loaded: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the live tensors if an export is of this checkpoint; None otherwise, or where they cannot be read."""
    with contextlib.suppress(SafetensorError, OSError):
        if not _equal(_read(checkpoint / AVERAGE, loaded), loaded):
            return None
        for path in sorted(checkpoint.glob(f"*/{WEIGHTS}")):
            live = _read(path, loaded)
            if live.keys() == loaded.keys() and all(live[name].shape == loaded[name].shape for name in loaded):
                return live
    return None


def _read(path: Path, names: dict[str, Any]) -> dict[str, Tensor]:
    """Those of the named tensors that the file holds."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names.keys() & set(file.keys())}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].cpu()) for name in one)
