"""Seeds by purpose and rank, and the state of the random number generators to save and restore."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part, in order; near parts give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed Python's, NumPy's and torch's global generators (all devices) from these parts."""
    seed_host(*parts)
    torch.manual_seed(derive_seed(*parts))


def seed_host(*parts: int | str) -> None:
    """Seed Python's, NumPy's and torch's global generators from these parts; those of devices stay as they are."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def host_generators_kept() -> Iterator[None]:
    """Let the global generators of the host go on after this context as if nothing had been drawn in it."""
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)


class OwnGenerators:
    """A state of the global generators that one of several users has: within this context they go on from there.

    It begins as they are at construction. After the context they are again as they were before it, so two trainings
    in one process take turns and each draws what it would draw alone. The context may be entered within itself.
    """

    def __init__(self) -> None:
        self._own = self._others = _snapshot()
        self._depth = 0

    def __enter__(self) -> None:
        if not self._depth:
            self._others = _snapshot()
            _go_on_from(self._own)
        self._depth += 1

    def __exit__(self, *_exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._own = _snapshot()
            _go_on_from(self._others)


class _Snapshot(NamedTuple):
    """The states of the generators in the forms that they give themselves, as each step takes and sets them."""

    python: Any
    of_numpy: Any
    of_torch: Tensor
    of_device: Tensor | None


def _snapshot() -> _Snapshot:
    of_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return _Snapshot(random.getstate(), np.random.get_state(), torch.get_rng_state(), of_device)


def _go_on_from(state: _Snapshot) -> None:
    random.setstate(state.python)
    np.random.set_state(state.of_numpy)
    torch.set_rng_state(state.of_torch)
    if state.of_device is not None:
        torch.cuda.set_rng_state(state.of_device)


def generator_states() -> dict[str, Tensor]:
    """Return the state of each generator that training draws from, as tensors for `torch.load(weights_only=True)`."""
    python = torch.tensor(list(repr(random.getstate()).encode()), dtype=torch.uint8)
    of_numpy = np.random.get_state(legacy=False)
    twister = of_numpy["state"]
    numpy_tail = torch.tensor([twister["pos"], of_numpy["has_gauss"], of_numpy["gauss"]], dtype=torch.float64)
    states = {
        "python": python,
        "numpy_keys": torch.from_numpy(twister["key"].astype(np.int64)),
        "numpy_tail": numpy_tail,
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generator_states(states: dict[str, Tensor]) -> None:
    """Bring back what `generator_states` returned."""
    import ast

    random.setstate(ast.literal_eval(bytes(states["python"].tolist()).decode()))
    position, has_gauss, cached = states["numpy_tail"].tolist()
    keys = states["numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
