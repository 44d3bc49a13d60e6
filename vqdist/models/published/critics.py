"""The discriminator in a checkpoint of another project, where it is a PatchGAN in the form that most publish."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqdist.models.networks.patchgan import PatchGAN
from vqdist.models.published.files import without_prefix

PREFIXES = ("loss.discriminator.", "discriminator.")
"""Of names, in checkpoints of Lightning."""
KEYS = ("discriminator", "state_dict")
"""Of a checkpoint's dictionary, below which its weights may lie."""
WRAPPERS = ("module.", "_orig_mod.")
FIRST = "main.0.weight"


class Critic(NamedTuple):
    """A discriminator in a file.

    Attributes:
        part: its specification, as `VQGanVAE` takes it.
        tensors: its weights and buffers, by name.
    """

    part: dict[str, Any]
    tensors: dict[str, Tensor]


def critic_in(content: Any) -> Critic | None:
    """Return the discriminator in what a file holds; None where there is none, or one of another form."""
    held = content if isinstance(content, Mapping) else {}
    for place in (*(held.get(key) for key in KEYS), held):
        if isinstance(place, Mapping):
            found = _patchgan(_tensors_of(place))
            if found is not None:
                return found
    return None


def _tensors_of(place: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {str(name): one for name, one in place.items() if isinstance(one, Tensor)}
    named = without_prefix(without_prefix(tensors, *WRAPPERS), *PREFIXES)
    return {name: one.float() if one.is_floating_point() else one for name, one in named.items()}


def _patchgan(tensors: Mapping[str, Tensor]) -> Critic | None:
    """Return a PatchGAN whose tensors are among these; None unless each is there in its shape."""
    kernels = [name for name, one in tensors.items() if re.fullmatch(r"main\.\d+\.weight", name) and one.ndim == 4]
    if FIRST not in kernels or len(kernels) < 3:
        return None
    width, channels = tensors[FIRST].shape[:2]
    norm = "actnorm" if any(name.endswith(".loc") for name in tensors) else "batch"
    arguments: dict[str, Any] = {"width": width, "layers": len(kernels) - 2, "norm": norm}
    with torch.device("meta"):
        expected = PatchGAN(**arguments, channels=channels).state_dict()
    if any(name not in tensors or tensors[name].shape != one.shape for name, one in expected.items()):
        return None
    return Critic({"class_path": "patchgan", "init_args": arguments}, {name: tensors[name] for name in expected})
