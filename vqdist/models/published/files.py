"""Reading the files of other projects: tensors and plain values, and never code.

Checkpoints of torch are unpickled with `weights_only`. Where a file names a class that only describes a run, as
Lightning's callbacks do, an empty class of this module takes its place: nothing of it is imported or called.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqdist.errors import UserError
from vqdist.files import LARGEST_YAML, read_json, read_small, sha256_of

HARMLESS = re.compile(
    r"(argparse|lightning|lightning_fabric|numpy|omegaconf|pathlib|pytorch_lightning|typing)\.[\w.]+"
)
"""Names of classes and functions that describe a run beside its weights; each becomes an `Inert`."""
AVERAGES = "model_ema."
"""Prefix of the moving averages in a checkpoint of Lightning."""
INDEX = ".index.json"
"""End of the name of a list of shards: which file has which tensor."""
WITHIN = re.compile(r"(?:^|\.)(?:vqmodel|gen_vision_model|first_stage_model|vqvae|vqgan|vae)\.")
"""Names of the tokenizer's tensors in a larger model: of shards no others are loaded."""
MOST_NAMES = 200
MOST_NESTED = 3  # dictionaries around the weights
MOST_UNPACKED = 8  # times the size of a file


WRAPPERS = ("module.", "_orig_mod.")


class Inert:
    """An object in the place of one that a file names: it takes everything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Do nothing."""

    extend = update = append


def read_content(path: Path) -> Any:
    """Return what a checkpoint of torch or a safetensors file holds; of torch's, nested dictionaries with tensors.

    Raises:
        UserError: it is neither, is damaged, or wants code to be run.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected a checkpoint, as .ckpt, .pt, .pth, .bin or .safetensors")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file ({error})") from error
    return read_torch(path)


def _read_shards(index: Path) -> dict[str, Any]:
    """Return the tensors of several files together; of a larger model those of its tokenizer alone."""
    places = places_in(index)
    found: dict[str, Any] = {}
    for file in shards_of(index):
        shard = read_content(file)
        if not isinstance(shard, Mapping):
            raise UserError(f"{file} holds no tensors by name, as {index.name} says that it does")
        found |= {name: one for name, one in shard.items() if name in places}
    return found


def shards_of(index: Path) -> list[Path]:
    """Return the files that are read of a list of shards, in order; raise `UserError` for a list that names none."""
    return [index.with_name(file) for file in sorted(set(places_in(index).values()))]


def places_in(index: Path) -> dict[str, str]:
    """Return the file of each tensor that is read of a list of shards; raise `UserError` if it says none."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places or not all(_is_file_name(name) for name in places.values()):
        raise UserError(f"{index} says no weight_map of tensors and files beside it; give the file with the weights")
    return {name: file for name, file in places.items() if WITHIN.search(name)} or dict(places)


def checksum_of_weights(file: Path) -> str:
    """Return the SHA-256 (hex) of a file of weights; of a list of shards that of its own and theirs, in order."""
    if not file.name.endswith(INDEX):
        return sha256_of(file)
    return hashlib.sha256("".join(map(sha256_of, (file, *shards_of(file)))).encode()).hexdigest()


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and not name.endswith(INDEX)


def read_torch(path: Path, *, with_inert: bool = True) -> Any:
    """Return the tensors and plain values of a checkpoint of torch; see `read_content`.

    Args:
        path: the file.
        with_inert: whether empty classes take the place of those that describe a run; if not, such a file is refused.
    """
    inert: list[Any] = []
    _check_unpacked(path)
    while True:
        try:
            with torch.serialization.safe_globals(inert):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # not a file of torch, damaged, or one that would run code when unpickled
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            name = wanted[1] if wanted else ""
            if with_inert and HARMLESS.fullmatch(name) and (Inert, name) not in inert and len(inert) < MOST_NAMES:
                inert.append((Inert, name))
                continue
            reason = no_file_of_torch(path) or why_refused(str(error))
            raise UserError(f"{path} cannot be read as tensors and plain values ({reason})") from error


