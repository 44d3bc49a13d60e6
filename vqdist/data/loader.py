"""Which image goes to which rank at which position, and the workers that fetch it.

The training order is one endless stream: epoch after epoch, each a permutation of the images that depends on (seed,
epoch) only. A position is a place in that stream. One optimizer step takes the next `global batch` positions; rank
and world size only say which part of them a process fetches. So the whole state to resume from is one integer, every
image is seen once per epoch by any number of ranks, and nothing depends on the number of workers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.errors import UserError
from vqdist.seeding import derive_seed
from vqdist.stopping import protect_worker, training_flag


class Split(NamedTuple):
    """Indices into one dataset, disjoint: what is trained on and what is validated on."""

    train: Tensor
    valid: Tensor


class Batch(NamedTuple):
    """One micro-batch of a loader.

    Attributes:
        item: images (b, c, h, w) float32 in [0, 1]; of stored codes (b, n) or (b, n, q) int64.
        label: classes (b,) int64; -1 where the source has none, and everywhere unless labels were asked for.
        bad: names of the files that could not be decoded and were replaced (`on_bad_image="skip"`).
        places: of the images in the data order, while training: what is drawn at random for an image is seeded by its
            place, so that it is the same for any number of ranks. Empty elsewhere.
    """

    item: Tensor
    label: Tensor
    bad: list[str]
    places: range = range(0)


def split_indices(length: int, *, valid_frac: float, seed: int) -> Split:
    """Split 0 .. length - 1 at random; equal on every rank for equal arguments.

    Args:
        length: number of images.
        valid_frac: share of the images to validate on, in [0, 1); at least one image if it is above 0.
        seed: of the split alone, so that it stays when the run's seed changes.
    """
    if not 0 <= valid_frac < 1:
        raise UserError(f"valid_frac {valid_frac} is not possible; give a share of the images in [0, 1), 0 for none")
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    num_valid = max(1, round(length * valid_frac)) if valid_frac > 0 else 0
    if num_valid >= length:
        raise UserError(f"valid_frac {valid_frac} of {length} images leaves none to train on; lower it")
    return Split(train=order[num_valid:].sort().values, valid=order[:num_valid].sort().values)


class PositionSampler(Sampler[list[tuple[int, int]]]):
    """This rank's micro-batches of the endless stream, as lists of (epoch, index).

    Args:
        indices: of the images to train on, sorted.
        seed: of the order.
        batch_size: images per micro-batch of one rank.
        rank, world_size: which slice of each global micro-batch is this process's.
        position: where in the stream to begin.
    """

    def __init__(self, indices: Tensor, *, seed: int, batch_size: int, rank: int, world_size: int, position: int = 0):
        self.indices = indices
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.position = position

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = lru_cache(maxsize=2)(self.epoch_order)
        for places in self.places():
            visits = (divmod(place, len(self.indices)) for place in places)
            yield [(epoch, int(order(epoch)[offset])) for epoch, offset in visits]

    def places(self) -> Iterator[range]:
        """Yield the places in the stream of each micro-batch of this rank."""
        start = self.position + self.rank * self.batch_size
        for first in itertools.count(start, self.batch_size * self.world_size):
            yield range(first, first + self.batch_size)

    def epoch_order(self, epoch: int) -> Tensor:
        """Return the dataset's indices in the order in which this epoch visits them."""
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
        return self.indices[torch.randperm(len(self.indices), generator=generator)]


class _Fetcher(torch.utils.data.Dataset):
    """Looks (epoch, index) up in one split of the dataset; what a worker process runs."""

    def __init__(self, dataset: ImageDataset | CodeDataset, indices: Tensor, labels: bool):
        self.dataset = dataset
        self.indices = indices
        self.labels = labels

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int, tuple[str, ...]] | UserError:
        try:
            if not self.labels:
                item, bad = self.dataset.fetch(*place, among=self.indices)
                return item, -1, bad
            item, label, bad = self.dataset.fetch_labelled(*place, among=self.indices)
            return item, -1 if label is None else label, bad
        except UserError as error:  # raised in a worker it would arrive wrapped in the worker's traceback
            return error


def collate(samples: list[tuple[Tensor, int, tuple[str, ...]] | UserError]) -> Batch | UserError:
    """Stack items and labels and join the names of the replaced ones; or pass the first error on."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    items, labels, bad = zip(*samples, strict=True)
    return Batch(torch.stack(items), torch.tensor(labels), [name for names in bad for name in names])


def train_loader(
    dataset: ImageDataset | CodeDataset,
    indices: Tensor,
    *,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    position: int,
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int,
    labels: bool = False,
) -> Iterator[Batch]:
    """Return an endless loader of this rank's micro-batches from a position of the stream on."""
    sampler = PositionSampler(
        indices, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size, position=position
    )
    batches = _loader(
        _Fetcher(dataset, indices, labels),
        sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
    )
    for batch, places in zip(batches, sampler.places()):
        yield batch._replace(places=places)


def valid_loader(
    dataset: ImageDataset | CodeDataset,
    indices: Tensor,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    labels: bool = False,
) -> Iterator[Batch]:
    """Return this rank's share of the images, each once over all ranks.

    Its last batch may be smaller, and a share may be empty.
    """
    mine = [(0, int(index)) for index in indices[rank::world_size]]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return _loader(
        _Fetcher(dataset, indices, labels),
        batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
    )


def listed_loader(
    dataset: ImageDataset,
    batches: Iterable[Iterable[int]],
    *,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """Exactly these batches of images, as they are in epoch 0, in this order, with labels."""
    return _loader(
        _Fetcher(dataset, torch.arange(len(dataset)), labels=True),
        ([(0, index) for index in batch] for batch in batches),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=2,
    )


def default_workers() -> int:
    """Loader processes of a rank where the user says nothing: up to 4, as this node's cores allow."""
    per_rank = (os.cpu_count() or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(0, min(4, per_rank - 1))


def _loader(
    dataset: _Fetcher, batches, *, num_workers: int, pin_memory: bool, prefetch_factor: int
) -> Iterator[Batch]:
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        # workers are forked or spawned once; a generator of its own keeps the loader out of the run's random state
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=partial(_set_up_worker, training=training_flag()) if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _set_up_worker(_worker: int, training: Tensor) -> None:
    torch.set_num_threads(1)
    protect_worker(training)
