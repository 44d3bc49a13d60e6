"""Which image goes to which rank at which position, and the workers that fetch it.

The training order is one endless stream: epoch after epoch, each a permutation of the images that depends on (seed,
epoch) only. A position is a place in that stream. One optimizer step takes the next `global batch` positions; rank
and world size only say which part of them a process fetches. So the whole state to resume from is one integer, every
image is seen once per epoch by any number of ranks, and nothing depends on the number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import lru_cache, partial
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler

from vqdist.data.codes import CodeDataset
from vqdist.data.cores import cores_of_rank
from vqdist.data.dataset import ImageDataset
from vqdist.data.sources import TensorSource
from vqdist.data.workers import Workers
from vqdist.errors import UserError
from vqdist.seeding import derive_seed, host_generators_kept, seed_host
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

    def __repr__(self) -> str:
        """Return one line, without the numbers."""
        shape = " x ".join(map(str, self.item.shape))
        return f"Batch({shape} {str(self.item.dtype).removeprefix('torch.')}, places {self.places}, bad {self.bad})"


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


def drawn(indices: Tensor, count: int | None, *, seed: int) -> Tensor:
    """Return so many of these indices at most, drawn at random and sorted; equal on every rank for equal arguments."""
    if count is None or count >= len(indices):
        return indices
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(derive_seed("valid", seed)))
    return indices[order[:count]].sort().values


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


class _Fetcher:
    """Loads a batch of (epoch, index) from one split of the dataset; what a loader process runs.

    A dataset of tensors of one's own may crop or flip at random. It draws from the global generators, which are seeded
    for each image: so it gives the same on any rank, in any process, and after a resume.
    """

    def __init__(self, dataset: ImageDataset | CodeDataset, indices: Tensor, labels: bool):
        self.dataset = dataset
        self.indices = indices
        self.labels = labels
        own = isinstance(dataset, ImageDataset) and isinstance(dataset.source, TensorSource)
        self._seed = cast(ImageDataset, dataset).seed if own else None

    def __call__(self, places: Sequence[tuple[int, int]]) -> tuple[Tensor, tuple[list[int], list[str]]]:
        """Return the items (b, ...), their classes, and the names of the images that were replaced."""
        with nullcontext() if self._seed is None else host_generators_kept():
            items, labels, bad = zip(*(self._fetch(*place) for place in places), strict=True)
        return torch.stack(items), (list(labels), [name for names in bad for name in names])

    def _fetch(self, epoch: int, index: int) -> tuple[Tensor, int, tuple[str, ...]]:
        if self._seed is not None:
            seed_host("dataset", self._seed, epoch, index)
        if not self.labels:
            item, bad = self.dataset.fetch(epoch, index, among=self.indices)
            return item, -1, bad
        item, label, bad = self.dataset.fetch_labelled(epoch, index, among=self.indices)
        return item, -1 if label is None else label, bad

    def names(self, places: Sequence[tuple[int, int]], most: int = 3) -> str:
        """Return what a batch is made of, for messages."""
        names = [self.dataset.name(index) for _, index in places[:most]]
        return ", ".join(names) + (f" and {len(places) - most} more" if len(places) > most else "")


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
    patience: float | None = None,
) -> Generator[Batch, None, None]:
    """Return an endless loader of this rank's micro-batches from a position of the stream on."""
    sampler = PositionSampler(
        indices, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size, position=position
    )
    batches = _loader(
        _Fetcher(dataset, indices, labels),
        sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        patience=patience,
    )
    with closing(batches):
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
    patience: float | None = None,
) -> Iterator[Batch]:
    """Return this rank's share of the images, each once over all ranks.

    Its last batch may be smaller, and a share may be empty.
    """
    mine = [(0, int(index)) for index in indices[rank::world_size]]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return _loader(
        _Fetcher(dataset, indices, labels),
        batches,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        patience=patience,
    )


def listed_loader(
    dataset: ImageDataset,
    batches: Iterable[Iterable[int]],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """Exactly these batches of images, as they are in epoch 0, in this order, with labels.

    Args:
        dataset: of the images.
        batches: their indices.
        batch_size: of the largest batch.
        num_workers: processes that load.
        pin_memory: whether the images come in page-locked memory.
    """
    return _loader(
        _Fetcher(dataset, torch.arange(len(dataset)), labels=True),
        ([(0, index) for index in batch] for batch in batches),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=2,
    )


def first_items(dataset: ImageDataset | CodeDataset, indices: Tensor, count: int) -> Tensor:
    """Return the items (n, ...) at the first of these indices, at most so many, the same at each call."""
    return _Fetcher(dataset, indices, labels=False)([(0, int(index)) for index in indices[:count]])[0]


def default_workers() -> int:
    """Loader processes of a rank where the user says nothing: up to 4, as its cores allow."""
    return max(0, min(4, cores_of_rank() - 1))


def _loader(
    fetcher: _Fetcher,
    batches: Iterable[list[tuple[int, int]]],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int,
    patience: float | None = None,
) -> Generator[Batch, None, None]:
    pin_memory = pin_memory and torch.cuda.is_available()
    if not num_workers:
        for items, (labels, bad) in map(fetcher, batches):
            yield Batch(items.pin_memory() if pin_memory else items, torch.tensor(labels), bad)
        return
    workers = Workers(
        fetcher,
        batches,
        count=num_workers,
        prefetch=prefetch_factor,
        nbytes=batch_size * fetcher.dataset.item_bytes,
        set_up=partial(_set_up_worker, training=training_flag()),
        describe=fetcher.names,
        pin_memory=pin_memory,
        patience=patience,
    )
    with closing(workers):
        for items, (labels, bad) in workers:
            yield Batch(items, torch.tensor(labels), bad)


def _set_up_worker(training: Tensor) -> None:
    torch.set_num_threads(1)
    protect_worker(training)
