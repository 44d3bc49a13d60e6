"""The statistics of a set of images as a file, so that a large set is looked at once.

A file has the names of the ADM evaluator: `mu`, `sigma` of the features, `mu_s`, `sigma_s` of the spatial ones. Beside
them lie `features` of some of the images, and what they were made of. `order_s` says in which order the spatial ones
are flattened: a file of vqdist without it has another order, and is refused. Files of pytorch-fid and clean-fid are
read, too (`mu` and `sigma`, or `feats`), of torch-fidelity (a .pt of `mu` and `sigma`, or of features alone), and
reference batches of ADM (`arr_0`, images in 8 bits).
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqdist.backends.base import Backend
from vqdist.errors import UserError
from vqdist.evaluation.extractors import FeatureExtractor
from vqdist.evaluation.features import Features, FeatureSet, Moments
from vqdist.sizes import ImageSize, sides_of

IMAGES = "arr_0"  # as np.savez calls what has no name
FEATURES = ("features", "feats")  # ours, and those of clean-fid's files for KID
SPATIAL = ("mu_s", "sigma_s")
ORDER, ROWS_FIRST = "order_s", "row, column, channel"  # of spatial features, as the ADM evaluator flattens them
LARGEST = 64 << 30  # bytes that an array of a file may take, unpacked


@dataclass(frozen=True)
class Reference:
    """The other side of a comparison: the moments of a set, and features of all or some of its images.

    Attributes:
        moments: of the features.
        spatial: of the spatial features; None where they are not known.
        features: (M, f); None where only moments are known.
        images: their number, 0 where it is not known.
        protocol: what they were made of; empty where a file does not say.
    """

    moments: Moments
    spatial: Moments | None = None
    features: Tensor | None = None
    images: int = 0
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.images

    @classmethod
    def of(cls, features: Features, protocol: Mapping[str, Any] | None = None) -> Reference:
        """Return the reference that a set of features is."""
        spatial, count = features.spatial_moments(), len(features)
        return cls(features.moments(), spatial, features.features, count, dict(protocol or {}))

    def write(self, path: Path, keep: int) -> None:
        """Write the statistics as .npz, with the features of as many images as are to be kept, evenly over the set.

        Args:
            path: of the file; it is replaced when it is whole.
            keep: number of images whose features are kept; 0 for none.
        """
        arrays = {"mu": self.moments.mean, "sigma": self.moments.covariance}
        if self.spatial is not None:
            arrays |= dict(zip(SPATIAL, (self.spatial.mean, self.spatial.covariance), strict=True))
        if self.features is not None and keep:
            count = min(keep, len(self.features))
            arrays["features"] = self.features[torch.arange(count) * len(self.features) // count]
        content: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
        content["protocol"] = np.array(json.dumps({**self.protocol, "images": self.images}))
        content |= {} if self.spatial is None else {ORDER: np.array(ROWS_FIRST)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        with open(partial, "wb") as file:
            np.savez(file, **content)
        partial.replace(path)


class ReferenceFile:
    """A file of statistics, of images, or of both. Nothing is unpickled.

    Args:
        path: an .npz, or a .pt of torch-fidelity.

    Attributes:
        has_images: whether it holds images (n, h, w, 3) in 8 bits.
        has_moments, has_features: whether it holds statistics, and features.

    Raises:
        UserError: it is none, or holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"{self.path} is no file; give the .npz that `vqdist statistics` wrote, or one of ADM's")
        self._arrays = _npz_shapes(self.path) if zipfile.is_zipfile(self.path) and not _is_torch(self.path) else None
        self._tensors = {} if self._arrays is not None else _torch_statistics(self.path)
        names = self._tensors if self._arrays is None else self._arrays
        self.has_images = IMAGES in (self._arrays or ())
        self.has_moments, self.has_features = {"mu", "sigma"} <= set(names), any(name in names for name in FEATURES)
        if not (self.has_images or self.has_moments or self.has_features):
            raise UserError(
                f"{self.path} holds {', '.join(sorted(names)[:6]) or 'nothing'}; expected mu and sigma, features as "
                f"{FEATURES[1]} (n, f), or images as {IMAGES} (n, h, w, 3)"
            )
        if self.has_images:
            _check_images(self._shape(IMAGES), self.path)

    @property
    def count(self) -> int:
        """Number of images in the file."""
        return self._shape(IMAGES)[0][0] if self.has_images else 0

    @property
    def image_size(self) -> list[int] | None:
        """Height and width of the images in the file, if there are any."""
        return list(self._shape(IMAGES)[0][1:3]) if self.has_images else None

    def image_batches(self, start: int, step: int, size: int) -> Iterator[Tensor]:
        """Yield every `step`-th batch of `size` images from the one of number `start` on, (b, 3, h, w) in [0, 1]."""
        images = self._array(IMAGES)
        for first in range(start * size, len(images), step * size):
            batch = torch.from_numpy(np.ascontiguousarray(images[first : first + size]))
            yield batch.permute(0, 3, 1, 2).float() / 255

    def reference(self, width: int, spatial_width: int | None = None) -> Reference:
        """Return the statistics, for an extractor of so many features and spatial features.

        Raises:
            UserError: they are of another extractor, or not finite; or their spatial features are in another order.
        """
        if not self.has_moments:
            return Reference.of(Features(self._needed_features(width)), self.protocol())
        moments = self._moments("mu", "sigma", width)
        spatial = None
        if spatial_width is not None and set(SPATIAL) <= set(self._arrays or ()):
            self._check_order()
            spatial = self._moments(*SPATIAL, spatial_width)
        features = self._features(width)
        protocol = self.protocol()
        images = protocol.get("images")
        return Reference(moments, spatial, features, images if isinstance(images, int) else 0, protocol)

    def check_made_by(self, extractor: FeatureExtractor, image_size: ImageSize) -> None:
        """Raise `UserError` where the file says that another extractor made it, or of images of another size.

        Args:
            extractor: of the images that are compared with it.
            image_size: of those images.
        """
        said, sides = self.protocol(), list(sides_of(image_size))
        if said.get("features_hash", extractor.digest) != extractor.digest:
            raise UserError(
                f"{self.path} was made with {said.get('features')} (hash {said['features_hash']}), and --features is "
                f"{extractor.name} (hash {extractor.digest}); give the same extractor, or make the statistics anew"
            )
        if said.get("image_size", sides) != sides:
            raise UserError(
                f"{self.path} is of images of {said['image_size']} pixels, and {sides} is the size here; make the "
                "statistics at this size"
            )

    def protocol(self) -> dict[str, Any]:
        """Return what the file says of its making; empty where it says nothing."""
        if "protocol" not in (self._arrays or ()):
            return {}
        try:
            said = json.loads(str(self._array("protocol")))
        except (ValueError, RecursionError):
            return {}
        return said if isinstance(said, dict) else {}

    def digest(self) -> str:
        """Return the first 16 digits of the file's SHA-256."""
        sums = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 22):
                sums.update(block)
        return sums.hexdigest()[:16]

    def _shape(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        assert self._arrays is not None
        return self._arrays[name]

    def _array(self, name: str) -> np.ndarray:
        if self._arrays is None:
            return _as_array(self._tensors[name], name, self.path)
        shape, dtype = self._arrays[name]
        if dtype.hasobject:
            raise UserError(f"{name} in {self.path} is pickled, which is not read; give an array of numbers")
        if int(np.prod(shape, dtype=object)) * dtype.itemsize > LARGEST:
            raise UserError(f"{name} in {self.path} says that it takes more than {LARGEST >> 30} GiB; it is not read")
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
        except Exception as error:  # a damaged file raises almost anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UserError(f"{name} in {self.path} cannot be read ({reason}); the file is damaged") from error

    def _numbers(self, name: str) -> Tensor:
        array = self._array(name)
        if array.dtype.kind not in "fiu":
            raise UserError(f"{name} in {self.path} is of type {array.dtype}; numbers are expected")
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
        if not tensor.isfinite().all():
            raise UserError(f"{name} in {self.path} is not finite; make the statistics anew")
        return tensor

    def _check_order(self) -> None:
        """Raise `UserError` unless spatial features are flattened as ADM's, whose files do not say it."""
        names = self._arrays or {}
        order = str(self._array(ORDER)) if ORDER in names else None
        if order != ROWS_FIRST and (order is not None or "protocol" in names):
            raise UserError(
                f"{SPATIAL[0]} in {self.path} is in the order {order or 'channel, row, column'}, and {ROWS_FIRST} is "
                "that of the ADM evaluator and of the extractor; make the file anew with `vqdist statistics`"
            )

    def _moments(self, mean: str, covariance: str, width: int) -> Moments:
        moments = Moments(self._numbers(mean), self._numbers(covariance))
        found = (tuple(moments.mean.shape), tuple(moments.covariance.shape))
        if found != ((width,), (width, width)):
            raise UserError(
                f"{self.path} holds {mean} of shape {found[0]} and {covariance} of shape {found[1]}, but the "
                f"extractor gives {width} features; give statistics that the same extractor made"
            )
        return moments

    def _needed_features(self, width: int) -> Tensor:
        features = self._features(width)
        if features is None:
            name = next(name for name in FEATURES if name in (self._arrays or self._tensors))
            raise UserError(
                f"{self.path} holds {name} of shape {tuple(self._array(name).shape)}, but the extractor gives {width} "
                "features; give those that the same extractor made"
            )
        return features

    def _features(self, width: int) -> Tensor | None:
        for name in FEATURES:
            if name in (self._tensors if self._arrays is None else self._arrays):
                features = self._numbers(name)
                if features.ndim == 2 and features.shape[1] == width:
                    return features
        return None


def features_in(file: ReferenceFile, extractor: FeatureExtractor, backend: Backend, batch_size: int) -> Features:
    """Return the features of the images in a file; every rank calls this and gets the same.

    Raises:
        UserError: there are none in it.
    """
    if not file.has_images:
        raise UserError(f"{file.path} holds statistics but no images; give images in its place")
    looked = FeatureSet(extractor, backend, file.count, block=batch_size)
    for images in file.image_batches(backend.rank, backend.world_size, batch_size):
        looked.add(images.to(backend.device))
    return looked.over_ranks()


def reference_in(file: ReferenceFile, extractor: FeatureExtractor, backend: Backend, batch_size: int) -> Reference:
    """Return what a file is to be compared with: its statistics, those of its images, or both.

    Statistics and images of one file are those of ADM's batches: FID takes the first, precision and recall the second.
    Every rank calls this.
    """
    if not file.has_moments and not file.has_features:
        return Reference.of(features_in(file, extractor, backend, batch_size))
    reference = file.reference(extractor.width, extractor.widths.get("spatial"))
    if reference.features is None and file.has_images:
        reference = replace(reference, features=features_in(file, extractor, backend, batch_size).features)
    return reference


def _is_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return True  # whatever it is, torch says that it cannot read it


def _npz_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and type of each array, from their heads."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    version = np.lib.format.read_magic(file)
                    head = np.lib.format
                    read = head.read_array_header_1_0 if version == (1, 0) else head.read_array_header_2_0
                    shape, _, dtype = read(file)
                    found[name.removesuffix(".npy")] = (shape, dtype)
    except Exception as error:  # a damaged file raises almost anything, numpy's parser of heads too
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path} is no whole .npz ({reason}); make it anew") from error
    return found


