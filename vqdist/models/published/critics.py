"""The discriminator in a file of another project, and in the export of what was converted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.files import follow_umask
from vqdist.locations import DISCRIMINATOR
from vqdist.models.networks.blur import BlurDiscriminator
from vqdist.models.networks.patch import PatchDiscriminator
from vqdist.models.networks.patchgan import PatchGAN
from vqdist.models.published.files import read_content, without_prefix, without_wrappers
from vqdist.registries import DISCRIMINATORS

PREFIXES = ("loss.discriminator.", "discriminator.", "online_model.discr.", "ema_model.discr.", "discr.")
"""Of names: in checkpoints of Lightning, in 1d-tokenizer's module of losses, and in muse's files."""
KEYS = ("discriminator", "state_dict", "model")
"""Of a checkpoint's dictionary, below which its weights may lie."""
LOSSES = {"model.safetensors": "model_1.safetensors", "pytorch_model.bin": "pytorch_model_1.bin"}
"""Files of a training state of accelerate: that of the tokenizer, and that of its losses."""
PATCHGAN, BLUR = "main.0.weight", "block_in.0.weight"
IN_METADATA = "vqdist.discriminator"
MUSE_LAYER = re.compile(r"layers\.(\d+)\.([01])\.(weight|bias)")


class Critic(NamedTuple):
    """A discriminator in a file.

    Attributes:
        part: its specification, as `VQGanVAE` takes it.
        tensors: its weights and buffers, by name.
    """

    part: dict[str, Any]
    tensors: dict[str, Tensor]


def critic_in(content: Any, path: Path, blur: Mapping[str, Any]) -> Critic | str | None:
    """Return the discriminator in a file of another project.

    Args:
        content: of the file.
        path: of the file; beside it may lie that of the losses.
        blur: arguments of `BlurDiscriminator` that no tensor says.

    Returns:
        The discriminator, None where there is none, or a line that says of which form it is, which vqdist has not.
    """
    beside = path.with_name(LOSSES.get(path.name, "")) if path.name in LOSSES else None
    contents = [content, *([read_content(beside)] if beside is not None and beside.is_file() else [])]
    left_out: str | None = None
    for some in contents:
        for tensors in _places(some):
            found = _of_form(tensors, blur)
            if found is not None:
                return found
            left_out = left_out or _unknown(tensors, path)
    return left_out


def save_critic(critic: Critic, folder: Path) -> None:
    """Write a discriminator beside an export, with its specification in the metadata."""
    path = folder / DISCRIMINATOR
    save_file(
        {name: one.contiguous() for name, one in critic.tensors.items()}, path, {IN_METADATA: json.dumps(critic.part)}
    )
    follow_umask(path)


def part_of_file(path: Path | None) -> dict[str, Any] | None:
    """Return the specification in the metadata of a discriminator's file; None of one that a run wrote.

    Raises:
        UserError: it is none of vqdist's own discriminators: a file is no place for anybody's code.
    """
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(IN_METADATA)
        part = None if said is None else json.loads(said)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to begin with a new discriminator") from error
    known = isinstance(part, dict) and part.get("class_path") in DISCRIMINATORS and "." not in part["class_path"]
    if part is not None and not known:
        raise UserError(
            f"{path} names the discriminator {str(part)[:100]!r}, which is none of vqdist; remove the file"
        )
    return part


def _places(content: Any) -> Iterable[dict[str, Tensor]]:
    """Yield the tensors of every place where a file may hold a discriminator, by its own names."""
    held = content if isinstance(content, Mapping) else {}
    for key in (*KEYS, None):
        place = held if key is None else held.get(key)
        if not isinstance(place, Mapping):
            continue
        tensors = without_wrappers({str(name): one for name, one in place.items() if isinstance(one, Tensor)})
        named = without_wrappers(without_prefix(tensors, *PREFIXES))
        if key == "discriminator" or len(named) < len(tensors):
            yield {name: one.float() if one.is_floating_point() else one for name, one in named.items()}


def _of_form(tensors: Mapping[str, Tensor], blur: Mapping[str, Any]) -> Critic | None:
    """Return a discriminator whose tensors are among these; None unless each is there in its shape."""
    try:
        if PATCHGAN in tensors:
            return _patchgan(tensors)
        if BLUR in tensors:
            return _blur(tensors, blur)
        return _of_muse(tensors) if "to_logits.2.weight" in tensors else None
    except (UserError, IndexError, KeyError, ValueError):  # sizes of no such network
        return None


def _patchgan(tensors: Mapping[str, Tensor]) -> Critic | None:
    kernels = [name for name, one in tensors.items() if re.fullmatch(r"main\.\d+\.weight", name) and one.ndim == 4]
    width, channels = tensors[PATCHGAN].shape[:2]
    norm = "actnorm" if any(name.endswith(".loc") for name in tensors) else "batch"
    return _taken("patchgan", PatchGAN, tensors, channels, {"width": width, "layers": len(kernels) - 2, "norm": norm})


def _blur(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Critic | None:
    width, channels = tensors[BLUR].shape[:2]
    stages = sum(re.fullmatch(r"blocks\.\d+\.0\.weight", name) is not None for name in tensors)
    size = tensors["blocks.0.1.kernel"].shape[-1]
    arguments = {"width": width, "stages": stages, "blur_kernel_size": size, **said}
    return _taken("blur", BlurDiscriminator, tensors, channels, arguments)


def _of_muse(tensors: Mapping[str, Tensor]) -> Critic | None:
    """Return muse's: each of its layers is a convolution, a norm and an activation, as three of our modules are."""
    named: dict[str, Tensor] = {}
    for name, one in tensors.items():
        layer = MUSE_LAYER.fullmatch(name)
        if layer is None:
            named[name.replace("to_logits.", "head.")] = one
        else:
            number = max(3 * int(layer[1]) - 1, 0) + int(layer[2])
            named[f"body.{number}.{layer[3]}"] = one
    first = named["body.0.weight"]
    layers = sum(re.fullmatch(r"layers\.[1-9]\d*\.0\.weight", name) is not None for name in tensors)
    arguments = {"dim": first.shape[0], "layers": layers, "first_kernel_size": first.shape[-1], "head_padding": 0}
    return _taken("patch", PatchDiscriminator, named, first.shape[1], arguments)


def _taken(
    name: str, network: type[nn.Module], tensors: Mapping[str, Tensor], channels: int, arguments: dict[str, Any]
) -> Critic | None:
    with torch.device("meta"):
        expected = network(**arguments, channels=channels).state_dict()
    if any(key not in tensors or tensors[key].shape != one.shape for key, one in expected.items()):
        return None
    return Critic({"class_path": name, "init_args": arguments}, {key: tensors[key] for key in expected})


def _unknown(tensors: Mapping[str, Tensor], path: Path) -> str | None:
    if not tensors:
        return None
    names = ", ".join(sorted(tensors)[:3])
    return f"the discriminator of {path} is left out, since vqdist has no network with its tensors ({names}, ...)"
