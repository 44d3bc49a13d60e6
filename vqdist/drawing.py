"""Drawing many images from a model, spread over ranks: the same images for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vqdist.backends.base import Backend
from vqdist.models.autoregressive import AutoregressiveModel
from vqdist.sampling import DrawOptions, uniform_per_image
from vqdist.seeding import derive_seed


def draw_batches(
    model: AutoregressiveModel,
    labels: Tensor,
    options: DrawOptions,
    *,
    seed: int,
    batch_size: int,
    backend: Backend,
) -> Iterator[tuple[range, Tensor]]:
    """Return this rank's batches of the images 0 .. len(labels) - 1.

    An image depends on (seed, its number) and its label. Batches are cut by number, whatever the number of ranks, and
    taken by the ranks in turn: the same products of the same shapes, so the same picture to the bit on the same kind
    of device.

    Args:
        model: to draw from.
        labels: (count,) int64, the class of each image; `num_classes` for none.
        options: how to draw.
        seed: of all images.
        batch_size: images at once.
        backend: says which batches are this rank's.

    Yields:
        The numbers of a batch, and its images (b, c, h, w) in [0, 1] on the backend's device.
    """
    starts = range(0, len(labels), batch_size)
    for start in starts[backend.rank :: backend.world_size]:
        numbers = range(start, min(start + batch_size, len(labels)))
        yield numbers, draw_numbers(model, numbers, labels[start : numbers.stop], options, seed=seed)


def draw_numbers(
    model: AutoregressiveModel, numbers: Sequence[int], labels: Tensor, options: DrawOptions, *, seed: int
) -> Tensor:
    """Return the images (b, c, h, w) in [0, 1] of these numbers, with labels (b,)."""
    seeds = (derive_seed("sample", seed, number) for number in numbers)
    return model.sample_from(uniform_per_image(model.num_codes, seeds), labels, options)


def gather_images(batches: Iterator[tuple[range, Tensor]], shape: tuple[int, ...], backend: Backend) -> Tensor:
    """All ranks' batches in one tensor of this shape, (count, c, h, w), on every rank. Every rank calls this."""
    images = torch.zeros(shape, device=backend.device)
    for numbers, batch in batches:
        images[numbers.start : numbers.stop] = batch
    return backend.sum(images)
