"""`hf:NAME[:SPLIT][?key=value&...]`: datasets of the `datasets` library."""

from __future__ import annotations

import io
import os
from typing import Any

from PIL import Image

from vqdist.data.images import open_image, undecodable
from vqdist.data.sources.base import (
    DIGIT_LIKE,
    Source,
    as_label,
    digest_of,
    missing_package,
    reason_of,
    some_labels,
    split_options,
)
from vqdist.data.specs import absolute_path
from vqdist.errors import UserError


class HuggingFaceSource(Source):
    """A dataset of the `datasets` library: the images stay in its memory-mapped files.

    Args:
        spec: `hf:NAME[:SPLIT][?key=value&...]`, see `vqdist.data.sources`.
    """

    def __init__(self, spec: str):
        self.spec = spec
        body, options = split_options(spec)
        for key in options:
            if key not in ("config", "image", "label"):
                raise UserError(f"{spec!r} has the key {key!r}; hf: knows config, image and label")
        self.dataset_name, _, self.split = body.partition(":")
        dataset = _load_hugging_face(spec, self.dataset_name, self.split, options.get("config"))
        self._image_column = _image_column(spec, dataset, options.get("image"))
        self._label_column = _label_column(spec, dataset, options.get("label"))
        self.flip = not DIGIT_LIKE.search(os.path.basename(self.dataset_name))
        self._features = repr(sorted(dataset.features.items()))
        self._images = _encoded_images(dataset, self._image_column)
        self._labels = dataset.with_format(None).select_columns([self._label_column]) if self._label_column else None

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        """From the bytes of the file, so that orientation and errors are handled as for any other file."""
        encoded = self._images[index][self._image_column] or {}
        if encoded.get("bytes"):
            return open_image(io.BytesIO(encoded["bytes"]), name=self.name(index))
        if encoded.get("path"):
            return open_image(encoded["path"])
        raise undecodable(self.name(index), "the sample is empty")

    def label(self, index: int) -> int | None:
        return None if self._labels is None else as_label(self._labels[index][self._label_column])

    def fingerprint(self) -> str:
        """By length, columns and a few labels; not by the folder, which may differ between nodes."""
        name = os.path.basename(self.dataset_name.rstrip("/"))
        return digest_of(["hf", name, self.split, str(len(self)), self._features, some_labels(self)])


def _load_hugging_face(spec: str, name: str, split: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_package(spec, "datasets") from error
    folder = os.path.expanduser(name)
    if name.startswith(("/", ".", "~")) and not os.path.isdir(folder):
        raise UserError(f"no such folder: {absolute_path(name)}; check the path in {spec!r}")
    saved = any(os.path.isfile(os.path.join(folder, file)) for file in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            return _choose_split(spec, datasets.load_from_disk(folder), split)
        place = folder if os.path.isdir(folder) else name
        return _choose_split(spec, datasets.load_dataset(place, config, split=split or None), split)
    except UserError:
        raise
    except Exception as error:  # no network, no such name, configuration or split, broken files
        raise UserError(
            f"{spec!r} could not be loaded ({reason_of(error)}); check the name, configuration and split, or, "
            f"without network, run `datasets.load_dataset({name!r}).save_to_disk('FOLDER')` on a machine that has it, "
            "copy the folder here and give `hf:FOLDER`"
        ) from error


def _choose_split(spec: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):  # one dataset: load_dataset was given the split, or it was saved alone
        if split and str(loaded.split or "") not in (split, split.partition("[")[0]):
            raise UserError(f"{spec!r} asks for the split {split!r}, but one dataset alone was saved; leave it out")
        return loaded
    wanted = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if wanted not in loaded:
        raise UserError(f"{spec!r} has no split {wanted!r}; it has {', '.join(loaded)}: add one as in hf:NAME:SPLIT")
    return loaded[wanted]


def _image_column(spec: str, dataset: Any, wanted: str | None) -> str:
    from datasets import Image as ImageFeature

    found = [name for name, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    if not found or (wanted and wanted not in found):
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in dataset.features.items())
        missing = f"no image column {wanted!r}" if wanted else "no column of images"
        raise UserError(f"{spec!r} has {missing}; its columns are {columns}; name one of type Image with ?image=")
    preferred = [name for name in ("image", "img", "pixel", "pixel_values") if name in found]
    return wanted or (preferred + found)[0]


def _label_column(spec: str, dataset: Any, wanted: str | None) -> str | None:
    from datasets import ClassLabel

    if wanted and wanted not in dataset.features:
        raise UserError(f"{spec!r} has no column {wanted!r}; its columns are {', '.join(dataset.features)}")
    classes = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    preferred = [name for name in ("label", "labels") if name in classes]
    plain = ["label"] if "label" in dataset.features else []
    return wanted or next(iter(preferred + classes + plain), None)


def _encoded_images(dataset: Any, column: str) -> Any:
    from datasets import Image as ImageFeature

    return dataset.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))
