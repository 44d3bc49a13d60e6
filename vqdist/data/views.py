"""Views of an image: crop, resize and flip as pure functions of (image, rng). No state outlives a call.

Legend: a size is (width, height) as Pillow has it; a box is (left, top, right, bottom) in pixels of the source.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from vqdist.data.config import View
from vqdist.sizes import ImageSize, sides_of

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's filters by name, all antialiased when an image shrinks."""

Box = tuple[float, float, float, float]
TRIES = 10  # of a crop that fits into the image, as torchvision has them


def apply_view(
    image: Image.Image, image_size: ImageSize, view: View, rng: torch.Generator | None, *, flip: bool
) -> Image.Image:
    """Return an image as a view shows it, in one resampling.

    Args:
        image: mode `L`, `RGB` or `RGBA`.
        image_size: of the result.
        view: which crop and filter.
        rng: all the chance in it; None gives the centre, whatever the crop.
        flip: whether the image may be mirrored, left to right with probability 0.5; without `rng` it is not.
    """
    # drawn first, so that the flips are those of runs from before there was a choice of crops
    mirrored = rng is not None and flip and _uniform(rng, 0, 1) < 0.5
    if rng is None or view.crop == "center":
        shown = centre_of(image, image_size, view)
    else:
        rows, columns = sides_of(image_size)
        draw = random_box if view.crop == "random" else random_area_box
        shown = image.resize((columns, rows), FILTERS[view.resample], box=draw(image.size, image_size, view, rng))
    return ImageOps.mirror(shown) if mirrored else shown


def centre_of(image: Image.Image, image_size: ImageSize, view: View) -> Image.Image:
    """Return the centre of an image, cut out as `view.center` says; those of publications are square."""
    if view.center == "exact":
        return resize_and_crop(image, image_size, view.resample)
    side, shorter = min(sides_of(image_size)), min(image.size)
    while view.center == "adm" and shorter >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        shorter = min(image.size)
    # torchvision rounds the longer side down, the others to the nearest whole pixel
    if view.center == "torchvision":
        width, height = (side * length // shorter for length in image.size)
    else:
        width, height = (round(length * (side / shorter)) for length in image.size)
    if view.center == "albumentations":
        resized = _without_antialiasing(image, (width, height))
    else:
        resized = image.resize((width, height), FILTERS[view.resample])
    halves = ((width - side) / 2, (height - side) / 2)
    left, top = (round(half) if view.center == "torchvision" else int(half) for half in halves)
    return resized.crop((left, top, left + side, top + side))


def _without_antialiasing(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image resized by bilinear interpolation between its pixels alone, as OpenCV's default does it."""
    if image.size == size:
        return image
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)[None]
    resized = interpolate(pixels.float(), size=size[::-1], mode="bilinear", align_corners=False)[0]
    rounded = resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(rounded[..., 0] if rounded.shape[2] == 1 else rounded)


def resize_and_crop(image: Image.Image, image_size: ImageSize, resample: str = "bicubic") -> Image.Image:
    """Resize until the result just fits in and cut out the centre, in one antialiased resampling.

    For a square result the shorter side is resized. Resampling the centred part of the source directly gives the same
    picture as resizing all of it and cropping, without computing what is cut away and without rounding a side. The
    colour of transparent pixels has no weight: PIL resamples RGBA with premultiplied alpha.

    Args:
        image: mode `L`, `RGB` or `RGBA`.
        image_size: of the result.
        resample: the filter.
    """
    (width, height), (rows, columns) = image.size, sides_of(image_size)
    scale = min(width / columns, height / rows)  # pixels of the source for one of the result
    across, down = (width, width * rows / columns) if scale == width / columns else (height * columns / rows, height)
    left, top = (width - across) / 2, (height - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize((columns, rows), FILTERS[resample], box=box)


def random_box(size: tuple[int, int], image_size: ImageSize, view: View, rng: torch.Generator) -> Box:
    """Return the part of the source that a random crop of the resized image shows.

    The shorter side is drawn in whole pixels from `view.shorter_side` times `image_size`, both ends included, and the
    crop begins at a whole pixel of the resized image. So do LlamaGen's and ADM's crops.
    """
    (width, height), (rows, columns) = size, sides_of(image_size)
    shorter = min(rows, columns)
    lowest, highest = (math.ceil(shorter * factor - 1e-9) for factor in view.shorter_side)
    factor = _whole(rng, lowest, highest) / shorter
    fit = min(width / columns, height / rows)
    across, down = max(columns, round(width / fit * factor)), max(rows, round(height / fit * factor))
    left, top = _whole(rng, 0, across - columns), _whole(rng, 0, down - rows)
    to_right, to_bottom = width / across, height / down  # pixels of the source for one of the resized image
    return left * to_right, top * to_bottom, (left + columns) * to_right, (top + rows) * to_bottom


def random_area_box(size: tuple[int, int], image_size: ImageSize, view: View, rng: torch.Generator) -> Box:
    """Return a part of random area and aspect ratio, which is stretched to the result: a random resized crop.

    The share of the area is uniform in `view.crop_area`, the logarithm of width / height in that of
    `view.crop_aspect`. Where no draw fits into the image, the largest centred part of a possible ratio is taken.
    """
    width, height = size
    lowest, highest = view.crop_aspect
    for _ in range(TRIES):
        area = width * height * _uniform(rng, *view.crop_area)
        aspect = math.exp(_uniform(rng, math.log(lowest), math.log(highest)))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = _whole(rng, 0, width - across), _whole(rng, 0, height - down)
            return left, top, left + across, top + down
    return _centre_of_ratio(size, min(max(width / height, lowest), highest))


def _centre_of_ratio(size: tuple[int, int], aspect: float) -> Box:
    width, height = size
    across, down = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=rng).item()


def _whole(rng: torch.Generator, low: int, high: int) -> int:
    """Return a whole number, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=rng))