def _torch_statistics(path: Path) -> dict[str, np.ndarray | Tensor]:
    """Return what torch-fidelity's cache holds: a dict of numpy arrays or tensors, or a tensor of features."""
    inert: list[Any] = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype("float64"))]
    try:
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0][:160]
        raise UserError(
            f"{path} is neither an .npz nor the statistics of torch-fidelity ({reason}); pickled objects are not read"
        ) from error
    if isinstance(content, Tensor) and content.ndim == 2:
        return {FEATURES[0]: content}
    if not isinstance(content, Mapping):
        return {}
    return {
        str(name): value
        for name, value in content.items()
        if isinstance(value, (Tensor, np.ndarray)) and value.dtype != object
    }


def _as_array(value: np.ndarray | Tensor, name: str, path: Path) -> np.ndarray:
    """Return numbers of any precision, also those of a parameter, as numpy has them."""
    if isinstance(value, np.ndarray):
        return value
    try:
        held = value.detach()
        return (held.double() if held.is_floating_point() else held).numpy()
    except Exception as error:  # sparse, quantized or without storage: torch raises almost anything
        raise UserError(
            f"{name} in {path} is a tensor of {value.dtype} ({value.layout}), which numpy cannot hold; give dense "
            "numbers"
        ) from error


def _check_images(head: tuple[tuple[int, ...], np.dtype], path: Path) -> None:
    shape, dtype = head
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise UserError(
            f"{IMAGES} in {path} is of type {dtype} and shape {shape}; images are expected as uint8 (n, h, w, 3)"
        )
