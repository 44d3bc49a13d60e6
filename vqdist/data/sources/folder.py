"""`DIR`: every image below a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from vqdist.data.images import open_image
from vqdist.data.sources.base import (
    PackedStrings,
    Source,
    digest_of,
    extension_of,
    normalise_extensions,
)
from vqdist.data.specs import absolute_path
from vqdist.errors import UserError


class FolderSource(Source):
    """Every image below a folder, sorted by its relative path.

    The label is the number of the first-level subfolder, in sorted order, when every image lies in one.

    Args:
        folder: path; `~` is expanded.
        exts: see `open_source`.
    """

    def __init__(self, folder: str | os.PathLike, *, exts: Iterable[str] | str | None = None):
        self.spec = os.fspath(folder)
        self.folder = absolute_path(self.spec)
        self._paths = PackedStrings(_list_images(self.folder, normalise_extensions(exts)))
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
        return digest_of(f"{path}\0{_size(os.path.join(self.folder, path))}" for path in self._paths)


def _list_images(folder: str, exts: tuple[str, ...]) -> list[str]:
    if not os.path.exists(folder):
        raise UserError(f"no such folder: {folder}; check the path")
    if not os.path.isdir(folder):
        hint = f"; tar files are given as `wds:{folder}`" if folder.lower().endswith(".tar") else ""
        raise UserError(f"{folder} is a file, and a folder of images is expected; give the folder it lies in{hint}")
    files = list(_walk(folder, "", (os.path.realpath(folder),)))
    images = sorted(path for path in files if extension_of(path) in exts)
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
    """Describe the files in place of images: `found 3 .txt and 1 .csv files`."""
    if not files:
        return "found no files"
    counts = Counter(f".{extension_of(path)}" if extension_of(path) else "(no extension)" for path in files)
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
