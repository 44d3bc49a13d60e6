"""`digits`: the MNIST test images that come with the package, in vqdist/data/digits/."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
from typing import NamedTuple

import numpy as np
from PIL import Image

from vqdist.data.sources.base import Source, digest_of
from vqdist.errors import UserError


class DigitsSource(Source):
    """The 10,000 MNIST test images of this package: 28 x 28 grey, labels 0 to 9, not to be mirrored."""

    flip = False
    class_names = tuple("0123456789")

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
        return digest_of([self.spec, str(_digits().images.shape)])


class _Digits(NamedTuple):
    images: np.ndarray  # (10000, 28, 28) uint8
    labels: np.ndarray  # (10000,) uint8


@functools.cache
def _digits() -> _Digits:
    """Decompressed once per process (about 0.1 s)."""
    return _Digits(_read_idx("t10k-images-idx3-ubyte.gz"), _read_idx("t10k-labels-idx1-ubyte.gz"))


def _read_idx(file: str) -> np.ndarray:
    """Read the idx format.

    It holds 2 zero bytes, the type (8 is uint8), the number of axes, each length as int32, then the data.
    """
    compressed = importlib.resources.files("vqdist.data").joinpath("digits", file).read_bytes()
    content = gzip.decompress(compressed)
    assert content[:3] == b"\0\0\x08", f"{file} is not an idx file of bytes"
    axes = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=axes, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)
