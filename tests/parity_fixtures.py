"""Small networks of the field with what their own code gave for given images: `tests/data/parity/NAME`.

Weights are exactly float16 numbers, under the names of the project that they come from.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "parity"


class Fixture(NamedTuple):
    """A network of the field.

    Attributes:
        weights: its state dict, float32.
        given: what went in, by name.
        found: what came out, by name; indices are int64.
        arguments: of its constructor.
        values: losses and norms of gradients.
    """

    weights: dict[str, Tensor]
    given: dict[str, Tensor]
    found: dict[str, Tensor]
    arguments: dict[str, Any]
    values: dict[str, Any]


@lru_cache
def fixture(name: str) -> Fixture:
    """Return the fixture of a name; nobody changes what is in it."""
    folder = FOLDER / name
    tensors = {key: _wide(value) for key, value in load_file(folder / "tensors.safetensors").items()}
    file = folder / "weights.safetensors"
    weights = {key: _wide(value) for key, value in load_file(file).items()} if file.is_file() else {}
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    values = json.loads((folder / "values.json").read_text())
    return Fixture(weights, under(tensors, "in."), under(tensors, "out."), arguments, values)


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.long()
