"""Stored codes of images, memory-mapped: what `vqdist encode` writes and the second stage trains on.

A folder of codes, in version 1 of the format:

| file | content |
| --- | --- |
| `encode.json` | the plan, written before the first shard: what was encoded, by what, in which batches |
| `codes_00000.npy`, ... | (rows, n), or (rows, n, q) with q levels, in the smallest fitting type of uint8, 16, 32 |
| `labels_00000.npy`, ... | (rows,) int64: the classes, -1 where the source has none |
| `manifest.json` | written last: the plan, names of classes, and of every shard file its size and its SHA-256 |

Row r of shard s belongs to the image s * shard_size + r, so the last shard may be shorter. With the maps of several
scales, a row is the coarsest map first. Every file is written under a name that ends in `.partial` and renamed when it
is whole; of a shard the codes are renamed last, so where they are, the labels are too. A folder without
`manifest.json` is unfinished.

Shapes: n codes per image, q levels.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqdist.classes import checked_names, missing, numbers_among
from vqdist.data.sources.base import checked_index
from vqdist.errors import UserError
from vqdist.files import read_json, sha256_of
from vqdist.sizes import ImageSize, image_size_of, pixels

FORMAT_VERSION = 1
PLAN = "encode.json"
MANIFEST = "manifest.json"
KINDS = ("labels", "codes")
"""The two files of a shard, in the order in which they appear."""

MAX_OPEN = 256
"""Mapped files of a kind in one process: each holds a file descriptor, of which there are often 1,024."""

LABEL_DTYPE = np.dtype(np.int64)

# what a manifest says of all images: its type, and the least of a number
FACTS: dict[str, tuple[Any, int | None]] = {
    "tokenizer": (str, None),
    "data": (str, None),
    "model_type": (str, None),
    "image_size": (int | list, 1),
    "channels": (int, 1),
    "codebook_size": (int, 1),
    "num_codes": (int, 1),
    "num_levels": (int, 1),
    "code_side": (int | None, None),
    "scales": (list | None, None),
    "count": (int, 1),
    "shard_size": (int, 1),
    "batch_size": (int, 1),
    "classes_seen": (int, 0),
}


class CodeDataset(Dataset):
    """The codes in a folder that `vqdist encode` wrote.

    Opening looks at the manifest and at the sizes of the files; a file is mapped when an image of it is first asked
    for, in each process anew, and nothing but the rows that are asked for is read.

    Args:
        folder: with `manifest.json` and shards.

    Attributes:
        folder: where the files are.
        tokenizer: fingerprint of the tokenizer that made the codes, see `Tokenizer.fingerprint`.
        data: fingerprint of the images, see `Source.fingerprint`.
        model_type: of the tokenizer's model.
        codebook_size: number of codes (of each level).
        num_codes: codes of an image.
        num_levels: codes per position.
        image_size: side of the images in pixels, or (height, width).
        channels: of the images.
        scales: sides of the token maps of a multi-scale tokenizer, the finest last; None where there is one map.
        code_side: side of that one map; None with scales, of codes in a row, and where the map is not square.
        class_names: of the labels, or None where they have no names.
        codebook_usage: share of the codes that occur; None where the manifest does not have it.
        classes_seen: how many different classes the images have; 0 where the source has none.

    Raises:
        UserError: there are no codes, they are unfinished or of another version, or a file is missing or of another
            size than it was.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self._manifest = manifest = read_manifest(self.folder)
        self.tokenizer: str = manifest["tokenizer"]
        self.data: str = manifest["data"]
        self.model_type: str = manifest["model_type"]
        self.codebook_size: int = manifest["codebook_size"]
        self.num_codes: int = manifest["num_codes"]
        self.num_levels: int = manifest["num_levels"]
        self.image_size: ImageSize = image_size_of(manifest["image_size"])
        self.channels: int = manifest["channels"]
        self.classes_seen: int = manifest["classes_seen"]
        self.code_side: int | None = manifest["code_side"]
        self.class_names = checked_names(manifest.get("classes"), self.folder / MANIFEST)
        self.codebook_usage: float | None = manifest.get("codebook_usage")
        self._numbers: list[int] | None = None  # of these classes, where a model counts them in another way
        self.scales: tuple[int, ...] | None = None if manifest["scales"] is None else tuple(manifest["scales"])
        self._dtypes = {"codes": code_dtype(self.codebook_size), "labels": LABEL_DTYPE}
        self._rows = {"codes": row_shape(self.num_codes, self.num_levels), "labels": ()}
        self._check_sizes()
        self._forget_maps()

    def __len__(self) -> int:
        return self._manifest["count"]

    def __repr__(self) -> str:
        """Return one line: where the codes are, how many, and of how large images."""
        levels = f" x {self.num_levels}" if self.num_levels > 1 else ""
        codes = f"{self.num_codes}{levels} codes of {self.codebook_size} each"
        return f"CodeDataset({self.folder}, {len(self):,} images of {pixels(self.image_size)}, {codes})"

    @property
    def item_bytes(self) -> int:
        """Bytes of the codes of an image, as `fetch` gives them."""
        return self.num_codes * self.num_levels * torch.int64.itemsize

    def name(self, index: int) -> str:
        """Return where the codes at an index lie."""
        return f"{self.folder}[{index}]"

    def __getitem__(self, place: int | tuple[int, int]) -> Tensor:
        epoch, index = place if isinstance(place, tuple) else (0, place)
        return self.fetch(epoch, index)[0]

    def fetch(
        self, epoch: int, index: int, *, among: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Return the codes (n,) or (n, q) int64 of an image, equal in every epoch.

        The names of broken images, which other datasets return beside, are always none.
        """
        shard, row = divmod(checked_index(index, len(self)), self._manifest["shard_size"])
        codes = self._maps["codes"](shard)[row].astype(np.int64)
        if codes.max() >= self.codebook_size:
            raise _damaged(
                self._path("codes", shard), f"it holds the code {codes.max()} of a codebook of {self.codebook_size}"
            )
        return torch.from_numpy(codes), ()

    def fetch_labelled(
        self, epoch: int, index: int, *, among: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, int | None, tuple[str, ...]]:
        """Return what `fetch` does, and the class of the image."""
        codes, bad = self.fetch(epoch, index)
        return codes, self.label(index), bad

    def label(self, index: int) -> int | None:
        """Return the class of an image, or None where the source had none."""
        shard, row = divmod(checked_index(index, len(self)), self._manifest["shard_size"])
        label = int(self._maps["labels"](shard)[row])
        if label < 0 or self._numbers is None:
            return None if label < 0 else label
        if label >= len(self._numbers):
            raise _damaged(self._path("labels", shard), f"it holds the class {label} of {len(self._numbers)}")
        return self._numbers[label]

    def use_classes(self, known: Sequence[str] | None) -> str | None:
        """Let labels be the numbers of a model's classes, see `ImageDataset.use_classes`."""
        if self.class_names is None or known is None:
            return None
        own = self._manifest["classes"]
        self._numbers, self.class_names = numbers_among(own, known), list(known)
        return missing(own, known)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the manifest: equal on two nodes if they see the same codes."""
        return sha256_of(self.folder / MANIFEST)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise `UserError` unless the codes were made by the tokenizer with this fingerprint."""
        if fingerprint != self.tokenizer:
            raise UserError(
                f"the codes in {self.folder} were made by the tokenizer {self.tokenizer[:12]}, and {fingerprint[:12]} "
                "is given: other weights or another image size; give the tokenizer that made them, or encode again"
            )

    def check_made_by(self, tokenizer: Any) -> None:
        """Raise `UserError` unless the codes are those of this `Tokenizer`, and the manifest agrees with it.

        They are, too, where only its decoder is another than that of the tokenizer that made them.
        """
        if not tokenizer.makes_codes_of(self._manifest.get("codes_fingerprint")):  # folders from before have none
            self.check_tokenizer(tokenizer.fingerprint())
        for name, value in facts_of(tokenizer).items():
            if name != "model_type" and self._manifest[name] != value:
                raise UserError(
                    f"{self.folder / MANIFEST} is damaged: its {name} is {self._manifest[name]!r:.40}, and the "
                    f"tokenizer that made the codes has {value!r:.40}; encode the images again"
                )

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest's; `UserError` naming the first that differs."""
        for shard, files in enumerate(self._manifest["shards"]):
            for kind in KINDS:
                path = self._path(kind, shard)
                if sha256_of(path) != files[kind]["sha256"]:
                    raise _damaged(path, "its SHA-256 is not the one in the manifest")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_maps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_maps()

    def _forget_maps(self) -> None:
        self._maps = {kind: lru_cache(MAX_OPEN)(partial(self._open, kind)) for kind in KINDS}

    def _open(self, kind: str, shard: int) -> np.ndarray:
        rows = len(shard_range(shard, len(self), self._manifest["shard_size"]))
        return map_array(self._path(kind, shard), self._dtypes[kind], (rows, *self._rows[kind]))

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / shard_file(kind, shard)

    def _check_sizes(self) -> None:
        for shard, files in enumerate(self._manifest["shards"]):
            for kind in KINDS:
                path, expected = self._path(kind, shard), files[kind]["bytes"]
                if not path.is_file():
                    raise UserError(
                        f"{path} is missing though {MANIFEST} lists it; run the same `vqdist encode` command again"
                    )
                if path.stat().st_size != expected:
                    raise _damaged(path, f"it has {path.stat().st_size} bytes, and {MANIFEST} says {expected}")


# --------------------------------------------------------------------------------------------- the format


def facts_of(tokenizer: Any) -> dict[str, Any]:
    """Return what a manifest says of the `Tokenizer` that made the codes, besides its fingerprint, as JSON."""
    scales = tokenizer.network.scales
    return {
        "model_type": tokenizer.model_type,
        "image_size": list(size) if isinstance(size := tokenizer.image_size, tuple) else size,
        "channels": tokenizer.channels,
        "codebook_size": tokenizer.codebook_size,
        "num_codes": tokenizer.num_codes,
        "num_levels": tokenizer.num_levels,
        "code_side": tokenizer.code_side if scales is None else None,
        "scales": None if scales is None else list(scales),
    }


def shard_file(kind: str, shard: int) -> str:
    """Return the name of a shard's file; the kind is `codes` or `labels`."""
    return f"{kind}_{shard:05d}.npy"


def num_shards(count: int, shard_size: int) -> int:
    """Return the number of shards that `count` images make."""
    return -(-count // shard_size)


def shard_range(shard: int, count: int, shard_size: int) -> range:
    """Return the indices of the images of a shard; fewer than `shard_size` in the last one."""
    return range(shard * shard_size, min(count, (shard + 1) * shard_size))


def row_shape(num_codes: int, num_levels: int) -> tuple[int, ...]:
    """Return the shape of an image's codes: (n,), or (n, q) with more than one level."""
    return (num_codes,) if num_levels == 1 else (num_codes, num_levels)


def code_dtype(codebook_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds the codes 0 .. codebook_size - 1."""
    for bits in (8, 16, 32):
        if codebook_size <= 2**bits:
            return np.dtype(f"uint{bits}")
    raise UserError(f"a codebook of {codebook_size} codes is too large to be stored; at most {2**32} can be")


def map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array in a .npy file, memory-mapped; `UserError` unless it has this type and shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (dtype, shape):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise _damaged(path, f"it holds {found}, and {dtype} {shape} is expected")
    return array.view(np.ndarray)  # numpy.memmap is a subclass whose every slice costs more


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of `manifest.json`; `UserError` if there is none, or none of this version."""
    if not (folder / MANIFEST).is_file():
        if (folder / PLAN).is_file():
            raise UserError(f"the encoding of {folder} was not finished: run the same `vqdist encode` command again")
        raise UserError(
            f"there are no codes in {folder}: it has no {MANIFEST}; give a folder that `vqdist encode` wrote"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST} has the version {manifest.get('version')!r}, and this vqdist reads "
            f"{FORMAT_VERSION}; encode the images again"
        )
    if (wrong := _wrong_part(manifest)) is not None:
        raise _damaged(folder / MANIFEST, f"its {wrong!r} is missing or wrong")
    return manifest


def _wrong_part(manifest: dict[str, Any]) -> str | None:
    """Return the first key of a manifest that cannot be right."""
    for name, (kind, least) in FACTS.items():
        if name not in manifest or not isinstance(manifest[name], kind):
            return name
        if least is not None and any(number < least for number in _numbers(manifest[name])):
            return name
    shards = manifest.get("shards")
    if not isinstance(shards, list) or len(shards) != num_shards(manifest["count"], manifest["shard_size"]):
        return "shards"
    for shard in shards:
        for file_kind in KINDS:
            file = shard.get(file_kind) if isinstance(shard, dict) else None
            if not isinstance(file, dict) or not {"bytes", "sha256"} <= file.keys():
                return "shards"
    return None


def _numbers(value: Any) -> list[Any]:
    """Return the whole numbers of a value that is one, or a list of two."""
    if not isinstance(value, list):
        return [value]
    return value if len(value) == 2 and all(isinstance(number, int) for number in value) else [0]


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} is damaged ({problem}); remove it and run the same `vqdist encode` command again, which makes it anew"
    )
