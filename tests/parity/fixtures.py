"""Small weights, inputs and outputs that the field's own code gave; tests/data/parity/README.md says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "data" / "parity"


def file_of_losses(name: str) -> Path:
    """Return the file with the tensors `loss.*` of a project's model."""
    own = FOLDER / name / "losses.safetensors"
    return own if own.is_file() else FOLDER / name / "weights.safetensors"


def weights(name: str, prefix: str = "") -> dict[str, Tensor]:
    """Return a state dict under the names of the code it comes from; of a part, by its prefix."""
    tensors = load_file(file_of_losses(name) if prefix.startswith("loss.") else FOLDER / name / "weights.safetensors")
    return {
        key.removeprefix(prefix): tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def tensors(name: str) -> dict[str, Tensor]:
    """Return `in.NAME` and `out.NAME`."""
    return load_file(FOLDER / name / "tensors.safetensors")


def values(name: str, file: str = "values") -> dict:
    """Return the numbers."""
    return json.loads((FOLDER / name / f"{file}.json").read_text(encoding="utf-8"))


def arguments(name: str) -> dict:
    """Return the arguments that the network was built with."""
    return json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))["arguments"]


def in_unit_range(image: Tensor) -> Tensor:
    """Return images of [-1, 1] in [0, 1]; of multiples of 1/256 without rounding."""
    return (image + 1) / 2


def largest(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    assert ours.shape == theirs.shape
    return float((ours.detach() - theirs).abs().max())


def gradient_norms(module: torch.nn.Module) -> dict[str, float]:
    """Return the 2-norm of the gradient of every parameter that has one."""
    return {name: float(p.grad.norm()) for name, p in module.named_parameters() if p.grad is not None}


class Fixture(NamedTuple):
    """All of a fixture, float32 and int64.

    Attributes:
        weights: its state dict.
        given: tensors that went in, by name.
        found: tensors that came out, by name.
        arguments: of its constructor.
        values: losses and norms of gradients.
    """

    weights: dict[str, Tensor]
    given: dict[str, Tensor]
    found: dict[str, Tensor]
    arguments: dict[str, Any]
    values: dict[str, Any]


def fixture(name: str) -> Fixture:
    """Return a fixture."""
    held = {key: one.float() if one.is_floating_point() else one.long() for key, one in tensors(name).items()}
    given, found = (
        {key.removeprefix(prefix): one for key, one in held.items() if key.startswith(prefix)}
        for prefix in ("in.", "out.")
    )
    return Fixture(weights(name), given, found, arguments(name), values(name))
