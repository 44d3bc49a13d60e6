"""Images become tensors of one size by (seed, epoch, index) alone; broken ones are refused or replaced and named."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from source_files import encoded, message_of, same_after_pickling, save, write_tar
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from vqdist.data.dataset import ImageDataset
from vqdist.data.images import BadImageError
from vqdist.data.sources import DummyDataset, TensorSource, open_source


def left_white(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 4, 8))
    image.save(path)


@pytest.fixture
def halves(tmp_path):
    for index in range(40):
        left_white(tmp_path / f"{index:02}.png")
    return tmp_path


def test_items(tmp_path):
    save(tmp_path / "b/1.png", 51, size=(40, 20))
    save(tmp_path / "a/2.png", 255)
    dataset = ImageDataset(tmp_path, 16)
    assert len(dataset) == 2 and dataset[0].shape == (3, 16, 16) and dataset[0].dtype == torch.float32
    assert dataset[0][0].eq(1).all() and torch.allclose(dataset[1][0], torch.tensor(0.2))
    assert torch.equal(dataset[-1], dataset[1]) and torch.equal(dataset[np.int64(1)], dataset[1])
    assert [dataset.label(0), dataset.label(1)] == [0, 1]
    assert dataset.name(0) == f"{tmp_path}/a/2.png"
    assert dataset.fingerprint() == open_source(tmp_path).fingerprint()
    assert ImageDataset(str(tmp_path), 8, channels=1)[0].shape == (1, 8, 8)
    assert ImageDataset(tmp_path, image_size=8, channels=4)[0].shape == (4, 8, 8)
    assert len(list(dataset)) == 2
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 2 items"):
            dataset[index]
    save(tmp_path / "a/3.jpg")
    assert len(ImageDataset(tmp_path, 16, exts=["jpg"])) == 1


def test_augmentation_depends_on_seed_epoch_and_index_only(halves):
    dataset = ImageDataset(halves, 8, channels=1, seed=3)

    def mirrored(dataset, epoch):
        return [bool(dataset[epoch, index][0, 0, 0] == 0) for index in range(40)]

    views = [mirrored(dataset, epoch) for epoch in range(3)]
    assert mirrored(dataset, 1) == views[1] and mirrored(pickle.loads(pickle.dumps(dataset)), 2) == views[2]
    assert len({tuple(view) for view in views}) == 3
    assert all(5 < sum(view) < 35 for view in views)
    assert mirrored(ImageDataset(halves, 8, channels=1, seed=4), 0) != views[0]
    assert [bool(dataset[index][0, 0, 0] == 0) for index in range(40)] == views[0]  # a plain index is epoch 0
    assert [dataset[2, 7].sum(), torch.equal(dataset[2, 7], dataset.fetch(2, 7)[0])] == [32, True]
    state = torch.get_rng_state()
    mirrored(dataset, 5)
    assert torch.equal(state, torch.get_rng_state())  # the run's generator is not touched


def test_no_augmentation(halves):
    plain = ImageDataset(halves, 8, channels=1, augment=False)
    assert all(plain[epoch, index][0, 0, 0] == 1 for epoch in range(3) for index in range(40))
    digits = ImageDataset("digits", 28, channels=1)
    for index in range(20):
        expected = torch.from_numpy(np.asarray(open_source("digits").image(index)).copy())[None] / 255
        assert torch.equal(digits[1, index], expected)


def break_file(folder, *indices):
    for index in indices:
        (folder / f"{index:02}.png").write_bytes(b"broken")


def test_bad_image_raises(halves):
    break_file(halves, 3)
    dataset = ImageDataset(halves, 8)
    assert "03.png (UnidentifiedImageError" in message_of(dataset.fetch, 0, 3)
    with pytest.raises(BadImageError):
        dataset[3]


def test_bad_images_are_replaced_and_named(halves):
    break_file(halves, 3, 4, 38, 39, 0)
    (halves / "05.png").unlink()
    save(halves / "05.png", 255)
    dataset = ImageDataset(halves, 8, on_bad_image="skip", augment=False)
    image, bad = dataset.fetch(0, 3)
    assert bad == (f"{halves}/03.png", f"{halves}/04.png") and torch.equal(image, dataset[5])
    image, bad = dataset.fetch(0, 38)  # on from the start
    assert [os.path.basename(name) for name in bad] == ["38.png", "39.png", "00.png"]
    assert torch.equal(image, dataset[1])
    assert dataset.fetch(0, 1)[1] == ()
    assert torch.equal(dataset[3], dataset[5])
    mirrored = ImageDataset(halves, 8, on_bad_image="skip")
    assert all(torch.equal(mirrored[e, 6], mirrored.fetch(e, 6)[0]) for e in range(4))


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_replacements_stay_in_their_split(halves, kind):
    break_file(halves, 3, 8)
    dataset = ImageDataset(halves, 8, on_bad_image="skip")
    names = []
    view = dataset._view
    dataset._view = lambda epoch, index, candidate: names.append(candidate) or view(epoch, index, candidate)
    assert len(dataset.fetch(0, 3, among=kind([1, 3, 8, 20]))[1]) == 2
    assert names == [3, 8, 20]
    names.clear()
    dataset.fetch(0, 8, among=kind([1, 3, 8]))
    assert names == [8, 1]


def test_all_bad(halves):
    break_file(halves, *range(40))
    dataset = ImageDataset(halves, 8, on_bad_image="skip")
    message = message_of(dataset.fetch, 0, 2)
    assert message.startswith(
        f"none of the 40 images could be decoded; first: cannot decode the image {halves}/02.png ("
    )


def collate(samples):
    return [image for image, _ in samples], [name for _, names in samples for name in names]


class Fetched(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset.fetch(1, index)


@pytest.mark.parametrize("spec", ["folder", "digits", "wds"])
def test_workers_see_what_the_process_sees(halves, tmp_path, spec):
    if spec == "folder":
        break_file(halves, 3)
        dataset = ImageDataset(halves, 8, on_bad_image="skip")
    elif spec == "wds":
        write_tar(tmp_path / "a.tar", [(f"{i:03}.png", encoded(i)) for i in range(40)])
        dataset = ImageDataset(f"wds:{tmp_path}/a.tar", 8)
    else:
        dataset = Subset(ImageDataset("digits", 8, channels=1), range(40)).dataset
    loader = DataLoader(
        Fetched(dataset), sampler=range(40), batch_size=10, num_workers=2, collate_fn=collate, timeout=60
    )
    batches = list(loader)
    images = [image for images, _ in batches for image in images]
    assert all(torch.equal(image, dataset[1, index]) for index, image in enumerate(images))
    assert [os.path.basename(name) for _, names in batches for name in names] == ["03.png"] * (spec == "folder")


def test_image_dataset_errors(tmp_path):
    assert message_of(ImageDataset, "digits", 0) == (
        "image_size 0 is not possible; give the side in pixels, a whole number from 1 to 65536"
    )
    assert "image_size 2.5 is not possible" in message_of(ImageDataset, "digits", 2.5)
    assert "channels 2 is not possible for images; choose 1" in message_of(ImageDataset, "digits", 8, channels=2)
    assert message_of(ImageDataset, "digits", 8, on_bad_image="ignore") == (
        "on_bad_image 'ignore' is not known; choose raise or skip"
    )
    assert "the data source is None; give a folder" in message_of(ImageDataset, None, 8)
    assert "is not a source of images; give a folder" in message_of(ImageDataset, 7, 8)
    assert "exts ['png'] has no meaning for a DigitsSource that is open" in message_of(
        ImageDataset, open_source("digits"), 8, exts=["png"]
    )
    assert "no such folder" in message_of(ImageDataset, tmp_path / "gone", 8)


def test_dataset_of_a_dataset(halves):
    inner = ImageDataset(halves, 8, channels=1, augment=False)
    outer = ImageDataset(inner, 8, channels=1)
    assert outer.source is inner.source and outer.augment is False
    assert ImageDataset(ImageDataset(halves, 8), 8).augment is True
    assert message_of(ImageDataset, inner, 16) == (
        "the dataset has image_size 8 and channels 1; expected 16 and 3: build it with these, or change the options"
    )


# ------------------------------------------------------------------------------------- TensorSource


class Tensors(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_tensors_are_taken_as_they_are():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    dataset = ImageDataset(Tensors(image, (image, 4), [image.double(), torch.tensor(5)]), 8)
    assert all(torch.equal(dataset[epoch, index], image) for epoch in range(5) for index in range(2))
    assert dataset[2].dtype == torch.float32
    assert [dataset.label(index) for index in range(3)] == [None, 4, 5]
    assert dataset.name(1) == "Tensors[1]" and len(dataset.fingerprint()) == 64
    assert dataset.source.image(0).size == (8, 8)
    assert isinstance(dataset.source, TensorSource) and same_after_pickling(dataset.source)
    assert ImageDataset(DummyDataset(5), 64).label(2) == DummyDataset()[2][1]


def test_tensor_errors():
    def error(item, on_bad_image="skip"):  # a wrong dataset is never skipped
        return message_of(ImageDataset(Tensors(item), 8, on_bad_image=on_bad_image).fetch, 0, 0)

    assert error(torch.zeros(3, 8, 9)).startswith("Tensors[0] has the shape (3, 8, 9); expected (3, 8, 8) (channels,")
    assert "has the shape (1, 8, 8); expected (3, 8, 8)" in error(torch.zeros(1, 8, 8))
    assert "Tensors[0] is a tensor of torch.uint8; expected a float tensor" in error(torch.zeros(3, 8, 8).byte())
    assert "Tensors[0] is a Image; expected a float tensor (c, h, w)" in error((Image.new("RGB", (8, 8)), 1))
    assert "has values from -1 to 1; expected [0, 1]: leave normalisation out" in error(
        torch.linspace(-1, 1, 192).view(3, 8, 8)
    )
    assert "has values from nan to nan" in error(torch.full((3, 8, 8), torch.nan))
    assert message_of(ImageDataset, Tensors(), 8) == ("the dataset Tensors is empty; give one with at least one image")


def test_streams_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    assert "or a dataset with __len__ and __getitem__" in message_of(ImageDataset, Stream(), 8)
