"""`torchvision:NAME[:SPLIT][?key=value&...]`: the dataset classes of torchvision."""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import sys
from typing import Any

from PIL import Image

from vqdist.data.images import undecodable
from vqdist.data.sources.base import (
    DIGIT_LIKE,
    Source,
    as_label,
    data_cache,
    digest_of,
    reason_of,
    some_labels,
    split_options,
)
from vqdist.data.specs import absolute_path
from vqdist.errors import UserError
from vqdist.names import unknown


class TorchvisionSource(Source):
    """A dataset class of torchvision. Workers that are spawned open it again from its files.

    Args:
        spec: `torchvision:NAME[:SPLIT][?key=value&...]`, see `vqdist.data.sources`.
    """

    RESERVED = ("download", "transform", "transforms", "target_transform")

    def __init__(self, spec: str):
        self.spec = spec
        body, self._options = split_options(spec)
        self.class_name, _, self.split = body.partition(":")
        self._class = _torchvision_class(self.class_name)
        self.flip = not DIGIT_LIKE.search(self.class_name)
        for key in self.RESERVED:
            if key in self._options:
                raise UserError(f"{spec!r} sets {key}, which vqdist decides itself; leave it out")
        self.root = absolute_path(self._options.pop("root", str(data_cache() / "torchvision")))
        self._dataset = self._open_or_download()
        self.class_names = _names_of(getattr(self._dataset, "classes", None))

    def __len__(self) -> int:
        return len(self._opened())

    def image(self, index: int) -> Image.Image:
        try:
            item = self._opened()[index]
            image = item[0] if isinstance(item, tuple | list) else item
            if isinstance(image, Image.Image):
                image.load()
                return image
        except Exception as error:  # torchvision decodes in its own way: any error is this sample's
            raise undecodable(self.name(index), error) from error
        raise UserError(
            f"torchvision:{self.class_name} gives {type(image).__name__} objects where images are expected; choose a "
            "dataset of images"
        )

    def label(self, index: int) -> int | None:
        dataset = self._opened()
        for attribute in ("targets", "labels", "_labels"):
            values = getattr(dataset, attribute, None)
            if values is not None and len(values) == len(dataset):
                return as_label(values[index])
        item = dataset[index]
        return as_label(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else None

    def fingerprint(self) -> str:
        options = repr(sorted(self._options.items()))
        return digest_of(["torchvision", self.class_name, self.split, options, some_labels(self)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}

    def _opened(self) -> Any:
        if self._dataset is None:
            self._dataset = self._construct(download=False)
        return self._dataset

    def _open_or_download(self) -> Any:
        try:
            return self._construct(download=False)
        except (RuntimeError, OSError) as error:
            absent = error
        if "download" not in _parameters(self._class):
            raise UserError(
                f"torchvision:{self.class_name} is not in {self.root} ({reason_of(absent)}) and torchvision cannot "
                "download it; get its files as torchvision's documentation says and give their folder with ?root="
            ) from absent
        try:
            return self._download()
        except UserError:
            raise
        except Exception as error:  # no network, no server, no space, a wrong checksum
            raise UserError(self._how_to_download(error)) from error

    def _download(self) -> Any:
        """One process of a node downloads, the others wait and then find the files."""
        from filelock import FileLock  # torch needs it too

        os.makedirs(self.root, exist_ok=True)
        with FileLock(os.path.join(self.root, f".{self.class_name}.lock")):
            # torchvision prints, and standard output belongs to results
            with contextlib.redirect_stdout(sys.stderr):
                return self._construct(download=True)

    def _how_to_download(self, error: Exception) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self._arguments(download=True).items())
        return (
            f"torchvision:{self.class_name} is not in {self.root} and could not be downloaded ({reason_of(error)}); "
            f"on a machine with network run `import torchvision; torchvision.datasets.{self.class_name}({arguments})` "
            "and copy that folder here, or give the folder of its files with ?root="
        )

    def _construct(self, *, download: bool) -> Any:
        arguments = self._arguments(download=download)
        try:
            return self._class(**arguments)
        except ImportError as error:
            raise UserError(
                f"torchvision:{self.class_name} needs a package: {error}; install it with `pip install {error.name}`"
            ) from error
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.spec!r} does not fit torchvision.datasets.{self.class_name} ({reason_of(error)}); its "
                f"options are {', '.join(key for key in _parameters(self._class) if key not in self.RESERVED)}"
            ) from error

    def _arguments(self, *, download: bool) -> dict[str, Any]:
        known = _parameters(self._class)
        arguments = {key: _literal(value) for key, value in self._options.items()}
        if "root" in known:
            arguments["root"] = self.root
        if "download" in known:
            arguments["download"] = download
        if self.split:
            arguments.update(_split_argument(self.spec, self.split, known))
        return arguments


def _torchvision_class(name: str) -> type:
    import torchvision.datasets

    members = vars(torchvision.datasets)
    classes = {key: members[key] for key in torchvision.datasets.__all__ if isinstance(members.get(key), type)}
    if name not in classes:
        raise unknown("dataset", name, classes, "; see torchvision.datasets for the names", of="torchvision")
    return classes[name]


def _names_of(classes: Any) -> list[str] | None:
    """Return the attribute `classes` of a dataset, if it is names; of some it is a table, or pairs."""
    names = list(classes) if isinstance(classes, list | tuple) else []
    return names if names and all(isinstance(name, str) for name in names) and len(set(names)) == len(names) else None


def _literal(value: str) -> Any:
    """Return a Python value if it reads as one (`3`, `True`, `(3, 32, 32)`), else the text."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _parameters(cls: type) -> list[str]:
    """Return the names that a constructor takes, with those that it passes on to its base class."""
    names: list[str] = []
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names += [
            p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in names
        ]
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            break
    return names


def _split_argument(spec: str, split: str, known: list[str]) -> dict[str, Any]:
    """Return the argument by which this class takes its split.

    `train` comes first, because EMNIST has a `split` that means something else.
    """
    if "train" in known:
        if split not in ("train", "test"):
            raise UserError(f"{spec!r} asks for the split {split!r}; this dataset has the splits train and test")
        return {"train": split == "train"}
    for key in ("split", "image_set"):
        if key in known:
            return {key: split}
    raise UserError(f"{spec!r} asks for the split {split!r}, and this dataset has no splits; leave it out")
