"""From a spec string to a dataset of images that any process can open and look into at any index.

| spec | images |
| --- | --- |
| `DIR` | every jpg jpeg png webp bmp tif tiff gif below a folder, in any letter case and nesting |
| `digits` | the 10,000 MNIST test images that come with the package, 28 x 28 grey, with labels |
| `synthetic`, `synthetic:LENGTH` | 64 x 64 colour pictures computed from their index (100 if no length is given) |
| `torchvision:NAME[:SPLIT][?key=value&...]` | a class of `torchvision.datasets` |
| `wds:SHARDS` | samples of local or remote tar files, e.g. `wds:/data/train-{000..099}.tar` |
| `hf:NAME[:SPLIT][?key=value&...]` | a Hugging Face dataset: of the Hub, of a folder, or saved by `save_to_disk` |

- Folders: hidden files and folders (a leading dot) are passed over; symbolic links are followed, except back to a
  folder that encloses them. A folder that is called like another spec is written `./digits`.
- `torchvision`: `SPLIT` is given to the class as `split` or `image_set`, or as `train` (`train` or `test`). `root` is
  the folder of the files; every other key goes to the class: `torchvision:EMNIST:test?split=letters&root=/data`. Files
  that are absent are downloaded, once.
- `wds`: braces as in the webdataset library, `*` and `?` as in a shell, or one folder of tar files. Positions must be
  addressable, so the tar headers are read once at the start, and remote shards are downloaded first. An entry `cls`
  is the label.
- `hf`: keys `config` (the dataset's configuration), `image` and `label` (columns, if they are not the first ones of
  these types). The split is `train` if none is given, or the only one.

What is downloaded by torchvision and wds lies under `VQDIST_DATA` (default `~/.cache/vqdist`), in `torchvision/` and
`wds/`.

Every file list is sorted, so each node sees the same order; `fingerprint` proves it without reading the images.

Legend: c channel, h w image.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import glob
import gzip
import hashlib
import importlib.resources
import inspect
import io
import operator
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from vqdist.data.images import (
    BadImageError,
    check_channels,
    image_to_tensor,
    open_image,
    tensor_to_image,
    undecodable,
)
from vqdist.errors import UserError
from vqdist.seeding import derive_seed

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
        """The decoded image at 0 <= index < len; `BadImageError` names it if it cannot be decoded."""
        raise NotImplementedError

    def label(self, index: int) -> int | None:
        """The class of an image, or None where the source has no classes."""
        return None

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return f"{self.spec}[{index}]"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of names and sizes: equal on two nodes if they see the same images. Does not read images."""
        raise NotImplementedError

    def tensor(self, index: int, *, image_size: int, channels: int, rng: torch.Generator | None = None) -> Tensor:
        """The image as (c, h, w) float32 in [0, 1], see `images.image_to_tensor`."""
        return image_to_tensor(self.image(index), image_size=image_size, channels=channels, rng=rng)


def open_source(spec: str | os.PathLike, *, exts: Iterable[str] | str | None = None) -> Source:
    """Open the images that a spec names (the forms are listed on top of this module).

    Args:
        spec: the spec; a path object is always a folder.
        exts: file name extensions to read in place of the usual ones, with or without the dot, in any letter case; for
            folders and `wds:` only.

    Raises:
        UserError: there is no such source, it is empty, or it cannot be opened.
    """
    if isinstance(spec, os.PathLike):
        return FolderSource(spec, exts=exts)
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"the data source is {spec!r}; give {FORMS}")
    kind, colon, rest = spec.partition(":")
    if kind not in OPENERS:
        return _open_path(spec, exts)
    if colon and not rest:
        raise UserError(f"the data source {spec!r} ends after its colon; give {FORMS}")
    if kind == "wds":
        return WebDatasetSource(spec, exts=exts)
    if exts is not None:
        raise UserError(f"exts {exts!r} has no meaning for {spec!r}, which is not made of image files; leave it out")
    source = OPENERS[kind](spec)
    if len(source) == 0:
        raise UserError(f"{spec!r} holds no images; choose another split or dataset")
    return source


