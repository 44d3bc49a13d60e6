"""From a file to a float image in [0, 1].

    open_image(file), then image_to_tensor(image, ...) = convert_channels, crop, resize and perhaps mirror, to float

Every function is pure: what comes out depends on the arguments alone, chance included (`rng`). Images stay 8-bit PIL
images until the last step. The meaning of "right" for each kind of file:

- EXIF orientation is applied; of an animation the first frame is taken.
- 16-bit grey (`I;16` in both byte orders, `I`): 65535 is white. `I` with larger values: 2 ** 31 - 1 is white.
  Float grey (`F`): 1 is white if no value is above 1, else 65535. Values below 0 and NaN are black.
- Alpha (an alpha channel, or one transparent colour) is kept for 4 channels and laid on white for 1 and 3. Without
  alpha, the fourth channel is opaque.
- Palette, CMYK, YCbCr, HSV, Lab and 1-bit images go through RGB (1-bit through grey).
- Colour profiles are not applied: the numbers of the file are taken as sRGB.
- Metadata that cannot be read do not spoil pixels that can.

Legend: b batch, c channel, h w image.
"""

from __future__ import annotations

import ctypes
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vqdist.data.config import MAX_PIXELS, STILL, View
from vqdist.data.files import NotAnImage, is_storage_failure, read_file, storage_error
from vqdist.data.metadata import num_scans, without_metadata
from vqdist.data.views import apply_view
from vqdist.errors import UserError
from vqdist.sizes import ImageSize, sides_of

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> the PIL mode in which an image becomes a tensor."""

UNUSUAL_ALPHA = {"La": "LA", "RGBa": "RGBA"}
"""Premultiplied modes, which PIL converts to their straight form only."""

WHITE_16_BIT = 65535
WHITE_32_BIT = 2**31 - 1
BAND = 2**20  # pixels of deep grey that are scaled at once

EXTENSIONS = {
    "AVIF": ("avif", "avifs"),
    "BLP": ("blp",),
    "BMP": ("bmp",),
    "CUR": ("cur",),
    "DCX": ("dcx",),
    "DDS": ("dds",),
    "DIB": ("dib",),
    "FITS": ("fit", "fits"),
    "FLI": ("flc", "fli"),
    "FTEX": ("ftc", "ftu"),
    "GBR": ("gbr",),
    "GIF": ("gif",),
    "ICNS": ("icns",),
    "ICO": ("ico",),
    "IM": ("im",),
    "JPEG": ("jfif", "jpe", "jpeg", "jpg"),
    "JPEG2000": ("j2c", "j2k", "jp2", "jpc", "jpf", "jpx"),
    "MPO": ("mpo",),
    "MSP": ("msp",),
    "PCD": ("pcd",),
    "PCX": ("pcx",),
    "PIXAR": ("pxr",),
    "PNG": ("apng", "png"),
    "PPM": ("pbm", "pfm", "pgm", "pnm", "ppm"),
    "PSD": ("psd",),
    "QOI": ("qoi",),
    "SGI": ("bw", "rgb", "rgba", "sgi"),
    "SUN": ("ras",),
    "TGA": ("icb", "tga", "vda", "vst"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "XBM": ("xbm",),
    "XPM": ("xpm",),
}
"""The formats that are decoded, with the file name extensions of each: Pillow's, without those that start another
program (EPS) or hold no picture of pixels (PDF, WMF, HDF5, GRIB, BUFR, MPEG)."""

USUAL_SCANS = 12  # of a progressive JPEG file; ten are common

_max_pixels: ContextVar[int] = ContextVar("_max_pixels", default=MAX_PIXELS)


class BadImageError(UserError):
    """One image that cannot be decoded: what `on_bad_image="skip"` passes over, in contrast to a wrong option.

    Attributes:
        problem: the message without the advice.
    """

    def __init__(self, problem: str):
        super().__init__(
            f"{problem}; replace or remove it, or pass over such images with on_bad_image=skip",
        )
        self.problem = problem

    def __reduce__(self):
        return type(self), (self.problem,)


class TooLarge(ValueError):
    """An image of more pixels than are allowed."""


@contextmanager
def limited_to(max_pixels: int) -> Iterator[None]:
    """Refuse images of more pixels within this context."""
    token = _max_pixels.set(max_pixels)
    try:
        yield
    finally:
        _max_pixels.reset(token)


def open_image(file: str | os.PathLike | BinaryIO, *, name: str | None = None) -> Image.Image:
    """Decode a whole image and turn it upright.

    Args:
        file: path, or a binary file object at the image's first byte.
        name: what to call the image in messages; by default the path.

    Returns:
        A loaded image in the file's own mode, which no longer needs the file.

    Raises:
        BadImageError: the file is missing, truncated, not an image, a pipe or a device, or has more pixels than
            `limited_to` allows or than PIL's limit against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`).
        StorageError: the system could not read it.
    """
    name = name or _name_of(file)
    try:
        content = read_file(file) if isinstance(file, str | os.PathLike) else file.read()
    except (OSError, MemoryError) as error:
        raise undecodable(name, error) from error
    try:
        return _decode(content)
    except Exception as error:  # decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error
        raise undecodable(name, error) from error


def undecodable(name: str, error: Exception | str) -> UserError:
    """Return the one message for an image that cannot be decoded, or could not be read: `StorageError`."""
    if isinstance(error, UserError):
        return error
    if not isinstance(error, str) and is_storage_failure(error):
        return storage_error(name, error)
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        reason = f"it has more than {limit:,} pixels, PIL's limit against decompression bombs"
    elif isinstance(error, UnidentifiedImageError):
        reason = "UnidentifiedImageError: it is of no format that is read"
    elif isinstance(error, TooLarge | NotAnImage):
        reason = str(error)
    return BadImageError(f"cannot decode the image {name} ({' '.join(reason.split())})")


def convert_channels(image: Image.Image, channels: int) -> Image.Image:
    """Bring an image of any mode to 8 bits and 1, 3 or 4 channels.

    Args:
        image: any PIL image.
        channels: 1 grey (ITU-R 601 luma), 3 RGB, 4 RGBA. Alpha that is dropped is composited on white; alpha that is
            missing becomes opaque.

    Returns:
        An image of mode `L`, `RGB` or `RGBA`, of the same size.

    Raises:
        UserError: another number of channels.
    """
    check_channels(channels)
    mode = MODES[channels]
    if image.mode == mode and "transparency" not in image.info:
        return image
    image = _to_8_bits(image)
    if _has_alpha(image):
        image = image.convert("RGBA")
        return image if channels == 4 else _on_white(image).convert(mode)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode)


def check_channels(channels: int) -> None:
    """Raise a `UserError` unless images can have this number of channels."""
    if channels not in MODES:
        raise UserError(f"channels {channels} is not possible for images; choose 1 (grey), 3 (RGB) or 4 (RGBA)")


def image_to_tensor(
    image: Image.Image,
    *,
    image_size: ImageSize,
    channels: int,
    rng: torch.Generator | None = None,
    view: View = STILL,
    flip: bool = True,
) -> Tensor:
    """Convert, resize, crop and, with `rng`, augment one image.

    Args:
        image: any PIL image.
        image_size: side of the square result in pixels, or (height, width).
        channels: 1, 3 or 4, see `convert_channels`.
        rng: turns augmentation on, and is all the chance in it. None gives the deterministic view: the centre.
        view: crop, filter and flip; by default the centre, bicubic, and with `rng` a flip with probability 0.5.
        flip: false for images that mean something else when mirrored.

    Returns:
        (c, h, w) float32 in [0, 1].

    Raises:
        UserError: another number of channels.
    """
    image = apply_view(convert_channels(image, channels), image_size, view, rng, flip=flip and view.flip)
    pixels = rearrange(np.asarray(image).reshape(*sides_of(image_size), channels), "h w c -> c h w")
    return torch.from_numpy(pixels.astype(np.float32, order="C")).div_(255)


def tensor_to_image(tensor: Tensor) -> Image.Image:
    """Return the 8-bit PIL image of a float tensor (c, h, w) in [0, 1], c 1, 3 or 4; values outside are clamped."""
    check_channels(tensor.shape[0])
    pixels = rearrange(tensor.detach().cpu().float().clamp(0, 1) * 255, "c h w -> h w c").round().byte().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if tensor.shape[0] == 1 else pixels))


# ------------------------------------------------------------------------------------------- parts


def _name_of(file: str | os.PathLike | BinaryIO) -> str:
    if isinstance(file, str | os.PathLike):
        return os.fspath(file)
    return str(getattr(file, "name", "given as a file object"))


def _decode(content: bytes) -> Image.Image:
    """Return the upright image; where a decoder fails, the pixels may be good without the metadata."""
    try:
        return _decode_all(content)
    except (Image.DecompressionBombError, TooLarge, MemoryError):
        raise
    except Exception:
        for stripped in without_metadata(content):
            with suppress(Exception):
                return _decode_all(stripped)
        raise


def _decode_all(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of sizes, which are looked at here
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            _check_size(image, num_scans(content))
            image.load()
            return upright(image)


def _check_size(image: Image.Image, scans: int) -> None:
    pixels, limit = image.width * image.height, _max_pixels.get()
    if pixels > limit:
        raise TooLarge(f"it has {pixels:,} pixels, and max_pixels is {limit:,}")
    if pixels * scans > limit * USUAL_SCANS:
        raise TooLarge(f"it has {pixels:,} pixels in {scans:,} scans, too many for max_pixels {limit:,}")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `EXTENSIONS` that this Pillow knows."""
    Image.init()
    _silence_libtiff()
    return tuple(name for name in EXTENSIONS if name in Image.OPEN)


