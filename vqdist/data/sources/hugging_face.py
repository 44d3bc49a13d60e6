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

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel", "pixel_values")
BINARY = ("binary", "large_binary")


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
        self.class_names = _class_names(dataset, self._label_column)

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
        if self._labels is None:
            return None
        label = self._labels[index][self._label_column]
        if isinstance(label, str) and self.class_names is not None:
            return self.class_names.index(label)
        return as_label(label)

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
    """Return the column of images: of type Image, or as others write them, bytes alone or beside a path."""
    from datasets import Image as ImageFeature

    images = [name for name, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    found = images or [name for name, feature in dataset.features.items() if _holds_files(feature)]
    if not found or (wanted and wanted not in found):
        columns = ", ".join(f"{name} ({_type_of(feature)})" for name, feature in dataset.features.items())
        missing = f"no image column {wanted!r}" if wanted else "no column of images"
        raise UserError(
            f"{spec!r} has {missing}; its columns are {columns}; name one of type Image, or of the bytes of files, "
            "with ?image="
        )
    preferred = [name for name in IMAGE_COLUMNS if name in found]
    return wanted or (preferred + found)[0]


def _holds_files(feature: Any) -> bool:
    """Return whether a column that is not said to be one of images holds the bytes of files."""
    if isinstance(feature, dict):
        return _is_value(feature.get("bytes"), *BINARY) and feature.keys() <= {"bytes", "path"}
    return _is_value(feature, *BINARY)


def _is_value(feature: Any, *dtypes: str) -> bool:
    return getattr(feature, "dtype", None) in dtypes


def _type_of(feature: Any) -> str:
    return f"of {', '.join(feature)}" if isinstance(feature, dict) else type(feature).__name__


def _label_column(spec: str, dataset: Any, wanted: str | None) -> str | None:
    from datasets import ClassLabel

    if wanted and wanted not in dataset.features:
        raise UserError(f"{spec!r} has no column {wanted!r}; its columns are {', '.join(dataset.features)}")
    classes = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    preferred = [name for name in ("label", "labels") if name in classes]
    plain = [name for name in ("label", "cls") if name in dataset.features]
    return wanted or next(iter(preferred + classes + plain), None)


def _class_names(dataset: Any, column: str | None) -> list[str] | None:
    """Return the names of the classes: of a column of classes, or the sorted texts of one of texts."""
    from datasets import ClassLabel

    feature = dataset.features[column] if column else None
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if feature is None or not _is_value(feature, "string", "large_string"):
        return None
    return sorted(text for text in dataset.unique(column) if text is not None)


def _encoded_images(dataset: Any, column: str) -> Any:
    from datasets import Image as ImageFeature

    return dataset.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))