def _open_path(spec: str, exts: Iterable[str] | str | None) -> Source:
    if os.path.exists(os.path.expanduser(spec)):
        return FolderSource(spec, exts=exts)
    if "://" in spec or spec.lower().endswith(".tar"):
        raise UserError(f"{spec} is not a folder; tar files, local or remote, are given as `wds:{spec}`")
    if "/" in spec or spec.startswith((".", "~")):
        raise UserError(f"no such folder: {_absolute(spec)}; check the path, or give {FORMS}")
    near = difflib.get_close_matches(spec.partition(":")[0].lower(), OPENERS, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise UserError(f"no folder and no data source is called {spec!r}; {hint}Give {FORMS}")


# --------------------------------------------------------------------------------- files in a folder


class FolderSource(Source):
    """Every image below a folder, sorted by its relative path.

    The label is the number of the first-level subfolder, in sorted order, when every image lies in one.

    Args:
        folder: path; `~` is expanded.
        exts: see `open_source`.
    """

    def __init__(self, folder: str | os.PathLike, *, exts: Iterable[str] | str | None = None):
        self.spec = os.fspath(folder)
        self.folder = _absolute(self.spec)
        self._paths = PackedStrings(_list_images(self.folder, _normalise_extensions(exts)))
        self._labels = _subfolder_labels(list(self._paths))

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        return open_image(self.name(index))

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self.folder, self._paths[index])

    def fingerprint(self) -> str:
        return _digest(f"{path}\0{_size(os.path.join(self.folder, path))}" for path in self._paths)


def _list_images(folder: str, exts: tuple[str, ...]) -> list[str]:
    if not os.path.exists(folder):
        raise UserError(f"no such folder: {folder}; check the path")
    if not os.path.isdir(folder):
        hint = f"; tar files are given as `wds:{folder}`" if folder.lower().endswith(".tar") else ""
        raise UserError(f"{folder} is a file, and a folder of images is expected; give the folder it lies in{hint}")
    files = list(_walk(folder, "", (os.path.realpath(folder),)))
    images = sorted(path for path in files if _extension(path) in exts)
    if not images:
        raise UserError(
            f"no images in {folder}: {_census(files)}; expected files ending in {', '.join(exts)} at any depth"
        )
    return images


def _walk(folder: str, prefix: str, ancestors: tuple[str, ...]) -> Iterator[str]:
    """Relative posix paths of all files, unsorted. A link is followed unless it leads to a folder that encloses it."""
    try:
        with os.scandir(folder) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {folder} ({error.strerror}); mend its permissions") from error
    for entry in entries:
        if not _is_folder(entry):
            yield prefix + entry.name
            continue
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(ancestors[-1], entry.name)
        if real not in ancestors:
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*ancestors, real))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _census(files: list[str]) -> str:
    """What there is in place of images: `found 3 .txt and 1 .csv files`."""
    if not files:
        return "found no files"
    counts = Counter(f".{_extension(path)}" if _extension(path) else "(no extension)" for path in files)
    found = [f"{count} {extension}" for extension, count in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))]
    return f"found {', '.join(found[:8])}{', ...' if len(found) > 8 else ''} file{'s' if len(files) > 1 else ''}"


def _subfolder_labels(paths: list[str]) -> np.ndarray | None:
    if any("/" not in path for path in paths):
        return None
    folders = [path.partition("/")[0] for path in paths]
    numbers = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return np.array([numbers[folder] for folder in folders], dtype=np.int32)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nowhere; the image itself is refused when it is read
        return -1


# -------------------------------------------------------------------- images that need no other files


class DigitsSource(Source):
    """The 10,000 MNIST test images of this package: 28 x 28 grey, labels 0 to 9, not to be mirrored."""

    flip = False

    def __init__(self, spec: str = "digits"):
        if spec != "digits":
            raise UserError(f"{spec!r} is not known: `digits` takes no argument; write `digits`")
        self.spec = spec

    def __len__(self) -> int:
        return len(_digits().labels)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(_digits().images[index])

    def label(self, index: int) -> int:
        return int(_digits().labels[index])

    def fingerprint(self) -> str:
        return _digest([self.spec, str(_digits().images.shape)])