def _silence_libtiff() -> None:
    """Keep libtiff, which Pillow is linked with, from writing to the terminal by itself; Pillow raises the errors."""
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(Image.core.__file__)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            getattr(library, name)(None)


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are good and only the metadata is broken: cameras and editors write such files
        return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale deep grey to mode `L` (`LA` with a transparent colour); PIL's own conversion clips it to white."""
    if image.mode in UNUSUAL_ALPHA:
        return image.convert(UNUSUAL_ALPHA[image.mode])
    if not image.mode.startswith(("I", "F")):
        return image
    white = _white_of(image)
    grey = _by_bands(image, lambda band: np.rint(_shares(band, white) * 255))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", (grey, _by_bands(image, lambda band: np.where(band == transparent, 0, 255))))


def _bands(image: Image.Image) -> Iterator[np.ndarray]:
    """Yield the pixels (h, w) some rows at a time: a copy of all of them may take gigabytes."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _by_bands(image: Image.Image, function: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """Return a function of each pixel as an image of mode `L`."""
    out, top = np.empty((image.height, image.width), dtype=np.uint8), 0
    for band in _bands(image):
        out[top : top + len(band)] = function(band)
        top += len(band)
    return Image.fromarray(out)


def _shares(values: np.ndarray, white: int) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64) / white, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)


def _white_of(image: Image.Image) -> int:
    if image.mode not in ("I", "F"):
        return WHITE_16_BIT
    highest = max(float(np.max(band, initial=0, where=np.isfinite(band))) for band in _bands(image))
    if image.mode == "F" and highest <= 1:
        return 1
    return WHITE_32_BIT if image.mode == "I" and highest > WHITE_16_BIT else WHITE_16_BIT


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
