"""`torchvision:` reads what torchvision reads, downloads once, and says what is wrong with a name."""

import gzip
import importlib.resources
import pickle
from urllib.error import URLError

import pytest
import torch
from source_files import message_of, same_after_pickling, save
from torch.utils.data import Dataset

from vqdist.data.sources import open_source


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
    assert message_of(open_source, "torchvision:MNSIT").startswith(
        "torchvision has no dataset 'MNSIT'; nearest: MNIST"
    )
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