class _Digits(NamedTuple):
    images: np.ndarray  # (10000, 28, 28) uint8
    labels: np.ndarray  # (10000,) uint8


@functools.cache
def _digits() -> _Digits:
    """Decompressed once per process (about 0.1 s)."""
    return _Digits(_read_idx("t10k-images-idx3-ubyte.gz"), _read_idx("t10k-labels-idx1-ubyte.gz"))


def _read_idx(file: str) -> np.ndarray:
    """The idx format: 2 zero bytes, the type (8 is uint8), the number of axes, each length as int32, then the data."""
    compressed = importlib.resources.files("vqdist.data").joinpath("digits", file).read_bytes()
    content = gzip.decompress(compressed)
    assert content[:3] == b"\0\0\x08", f"{file} is not an idx file of bytes"
    axes = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=axes, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


class SyntheticSource(Source):
    """Pictures computed from their index: a colour gradient, whose hue goes with the label, under three soft spots.

    Args:
        spec: `synthetic` or `synthetic:LENGTH`.
    """

    SIDE = 64

    def __init__(self, spec: str = "synthetic"):
        self.spec = spec
        length = spec.partition(":")[2] or "100"
        if not length.isdecimal() or int(length) < 1:
            raise UserError(f"{spec!r} has the length {length!r}; give a number of images from 1, as in synthetic:100")
        self.length = int(length)

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Image.Image:
        random = np.random.RandomState(derive_seed("synthetic", index) % 2**32)  # its streams never change
        y, x = np.mgrid[: self.SIDE, : self.SIDE] / self.SIDE
        angle = random.uniform(0, 2 * np.pi)
        slope = 0.5 + 0.5 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
        picture = slope[..., None] * _hue(self.label(index) / 10)
        for _ in range(3):
            centre_y, centre_x, radius = random.uniform([0, 0, 0.08], [1, 1, 0.25])
            spot = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / radius**2)[..., None]
            picture = (1 - spot) * picture + spot * random.uniform(0, 1, size=3)
        return Image.fromarray(np.rint(picture.clip(0, 1) * 255).astype(np.uint8))

    def label(self, index: int) -> int:
        return derive_seed("synthetic label", index) % 10

    def fingerprint(self) -> str:
        return _digest(["synthetic", str(self.length)])


def _hue(share: float) -> np.ndarray:
    """A saturated colour (3,) in [0, 1] at this share of the colour circle."""
    return 0.5 + 0.5 * np.cos(2 * np.pi * (share + np.array([0, 1 / 3, 2 / 3])))


class DummyDataset(Dataset):
    """The `synthetic` source as a torch dataset, for smoke tests: items are ((3, 64, 64) float32 in [0, 1], label)."""

    def __init__(self, length: int = 100):
        self.source = SyntheticSource(f"synthetic:{length}")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = _checked_index(index, len(self))
        return self.source.tensor(index, image_size=64, channels=3), self.source.label(index)


# --------------------------------------------------------------------------------------- torchvision


