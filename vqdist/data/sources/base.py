"""The base class of every source of images, and the parts that several of them share."""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqdist.data.config import STILL, View
from vqdist.data.files import is_storage_failure, storage_error
from vqdist.data.images import EXTENSIONS, BadImageError, image_to_tensor
from vqdist.data.specs import FORMS
from vqdist.errors import UserError, an, printable
from vqdist.sizes import ImageSize

USUAL_EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
IMAGE_EXTENSIONS = tuple(sorted(extension for names in EXTENSIONS.values() for extension in names))

DIGIT_LIKE = re.compile(r"mnist|svhn|usps|semeion|omniglot|gtsrb|sst2|digits", re.IGNORECASE)
"""Published datasets of digits, letters, text and traffic signs: mirrored, they mean something else."""


class Source:
    """Images by index. A subclass gives `__len__` and `image`, and where there are classes `label`.

    ```python
    class Squares(vqdist.Source):
        def __init__(self, count=100, side=32):
            self.count, self.side = count, side

        def __len__(self):
            return self.count

        def image(self, index):  # a PIL image of any mode and size, the same each time
            return Image.new("L", (self.side, self.side), index % 256)
    ```

    In YAML it is `data: {folder: {class_path: my_data.Squares, init_args: {count: 50}}}`, on the command line
    `--data my_data.Squares`, in Python `folder=Squares(50)`. The constructor also gets `exts`, where it has that
    parameter and the option was given. A source is pickled for loader processes, so it opens files in `image`. All
    chance (crops, flips) belongs to the training, so that a resumed run sees the same images.

    Attributes:
        spec: the source in messages; by default the name of the class.
        flip: whether a mirrored image is as good as the image.
        class_names: of the labels 0, 1, ..., or None where they have no names.
        first_class_names: the order in which they were numbered before names were kept, for runs of that time.
    """

    spec: str
    flip: bool = True
    class_names: Sequence[str] | None = None

    @property
    def first_class_names(self) -> Sequence[str] | None:
        """Return the names in the order in which they were numbered before names were kept."""
        return self.class_names

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "spec" not in vars(cls):
            cls.spec = cls.__name__

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} has no __len__")

    def __repr__(self) -> str:
        """Return one line: the spec, and how many images and classes there are."""
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"{type(self).__name__}({printable(self.spec)}, {len(self):,} images{classes})"

    def image(self, index: int) -> Image.Image:
        """Return the decoded image at 0 <= index < len; `BadImageError` names it if it cannot be decoded."""
        raise NotImplementedError(f"{type(self).__name__} has no image")

    def label(self, index: int) -> int | None:
        """Return the class of an image, or None where the source has no classes."""
        return None

    def name(self, index: int) -> str:
        """Return the name of an image for messages: by default the spec, without its options, and the index."""
        return f"{self.spec.partition('?')[0]}[{index}]"

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) that is equal where the images are: on all ranks, and in a run and its resume.

        By default it is of the class's name, the length, and pixels and labels of up to 16 images, evenly spaced. A
        subclass that knows names and sizes can do without reading images.

        Raises:
            UserError: an image is another one each time.
        """
        if "_sampled" not in vars(self):
            self._sampled = fingerprint_of_sample(self)
        return self._sampled

    def tensor(
        self,
        index: int,
        *,
        image_size: ImageSize,
        channels: int,
        rng: torch.Generator | None = None,
        view: View = STILL,
    ) -> Tensor:
        """Return the image as (c, h, w) float32 in [0, 1], see `images.image_to_tensor`."""
        image = checked_image(self, index)
        return image_to_tensor(image, image_size=image_size, channels=channels, rng=rng, view=view, flip=self.flip)


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
    """Return where downloads go: the environment variable `VQDIST_DATA`, or `~/.cache/vqdist`."""
    return Path(os.environ.get("VQDIST_DATA") or "~/.cache/vqdist").expanduser()


def normalise_extensions(exts: Iterable[str] | str | None) -> tuple[str, ...]:
    """`["*.JPG", ".png"]` or `"jpg,png"` -> `("jpg", "png")`; every known image format for None."""
    if exts is None:
        return IMAGE_EXTENSIONS
    names = exts.replace(",", " ").split() if isinstance(exts, str) else list(exts)
    if not names:
        raise UserError(f"exts is empty; give extensions such as {', '.join(USUAL_EXTENSIONS)}, or leave it out")
    return tuple(sorted({name.removeprefix("*").removeprefix(".").lower() for name in names}))


def words_of(exts: tuple[str, ...]) -> str:
    """Return extensions for a message."""
    if exts == IMAGE_EXTENSIONS:
        return f"{', '.join(USUAL_EXTENSIONS)} (or of a rarer format that Pillow opens)"
    return ", ".join(exts)


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


def probes(source: Source) -> list[int]:
    """Return up to 16 indices, evenly spaced: all that a fingerprint looks at where it must read the content."""
    return np.linspace(0, len(source) - 1, num=min(len(source), 16)).astype(int).tolist()


def some_labels(source: Source) -> str:
    """Return the labels of `probes`."""
    return repr([source.label(index) for index in probes(source)])


def fingerprint_of_sample(source: Source) -> str:
    """Return a SHA-256 (hex) of class name, length, and the images and labels of `probes`.

    Raises:
        UserError: an image is another one each time.
    """
    lines = [type(source).__name__, str(len(source))]
    for number, index in enumerate(probes(source)):
        seen = _digest_of_image(source, index)
        if number == 0 and _digest_of_image(source, index) != seen:
            raise UserError(
                f"{source.name(index)} is another image each time it is read; let image(index) depend on the index "
                "alone, since the training adds all chance, or give the source a fingerprint() of its own"
            )
        lines.append(f"{seen} {checked_label(source, index)}")
    return digest_of(lines)


def _digest_of_image(source: Source, index: int) -> str:
    try:
        image = checked_image(source, index)
    except BadImageError:  # the training says so, or passes over it
        return "undecodable"
    return digest_of([image.mode, str(image.size), hashlib.sha256(image.tobytes()).hexdigest()])


def checked_image(source: Source, index: int) -> Image.Image:
    """Return `source.image(index)`; raise `UserError` unless it is an image of Pillow, or where the system fails."""
    try:
        image = source.image(index)
    except (OSError, MemoryError) as error:
        if is_storage_failure(error):
            raise storage_error(source.name(index), error) from error
        raise
    if not isinstance(image, Image.Image):
        raise UserError(
            f"{source.name(index)} is {an(type(image).__name__)}; return a PIL image, as Image.fromarray(array), "
            "or give tensors (c, h, w) in [0, 1] as a torch dataset, with dataset= in Python"
        )
    return image


def checked_label(source: Source, index: int) -> int | None:
    """Return `source.label(index)` as a number or None; raise `UserError` for anything else."""
    label = source.label(index)
    if label is not None and as_label(label) is None:
        raise UserError(f"the label of {source.name(index)} is {label!r}; return the number of a class, or None")
    return as_label(label)


def checked_length(source: Source) -> int:
    """Return `len(source)`; raise `UserError` where it is no whole number of at least 0."""
    try:
        return len(source)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"the length of {type(source).__name__} cannot be used ({reason_of(error)}); return the number of images"
        ) from error


def checked_fingerprint(source: Source) -> str:
    """Return `source.fingerprint()`; raise `UserError` unless it is a SHA-256 in hexadecimal digits."""
    given = source.fingerprint()
    if not isinstance(given, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", given):
        raise UserError(
            f"the fingerprint of {type(source).__name__} is {given!r:.80}; return a SHA-256 of what the images are, "
            "64 hexadecimal digits as hashlib.sha256(...).hexdigest() gives, or leave the method out"
        )
    return given


def reason_of(error: Exception) -> str:
    """Return the error in one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 240 else f"{text[:240]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def missing_package(spec: str, package: str) -> UserError:
    """Return the one message for a package that only some sources need."""
    return UserError(f"{spec!r} needs the package {package}, which is not installed; run `pip install 'vqdist[data]'`")
