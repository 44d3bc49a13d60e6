"""A dataset of one's own, made of tensors, as a source."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from vqdist.data.config import STILL, View
from vqdist.data.images import tensor_to_image
from vqdist.data.sources.base import Source, as_label, digest_of
from vqdist.data.specs import FORMS
from vqdist.errors import UserError
from vqdist.sizes import ImageSize, sides_of


class TensorSource(Source):
    """Any map-style dataset whose items are ready-made tensors, or (tensor, label): nothing is transformed.

    Args:
        dataset: gives float tensors (c, h, w) in [0, 1] of the size and channels that are trained on.

    Raises:
        UserError: at construction if the dataset has no length or is empty; at an item if it is something else.
    """

    flip = False
    TOLERANCE = 1e-3
    """The distance from [0, 1] at which a value may lie: an interpolation overshoots so far in float16."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.spec = type(dataset).__name__
        map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not map_style or isinstance(dataset, IterableDataset):
            raise UserError(
                f"{dataset!r} is not a source of images; give {FORMS}, or a dataset with __len__ and __getitem__"
            )
        if len(dataset) == 0:
            raise UserError(f"the dataset {self.spec} is empty; give one with at least one image")

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        return tensor_to_image(self._item(index)[0])

    def label(self, index: int) -> int | None:
        return as_label(self._item(index)[1])

    def fingerprint(self) -> str:
        """By type and length only: what else a dataset holds cannot be known without reading it."""
        return digest_of(["tensors", self.spec, str(len(self))])

    def tensor(
        self,
        index: int,
        *,
        image_size: ImageSize,
        channels: int,
        rng: torch.Generator | None = None,
        view: View = STILL,
    ) -> Tensor:
        image = self._item(index)[0]
        expected = (channels, *sides_of(image_size))
        if tuple(image.shape) != expected:
            raise UserError(
                f"{self.name(index)} has the shape {tuple(image.shape)}; expected {expected} (channels, image_size, "
                "image_size): let the dataset resize, or set image_size and channels to what it gives"
            )
        low, high = image.aminmax()
        if not (low >= -self.TOLERANCE and high <= 1 + self.TOLERANCE):  # NaN fails, too
            raise UserError(
                f"{self.name(index)} has values from {low:.4g} to {high:.4g}; expected [0, 1]: leave normalisation "
                "out of the dataset"
            )
        return image.float()

    def _item(self, index: int) -> tuple[Tensor, Any]:
        item = self.dataset[index]
        image, label = (*item, None, None)[:2] if isinstance(item, tuple | list) else (item, None)
        if not isinstance(image, Tensor) or not image.is_floating_point():
            found = f"tensor of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f"{self.name(index)} is a {found}; expected a float tensor (c, h, w) in [0, 1], alone or as (tensor, "
                "label): give the dataset a transform such as torchvision.transforms.ToTensor()"
            )
        return image, label
