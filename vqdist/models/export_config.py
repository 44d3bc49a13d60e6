"""The values of an export's config.json, before anything is built: types, and sizes that its weights can have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from safetensors import SafetensorError, safe_open

from vqdist.errors import UserError
from vqdist.options import in_words, is_of, is_whole
from vqdist.sizes import image_size_of

# numbers of layers or blocks, each of which has a tensor at least
COUNTS = frozenset(
    ["layers", "depth", "num_layers", "num_resnet_blocks", "encdec_num_resnet_blocks", "discr_layers"]
    + ["num_res_blocks", "num_phis"]
)
# what need not be the size of a tensor: codes of a lookup-free quantizer, pixels
FREE = frozenset(
    ["codebook_size", "image_size", "channels", "patch_size", "encdec_resnet_groups", "discr_layers"]
    + ["resolution", "attn_resolutions", "groups"]
)
FEW = 64  # layers that any file may name
MOST = 2**32  # of any number
LARGEST_SIDE = 16_384  # pixels


def check_config(written: Mapping[str, Any], model_class: type, folder: Path) -> None:
    """Raise `UserError` for a value of config.json that the model's arguments cannot be.

    Args:
        written: the values that are used, of the whole file or of a part.
        model_class: whose arguments they are.
        folder: of config.json and model.safetensors, whose header bounds the sizes; without that file types alone are
            looked at.
    """
    where = folder / "config.json"
    hints: dict[str, Any] = get_type_hints(model_class.__init__)  # type: ignore[misc]
    for key, value in written.items():
        recorded_object = isinstance(value, Mapping) and "class_path" in value  # in place of a name
        if key in hints and key != "image_size" and not recorded_object and not is_of(value, hints[key]):
            raise UserError(f"{where}: {key} is {value!r}; expected {in_words(hints[key])}")
    _check_image_size(written.get("image_size"), where)
    if (folder / "model.safetensors").is_file():
        _check_sizes({key: value for key, value in written.items() if key in hints}, where)


def _check_image_size(given: Any, where: Path) -> None:
    if given is None:
        return
    try:
        size = image_size_of(given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    largest = max(size) if isinstance(size, tuple) else size
    if not 1 <= largest <= LARGEST_SIDE:
        raise UserError(f"{where}: image_size is {given!r}; expected sides from 1 to {LARGEST_SIDE} pixels")


def _check_sizes(written: Mapping[str, Any], where: Path) -> None:
    tensors, numbers = _of_header(where.with_name("model.safetensors"))
    for key, value in _with_parts(written):
        for number in numbers_in(value):
            if key in COUNTS:
                most, what = max(FEW, tensors), f"model.safetensors has {tensors} tensors"
            elif key in FREE:
                most, what = MOST, "more is in no model"
            else:
                most, what = max(FEW, numbers), f"model.safetensors has {numbers} numbers in all"
            if number > most:
                raise UserError(f"{where}: {key} is {value!r}; expected at most {most}, because {what}")


def _of_header(path: Path) -> tuple[int, int]:
    """Return how many tensors a file has, and how many numbers they have together; nothing is loaded."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            shapes = [file.get_slice(name).get_shape() for name in names]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.parent} holds no model that can be loaded ({error})") from error
    return len(shapes), sum(math.prod(shape) for shape in shapes)


def _with_parts(written: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options of a model and of its parts; a part of somebody else may mean anything by a number."""
    for key, value in written.items():
        if not isinstance(value, Mapping):
            yield key, value
        elif "." not in str(value.get("class_path", "")):
            options = value.get("init_args", value)
            yield from _with_parts(options) if isinstance(options, Mapping) else ()


def numbers_in(value: Any) -> Iterator[int]:
    """Yield the whole numbers of a value: itself, or those of a list."""
    if is_whole(value):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
