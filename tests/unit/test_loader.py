"""The data order: a pure function of (seed, epoch, position), whatever the ranks and workers."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import PositionSampler, split_indices, train_loader, valid_loader
from vqdist.errors import UserError


def sampler(rank=0, world_size=1, batch_size=3, position=0, length=20, seed=7) -> PositionSampler:
    return PositionSampler(
        torch.arange(length), seed=seed, batch_size=batch_size, rank=rank, world_size=world_size, position=position
    )


def places(count: int, **options) -> list[tuple[int, int]]:
    """Return the first so many (epoch, index) of a rank."""
    return list(itertools.islice(itertools.chain.from_iterable(sampler(**options)), count))


def test_an_epoch_visits_every_image_once_and_the_next_in_another_order():
    seen = places(40)
    first, second = [i for epoch, i in seen if epoch == 0], [i for epoch, i in seen if epoch == 1]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert [epoch for epoch, _ in seen] == [0] * 20 + [1] * 20


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_take_what_one_rank_takes(world_size):
    alone = places(60, batch_size=4 * world_size)
    ranks = [iter(sampler(rank=rank, world_size=world_size, batch_size=4)) for rank in range(world_size)]
    together = []
    while len(together) < 60:
        for rank in ranks:
            together += next(rank)
    assert together[:60] == alone


def test_resuming_at_a_position_goes_on_for_another_world_size():
    straight = places(60, batch_size=6)
    assert places(36, batch_size=4, position=24) == straight[24:]
    halves = [places(18, batch_size=3, position=24, rank=rank, world_size=2) for rank in range(2)]
    merged = [p for start in range(0, 18, 3) for half in halves for p in half[start : start + 3]]
    assert merged == straight[24:]


def test_order_depends_on_the_seed():
    assert places(20, seed=1) != places(20, seed=2)


def test_split_is_disjoint_whole_and_depends_on_its_seed():
    split = split_indices(100, valid_frac=0.2, seed=42)
    assert len(split.valid) == 20
    assert sorted([*split.train.tolist(), *split.valid.tolist()]) == list(range(100))
    assert torch.equal(split.valid, split_indices(100, valid_frac=0.2, seed=42).valid)
    assert not torch.equal(split.valid, split_indices(100, valid_frac=0.2, seed=43).valid)
    assert len(split_indices(100, valid_frac=0, seed=42).valid) == 0
    assert len(split_indices(10, valid_frac=0.01, seed=42).valid) == 1


@pytest.mark.parametrize(("length", "valid_frac"), [(10, 1.0), (10, -0.1), (1, 0.5)])
def test_an_impossible_split_is_refused(length, valid_frac):
    with pytest.raises(UserError, match="valid_frac"):
        split_indices(length, valid_frac=valid_frac, seed=0)


def batches(
    num_workers: int, count: int = 6, *, source="synthetic:10", batch_size=4, rank=0, world_size=1, position=0
) -> list[torch.Tensor]:
    dataset = ImageDataset(source, 16, augment=True, seed=3)
    loader = train_loader(
        dataset,
        torch.arange(10),
        seed=3,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        position=position,
        num_workers=num_workers,
        pin_memory=False,
        prefetch_factor=2,
    )
    return [batch.item for batch in itertools.islice(loader, count)]


def test_images_do_not_depend_on_the_number_of_workers():
    for alone, with_workers in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone, with_workers)


class AtRandom(torch.utils.data.Dataset):
    """A dataset that draws from every global generator, as augmentations of one's own do."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        drawn = torch.rand(1).item(), random.random(), np.random.rand()
        return torch.tensor(drawn)[:, None, None].expand(3, 16, 16)


def test_chance_in_a_dataset_of_ones_own_belongs_to_the_image():
    alone = torch.cat(batches(0, source=AtRandom()))
    assert len(alone[:, 0, 0, 0].unique()) == len(alone)  # other numbers in every epoch
    assert torch.equal(torch.cat(batches(2, source=AtRandom())), alone)
    ranks = [batches(1, source=AtRandom(), batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half for both in zip(*ranks, strict=True) for half in both]), alone)
    assert torch.equal(torch.cat(batches(1, 3, source=AtRandom(), position=12)), alone[12:])


@pytest.mark.parametrize("source", ["synthetic:10", AtRandom()], ids=["a source", "a dataset"])
def test_loading_leaves_the_global_random_state_alone(source):
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate()
    batches(0, source=source)
    batches(1, count=2, source=source)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_validation_counts_each_image_once_over_ranks():
    dataset = ImageDataset("synthetic:10", 16, augment=False)
    counts = [
        [len(batch.item) for batch in valid_loader(dataset, torch.arange(7), batch_size=2, rank=rank, world_size=3)]
        for rank in range(3)
    ]
    assert counts == [[2, 1], [2], [2]]
