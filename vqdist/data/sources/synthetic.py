"""`synthetic`, `synthetic:LENGTH`: pictures that need no files."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vqdist.data.sources.base import Source, checked_index, digest_of
from vqdist.errors import UserError
from vqdist.seeding import derive_seed


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
        return digest_of(["synthetic", str(self.length)])


def _hue(share: float) -> np.ndarray:
    """Return a saturated colour (3,) in [0, 1] at this share of the colour circle."""
    return 0.5 + 0.5 * np.cos(2 * np.pi * (share + np.array([0, 1 / 3, 2 / 3])))


class DummyDataset(Dataset):
    """The `synthetic` source as a torch dataset, for smoke tests: items are ((3, 64, 64) float32 in [0, 1], label)."""

    def __init__(self, length: int = 100):
        self.source = SyntheticSource(f"synthetic:{length}")

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"DummyDataset({len(self)})"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = checked_index(index, len(self))
        return self.source.tensor(index, image_size=64, channels=3), self.source.label(index)
