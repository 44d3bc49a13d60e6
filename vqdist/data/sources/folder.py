"""`DIR`: every image below a folder."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from vqdist.classes import in_order, listed
from vqdist.data.images import open_image
from vqdist.data.sources.base import (
    PackedStrings,
    Source,
    digest_of,
    extension_of,
    normalise_extensions,
    words_of,
)
from vqdist.data.specs import absolute_path
from vqdist.errors import UserError, printable


class FolderSource(Source):
    """Every image below a folder, sorted by its relative path; or one image file.

    The label is the number of the first-level subfolder when every image lies in one: in sorted order, or in that of
    their numbers where all are called by numbers. Files that are passed over are counted in a line on standard error.

    Args:
        folder: path; `~` is expanded.
        exts: see `open_source`.
    """

    def __init__(self, folder: str | os.PathLike, *, exts: Iterable[str] | str | None = None):
        self.spec = os.fspath(folder)
        self.folder, images = _find_images(absolute_path(self.spec), normalise_extensions(exts))
        self._paths = PackedStrings(images)
        self.class_names, self._labels = _classes(images)

    @property
    def first_class_names(self) -> list[str] | None:
        """Return the names in sorted order, by which folders that are called by numbers were counted, too."""
        return None if self.class_names is None else sorted(self.class_names)

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


def _find_images(path: str, exts: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the folder of a source, and the paths of its images below it."""
    if os.path.isdir(path):
        return path, _list_images(path, exts)
    if not os.path.exists(path):
        raise UserError(f"no such folder: {path}; check the path")
    if extension_of(path) in exts:
        return os.path.dirname(path), [os.path.basename(path)]
    hint = f"; tar files are given as `wds:{path}`" if path.lower().endswith(".tar") else ""
    raise UserError(f"{path} is a file, and a folder of images or an image is expected; give one of both{hint}")


def _list_images(folder: str, exts: tuple[str, ...]) -> list[str]:
    files = list(_walk(folder))
    images = sorted(path for path, regular in files if regular and extension_of(path) in exts)
    if not images:
        raise UserError(
            f"no images in {folder}: {_census(files)}; expected files ending in {words_of(exts)} at any depth"
        )
    if len(images) < len(files):
        _say_what_is_passed_over(folder, images, files)
    return images


def _say_what_is_passed_over(folder: str, images: list[str], files: list[tuple[str, bool]]) -> None:
    """Write a line about the files that are no images, and the class folders of which nothing is left."""
    if int(os.environ.get("RANK") or 0):
        return
    taken = set(images)
    others = [(path, regular) for path, regular in files if path not in taken]
    line = f"{folder}: {len(images)} images; {_census(others).replace('found', 'passed over')}"
    if all("/" in path for path in images):
        lost = {path.partition("/")[0] for path, _ in others if "/" in path} - {p.partition("/")[0] for p in images}
        line += f"; no class without images: {listed(sorted(lost))}" if lost else ""
    print(f"vqdist: {printable(line)}", file=sys.stderr)


def _walk(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield all files below a folder, unsorted: the relative posix path, and whether it can be a regular file.

    Every folder is entered once, however many links lead to it: by its own path if that lies below the folder, else by
    the first link in sorted order.
    """
    seen = {_identity(folder)}
    folders, links = [""], list[str]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
        prefix = folders.pop() if folders else links.pop()
        path = os.path.join(folder, prefix)
        if prefix and not _is_new(path, seen):
            continue
        for entry in _entries(path):
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry.is_symlink() or entry.is_file()


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as scan:
            return [entry for entry in scan if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {folder} ({error.strerror}); mend its permissions") from error


def _is_new(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Note a folder as seen; return whether it was not before."""
    identity = _identity(folder)
    new = identity not in seen
    seen.add(identity)
    return new


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(
            f"cannot look at the folder {folder} ({error.strerror}); mend it, or its permissions"
        ) from error
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _census(files: list[tuple[str, bool]]) -> str:
    """Describe the files in place of images: `found 3 .txt and 1 .csv files`."""
    if not files:
        return "found no files"
    counts = Counter(_kind_of(path) if regular else "special" for path, regular in files)
    found = [f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))]
    return f"found {', '.join(found[:8])}{', ...' if len(found) > 8 else ''} file{'s' if len(files) > 1 else ''}"


def _kind_of(path: str) -> str:
    return f".{extension_of(path)}" if extension_of(path) else "(no extension)"


def _classes(paths: list[str]) -> tuple[list[str] | None, np.ndarray | None]:
    """Return the names of the classes and the label of each image, or None where some image lies in no subfolder."""
    if any("/" not in path for path in paths):
        return None, None
    folders = [path.partition("/")[0] for path in paths]
    names = in_order(list(set(folders)))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[folder] for folder in folders], dtype=np.int32)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nowhere; the image itself is refused when it is read
        return -1