class TorchvisionSource(Source):
    """A dataset class of torchvision. Workers that are spawned open it again from its files.

    Args:
        spec: `torchvision:NAME[:SPLIT][?key=value&...]`, see the top of this module.
    """

    RESERVED = ("download", "transform", "transforms", "target_transform")

    def __init__(self, spec: str):
        self.spec = spec
        body, self._options = _split_options(spec)
        self.class_name, _, self.split = body.partition(":")
        self._class = _torchvision_class(self.class_name)
        self.flip = not DIGIT_LIKE.search(self.class_name)
        for key in self.RESERVED:
            if key in self._options:
                raise UserError(f"{spec!r} sets {key}, which vqdist decides itself; leave it out")
        default_root = data_cache() / "torchvision"
        self.root = _absolute(self._options.pop("root", str(default_root)))
        self._dataset = self._open_or_download()

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
                return _as_label(values[index])
        item = dataset[index]
        return _as_label(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else None

    def name(self, index: int) -> str:
        return f"torchvision:{self.class_name}{f':{self.split}' if self.split else ''}[{index}]"

    def fingerprint(self) -> str:
        length = len(self)
        probes = np.linspace(0, length - 1, num=min(length, 16)).astype(int)
        labels = [self.label(int(index)) for index in probes]
        return _digest(["torchvision", self.class_name, self.split, repr(sorted(self._options.items())), repr(labels)])

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
                f"torchvision:{self.class_name} is not in {self.root} ({_reason(absent)}) and torchvision cannot "
                "download it; get its files as torchvision's documentation says and give their folder with ?root="
            ) from absent
        try:
            return self._download()
        except (ImportError, UserError):
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
            f"torchvision:{self.class_name} is not in {self.root} and could not be downloaded ({_reason(error)}); "
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
                f"{self.spec!r} does not fit torchvision.datasets.{self.class_name} ({_reason(error)}); its "
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
        lowered = {key.lower(): key for key in classes}
        near = [lowered[key] for key in difflib.get_close_matches(name.lower(), lowered, n=3)]
        hint = f"the nearest are {', '.join(near)}" if near else "see torchvision.datasets for the names"
        raise UserError(f"torchvision has no dataset {name!r}; {hint}")
    return classes[name]


def _parameters(cls: type) -> list[str]:
    """The names that a constructor takes, with those that it passes on to its base class."""
    names: list[str] = []
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        names += [
            p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in names
        ]
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            break
    return names


def _split_argument(spec: str, split: str, known: list[str]) -> dict[str, Any]:
    """How this class is told its split; `train` first, for EMNIST has a `split` that means something else."""
    if "train" in known:
        if split not in ("train", "test"):
            raise UserError(f"{spec!r} asks for the split {split!r}; this dataset has the splits train and test")
        return {"train": split == "train"}
    for key in ("split", "image_set"):
        if key in known:
            return {key: split}
    raise UserError(f"{spec!r} asks for the split {split!r}, and this dataset has no splits; leave it out")


# ---------------------------------------------------------------------------------------- webdataset