def _check_unpacked(path: Path) -> None:
    """Raise `UserError` for an archive that unpacks to far more than its size; torch packs without compression."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # an older format, or damaged in any way: torch says so
        return
    if unpacked > MOST_UNPACKED * path.stat().st_size:
        raise UserError(
            f"{path} would unpack to {unpacked} bytes from {path.stat().st_size}; expected a file of torch.save, "
            "which is not compressed"
        )


def no_file_of_torch(path: Path) -> str | None:
    """Return what a file is that torch has not written: empty, or text; None for any other."""
    with path.open("rb") as file:
        first = file.read(40)
    if not first:
        return "it is empty"
    text = " ".join(first.decode("ascii", "replace").split())
    return f"it is text that begins with {text!r}" if text.isascii() and text.isprintable() else None


def why_refused(message: str) -> str:
    """Return what torch refuses, without its advice on how to run the code all the same."""
    named = re.search(r"GLOBAL (\S+)", message)
    if named:
        return f"it holds {named[1]}"
    first = message.rpartition("WeightsUnpickler error: ")[2].partition(". ")[0]
    return shorten(first, 200, placeholder=" ...")


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration in a JSON or YAML file; raise `UserError` if there is none."""
    if path.suffix == ".json":
        return read_json(path)
    try:
        content = yaml.safe_load(read_small(path, LARGEST_YAML).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid YAML ({shorten(str(error), 150)}); give the peer's own file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; the options of a model are expected, by name")
    return content


def options_in(config: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Return the innermost dictionary of a configuration that has one of these options; empty if none has.

    Peers write options at the top, below `arguments`, or below `model: params:`, `model: init_args:` and deeper.
    """
    seen: set[int] = set()  # a YAML file may refer to itself

    def innermost(some: Mapping[str, Any]) -> dict[str, Any]:
        if any(name in some for name in known):
            return dict(some)
        seen.add(id(some))
        groups = (value for value in some.values() if isinstance(value, Mapping) and id(value) not in seen)
        return next((found for group in groups if (found := innermost(group))), {})

    return innermost(config)


def unsaid(config: Mapping[str, Any], known: tuple[str, ...], **values: Any) -> dict[str, Any]:
    """Return those of these options and their values that a configuration does not say; see `options_in`."""
    said = options_in(config, known)
    return {name: value for name, value in values.items() if said.get(name) is None}


class BadTensor(UserError):
    """A tensor that no weights file has: it would take more memory than the file holds, or cannot be copied."""


def _plain(name: str, tensor: Tensor, path: Path) -> Tensor:
    """Return a tensor in float32; raise `BadTensor` for one without all of its numbers in the file."""
    stored = tensor.layout == torch.strided and not tensor.is_meta
    if not stored or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BadTensor(
            f"{path} has {name} of shape {tuple(tensor.shape)} without all its numbers; expected a dense tensor, "
            "saved with torch.save(model.state_dict(), path)"
        )
    return tensor.float() if tensor.is_floating_point() else tensor


def state_dict_in(content: Any, keys: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    """Return the tensors by name that lie under the first of these keys that there is, or bare; in float32.

    Raises:
        UserError: there are none; the message says what there is.
    """
    held = chosen = content if isinstance(content, Mapping) else {}
    for _ in range(MOST_NESTED):
        chosen = next((chosen[key] for key in keys if isinstance(chosen.get(key), Mapping) and chosen[key]), chosen)
    tensors = {
        str(name): _plain(str(name), value, path) for name, value in chosen.items() if isinstance(value, Tensor)
    }
    if not tensors:
        found = ", ".join(sorted(map(str, held))[:8]) if held else f"a {type(content).__name__}"
        raise UserError(f"{path} holds {found}; expected tensors by name, bare or under {', '.join(keys)}")
    return tensors


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefixes that DDP, EMA wrappers and torch.compile put before their names."""
    found = dict(tensors)
    for _ in range(MOST_NESTED):
        found = without_prefix(found, *WRAPPERS)
    return found


def without_prefix(tensors: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Return the tensors below the first of these prefixes that any name has, without it; all if none has."""
    for prefix in prefixes:
        inner = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        if inner:
            return inner
    return dict(tensors)


def with_averages(tensors: Mapping[str, Tensor], prefix: str = AVERAGES) -> dict[str, Tensor]:
    """Return tensors, of which each has the value of its moving average where the file has one.

    Lightning modules of this family keep them below a prefix, under the names of the weights without dots.
    """
    live = {name: one for name, one in tensors.items() if not name.startswith(prefix)}
    return {name: tensors.get(prefix + name.replace(".", ""), one) for name, one in live.items()}


CONFIG = ".yaml"
"""End of the name of the configuration beside a file of weights, behind the whole name of that."""


def write_config_beside(path: Path, content: Mapping[str, Any]) -> None:
    """Write the configuration of the model in a file as YAML; raise `UserError` where another file is in its place."""
    beside = path.with_name(path.name + CONFIG)
    if beside.exists() and not path.exists():  # of both, both are replaced
        raise UserError(f"{beside} is there already, where the configuration would be written; remove it")
    beside.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")


def write_json_beside(path: Path, content: Mapping[str, Any]) -> None:
    """Write options as JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
