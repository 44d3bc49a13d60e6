"""`wds:SHARDS`: samples of local or remote tar files, addressed by index."""

from __future__ import annotations

import glob
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

from vqdist.data.images import open_image, undecodable
from vqdist.data.sources.base import (
    USUAL_EXTENSIONS,
    PackedStrings,
    Source,
    data_cache,
    digest_of,
    extension_of,
    missing_package,
    normalise_extensions,
    reason_of,
    words_of,
)
from vqdist.data.sources.tar_index import Member, tar_members
from vqdist.data.specs import absolute_path
from vqdist.errors import UserError

LABEL = re.compile(r"-?[0-9]{1,9}")
LONGEST_LABEL = 64  # bytes
MOST_SHARDS = 1_000_000
RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.-?[0-9]+)?\}")
LIST = re.compile(r"\{[^{}]*,[^{}]*\}")


class WebDatasetSource(Source):
    """Samples of tar files, by index: the headers are read once, an image is one seek and one read.

    A sample is the files of a tar that share their path up to the first dot of the file name, as in webdataset. Shards
    are opened for each read, so that nothing is shared between processes.

    Args:
        spec: `wds:SHARDS`, see `vqdist.data.sources`.
        exts: see `open_source`.
    """

    def __init__(self, spec: str, *, exts: Iterable[str] | str | None = None):
        self.spec = spec
        self._exts = normalise_extensions(exts)
        self.shards = [_local_shard(url) for url in _expand_shards(spec)]
        samples = [(shard, *sample) for shard in range(len(self.shards)) for sample in self._index(shard)]
        if not samples:
            raise UserError(
                f"no images in the {len(self.shards)} tar files of {spec!r}; expected entries ending in "
                f"{words_of(self._exts)}"
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
        text = self._read(index, shard, offset, min(size, LONGEST_LABEL)).decode("utf-8", "replace").strip()
        if not LABEL.fullmatch(text) or size > LONGEST_LABEL:
            raise UserError(f"the entry cls of {self.name(index)} is {text[:40]!r}; a whole number is expected")
        return int(text)

    def name(self, index: int) -> str:
        return f"{self.shards[self._places[index, 0]]}:{self._names[index]}"

    def fingerprint(self) -> str:
        """By the shards' file names, not their folder, which may differ between nodes."""
        shards = [os.path.basename(path) for path in self.shards]
        rows = zip(self._places[:, 0], self._names, self._places[:, 2])
        return digest_of(f"{shards[shard]}\0{name}\0{size}" for shard, name, size in rows)

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
        samples: dict[str, dict[str, Member]] = {}
        for member in tar_members(self.shards[shard]):
            key, suffix = _sample_key(member.name)
            if key is None:
                continue
            if suffix in samples.setdefault(key, {}):
                raise UserError(f"{self.shards[shard]} holds {member.name} twice; pack it again with different names")
            samples[key][suffix] = member
        return [sample for entries in samples.values() if (sample := self._sample(entries))]

    def _sample(self, entries: dict[str, Member]) -> tuple[str, tuple[int, int], tuple[int, int]] | None:
        # `jpg` before `mask.jpg`: what belongs to the image has a longer suffix
        images = sorted(
            (suffix.count("."), extension_of(f"image.{suffix}") not in USUAL_EXTENSIONS, suffix)
            for suffix in entries
            if extension_of(f"image.{suffix}") in self._exts
        )
        if not images:
            return None
        image, label = entries[images[0][-1]], entries.get("cls")
        label_place = (label.offset, label.size) if label else (-1, 0)
        return image.name, (image.offset, image.size), label_place


def _expand_shards(spec: str) -> list[str]:
    """Return the paths and addresses that a spec names, in its order."""
    pattern = spec.partition(":")[2]
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise missing_package(spec, "webdataset") from error
    if (count := _most_combinations(pattern)) > MOST_SHARDS:
        raise UserError(f"{spec[:80]!r} names up to {count:.0e} tar files; at most {MOST_SHARDS:,} are opened")
    try:
        urls = expand_urls(pattern)
    except (AssertionError, ValueError) as error:  # an unset ${variable}, unbalanced braces
        raise UserError(f"{spec!r} cannot be expanded ({reason_of(error)}); check its braces") from error
    shards = [path for url in urls for path in _matching_files(url)]
    if not shards:
        raise UserError(f"no tar file matches {spec!r}; check the path")
    return shards


def _most_combinations(pattern: str) -> float:
    """Return an upper bound of what a pattern with braces expands to, which is not expanded for it."""
    count = 1.0
    for first, last in RANGE.findall(pattern):
        numbers = (float(first), float(last)) if max(len(first), len(last)) < 20 else (0.0, math.inf)
        count *= abs(numbers[1] - numbers[0]) + 1
    for group in LIST.findall(pattern):  # the innermost; of those around them every comma counts once more
        count *= group.count(",") + 1
    return count * (1 + LIST.sub("", pattern).count(","))


def _matching_files(url: str) -> list[str]:
    if url.startswith("pipe:"):
        raise UserError(f"{url!r} would run a command; give files or addresses, wds: reads at any position")
    if _is_remote(url):
        return [url]
    path = absolute_path(url.removeprefix("file:"))
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    return sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]


def _is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file:")


def _local_shard(url: str) -> str:
    """Return the path of a shard; a remote one is downloaded by one process of a node while the others wait."""
    if not _is_remote(url):
        return url
    from filelock import FileLock  # torch needs it too
    from webdataset.cache import download

    folder = data_cache() / "wds" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / (url.partition("?")[0].rstrip("/").rpartition("/")[2] or "shard.tar")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                download(url, str(path))
    except Exception as error:  # each scheme has its own errors; a cache that cannot be written
        raise UserError(f"cannot download {url} ({reason_of(error)}); copy the tar files here") from error
    return str(path)


def _sample_key(name: str) -> tuple[str | None, str]:
    """Split at the first dot of the file name, as webdataset does: `a/b.c.jpg` -> (`a/b`, `c.jpg`)."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    hidden = not stem or not dot or stem.startswith("__")
    return (None, "") if hidden else (folder + slash + stem, suffix.lower())
