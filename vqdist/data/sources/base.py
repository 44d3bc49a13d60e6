"""The base class of every source of images, and the parts that several of them share."""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqdist.data.images import image_to_tensor
from vqdist.errors import UserError

IMAGE_EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")

DIGIT_LIKE = re.compile(r"mnist|svhn|usps|semeion|omniglot|gtsrb|sst2|digits", re.IGNORECASE)
"""Published datasets of digits, letters, text and traffic signs: mirrored, they mean something else."""

FORMS = (
    "a folder of images, `digits`, `synthetic[:LENGTH]`, `torchvision:NAME[:SPLIT]`, `wds:SHARDS-{000..099}.tar` or "
    "`hf:NAME[:SPLIT]`"
)


class Source:
    """Images by index. A subclass gives `__len__`, `image` and `fingerprint`, and pickles (loader workers).

    Attributes:
        spec: what was asked for, for messages.
        flip: whether a mirrored image is as good as the image.
    """

    spec: str
    flip: bool = True

    def __len__(self) -> int:
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """Return the decoded image at 0 <= index < len; `BadImageError` names it if it cannot be decoded."""
        raise NotImplementedError

    def label(self, index: int) -> int | None:
        """Return the class of an image, or None where the source has no classes."""
        return None

    def name(self, index: int) -> str:
        """Return the name of an image for messages: by default the spec, without its options, and the index."""
        return f"{self.spec.partition('?')[0]}[{index}]"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of names and sizes: equal on two nodes if they see the same images. Does not read images."""
        raise NotImplementedError

    def tensor(self, index: int, *, image_size: int, channels: int, rng: torch.Generator | None = None) -> Tensor:
        """Return the image as (c, h, w) float32 in [0, 1], see `images.image_to_tensor`."""
        return image_to_tensor(self.image(index), image_size=image_size, channels=channels, rng=rng)


class PackedStrings:
    """Many strings in two arrays.

    A list of a million strings is copied into every forked worker, a string at a time, as reading one writes its
    reference count; arrays stay shared.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        index = checked_index(index, len(self))
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")


def data_cache() -> Path:
    """Where downloads go: the environment variable `VQDIST_DATA`, or `~/.cache/vqdist`."""
    return Path(os.environ.get("VQDIST_DATA") or "~/.cache/vqdist").expanduser()


def normalise_extensions(exts: Iterable[str] | str | None) -> tuple[str, ...]:
    """`["*.JPG", ".png"]` or `"jpg,png"` -> `("jpg", "png")`; every known image format for None."""
    if exts is None:
        return IMAGE_EXTENSIONS
    names = exts.replace(",", " ").split() if isinstance(exts, str) else list(exts)
    if not names:
        raise UserError(f"exts is empty; give extensions such as {', '.join(IMAGE_EXTENSIONS)}, or leave it out")
    return tuple(sorted({name.removeprefix("*").removeprefix(".").lower() for name in names}))


def extension_of(path: str) -> str:
    """Return the extension in lower case without its dot, '' if there is none."""
    return os.path.splitext(path)[1].removeprefix(".").lower()


def split_options(spec: str) -> tuple[str, dict[str, str]]:
    """`kind:BODY?key=value&key=value` -> (BODY, {key: value})."""
    body, mark, query = spec.partition(":")[2].partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")] if mark else []
    for key, equals, value in pairs:
        if not key or not value:
            raise UserError(f"{spec!r} has {key + equals + value!r} after its question mark; give key=value&key=value")
    if not body:
        raise UserError(f"the data source {spec!r} has no name; give {FORMS}")
    return body, {key: value for key, _, value in pairs}


def as_label(value: Any) -> int | None:
    """Return a dataset's label as a number; None if it is not a class (a text, a mask, a list)."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.item() if value.ndim == 0 else None
    return int(value) if isinstance(value, int | np.integer) else None


def checked_index(index: int, length: int) -> int:
    """Return the index counted from the start, as lists do it; `IndexError` if there is none."""
    index = operator.index(index)
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for {length} items")
    return index % length


def digest_of(lines: Iterable[str]) -> str:
    """SHA-256 (hex) of lines of text, file names of any bytes included."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def some_labels(source: Source) -> str:
    """Up to 16 labels, evenly spaced: what a fingerprint can know of the content without reading all of it."""
    probes = np.linspace(0, len(source) - 1, num=min(len(source), 16)).astype(int)
    return repr([source.label(int(index)) for index in probes])


def absolute_path(path: str) -> str:
    """With `~` expanded."""
    return os.path.abspath(os.path.expanduser(path))


def reason_of(error: Exception) -> str:
    """Return the error in one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 240 else f"{text[:240]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def missing_package(spec: str, package: str) -> UserError:
    """Return the one message for a package that only some sources need."""
    return UserError(f"{spec!r} needs the package {package}, which is not installed; run `pip install 'vqdist[data]'`")
