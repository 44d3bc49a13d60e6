"""Sheets of images and bar charts, as PNG files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import pad

from vqdist.files import CHART_NUMBERS, writing

BORDER = 2  # pixels around each image of a sheet


def make_sheet(rows: Tensor, columns: int = 2) -> Tensor:
    """Return groups of images (n, k, c, h, w) in [0, 1] as one picture (c, H, W), `columns` groups in a row."""
    images = as_colour(rows.flatten(0, 1).clamp(0, 1).cpu())
    if len(images) == 1:
        return images[0]
    across = min(rows.shape[1] * columns, len(images))
    bordered = pad(images, (BORDER, 0, BORDER, 0), value=0.5)
    empty = torch.full_like(bordered[:1], 0.5).expand(-len(images) % across, -1, -1, -1)
    sheet = rearrange(torch.cat([bordered, empty]), "(y x) c h w -> c (y h) (x w)", x=across)
    return pad(sheet, (0, BORDER, 0, BORDER), value=0.5)


def as_colour(images: Tensor) -> Tensor:
    """Return grey images (..., 1, h, w) with three equal channels; others as they are."""
    return images.expand(*images.shape[:-3], 3, -1, -1) if images.shape[-3] == 1 else images


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture (c, h, w) in [0, 1] as a PNG file."""
    pixels = (as_colour(picture) * 255 + 0.5).clamp(0, 255).to("cpu", torch.uint8)
    Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()).save(path, format="png")


def save_sheet(rows: Tensor, path: Path, columns: int = 2) -> None:
    """Write `make_sheet` as a PNG file that appears whole or not at all."""
    sheet = make_sheet(rows, columns)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(sheet, path)


def save_image(image: Tensor, path: Path) -> None:
    """Write an image (c, h, w) in [0, 1] as a PNG file that appears whole or not at all; its folder exists."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        save_picture(image, partial)
        partial.replace(path)


def save_bars(bars: np.ndarray, path: Path, height: int = 128, numbers: dict[str, Any] | None = None) -> None:
    """Write counts (n,) as a bar chart, two pixels a bar, that appears whole or not at all.

    Args:
        bars: (n,) whole numbers.
        path: of the PNG file.
        height: of the chart, in pixels.
        numbers: what else the file holds, as a text by the name `CHART_NUMBERS`.
    """
    heights = np.ceil(height * bars / max(1, bars.max())).astype(int)
    picture = np.where(np.arange(height)[::-1, None] < heights[None, :], 40, 235).astype(np.uint8)
    partial = path.with_name(path.name + ".partial")
    texts = PngInfo()
    if numbers is not None:
        texts.add_text(CHART_NUMBERS, json.dumps(numbers))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.repeat(2, axis=1)).save(partial, format="png", pnginfo=texts)
        partial.replace(path)


def chart_numbers(counts: Tensor) -> dict[str, Any]:
    """Return what a chart of counts of codes (v,) says in numbers.

    `codes` is v, `total` the sum, `used` the number of codes that occurred. `bars` are those of `group_bars`, and
    `ranked` of the same counts in descending order.
    """
    counts = counts.cpu()
    ranked = group_bars(counts.sort(descending=True).values)[0]
    sums = {"codes": len(counts), "total": int(counts.sum()), "used": int((counts > 0).sum())}
    return {**sums, "bars": group_bars(counts)[0].tolist(), "ranked": ranked.tolist()}


def group_bars(counts: Tensor, most: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Return counts of codes (v,) summed over neighbours into at most `most` bars (n,), and the edges (n + 1,)."""
    numbers = counts.cpu().numpy()
    per_bar = -(-len(numbers) // most)
    bars = np.pad(numbers, (0, -len(numbers) % per_bar)).reshape(-1, per_bar).sum(axis=1)
    return bars, np.minimum(np.arange(len(bars) + 1.0) * per_bar, len(numbers))
