"""From a file to a float image in [0, 1].

    open_image(file), then image_to_tensor(image, ...) = convert_channels, resize_and_crop, perhaps mirror, to float

Every function is pure: what comes out depends on the arguments alone, chance included (`rng`). Images stay 8-bit PIL
images until the last step. The meaning of "right" for each kind of file:

- EXIF orientation is applied; of an animation the first frame is taken.
- 16-bit grey (`I;16` in both byte orders, `I`): 65535 is white. `I` with larger values: 2 ** 31 - 1 is white.
  Float grey (`F`): 1 is white if no value is above 1, else 65535. Values below 0 and NaN are black.
- Alpha (an alpha channel, or one transparent colour) is kept for 4 channels and laid on white for 1 and 3. Without
  alpha, the fourth channel is opaque.
- Palette, CMYK, YCbCr, HSV, Lab and 1-bit images go through RGB (1-bit through grey).
- Colour profiles are not applied: the numbers of the file are taken as sRGB.

Legend: b batch, c channel, h w image.
"""

from __future__ import annotations

import os
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from vqdist.errors import UserError
from vqdist.sizes import ImageSize, sides_of

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> the PIL mode in which an image becomes a tensor."""

UNUSUAL_ALPHA = {"La": "LA", "RGBa": "RGBA"}
"""Premultiplied modes, which PIL converts to their straight form only."""

WHITE_16_BIT = 65535
WHITE_32_BIT = 2**31 - 1


class BadImageError(UserError):
    """One image that cannot be decoded: what `on_bad_image="skip"` passes over, in contrast to a wrong option."""


def open_image(file: str | os.PathLike | BinaryIO, *, name: str | None = None) -> Image.Image:
    """Decode a whole image and turn it upright.

    Args:
        file: path, or a binary file object at the image's first byte.
        name: what to call the image in messages; by default the path.

    Returns:
        A loaded image in the file's own mode, which no longer needs the file.

    Raises:
        BadImageError: the file is missing, truncated, not an image, or larger than PIL's limit against decompression
            bombs (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    try:
        with Image.open(file) as image:
            image.load()
            return _upright(image)
    except Exception as error:  # decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error
        raise undecodable(name or _name_of(file), error) from error


def undecodable(name: str, error: Exception | str) -> BadImageError:
    """Return the one message for an image that cannot be decoded."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        reason = f"it has more than {limit:,} pixels, PIL's limit against decompression bombs"
    reason = " ".join(reason.split())
    return BadImageError(
        f"cannot decode the image {name} ({reason}); replace or remove it, or pass over such images with "
        "on_bad_image=skip"
    )


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


def resize_and_crop(image: Image.Image, image_size: ImageSize) -> Image.Image:
    """Resize until the result just fits in and cut out the centre, in one antialiased bicubic resampling.

    For a square result the shorter side is resized. Resampling the centred part of the source directly gives the same
    picture as resizing all of it and cropping, without computing what is cut away and without rounding a side. The
    colour of transparent pixels has no weight: PIL resamples RGBA with premultiplied alpha.

    Args:
        image: mode `L`, `RGB` or `RGBA`.
        image_size: of the result.
    """
    (width, height), (rows, columns) = image.size, sides_of(image_size)
    scale = min(width / columns, height / rows)  # pixels of the source for one of the result
    across, down = (width, width * rows / columns) if scale == width / columns else (height * columns / rows, height)
    left, top = (width - across) / 2, (height - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize((columns, rows), Image.Resampling.BICUBIC, box=box)


def image_to_tensor(
    image: Image.Image, *, image_size: ImageSize, channels: int, rng: torch.Generator | None = None
) -> Tensor:
    """Convert, resize (shorter side, antialiased bicubic), centre-crop and, with `rng`, augment one image.

    Args:
        image: any PIL image.
        image_size: side of the square result in pixels, or (height, width).
        channels: 1, 3 or 4, see `convert_channels`.
        rng: turns augmentation on, and is all the chance in it: the image is mirrored left to right with probability
            0.5. None gives the deterministic view.

    Returns:
        (c, h, w) float32 in [0, 1].

    Raises:
        UserError: another number of channels.
    """
    image = resize_and_crop(convert_channels(image, channels), image_size)
    if rng is not None and torch.rand((), generator=rng).item() < 0.5:
        image = ImageOps.mirror(image)
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


def _upright(image: Image.Image) -> Image.Image:
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
    values = np.asarray(image).astype(np.float64)
    shares = np.nan_to_num(values / _white_of(image.mode, values), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    grey = Image.fromarray(np.rint(shares * 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _white_of(mode: str, values: np.ndarray) -> int:
    highest = np.max(values, initial=0, where=np.isfinite(values))
    if mode == "F" and highest <= 1:
        return 1
    return WHITE_32_BIT if mode == "I" and highest > WHITE_16_BIT else WHITE_16_BIT


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
