"""One picture of what a tokenizer does to an image: original, reconstruction, difference, code map, codes in use."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqdist.files import writing
from vqdist.tracking.pictures import as_colour

LEAST_SIDE = 256  # pixels of a panel, into which small images grow by whole factors
GAIN = 4  # of differences
GAP, TITLE = 12, 26  # pixels between panels, and above them
GOLDEN = 0.6180339887  # neighbouring codes have hues far apart
BACKGROUND = (245, 245, 245)
FIRST = 64  # bars of the codes that occur most


def code_picture(image: Tensor, recon: Tensor, maps: Sequence[Tensor], codebook_size: int) -> Image.Image:
    """Return the picture.

    Args:
        image: (c, h, w) in [0, 1].
        recon: its reconstruction, likewise.
        maps: codes (h', w') int64, one map a level or scale.
        codebook_size: number of codes of each.
    """
    used = torch.cat([one.flatten() for one in maps])
    difference = (GAIN * (image - recon).abs()).clamp(0, 1)
    height, width = (side * max(1, math.ceil(LEAST_SIDE / min(image.shape[-2:]))) for side in image.shape[-2:])
    panels = {
        "original": _enlarged(_pixels(image), height, width),
        f"reconstruction, PSNR {_psnr(image, recon):.2f}": _enlarged(_pixels(recon), height, width),
        f"difference x {GAIN}": _enlarged(_pixels(difference), height, width),
        "code map": _map_panel(maps, height, width),
        f"codes in use: {len(used.unique())} of {codebook_size}": _bars(used, height, width),
    }
    return _in_a_row(panels, height, width)


def save_code_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as a PNG file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format="png")
        partial.replace(path)


def colour_of(code: int) -> tuple[int, int, int]:
    """Return the colour of a code, the same in every picture."""
    hue = code * GOLDEN % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, 0.35 + 0.3 * (code % 3) / 2, 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def as_map(codes: Tensor) -> Tensor:
    """Return codes in a row (n,) as a map (h, w) of n cells that is nearly square; a map as it is."""
    if codes.ndim != 1:
        return codes
    height = next(side for side in range(math.isqrt(len(codes)), 0, -1) if len(codes) % side == 0)
    return rearrange(codes, "(h w) -> h w", h=height)


def _psnr(image: Tensor, recon: Tensor) -> float:
    """Return the peak signal-to-noise ratio of one image, in dB."""
    return -10 * math.log10(max(float((image - recon).square().mean()), 1e-10))


def _pixels(image: Tensor) -> np.ndarray:
    """Image (c, h, w) in [0, 1] -> bytes (h, w, 3); transparent pixels are over white."""
    colour = as_colour(image[:3]) if image.shape[0] != 2 else as_colour(image[:1])
    if image.shape[0] == 4:
        colour = colour * image[3:] + 1 - image[3:]
    return rearrange((colour * 255 + 0.5).clamp(0, 255).to("cpu", torch.uint8), "c h w -> h w c").numpy()


def _enlarged(pixels: np.ndarray, height: int, width: int) -> Image.Image:
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def _map_panel(maps: Sequence[Tensor], height: int, width: int) -> Image.Image:
    """Return the maps as tiles of equal size, in the colours of their codes."""
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    panel = Image.new("RGB", (width, height), BACKGROUND)
    for number, codes in enumerate(maps):
        coloured = np.array([[colour_of(code) for code in row] for row in as_map(codes).tolist()], np.uint8)
        tile = _enlarged(coloured, height // rows - (rows > 1), width // columns - (columns > 1))
        panel.paste(tile, (number % columns * (width // columns), number // columns * (height // rows)))
    return panel


def _bars(used: Tensor, height: int, width: int) -> Image.Image:
    """Return how often the codes occur, the most frequent first, as bars in their colours."""
    codes, counts = used.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:FIRST]
    panel = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    step = width / len(order)
    for place, index in enumerate(order.tolist()):
        top = height - round((height - 4) * int(counts[index]) / int(counts.max()))
        edges = round(place * step), round((place + 1) * step) - (step > 3)
        draw.rectangle([edges[0], top, max(edges[0], edges[1] - 1), height], fill=colour_of(int(codes[index])))
    return panel


def _in_a_row(panels: dict[str, Image.Image], height: int, width: int) -> Image.Image:
    across = GAP + len(panels) * (width + GAP)
    picture = Image.new("RGB", (across, height + TITLE + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, panel) in enumerate(panels.items()):
        left = GAP + number * (width + GAP)
        draw.text((left, TITLE // 2 - 5), title, fill="black", font=ImageFont.load_default())
        picture.paste(panel, (left, TITLE))
    return picture
