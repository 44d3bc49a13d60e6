"""Images as somebody has them at hand, as one batch for a tokenizer, and back.

They take the way of the images of a run without augmentation: `vqdist.data.images`.

Legend: b batch, c channel, h w image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqdist.data.config import View
from vqdist.data.images import MODES, BadImageError, image_to_tensor, open_image, tensor_to_image, undecodable, upright
from vqdist.errors import UserError, an
from vqdist.sizes import ImageSize, sides_of

FORMS = (
    "a PIL image, the path of a file, an array (h, w, c) of bytes or of floats in [0, 1], a tensor (c, h, w), a batch "
    "of these, or a list"
)
OVERSHOOT = 1e-3
"""The distance from [0, 1] at which a float may lie, as in a dataset of tensors; reconstructions go there."""


def batch_of(images: Any, *, image_size: ImageSize, channels: int, resample: str = "bicubic") -> Tensor:
    """Return images of any size as one batch, resized and cropped as those that a run trains on.

    Arrays and tensors of bytes reach from 0 to 255, those of floats from 0 to 1. An array is (h, w), (h, w, c) or
    (b, h, w, c); where its last axis is no number of channels, it is (c, h, w) or (b, c, h, w). A tensor is (c, h, w)
    or (b, c, h, w). Floats of the right size are taken as they are; others become 8-bit images first, as files are.

    Args:
        images: PIL images, paths, arrays and tensors, alone or in lists, mixed if need be.
        image_size: of the batch.
        channels: 1, 3 or 4, see `vqdist.data.images.convert_channels`.
        resample: filter of the resize.

    Returns:
        (b, c, h, w) float32 in [0, 1], on the device of the first tensor, or on the CPU.

    Raises:
        UserError: one is no image, or there are none.
    """
    view, shape = View(resample=resample), (channels, *sides_of(image_size))
    made = []
    for number, image in enumerate(_singles(images)):
        try:
            ready = image if isinstance(image, Tensor) else None
            if ready is None or ready.shape != shape:
                ready = image_to_tensor(_as_pil(image), image_size=image_size, channels=channels, view=view)
        except UserError as error:
            raise UserError(f"image {number}: {error}" if isinstance(images, list | tuple) else error) from error
        made.append(ready)
    if not made:
        raise UserError(f"no images were given; give {FORMS}")
    device = next((image.device for image in made if image.device.type != "cpu"), made[0].device)
    return torch.stack([image.to(device) for image in made])


def pil_images(images: Tensor) -> list[Image.Image]:
    """Return images (b, c, h, w) in [0, 1] as 8-bit PIL images; values outside are clamped."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else an(type(images).__name__)
        raise UserError(f"{found} was given; images (b, c, h, w) in [0, 1] are expected, as decode gives them")
    return [tensor_to_image(image) for image in images]


def _singles(images: Any) -> Iterator[Any]:
    """Yield image after image: PIL images, paths, and tensors (c, h, w) of floats; anything else as it is."""
    if isinstance(images, list | tuple):
        for image in images:
            yield from _singles(image)
    elif isinstance(images, np.ndarray):
        yield from _of_array(images)
    elif isinstance(images, Tensor):
        yield from _of_tensor(images)
    else:
        yield images


def _of_array(array: np.ndarray) -> Iterator[Any]:
    rows = array[:, :, None] if array.ndim == 2 else array
    if rows.ndim not in (3, 4) or not {rows.shape[-1], rows.shape[-3]} & MODES.keys():
        raise UserError(
            f"an array of shape {array.shape} was given; (h, w), (h, w, c) or (c, h, w) is expected, or a batch of "
            "these, with 1, 3 or 4 channels"
        )
    if rows.shape[-1] in MODES:
        rows = rearrange(rows, "... h w c -> ... c h w")
    if rows.dtype != np.uint8 and rows.dtype.kind != "f":
        raise UserError(f"an array of {array.dtype} was given; uint8 from 0 to 255 or floats from 0 to 1 are expected")
    yield from _of_tensor(torch.from_numpy(np.array(rows)))  # a copy: torch has no negative strides


def _of_tensor(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.ndim not in (3, 4) or tensor.shape[-3] not in MODES or 0 in tensor.shape[-2:]:
        raise UserError(
            f"a tensor of shape {tuple(tensor.shape)} was given; (c, h, w) or (b, c, h, w) is expected, with 1, 3 or "
            "4 channels"
        )
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise UserError(
            f"a tensor of {tensor.dtype} was given; uint8 from 0 to 255 or floats from 0 to 1 are expected"
        )
    images = tensor.detach()
    images = images.float() / 255 if tensor.dtype == torch.uint8 else _checked(images.float())
    yield from images if tensor.ndim == 4 else [images]


def _checked(images: Tensor) -> Tensor:
    if images.numel():
        low, high = (float(bound) for bound in images.aminmax())
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # NaN fails, too
            raise UserError(
                f"floats from {low:.4g} to {high:.4g} were given; expected [0, 1]: divide bytes by 255, and undo a "
                "normalisation"
            )
    return images


def _as_pil(image: Any) -> Image.Image:
    if isinstance(image, Tensor):
        return tensor_to_image(image)
    if isinstance(image, Image.Image):
        return _loaded(image)
    if isinstance(image, str | os.PathLike):
        return _opened(Path(image).expanduser())
    raise UserError(f"{an(type(image).__name__)} is no image; give {FORMS}")


def _loaded(image: Image.Image) -> Image.Image:
    """Return a PIL image as `open_image` would; a file is read when its pixels are asked for."""
    name = str(getattr(image, "filename", "") or "given as a PIL image")
    try:
        image.load()
    except Exception as error:
        raise _unusable(undecodable(name, error)) from error
    if 0 in image.size:
        raise UserError(f"the image {name} has no pixels ({image.width} x {image.height}); give another one")
    return upright(image)


def _opened(path: Path) -> Image.Image:
    if not path.exists():
        raise UserError(f"no such file: {path}; check the path of the image")
    if path.is_dir():
        raise UserError(f"{path} is a folder, and an image is expected; `vqdist encode` and ImageDataset take folders")
    try:
        return open_image(path)
    except UserError as error:
        raise _unusable(error) from error


def _unusable(error: UserError) -> UserError:
    """Return an error without the advice that a run would get."""
    return UserError(f"{error.problem}; give another file") if isinstance(error, BadImageError) else error
