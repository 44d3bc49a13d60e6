"""A spec string becomes a dataset: the right files in the right order, or one line that says what to do."""

import gzip
import importlib
import importlib.resources
import io
import os
import pickle
import sys
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from vqdist.data import sources
from vqdist.data.images import BadImageError
from vqdist.data.sources import (
    DummyDataset,
    FolderSource,
    ImageDataset,
    PackedStrings,
    Source,
    TensorSource,
    open_source,
)
from vqdist.errors import UserError


def save(path, value=0, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


def encoded(value=0, extension="png"):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, extension)
    return buffer.getvalue()


def message_of(call, *args, **kwargs):
    """The text of the `UserError` that a call raises: always one line."""
    with pytest.raises(UserError) as info:
        call(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


def relative_names(source):
    return [os.path.relpath(source.name(index), source.folder) for index in range(len(source))]


def same_after_pickling(source):
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source) and copy.fingerprint() == source.fingerprint()
    for index in range(len(source)):
        assert copy.image(index).tobytes() == source.image(index).tobytes()
        assert copy.label(index) == source.label(index) and copy.name(index) == source.name(index)
    return True


# ------------------------------------------------------------------------------------------- folders


def test_folder_finds_every_format_in_any_case_and_depth(tmp_path):
    names = ["a.jpg", "B.JPEG", "c/d.PNG", "c/e/f.WebP", "g.bmp", "h.TIF", "i.tiff", "z/z/z/j.GiF"]
    for name in names:
        save(tmp_path / name)
    for name in ["notes.txt", ".hidden.png", ".cache/k.png", "png", "c/l.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    source = open_source(str(tmp_path))
    assert isinstance(source, FolderSource) and source.flip and source.spec == str(tmp_path)
    assert relative_names(source) == sorted(names)
    assert [source.label(index) for index in range(8)] == [None] * 8
    assert source.image(0).size == (4, 4)
    assert same_after_pickling(source)


@pytest.mark.parametrize("exts", [["jpg", "png"], [".JPG", "*.Png"], ("JPG", ".png"), "jpg,png", "jpg png"])
def test_exts(tmp_path, exts):
    for name in ["a.jpg", "b.PNG", "c.webp"]:
        save(tmp_path / name)
    assert relative_names(open_source(tmp_path, exts=exts)) == ["a.jpg", "b.PNG"]


def test_exts_may_go_beyond_the_usual(tmp_path):
    save(tmp_path / "a.ppm", 9)
    source = open_source(tmp_path, exts=["ppm"])
    assert source.image(0).getpixel((0, 0)) == (9, 0, 0)


def test_labels_are_first_level_subfolders(tmp_path):
    for name in ["dog/1.png", "cat/x/2.png", "cat/0.png", "eel/3.png"]:
        save(tmp_path / name)
    source = open_source(tmp_path)
    assert relative_names(source) == ["cat/0.png", "cat/x/2.png", "dog/1.png", "eel/3.png"]
    assert [source.label(index) for index in range(4)] == [0, 0, 1, 2]
    save(tmp_path / "loose.png")
    assert open_source(tmp_path).label(0) is None


def test_home_is_expanded(tmp_path, monkeypatch):
    save(tmp_path / "pictures/a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert relative_names(open_source("~/pictures")) == ["a.png"]


def test_links_are_followed_without_loops(tmp_path):
    save(tmp_path / "data/a/1.png")
    save(tmp_path / "elsewhere/2.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/self").symlink_to("self")
    (tmp_path / "data/gone.png").symlink_to("nowhere.png")
    (tmp_path / "data/b.png").symlink_to(tmp_path / "elsewhere/2.png")
    source = open_source(tmp_path / "data")
    assert relative_names(source) == ["a/1.png", "b.png", "b/2.png", "b/back/1.png", "gone.png"]
    assert "gone.png (FileNotFoundError" in message_of(source.image, 4)
    assert len(source.fingerprint()) == 64


def test_odd_file_names(tmp_path):
    names = ["a b.png", "ü.png", "日本.png", os.fsdecode(b"\xff.png")]
    for name in names:
        save(tmp_path / name)
    source = open_source(tmp_path)
    assert relative_names(source) == sorted(names)
    assert source.image(3).size == (4, 4) and len(source.fingerprint()) == 64


def test_folder_fingerprint(tmp_path):
    for root in ["one", "two"]:
        for name in ["a.png", "b/c.png"]:
            save(tmp_path / root / name, 1)
    one, two = open_source(tmp_path / "one"), open_source(tmp_path / "two")
    assert one.fingerprint() == two.fingerprint()  # a node may mount the data elsewhere
    save(tmp_path / "two/b/d.png")
    more = open_source(tmp_path / "two").fingerprint()
    (tmp_path / "two/b/d.png").unlink()
    save(tmp_path / "two/a.png", 1, size=(64, 64))
    larger = open_source(tmp_path / "two").fingerprint()
    assert len({one.fingerprint(), more, larger}) == 3


def test_folder_errors(tmp_path):
    gone = tmp_path / "gone"
    assert message_of(open_source, str(gone)).startswith(f"no such folder: {gone}; check the path, or give a folder")
    assert message_of(open_source, gone) == f"no such folder: {gone}; check the path"
    file = save(tmp_path / "a.png")
    assert message_of(open_source, str(file)) == (
        f"{file} is a file, and a folder of images is expected; give the folder it lies in"
    )
    (tmp_path / "b.tar").touch()
    assert message_of(open_source, str(tmp_path / "b.tar")).endswith(f"tar files are given as `wds:{tmp_path}/b.tar`")
    assert "exts is empty; give extensions such as bmp" in message_of(open_source, tmp_path, exts=[])


def test_empty_folders(tmp_path):
    assert message_of(open_source, tmp_path) == (
        f"no images in {tmp_path}: found no files; expected files ending in bmp, gif, jpeg, jpg, png, tif, tiff, webp "
        "at any depth"
    )
    for name in ["a.txt", "b.TXT", "x/c.txt", "d.heic", "README"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert f"no images in {tmp_path}: found 3 .txt, 1 (no extension), 1 .heic files; expected" in message_of(
        open_source, tmp_path
    )
    save(tmp_path / "e.png")
    assert "found 3 .txt, 1 (no extension), 1 .heic, 1 .png files; expected files ending in jpg at" in message_of(
        open_source, tmp_path, exts=["jpg"]
    )


@pytest.mark.parametrize("spec", ["digit", "Digits", "sythetic", "torchvison:MNIST"])
def test_near_names(spec):
    near = {"d": "digits", "s": "synthetic", "t": "torchvision"}[spec[0].lower()]
    message = message_of(open_source, spec)
    assert message.startswith(f"no folder and no data source is called {spec!r}; did you mean `{near}`? Give a folder")
    for form in ["digits", "synthetic[:LENGTH]", "torchvision:NAME", "wds:", "hf:NAME"]:
        assert form in message


def test_other_wrong_specs():
    assert message_of(open_source, "").startswith("the data source is ''; give a folder of images, `digits`")
    assert message_of(open_source, None).startswith("the data source is None; give")
    assert message_of(open_source, "hf:").startswith("the data source 'hf:' ends after its colon; give")
    assert message_of(open_source, "digits:train").endswith("`digits` takes no argument; write `digits`")
    assert "s3://b/c.tar is not a folder; tar files, local or remote, are given as `wds:s3" in message_of(
        open_source, "s3://b/c.tar"
    )
    assert message_of(open_source, "digits", exts=["png"]) == (
        "exts ['png'] has no meaning for 'digits', which is not made of image files; leave it out"
    )


# --------------------------------------------------------------------------------- digits, synthetic


def test_digits():
    source = open_source("digits")
    assert len(source) == 10_000 and source.flip is False
    assert [source.label(index) for index in range(10)] == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    image = source.image(0)
    assert (image.mode, image.size) == ("L", (28, 28))
    assert image.getpixel((6, 7)) == 84 and image.getextrema() == (0, 255)
    assert source.name(3) == "digits[3]" and len(source.fingerprint()) == 64
    assert sources._digits() is sources._digits()  # decompressed once
    assert len(pickle.dumps(source)) < 1000  # the images do not travel to the workers


def test_digits_files_carry_their_licence():
    text = importlib.resources.files("vqdist.data").joinpath("digits", "README.md").read_text()
    for word in ["LeCun", "Cortes", "Burges", "CC BY-SA 3.0", "unchanged"]:
        assert word in text


def test_synthetic():
    source = open_source("synthetic")
    assert len(source) == 100 and len(open_source("synthetic:7")) == 7
    assert (source.image(0).mode, source.image(0).size) == ("RGB", (64, 64))
    assert {source.label(index) for index in range(100)} == set(range(10))
    images = [np.asarray(source.image(index)).astype(int) for index in range(10)]
    assert len({image.tobytes() for image in images}) == 10
    for image in images:  # smooth, and not flat
        assert np.abs(np.diff(image, axis=0)).max() < 40 and image.std() > 5
    assert open_source("synthetic:7").fingerprint() != source.fingerprint()
    assert same_after_pickling(open_source("synthetic:5"))


@pytest.mark.parametrize("length", ["0", "x", "-3", "2.5"])
def test_synthetic_length(length):
    assert message_of(open_source, f"synthetic:{length}") == (
        f"'synthetic:{length}' has the length {length!r}; give a number of images from 1, as in synthetic:100"
    )


def test_synthetic_never_changes():
    """Written down once: another process, machine or version gives the same picture."""
    image = open_source("synthetic").image(42)
    corners = [image.getpixel(place) for place in [(0, 0), (63, 0), (0, 63), (63, 63)]]
    np.testing.assert_allclose(corners, [(119, 2, 152), (129, 6, 165), (38, 1, 48), (49, 1, 62)], atol=1)
    assert open_source("synthetic").label(42) == 2


def test_dummy_dataset():
    dataset = DummyDataset()
    image, label = dataset[5]
    assert len(dataset) == 100 and image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1 and label == open_source("synthetic").label(5)
    assert torch.equal(dataset[-1][0], dataset[99][0])
    assert len(list(DummyDataset(length=3))) == 3  # IndexError ends the loop


# --------------------------------------------------------------------------------------- torchvision


@pytest.fixture
def mnist_root(tmp_path):
    """torchvision's folder of MNIST, made of the digits of the package (as both of its splits)."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ["images-idx3", "labels-idx1"]:
        file = importlib.resources.files("vqdist.data").joinpath("digits", f"t10k-{part}-ubyte.gz")
        content = gzip.decompress(file.read_bytes())
        for split in ["t10k", "train"]:
            (raw / f"{split}-{part}-ubyte").write_bytes(content)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_torchvision_mnist(mnist_root, no_network, monkeypatch):
    source = open_source(f"torchvision:MNIST:test?root={mnist_root}")
    digits = open_source("digits")
    assert len(source) == 10_000 and source.flip is False
    assert source.image(9).tobytes() == digits.image(9).tobytes() and source.label(9) == digits.label(9)
    assert source.name(9) == "torchvision:MNIST:test[9]"
    content = pickle.dumps(source)
    assert len(content) < 2000  # opened again by the worker
    copy = pickle.loads(content)
    assert copy.image(9).tobytes() == digits.image(9).tobytes()
    assert copy.fingerprint() == source.fingerprint()
    assert open_source(f"torchvision:MNIST:train?root={mnist_root}").fingerprint() != source.fingerprint()

    (mnist_root / "cache").mkdir()
    (mnist_root / "MNIST").rename(mnist_root / "cache" / "MNIST")
    (mnist_root / "cache").rename(mnist_root / "torchvision")
    monkeypatch.setenv("VQDIST_DATA", str(mnist_root))
    assert open_source("torchvision:MNIST:test").label(0) == 7


def test_torchvision_options(tmp_path):
    source = open_source("torchvision:FakeData?size=6&image_size=(3, 8, 10)&num_classes=4")
    assert len(source) == 6 and source.flip and source.image(0).size == (10, 8)
    assert all(source.label(index) in range(4) for index in range(6))
    assert same_after_pickling(source)
    other = open_source("torchvision:FakeData?size=6&image_size=(3, 8, 10)&num_classes=4&random_offset=5")
    assert other.fingerprint() != source.fingerprint()


def test_torchvision_image_folder(tmp_path):
    save(tmp_path / "cat/1.png", 3)
    save(tmp_path / "dog/2.png", 5)
    source = open_source(f"torchvision:ImageFolder?root={tmp_path}")
    assert [source.label(0), source.label(1)] == [0, 1] and source.image(1).getpixel((0, 0)) == (5, 0, 0)
    (tmp_path / "dog/2.png").write_bytes(b"broken")
    assert "cannot decode the image torchvision:ImageFolder[1] (UnidentifiedImageError" in message_of(source.image, 1)


def test_torchvision_wrong_names():
    assert message_of(open_source, "torchvision:MNSIT").startswith("torchvision has no dataset 'MNSIT'; the nearest")
    assert "MNIST" in message_of(open_source, "torchvision:mnist")
    assert "CIFAR10" in message_of(open_source, "torchvision:cifar-10")
    assert message_of(open_source, "torchvision:xyzxyz").endswith("see torchvision.datasets for the names")
    assert "the splits train and test" in message_of(open_source, "torchvision:CIFAR10:val")
    assert "Valid values are" in message_of(open_source, "torchvision:SVHN:val")
    assert "has no splits; leave it out" in message_of(open_source, "torchvision:FakeData:train")
    assert message_of(open_source, "torchvision:FakeData?colour=1").endswith(
        "its options are size, image_size, num_classes, random_offset"
    )
    assert "missing 1 required positional argument: 'split'" in message_of(open_source, "torchvision:EMNIST")
    assert "sets download, which vqdist decides itself" in message_of(open_source, "torchvision:MNIST?download=True")
    assert "has 'size' after its question mark; give key=value" in message_of(open_source, "torchvision:FakeData?size")
    assert "holds no images; choose another split" in message_of(open_source, "torchvision:FakeData?size=0")
    assert "has no name; give a folder" in message_of(open_source, "torchvision:?root=/")


def test_torchvision_offline(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("VQDIST_DATA", str(tmp_path))
    message = message_of(open_source, "torchvision:MNIST:test")
    assert message.startswith(f"torchvision:MNIST is not in {tmp_path}/torchvision and could not be downloaded (")
    assert "no route to host" in message
    assert (
        f"torchvision.datasets.MNIST(root='{tmp_path}/torchvision', download=True, train=False)` and copy" in message
    )
    assert message.endswith("?root=")
    assert "torchvision cannot download it; get its files as" in message_of(open_source, "torchvision:Sintel")


def test_torchvision_downloads_once(mnist_root, monkeypatch, capsys):
    """The second process that comes finds the files; what torchvision prints is no result of ours."""
    import torchvision.datasets

    calls = []
    hidden = (mnist_root / "MNIST").rename(mnist_root / "remote")

    def download(self):
        calls.append(self.root)
        print("downloading")
        if not (mnist_root / "MNIST").exists():
            hidden.rename(mnist_root / "MNIST")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    for _ in range(2):
        assert open_source(f"torchvision:MNIST:test?root={mnist_root}").label(0) == 7
    assert calls == [str(mnist_root)]
    assert capsys.readouterr().out == ""


def test_torchvision_without_images():
    class Numbers(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return torch.zeros(3), "text"

    source = open_source("torchvision:FakeData?size=1")
    source._dataset = Numbers()
    assert "torchvision:FakeData gives Tensor objects where images are expected" in message_of(source.image, 0)
    assert source.label(0) is None


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "SVHN", "USPS", "SEMEION", "Omniglot", "CIFAR10", "CelebA"])
def test_digits_are_not_mirrored(name):
    assert bool(sources.DIGIT_LIKE.search(name)) == (name not in ["CIFAR10", "CelebA"])


# ---------------------------------------------------------------------------------------- webdataset


def write_tar(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        entries = []
        for sample in range(4):
            value = 10 * shard + sample
            entries += [
                (f"{value:03}.png", encoded(value)),
                (f"{value:03}.cls", str(value % 10).encode()),
                (f"{value:03}.mask.png", encoded(255)),
                (f"{value:03}.txt", b"a caption"),
            ]
        write_tar(tmp_path / f"train-{shard:02}.tar", entries)
    return tmp_path


def test_wds_by_index(shards):
    source = open_source(f"wds:{shards}/train-{{00..02}}.tar")
    assert len(source) == 12 and source.flip
    assert [source.image(i).getpixel((0, 0)) for i in (11, 0, 5)] == [23, 0, 11]  # any order
    assert [source.label(i) for i in range(12)] == [0, 1, 2, 3] * 3
    assert source.name(5) == f"{shards}/train-01.tar:011.png"
    assert same_after_pickling(source)


def test_wds_agrees_with_the_library(shards):
    import webdataset

    stream = webdataset.WebDataset(f"{shards}/train-{{00..02}}.tar", shardshuffle=False)
    source = open_source(f"wds:{shards}/train-{{00..02}}.tar")
    expected = [Image.open(io.BytesIO(sample["png"])).tobytes() for sample in stream]
    assert [source.image(index).tobytes() for index in range(len(source))] == expected


@pytest.mark.parametrize("pattern", ["train-*.tar", "", "train-{00,01,02}.tar", "train-0?.tar"])
def test_wds_forms(shards, pattern):
    assert len(open_source(f"wds:{shards}/{pattern}")) == 12


def test_wds_address_of_a_file(shards):
    assert len(open_source(f"wds:file:{shards}/train-00.tar")) == 4


def test_wds_remote_is_downloaded_once(shards, tmp_path, monkeypatch):
    calls = []

    def download(url, path):
        calls.append(url)
        with open(shards / "train-00.tar", "rb") as file, open(path, "wb") as copy:
            copy.write(file.read())

    monkeypatch.setattr("webdataset.cache.download", download)
    monkeypatch.setenv("VQDIST_DATA", str(tmp_path / "cache"))
    for _ in range(2):
        source = open_source("wds:https://host/{a,b}/train.tar?token=1")
        assert len(source) == 8 and source.image(6).getpixel((0, 0)) == 2
    assert calls == ["https://host/a/train.tar?token=1", "https://host/b/train.tar?token=1"]


def test_wds_unreachable(tmp_path, monkeypatch):
    def download(url, path):
        raise OSError("curl: no route")

    monkeypatch.setattr("webdataset.cache.download", download)
    monkeypatch.setenv("VQDIST_DATA", str(tmp_path))
    assert message_of(open_source, "wds:https://host/a.tar") == (
        "cannot download https://host/a.tar (OSError: curl: no route); copy the tar files here"
    )


def test_wds_exts_names_and_missing_labels(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.JPG", encoded(1, "jpeg")),
            ("x/1.png", encoded(2)),
            ("__meta.png", encoded(3)),
            ("._x.png", b"resource fork"),
            ("x/2.json", b"{}"),
            ("x/3.png", encoded(4)),
            ("x/3.cls", b"cat"),
        ],
    )
    spec = f"wds:{tmp_path}/a.tar"
    both, png = open_source(spec), open_source(spec, exts=["png"])
    assert [both.image(i).getpixel((0, 0)) for i in range(len(both))] == [1, 4]
    assert [png.image(i).getpixel((0, 0)) for i in range(len(png))] == [2, 4]
    assert png.label(0) is None
    assert "the entry cls of" in message_of(png.label, 1) and "is 'cat'; a whole number" in message_of(png.label, 1)
    assert "no images in the 1 tar files of" in message_of(open_source, spec, exts=["bmp"])


def test_wds_broken_image_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.png", encoded(1)), ("2.png", encoded(2)[:30])])
    source = open_source(f"wds:{tmp_path}/a.tar")
    assert f"cannot decode the image {tmp_path}/a.tar:2.png (" in message_of(source.image, 1)
    os.truncate(tmp_path / "a.tar", 520)
    assert "the tar file ends" in message_of(source.image, 0)
    (tmp_path / "a.tar").unlink()
    assert "FileNotFoundError" in message_of(source.image, 0)


def test_wds_errors(tmp_path, shards):
    assert message_of(open_source, f"wds:{tmp_path}/no-{{0..3}}.tar") == (
        f"no such tar file: {tmp_path}/no-0.tar; check the path and the numbers between the braces"
    )
    assert message_of(open_source, f"wds:{tmp_path}/no-*.tar") == (
        f"no tar file matches 'wds:{tmp_path}/no-*.tar'; check the path"
    )
    assert f"no such tar file: {tmp_path}/train-03.tar" in message_of(
        open_source, f"wds:{tmp_path}/train-{{00..03}}.tar"
    )
    with gzip.open(tmp_path / "z.tar", "wb") as file:
        file.write((tmp_path / "train-00.tar").read_bytes())
    assert "it must be whole, and not compressed: fetch or pack" in message_of(open_source, f"wds:{tmp_path}/z.tar")
    content = (tmp_path / "train-00.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:700])
    assert f"cannot read the tar file {tmp_path}/cut.tar" in message_of(open_source, f"wds:{tmp_path}/cut.tar")
    write_tar(tmp_path / "twice.tar", [("1.png", encoded()), ("2.png", encoded()), ("1.png", encoded())])
    assert "twice.tar holds 1.png twice; pack it again" in message_of(open_source, f"wds:{tmp_path}/twice.tar")
    assert "would run a command; give files" in message_of(open_source, "wds:pipe:cat a.tar")
    assert "cannot be expanded" in message_of(open_source, "wds:/data/${NOT_SET}.tar")


@pytest.mark.parametrize("package, spec", [("webdataset", "wds:/a.tar"), ("datasets", "hf:name")])
def test_missing_packages(monkeypatch, package, spec):
    monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    assert message_of(open_source, spec) == (
        f"{spec!r} needs the package {package}, which is not installed; run `pip install 'vqdist[data]'`"
    )


# ------------------------------------------------------------------------------ Hugging Face datasets


@pytest.fixture(scope="module")
def pictures():
    """Three pictures in a column that is not called image, with classes."""
    datasets = importlib.import_module("datasets")
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["a", "b", "c"]),
        }
    )
    rows = {
        "id": ["x", "y", "z"],
        "picture": [{"bytes": encoded(i), "path": None} for i in range(3)],
        "kind": [2, 0, 1],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_hf_saved_dataset(tmp_path, pictures):
    pictures.save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path}/saved")
    assert len(source) == 3 and source.flip
    assert [source.image(i).getpixel((0, 0)) for i in range(3)] == [0, 1, 2]
    assert [source.label(i) for i in range(3)] == [2, 0, 1]
    assert source.name(1) == f"hf:{tmp_path}/saved[1]"
    assert same_after_pickling(source)
    pictures.save_to_disk(tmp_path / "other" / "saved")
    assert open_source(f"hf:{tmp_path}/other/saved").fingerprint() == source.fingerprint()
    assert "one dataset alone was saved; leave it out" in message_of(open_source, f"hf:{tmp_path}/saved:test")


def test_hf_splits(tmp_path, pictures):
    import datasets

    datasets.DatasetDict({"test": pictures.select([1]), "train": pictures}).save_to_disk(tmp_path / "both")
    assert len(open_source(f"hf:{tmp_path}/both")) == 3
    assert len(open_source(f"hf:{tmp_path}/both:test")) == 1
    assert message_of(open_source, f"hf:{tmp_path}/both:valid").endswith(
        "has no split 'valid'; it has test, train: add one as in hf:NAME:SPLIT"
    )
    datasets.DatasetDict({"odd": pictures}).save_to_disk(tmp_path / "one")
    assert len(open_source(f"hf:{tmp_path}/one")) == 3
    datasets.DatasetDict({"odd": pictures, "even": pictures}).save_to_disk(tmp_path / "two")
    assert "has no split 'train'; it has odd, even" in message_of(open_source, f"hf:{tmp_path}/two")


def test_hf_folder_of_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for name, value in [("cat/1.png", 3), ("dog/2.png", 5), ("dog/3.png", 7)]:
        save(tmp_path / "files" / name, value)
    source = open_source(f"hf:{tmp_path}/files:train[1:]")
    assert [source.image(i).getpixel((0, 0))[0] for i in range(2)] == [5, 7]
    assert [source.label(0), source.label(1)] == [1, 1]


def test_hf_columns(tmp_path, pictures):
    import datasets

    second = pictures.select_columns(["picture"]).rename_column("picture", "image")
    both = datasets.concatenate_datasets([pictures, second], axis=1).add_column("label", [5, 6, 7])
    both.save_to_disk(tmp_path / "both")
    source = open_source(f"hf:{tmp_path}/both")
    assert source._image_column == "image" and source.label(0) == 2  # classes before plain numbers
    chosen = open_source(f"hf:{tmp_path}/both?image=picture&label=label")
    assert chosen._image_column == "picture" and chosen.label(0) == 5
    assert "has no image column 'id'; its columns are id (Value), picture (Image)" in message_of(
        open_source, f"hf:{tmp_path}/both?image=id"
    )
    assert "has no column 'nothing'; its columns are id, picture" in message_of(
        open_source, f"hf:{tmp_path}/both?label=nothing"
    )
    assert "has the key 'column'; hf: knows config, image and label" in message_of(open_source, "hf:x?column=a")
    pictures.remove_columns(["picture"]).save_to_disk(tmp_path / "none")
    assert "has no column of images; its columns are id (Value), kind (ClassLabel); name one" in message_of(
        open_source, f"hf:{tmp_path}/none"
    )
    pictures.remove_columns(["kind"]).save_to_disk(tmp_path / "plain")
    assert open_source(f"hf:{tmp_path}/plain").label(0) is None


def test_hf_broken_and_missing_images(tmp_path, pictures):
    import datasets

    rows = {"image": [{"bytes": b"broken", "path": None}, None]}
    broken = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    broken.save_to_disk(tmp_path / "broken")
    source = open_source(f"hf:{tmp_path}/broken")
    assert f"cannot decode the image hf:{tmp_path}/broken[0] (Unidentified" in message_of(source.image, 0)
    assert f"cannot decode the image hf:{tmp_path}/broken[1] (the sample is empty)" in message_of(source.image, 1)


def test_hf_hub(monkeypatch, pictures):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return pictures if kwargs["split"] else datasets.DatasetDict({"train": pictures})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(type(pictures), "split", "test")
    assert open_source("hf:ylecun/mnist:test?config=small").flip is False
    assert open_source("hf:owner/cats").name(2) == "hf:owner/cats[2]"
    assert asked == [(("ylecun/mnist", "small"), {"split": "test"}), (("owner/cats", None), {"split": None})]


def test_hf_offline(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert message_of(open_source, "hf:owner/name") == (
        "'hf:owner/name' could not be loaded (ConnectionError: Couldn't reach 'owner/name' on the Hub second line); "
        "check the name, configuration and split, or, without network, run "
        "`datasets.load_dataset('owner/name').save_to_disk('FOLDER')` on a machine that has it, copy the folder here "
        "and give `hf:FOLDER`"
    )
    assert message_of(open_source, f"hf:{tmp_path}/gone").startswith(
        f"no such folder: {tmp_path}/gone; check the path"
    )


# ------------------------------------------------------------------------------------- ImageDataset


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
        "image_size 0 is not possible; give the side in pixels, a whole number from 1"
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


# ---------------------------------------------------------------------------------------------- parts


def test_a_source_of_ones_own():
    class Squares(Source):
        spec, flip = "squares", False

        def __len__(self):
            return 2

        def image(self, index):
            return Image.new("L", (index + 1, index + 1), 255)

        def fingerprint(self):
            return "0" * 64

    dataset = ImageDataset(Squares(), 4, channels=1)
    assert dataset[1].eq(1).all() and dataset.label(0) is None and dataset.name(1) == "squares[1]"


def test_packed_strings():
    strings = ["", "a", "日本", os.fsdecode(b"\xff"), ""]
    packed = PackedStrings(strings)
    assert list(packed) == strings and packed[-3] == "日本" and len(packed) == 5
    assert list(PackedStrings([])) == []
    with pytest.raises(IndexError):
        packed[5]
