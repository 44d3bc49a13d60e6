"""The options of the data, for every trainer and for the command line's `--data.*`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vqdist.errors import UserError
from vqdist.options import check_options, option
from vqdist.parts import Registry, import_path

CODES = "codes:"
"""The beginning of the name of a folder of stored codes, where images could be given, too."""


MAX_PIXELS = 2 * 89_478_485
"""Pixels of the largest image that is decoded: Pillow's own limit against decompression bombs."""

MAX_BAD_FRAC = 0.01

CROPS = ("center", "random", "resized")
RESAMPLES = ("bicubic", "bilinear", "lanczos")
RANGES = ("shorter_side", "crop_area", "crop_aspect")

CENTERS: dict[str, tuple[str | None, str]] = {
    "exact": (None, "shorter side resized ({resample}, antialiased), centre"),
    "adm": ("bicubic", "halved by a box filter while twice too large, shorter side resized ({resample}), centre"),
    "torchvision": ("bicubic", "shorter side resized ({resample}, antialiased), centre at a whole pixel"),
    "albumentations": ("bilinear", "shorter side resized ({resample}, not antialiased), centre at a whole pixel"),
}
"""The ways to cut out the centre, with the filter of each and a description. All but `exact` are of publications."""


@dataclass(kw_only=True, frozen=True)
class View:
    """One look at an image, see `vqdist.data.views`; the options of `DataConfig` with the same names say it.

    Raises:
        UserError: a value is not possible.
    """

    crop: str = option("center", one_of=CROPS)
    shorter_side: Sequence[float] = option((1.0, 1.0), at_least=1, at_most=16)
    crop_area: Sequence[float] = option((0.08, 1.0), above=0, at_most=1)
    crop_aspect: Sequence[float] = option((3 / 4, 4 / 3), above=0, at_most=100)
    resample: str = option("bicubic", one_of=RESAMPLES)
    flip: bool = True
    center: str = option("exact", one_of=tuple(CENTERS))

    def __post_init__(self) -> None:
        check_options(self)
        wanted = CENTERS[self.center][0]
        if wanted not in (None, self.resample):
            raise UserError(f"resample {self.resample} is given but center {self.center} is of {wanted}; give that")
        for name in RANGES:
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or len(given) != 2 or given[0] > given[1]:
                raise UserError(f"{name} {given!r} is not possible; give the lowest and the highest value, as [1, 2]")

    def described(self) -> str:
        """Return a sentence of how an image comes to its size where nothing is drawn at random."""
        return CENTERS[self.center][1].format(resample=self.resample)


STILL = View()
"""The centre, bicubic; of the random things the flip alone."""

VIEW_OPTIONS = tuple(f.name for f in fields(View) if f.name != "center")
"""Fields of a view that are options of training; the centres of publications are for measurements."""


@dataclass(kw_only=True, frozen=True)
class DataConfig:
    """Which images, of which size, split and loaded how."""

    folder: str | dict[str, Any] | None = option(None, free=True, own=True, part="vqdist.registries.SOURCES")
    """Image folder, `digits`, `synthetic`, `torchvision:NAME`, `wds:URL-{000..099}.tar`, `hf:NAME`, `class_path`."""
    image_size: int = option(at_least=1)
    """Side of the square training images in pixels."""
    exts: list[str] | str | None = option(None, free=True)
    """File name extensions to read from a folder; by default every image format that is known."""
    augment: bool = True
    """Random flips and crops while training; false trains on images as they are validated on."""
    flip: bool = True
    """Random horizontal flips while training; sources such as digits, which change when mirrored, are not flipped."""
    crop: str = "center"
    """Crop while training: `center`, `random` place, or `resized` (random area and aspect ratio, stretched)."""
    shorter_side: list[float] = option(default_factory=lambda: [1.0, 1.0])
    """Range of the shorter side before a `random` crop, as a multiple of image_size; LlamaGen has [1, 1.25]."""
    crop_area: list[float] = option(default_factory=lambda: [0.08, 1.0])
    """Range of the area of a `resized` crop, as a share of the image."""
    crop_aspect: list[float] = option(default_factory=lambda: [3 / 4, 4 / 3])
    """Range of the aspect ratio (width / height) of a `resized` crop."""
    resample: str = "bicubic"
    """Filter of every resize, of images to validate on too: `bicubic`, `bilinear` or `lanczos`, antialiased."""
    on_bad_image: str = option("raise", one_of=("raise", "skip"), free=True)
    """A file that cannot be decoded is an error (`raise`), or left out, counted and reported (`skip`)."""
    max_bad_frac: float = option(MAX_BAD_FRAC, at_least=0, at_most=1, free=True)
    """Largest share of images that `skip` may skip (one is always allowed); a run with more of them ends."""
    max_pixels: int = option(MAX_PIXELS, at_least=1, at_most=MAX_PIXELS, free=True)
    """Pixels of the largest image that is decoded; a larger one counts as broken."""
    valid: str | dict[str, Any] | None = option(None, free=True, own=True, part="vqdist.registries.SOURCES")
    """Images to validate on, as an official validation set, given as `folder` is; in place of valid_frac."""
    valid_images: int | None = option(None, at_least=1)
    """Validate on so many of these images at most, drawn by random_split_seed; by default on all."""
    valid_frac: float = 0.05
    """Share of the images that is held out for validation, where valid gives none; 0 turns validation off."""
    random_split_seed: int = 42
    """Seed of the split into training and validation images, and of the draw of valid_images."""
    num_workers: int | None = option(None, at_least=0, free=True, own=True)
    """Loader processes of each rank; by default up to 4, as the cores allow. 0 loads in the training process."""
    prefetch_factor: int = option(2, at_least=1, free=True, own=True)
    """Micro-batches that each loader process keeps ready."""
    pin_memory: bool | None = option(None, free=True, own=True)
    """Page-locked host memory for faster copies; by default on a CUDA device only."""

    @property
    def view(self) -> View:
        """The view of an image while training."""
        return View(**{name: getattr(self, name) for name in VIEW_OPTIONS})

    @classmethod
    def part_options(cls) -> dict[tuple[str, str], Registry[Any]]:
        """Return the options that take a part, by group of the command line and name, with the kind of part.

        Such a field has the import path of its registry in its metadata: `field(..., metadata={"part": "..."})`.
        """
        data = {f.name for f in fields(DataConfig)}
        return {
            ("data" if f.name in data else "trainer", f.name): import_path(f.metadata["part"])
            for f in fields(cls)
            if "part" in f.metadata
        }