class WebDatasetSource(Source):
    """Samples of tar files, by index: the headers are read once, an image is one seek and one read.

    A sample is the files of a tar that share their path up to the first dot of the file name, as in webdataset. Shards
    are opened for each read, so that nothing is shared between processes.

    Args:
        spec: `wds:SHARDS`, see the top of this module.
        exts: see `open_source`.
    """

    def __init__(self, spec: str, *, exts: Iterable[str] | str | None = None):
        self.spec = spec
        self._exts = _normalise_extensions(exts)
        self.shards = [_local_shard(url) for url in _expand_shards(spec)]
        samples = [(shard, *sample) for shard in range(len(self.shards)) for sample in self._index(shard)]
        if not samples:
            raise UserError(
                f"no images in the {len(self.shards)} tar files of {spec!r}; expected entries ending in "
                f"{', '.join(self._exts)}"
            )
        self._names = PackedStrings(name for _, name, _, _ in samples)
        self._places = np.array([(shard, *image, *label) for shard, _, image, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def image(self, index: int) -> Image.Image:
        shard, offset, size = self._places[index, :3]
        return open_image(io.BytesIO(self._read(index, shard, offset, size)), name=self.name(index))

    def label(self, index: int) -> int | None:
        shard, (offset, size) = self._places[index, 0], self._places[index, 3:]
        if offset < 0:
            return None
        text = self._read(index, shard, offset, size).decode("utf-8", "replace").strip()
        if not text.removeprefix("-").isdecimal():
            raise UserError(f"the entry cls of {self.name(index)} is {text[:40]!r}; a whole number is expected")
        return int(text)

    def name(self, index: int) -> str:
        return f"{self.shards[self._places[index, 0]]}:{self._names[index]}"

    def fingerprint(self) -> str:
        """By the shards' file names, not their folder, which may differ between nodes."""
        shards = [os.path.basename(path) for path in self.shards]
        rows = zip(self._places[:, 0], self._names, self._places[:, 2])
        return _digest(f"{shards[shard]}\0{name}\0{size}" for shard, name, size in rows)

    def _read(self, index: int, shard: int, offset: int, size: int) -> bytes:
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise undecodable(self.name(index), error) from error
        if len(content) < size:
            raise undecodable(self.name(index), f"the tar file ends {size - len(content)} bytes too early")
        return content

    def _index(self, shard: int) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """(name, place of the image, place of the label or (-1, 0)) of each sample of a tar, in its order."""
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in _tar_members(self.shards[shard]):
            key, suffix = _sample_key(member.name)
            if key is None:
                continue
            if suffix in samples.setdefault(key, {}):
                raise UserError(f"{self.shards[shard]} holds {member.name} twice; pack it again with different names")
            samples[key][suffix] = member
        return [sample for entries in samples.values() if (sample := self._sample(entries))]

    def _sample(self, entries: dict[str, tarfile.TarInfo]) -> tuple[str, tuple[int, int], tuple[int, int]] | None:
        # `jpg` before `mask.jpg`: what belongs to the image has a longer suffix
        images = sorted((suffix.count("."), suffix) for suffix in entries if _extension(f".{suffix}") in self._exts)
        if not images:
            return None
        image, label = entries[images[0][1]], entries.get("cls")
        label_place = (label.offset_data, label.size) if label else (-1, 0)
        return image.name, (image.offset_data, image.size), label_place


def _expand_shards(spec: str) -> list[str]:
    """The paths and addresses that a spec names, in its order."""
    pattern = spec.partition(":")[2]
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise UserError(_missing_package(spec, "webdataset")) from error
    try:
        urls = expand_urls(pattern)
    except (AssertionError, ValueError) as error:  # an unset ${variable}, unbalanced braces
        raise UserError(f"{spec!r} cannot be expanded ({_reason(error)}); check its braces") from error
    shards = [path for url in urls for path in _matching_files(url)]
    if not shards:
        raise UserError(f"no tar file matches {spec!r}; check the path")
    return shards


def _matching_files(url: str) -> list[str]:
    if url.startswith("pipe:"):
        raise UserError(f"{url!r} would run a command; give files or addresses, wds: reads at any position")
    if _is_remote(url):
        return [url]
    path = _absolute(url.removeprefix("file:"))
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    return sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]


def _is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file:")


def _local_shard(url: str) -> str:
    """The path of a shard; a remote one is downloaded by one process of a node while the others wait."""
    if not _is_remote(url):
        return url
    from filelock import FileLock  # torch needs it too
    from webdataset.cache import download

    folder = data_cache() / "wds" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / (url.partition("?")[0].rstrip("/").rpartition("/")[2] or "shard.tar")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            try:
                download(url, str(path))
            except Exception as error:  # each scheme has its own errors
                raise UserError(f"cannot download {url} ({_reason(error)}); copy the tar files here") from error
    return str(path)


def _tar_members(path: str) -> list[tarfile.TarInfo]:
    if not os.path.isfile(path):
        raise UserError(f"no such tar file: {path}; check the path and the numbers between the braces")
    try:
        with tarfile.open(path, "r:") as tar:
            return [member for member in tar if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"cannot read the tar file {path} ({_reason(error)}); it must be whole, and not compressed: fetch or "
            "pack it again"
        ) from error


def _sample_key(name: str) -> tuple[str | None, str]:
    """Split at the first dot of the file name, as webdataset does: `a/b.c.jpg` -> (`a/b`, `c.jpg`)."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    hidden = not stem or not dot or stem.startswith("__")
    return (None, "") if hidden else (folder + slash + stem, suffix.lower())


# ------------------------------------------------------------------------------ Hugging Face datasets


class HuggingFaceSource(Source):
    """A dataset of the `datasets` library: the images stay in its memory-mapped files.

    Args:
        spec: `hf:NAME[:SPLIT][?key=value&...]`, see the top of this module.
    """

    def __init__(self, spec: str):
        self.spec = spec
        body, options = _split_options(spec)
        self._check_keys(options)
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
        return None if self._labels is None else _as_label(self._labels[index][self._label_column])

    def name(self, index: int) -> str:
        return f"hf:{self.dataset_name}{f':{self.split}' if self.split else ''}[{index}]"

    def fingerprint(self) -> str:
        """By length, columns and a few labels; not by the folder, which may differ between nodes."""
        length = len(self)
        probes = np.linspace(0, length - 1, num=min(length, 16)).astype(int)
        labels = [self.label(int(index)) for index in probes]
        name = os.path.basename(self.dataset_name.rstrip("/"))
        return _digest(["hf", name, self.split, str(length), self._features, repr(labels)])

    def _check_keys(self, options: dict[str, str]) -> None:
        for key in options:
            if key not in ("config", "image", "label"):
                raise UserError(f"{self.spec!r} has the key {key!r}; hf: knows config, image and label")


def _load_hugging_face(spec: str, name: str, split: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(_missing_package(spec, "datasets")) from error
    folder = os.path.expanduser(name)
    if name.startswith(("/", ".", "~")) and not os.path.isdir(folder):
        raise UserError(f"no such folder: {_absolute(name)}; check the path in {spec!r}")
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
            f"{spec!r} could not be loaded ({_reason(error)}); check the name, configuration and split, or, "
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
    plain = [name for name in ("label",) if name in dataset.features]
    return wanted or next(iter(preferred + classes + plain), None)


def _encoded_images(dataset: Any, column: str) -> Any:
    from datasets import Image as ImageFeature

    return dataset.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))


# ------------------------------------------------------------------------------------- a user's tensors


class TensorSource(Source):
    """Any map-style dataset whose items are ready-made tensors, or (tensor, label): nothing is transformed.

    Args:
        dataset: gives float tensors (c, h, w) in [0, 1] of the size and channels that are trained on.

    Raises:
        UserError: at construction if the dataset has no length or is empty; at an item if it is something else.
    """

    flip = False
    TOLERANCE = 1e-3
    """How far beyond [0, 1] a value may lie: as far as an interpolation overshoots in float16."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.spec = type(dataset).__name__
        map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not map_style or isinstance(dataset, IterableDataset):
            raise UserError(
                f"{dataset!r} is not a source of images; give {FORMS}, or a dataset with __len__ and __getitem__"
            )
        if len(dataset) == 0:
            raise UserError(f"the dataset {self.spec} is empty; give one with at least one image")

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        return tensor_to_image(self._item(index)[0])

    def label(self, index: int) -> int | None:
        return _as_label(self._item(index)[1])

    def fingerprint(self) -> str:
        """By type and length only: what else a dataset holds cannot be known without reading it."""
        return _digest(["tensors", self.spec, str(len(self))])

    def tensor(self, index: int, *, image_size: int, channels: int, rng: torch.Generator | None = None) -> Tensor:
        image = self._item(index)[0]
        expected = (channels, image_size, image_size)
        if tuple(image.shape) != expected:
            raise UserError(
                f"{self.name(index)} has the shape {tuple(image.shape)}; expected {expected} (channels, image_size, "
                "image_size): let the dataset resize, or set image_size and channels to what it gives"
            )
        low, high = image.aminmax()
        if not (low >= -self.TOLERANCE and high <= 1 + self.TOLERANCE):  # NaN fails, too
            raise UserError(
                f"{self.name(index)} has values from {low:.4g} to {high:.4g}; expected [0, 1]: leave normalisation "
                "out of the dataset"
            )
        return image.float()

    def _item(self, index: int) -> tuple[Tensor, Any]:
        item = self.dataset[index]
        image, label = (
            (item[0], item[1] if len(item) > 1 else None) if isinstance(item, tuple | list) else (item, None)
        )
        if not isinstance(image, Tensor) or not image.is_floating_point():
            found = f"tensor of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f"{self.name(index)} is a {found}; expected a float tensor (c, h, w) in [0, 1], alone or as (tensor, "
                "label): give the dataset a transform such as torchvision.transforms.ToTensor()"
            )
        return image, label


# -------------------------------------------------------------------------------------------- dataset


class ImageDataset(Dataset):
    """The images of a source as tensors of one size; what comes out depends on (seed, epoch, index) only.

    `dataset[index]` is the image in epoch 0, `dataset[epoch, index]` in another; both are (c, h, w) float32 in [0, 1].
    `dataset.fetch` also tells which files were broken. The shorter side is resized to `image_size` and the centre cut
    out; training images are mirrored with probability 0.5 where the source allows it (not digits).

    Args:
        source: a spec (see the top of this module), a `Source`, another `ImageDataset` of the same size and channels
            (its images are looked at anew; augmented only if both are), or any map-style dataset of float tensors
            (c, h, w) in [0, 1], which are taken as they are.
        image_size: side in pixels.
        channels: 1, 3 or 4.
        exts: file name extensions to read from a folder or tar files; by default every image format that is known.
        augment: False gives the view for validation.
        seed: of the augmentation.
        on_bad_image: what to do with an image that cannot be decoded: `raise`, or `skip`, which puts the next good
            image in its place.

    Raises:
        UserError: a wrong argument, or a source that cannot be opened or is empty.
    """

    ON_BAD_IMAGE = ("raise", "skip")

    def __init__(
        self,
        source: Source | Dataset | str | os.PathLike,
        image_size: int,
        *,
        channels: int = 3,
        exts: Iterable[str] | str | None = None,
        augment: bool = True,
        seed: int = 0,
        on_bad_image: str = "raise",
    ):
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise UserError(
                f"image_size {image_size!r} is not possible; give the side in pixels, a whole number from 1"
            )
        check_channels(channels)
        if on_bad_image not in self.ON_BAD_IMAGE:
            raise UserError(f"on_bad_image {on_bad_image!r} is not known; choose {' or '.join(self.ON_BAD_IMAGE)}")
        if isinstance(source, ImageDataset):
            source, augment = source._source_for(image_size, channels), augment and source.augment
        self.source = _as_source(source, exts)
        self.image_size = image_size
        self.channels = channels
        self.augment = augment
        self.seed = seed
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: int | tuple[int, int]) -> Tensor:
        epoch, index = place if isinstance(place, tuple) else (0, place)
        return self.fetch(epoch, index)[0]

    def fetch(
        self, epoch: int, index: int, *, among: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """One image, and the names of the broken ones that were passed over to find it.

        With `on_bad_image="skip"` a broken image is replaced by the next good one: index + 1, index + 2, ... and on
        from the start after the last. The augmentation stays that of `index`.

        Args:
            epoch: from 0.
            index: 0 <= index < len, or counted from the end if negative.
            among: sorted indices to replace from, so that a split never gives an image of the other; by default all.

        Returns:
            (c, h, w) float32 in [0, 1]; the names.

        Raises:
            IndexError: there is no such index.
            BadImageError: the image cannot be decoded and `on_bad_image` is `raise`.
            UserError: not one image can be decoded.
        """
        index = _checked_index(index, len(self))
        bad: list[str] = []
        first: BadImageError | None = None
        for candidate in self._candidates(index, among):
            try:
                return self._view(epoch, index, candidate), tuple(bad)
            except BadImageError as error:
                if self.on_bad_image == "raise":
                    raise
                bad.append(self.source.name(candidate))
                first = first or error
        raise UserError(f"none of the {len(bad)} images could be decoded; first: {first}")

    def label(self, index: int) -> int | None:
        """The class of the image at an index (of this very index, also where a broken image is replaced)."""
        return self.source.label(_checked_index(index, len(self)))

    def name(self, index: int) -> str:
        """The path or name of the image at an index."""
        return self.source.name(_checked_index(index, len(self)))

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return self.source.fingerprint()

    def _source_for(self, image_size: int, channels: int) -> Source:
        if (self.image_size, self.channels) != (image_size, channels):
            raise UserError(
                f"the dataset has image_size {self.image_size} and channels {self.channels}; expected {image_size} "
                f"and {channels}: build it with these, or change the options"
            )
        return self.source

    def _view(self, epoch: int, index: int, candidate: int) -> Tensor:
        rng = None
        if self.augment and self.source.flip:
            rng = torch.Generator().manual_seed(derive_seed("augmentation", self.seed, epoch, index))
        return self.source.tensor(candidate, image_size=self.image_size, channels=self.channels, rng=rng)

    def _candidates(self, index: int, among: Sequence[int] | Tensor | None) -> Iterator[int]:
        yield index
        others = np.arange(len(self)) if among is None else np.asarray(among)
        start = int(np.searchsorted(others, index, side="right"))
        for offset in range(len(others)):
            candidate = int(others[(start + offset) % len(others)])
            if candidate != index:
                yield candidate


def _as_source(source: Source | Dataset | str | os.PathLike, exts: Iterable[str] | str | None) -> Source:
    if source is None or isinstance(source, str | os.PathLike):
        return open_source(source, exts=exts)
    if exts is not None:
        raise UserError(f"exts {exts!r} has no meaning for a {type(source).__name__} that is open; leave it out")
    return source if isinstance(source, Source) else TensorSource(source)


# ---------------------------------------------------------------------------------------------- parts


class PackedStrings(Sequence):
    """Many strings in two arrays. A list of a million strings is copied into every forked worker, a string at a time,
    as reading one writes its reference count; arrays stay shared.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = _checked_index(index, len(self))
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")


def data_cache() -> Path:
    """Where downloads go: the environment variable `VQDIST_DATA`, or `~/.cache/vqdist`."""
    return Path(os.environ.get("VQDIST_DATA") or "~/.cache/vqdist").expanduser()


def _normalise_extensions(exts: Iterable[str] | str | None) -> tuple[str, ...]:
    if exts is None:
        return IMAGE_EXTENSIONS
    names = exts.replace(",", " ").split() if isinstance(exts, str) else list(exts)
    if not names:
        raise UserError(f"exts is empty; give extensions such as {', '.join(IMAGE_EXTENSIONS)}, or leave it out")
    return tuple(sorted({name.strip().removeprefix("*").removeprefix(".").lower() for name in names}))


def _extension(path: str) -> str:
    """The extension in lower case without its dot, '' if there is none."""
    return path.rpartition("/")[2].rpartition(".")[2].lower() if "." in path.rpartition("/")[2] else ""


def _split_options(spec: str) -> tuple[str, dict[str, str]]:
    """`kind:BODY?key=value&key=value` -> (BODY, {key: value})."""
    body, mark, query = spec.partition(":")[2].partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")] if mark else []
    for key, equals, value in pairs:
        if not key or not equals or not value:
            raise UserError(f"{spec!r} has {key + equals + value!r} after its question mark; give key=value&key=value")
    if not body:
        raise UserError(f"the data source {spec!r} has no name; give {FORMS}")
    return body, {key: value for key, _, value in pairs}


def _literal(value: str) -> Any:
    """A Python value if it reads as one (`3`, `True`, `(3, 32, 32)`), else the text."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _as_label(value: Any) -> int | None:
    if isinstance(value, Tensor | np.ndarray):
        value = value.item() if value.ndim == 0 else None
    return int(value) if isinstance(value, int | np.integer) else None


def _checked_index(index: int, length: int) -> int:
    index = operator.index(index)
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for {length} items")
    return index % length


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _reason(error: Exception) -> str:
    """The error in one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 240 else f"{text[:240]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _missing_package(spec: str, package: str) -> str:
    return f"{spec!r} needs the package {package}, which is not installed; run `pip install 'vqdist[data]'`"


OPENERS: dict[str, type[Source]] = {
    "digits": DigitsSource,
    "synthetic": SyntheticSource,
    "torchvision": TorchvisionSource,
    "wds": WebDatasetSource,
    "hf": HuggingFaceSource,
}
