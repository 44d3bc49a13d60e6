"""A spec string becomes a source: the right files in the right order, or one line that says what to do."""

import importlib
import importlib.resources
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from source_files import message_of, same_after_pickling, save

from vqdist.cli import main
from vqdist.data import sources
from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.data.images import BadImageError
from vqdist.data.sources import DummyDataset, FolderSource, Source, digits, folder_of, open_source
from vqdist.data.sources.base import DIGIT_LIKE, PackedStrings
from vqdist.errors import UserError
from vqdist.parts import Registry


def relative_names(source):
    return [os.path.relpath(source.name(index), source.folder) for index in range(len(source))]


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
    assert relative_names(source) == ["a/1.png", "b.png", "b/2.png", "gone.png"]
    assert "gone.png (FileNotFoundError" in message_of(source.image, 3)
    assert len(source.fingerprint()) == 64


def test_every_folder_is_entered_once_however_many_links_lead_to_it(tmp_path):
    """Twelve folders that link to each other have 12! paths."""
    for number in range(12):
        save(tmp_path / f"d{number:02}/1.png")
    for number in range(12):
        for other in set(range(12)) - {number}:
            (tmp_path / f"d{number:02}/l{other:02}").symlink_to(tmp_path / f"d{other:02}")
    assert relative_names(open_source(tmp_path)) == [f"d{number:02}/1.png" for number in range(12)]


def test_of_links_to_one_folder_the_first_is_taken(tmp_path):
    save(tmp_path / "elsewhere/in/1.png")
    (tmp_path / "data").mkdir()
    for name in ("second", "first", "third"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/inner").symlink_to(tmp_path / "elsewhere/in")
    assert relative_names(open_source(tmp_path / "data")) == ["first/in/1.png"]


def test_deep_folders(tmp_path):
    deepest = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=deepest)
        inner = os.open("d", os.O_RDONLY, dir_fd=deepest)
        os.close(deepest)
        deepest = inner
    os.close(os.open("1.png", os.O_CREAT | os.O_WRONLY, dir_fd=deepest))
    os.close(deepest)
    try:
        assert relative_names(open_source(tmp_path)) == ["d/" * 1200 + "1.png"]
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # Python's own way is recursive


def test_formats_that_pillow_opens(tmp_path, capsys):
    names = ["a.jfif", "b.jpe", "c.PPM", "d.pgm", "e.tga", "f.jp2", "g.qoi"]
    for number, name in enumerate(names):
        kind = "jpeg" if name in names[:2] else None  # a name by which Pillow does not write
        Image.new("L" if name == "d.pgm" else "RGB", (4, 4), number).save(tmp_path / name, format=kind)
    source = open_source(tmp_path)
    assert relative_names(source) == names and [source.image(index).size for index in range(7)] == [(4, 4)] * 7
    assert capsys.readouterr().err == ""


def test_files_that_are_passed_over_are_said_once(tmp_path, capsys):
    for name in ["ant/1.png", "ant/2.png", "bee/1.heic", "bee/2.heic", "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "ant/3.png")
    source = open_source(tmp_path)
    assert relative_names(source) == ["ant/1.png", "ant/2.png"] and source.class_names == ["ant"]
    assert capsys.readouterr().err == (
        f"vqdist: {tmp_path}: 2 images; passed over 2 .heic, 1 .txt, 1 special files; no class without images: 'bee'\n"
    )


def test_one_image_is_a_source(tmp_path):
    file = save(tmp_path / "a/my.jpg")
    save(tmp_path / "a/other.jpg")
    for given in (str(file), file):
        source = open_source(given)
        assert relative_names(source) == ["my.jpg"] and source.label(0) is None and source.image(0).size == (4, 4)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["10", "9", "0", "1"], ["0", "1", "9", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["007", "10", "7"], ["007", "7", "10"]),
    ],
)
def test_class_names_in_the_order_of_their_numbers(tmp_path, folders, names):
    for folder in folders:
        save(tmp_path / folder / "1.png")
    source = open_source(tmp_path)
    assert source.class_names == names and source.first_class_names == sorted(folders)
    labels = {path.split("/")[0]: source.label(index) for index, path in enumerate(relative_names(source))}
    assert [labels[name] for name in names] == list(range(len(names)))


def test_labels_by_the_names_of_a_model(tmp_path):
    for name in ("cat", "bee", "10", "9"):
        save(tmp_path / name / "1.png")
    dataset = ImageDataset(tmp_path, 4)
    known = ["ant", "9", "bee", "cat", "10"]
    assert dataset.use_classes(known) == "warning: no images of 1 of 5 classes: 'ant'"
    labels = {os.path.basename(os.path.dirname(dataset.name(i))): dataset.fetch_labelled(0, i)[1] for i in range(4)}
    assert labels == {"cat": 3, "bee": 2, "10": 4, "9": 1} and dataset.class_names == known
    assert "the images have the class '10', '9', which the model does not know; it knows 'bee', 'cat'" in message_of(
        ImageDataset(tmp_path, 4).use_classes, ["bee", "cat"]
    )
    numbers = tmp_path / "numbers"
    for name in ("10", "9"):
        save(numbers / name / "1.png")
    old = ImageDataset(numbers, 4)
    assert [old.label(0), old.label(1)] == [1, 0]
    old.use_classes(None)  # of a model from before names were kept
    assert [old.label(0), old.label(1)] == [0, 1]


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
    file = tmp_path / "notes.txt"
    file.touch()
    assert message_of(open_source, str(file)) == (
        f"{file} is a file, and a folder of images or an image is expected; give one of both"
    )
    (tmp_path / "b.tar").touch()
    assert message_of(open_source, str(tmp_path / "b.tar")).endswith(f"tar files are given as `wds:{tmp_path}/b.tar`")
    assert "exts is empty; give extensions such as bmp" in message_of(open_source, tmp_path, exts=[])


def test_empty_folders(tmp_path):
    assert message_of(open_source, tmp_path) == (
        f"no images in {tmp_path}: found no files; expected files ending in bmp, gif, jpeg, jpg, png, tif, tiff, webp "
        "(or of a rarer format that Pillow opens) at any depth"
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
    assert message.startswith(f"there is no folder and no data source {spec!r}; nearest: {near}; there are digits, ")
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
    assert digits._digits() is digits._digits()  # decompressed once
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


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "SVHN", "USPS", "SEMEION", "Omniglot", "CIFAR10", "CelebA"])
def test_digits_are_not_mirrored(name):
    assert bool(DIGIT_LIKE.search(name)) == (name not in ["CIFAR10", "CelebA"])


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


OWN = """
import random
from PIL import Image
from vqdist import Source

class Squares(Source):
    shade = 5

    def __init__(self, count=40, side=20):
        self.count, self.side = count, side

    def __len__(self):
        return self.count

    def image(self, index):
        return Image.new("RGB", (self.side, 16), (index * self.shade % 256, 40, 200))

    def label(self, index):
        return index % 10

class Files(Squares):
    def __init__(self, spec=None, exts=None):
        super().__init__()
        self.given = spec, exts

class Random(Squares):
    def image(self, index):
        return Image.new("L", (4, 4), random.randrange(256))

class Array(Squares):
    def image(self, index):
        return [[0]]

class Words(Squares):
    def label(self, index):
        return "cat"

class Bare(Source):
    pass

def make(count):
    return Squares(count)

class Other:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Start in a folder that holds a module of a user."""
    (tmp_path / "my_data.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("my_data", None)


@pytest.mark.parametrize(
    "given, count",
    [
        ("my_data.Squares", 40),
        ({"class_path": "my_data.Squares"}, 40),
        ({"class_path": "my_data.Squares", "init_args": {"count": 7}}, 7),
        ('{"class_path": "my_data.make", "init_args": {"count": 3}}', 3),
        ({"class_path": "synthetic", "init_args": {"spec": "synthetic:5"}}, 5),
        ({"class_path": "digits"}, 10_000),
    ],
)
def test_a_source_in_every_form(own, given, count):
    dataset = ImageDataset(given, 16)
    assert len(dataset) == count and dataset[1].shape == (3, 16, 16) and isinstance(dataset.label(1), int)
    assert same_after_pickling(open_source(given)) if count < 100 else True


def test_a_source_that_is_built_is_taken_as_it_is(own):
    source = importlib.import_module("my_data").Squares(6)
    assert ImageDataset(source, 16).source is source and source.spec == "Squares"
    assert source.name(2) == "Squares[2]"


def test_an_existing_folder_goes_before_an_import_path(own):
    save(own / "my_data.Squares" / "a.png")
    assert isinstance(open_source("my_data.Squares"), FolderSource)


def test_a_source_is_told_the_spec_and_the_extensions_if_it_asks(own):
    import my_data

    registry = Registry("data source", Source)
    registry.add("files")(my_data.Files)
    registry.add("squares")(my_data.Squares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SOURCES", registry)
        assert open_source("files:a:b", exts=["png"]).given == ("files:a:b", ["png"])
        assert open_source("files").given == ("files", None)
        assert len(open_source("squares")) == 40
        assert "takes nothing after a colon" in message_of(open_source, "squares:3")
    assert open_source("my_data.Files", exts=["png"]).given == (None, ["png"])
    assert message_of(open_source, "my_data.Squares", exts=["png"]).startswith("exts ['png'] has no meaning for 'my_d")


@pytest.mark.parametrize(
    "given, expected",
    [
        ("my_data.Square", ["no folder 'my_data.Square', which would be taken first", "nearest: Squares"]),
        ("no_such_module.Squares", ["no folder", "no module 'no_such_module'"]),
        ("my_data.Other", ["no Source", "vqdist.data.sources.base.Source"]),
        ({"class_path": "my_data.Squares", "init_args": {"cuont": 3}}, ["no argument 'cuont'", "nearest: count"]),
        ({"class_path": "my_data.Squares", "init_args": {"count": 0}}, ["'Squares' holds no images"]),
        ({"class_path": "torchvison"}, ["no data source 'torchvison'", "nearest: torchvision"]),
        ({"class_path": "torchvision"}, ["'spec'", "init_args"]),
        ({"init_args": {}}, ["class_path"]),
        ('{"class_path": ', ["not JSON", "my_data.Source"]),
        ("{}", ["class_path"]),
    ],
)
def test_mistakes_with_an_own_source_are_one_line(own, given, expected):
    message = message_of(open_source, given)
    for words in expected:
        assert words in message


def test_mistakes_in_an_own_source_are_one_line(own):
    import my_data

    assert "Random[0] is another image each time" in message_of(my_data.Random().fingerprint)
    assert "Array[3] is a list; return a PIL image" in message_of(lambda: ImageDataset(my_data.Array(), 8)[3])
    assert "label of Words[3] is 'cat'" in message_of(ImageDataset(my_data.Words(), 8).label, 3)
    with pytest.raises(NotImplementedError, match="Bare has no __len__"):
        ImageDataset(my_data.Bare(), 8)


def test_the_fingerprint_of_an_own_source_knows_length_pixels_and_labels(own):
    import my_data

    class Lighter(my_data.Squares):
        shade = 6

    class Shifted(my_data.Squares):
        def label(self, index):
            return (index + 1) % 10

    Lighter.__name__ = Shifted.__name__ = "Squares"
    seen = [my_data.Squares(), my_data.Squares(41), my_data.Squares(40, 21), Lighter(), Shifted()]
    assert len({source.fingerprint() for source in seen}) == 5
    assert my_data.Squares().fingerprint() == my_data.Squares().fingerprint()


def test_a_broken_image_does_not_keep_a_source_from_its_fingerprint(own):
    import my_data

    class Broken(my_data.Squares):
        def image(self, index):
            if index == 0:
                raise BadImageError("cannot decode it")
            return super().image(index)

    dataset = ImageDataset(Broken(), 8, on_bad_image="skip")
    assert len(dataset.fingerprint()) == 64 and dataset.fetch(0, 0)[1] == ("Broken[0]",)


@pytest.mark.parametrize("given", [{"class_path": "vqdist.data.sources.FolderSource"}, None])
def test_the_folder_of_a_source_is_known(own, given):
    save(own / "images" / "a.png")
    spec = str(own / "images") if given is None else {**given, "init_args": {"folder": str(own / "images")}}
    assert folder_of(spec) == folder_of(open_source(spec)) == own / "images"
    assert folder_of("digits") is folder_of({"class_path": "digits"}) is folder_of(None) is None


OWN_SINK = """
from vqdist import Sink

class Table(Sink):
    def __init__(self, run_folder, every=1):
        self.file, self.every = (run_folder / "table.csv").open("a"), every

    def log(self, step, values):
        if step % self.every == 0:
            self.file.write(f"{step},{values.get('loss')}\\n")

    def close(self):
        self.file.close()
"""


def test_a_run_from_yaml_with_an_own_source_and_an_own_sink(own, capsys):
    """Trained with loader processes, resumed, refused with other images, measured, encoded and reconstructed."""
    (own / "my_sinks.py").write_text(OWN_SINK)
    (own / "run.yaml").write_text(
        "data: {folder: {class_path: my_data.Squares, init_args: {count: 24}}, image_size: 16, num_workers: 1}\n"
        "model: {num_layers: 2, num_tokens: 16, codebook_dim: 8, hidden_dim: 8}\n"
        "trainer:\n"
        "  batch_size: 4\n"
        "  num_train_steps: 2\n"
        "  trackers: [{class_path: my_sinks.Table, init_args: {every: 2}}]\n"
        "out: run\n"
    )
    data = json.dumps({"class_path": "my_data.Squares", "init_args": {"count": 24}})
    assert main(["train", "dvae", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    assert [line.split(",")[0] for line in (own / "run/table.csv").read_text().splitlines()] == ["2", "2"]
    trainer = json.loads((own / "run/config.json").read_text())["trainer"]
    assert trainer["folder"] == json.loads(data)
    assert trainer["trackers"] == [{"class_path": "my_sinks.Table", "init_args": {"every": 2}}]
    assert main(["train", "dvae", "--config", "run.yaml", "--data", data, "--trainer.num_train_steps", "4"]) == 0
    capsys.readouterr()
    assert main(["train", "dvae", "--config", "run.yaml", "--data.folder.count", "30"]) == 2
    assert "data.images" in capsys.readouterr().err
    assert main(["train", "dvae", "--config", "run.yaml", "--data", "my_data.Squares"]) == 2
    assert "data.images" in capsys.readouterr().err
    for alias, given in (("--data", "my_data.Squares"), ("--image_folder", data)):  # with its pieces in one command
        both = ["train", "dvae", "--config", "run.yaml", alias, given, "--data.folder.count"]
        assert main([*both, "24"]) == 0, capsys.readouterr().err
        assert main([*both, "30"]) == 2
        assert "data.images" in capsys.readouterr().err
    for command, options in {
        "evaluate": ["--num_workers", "1"],
        "encode": ["--out", "codes", "--num_workers", "1"],
        "reconstruct": ["--out", "sheet.png"],
    }.items():
        assert main([command, "run", "--data", data, *options]) == 0, capsys.readouterr().err
    assert CodeDataset("codes").label(13) == 3 and (own / "sheet.png").is_file()
    sys.modules.pop("my_sinks", None)


def test_packed_strings():
    strings = ["", "a", "日本", os.fsdecode(b"\xff"), ""]
    packed = PackedStrings(strings)
    assert list(packed) == strings and packed[-3] == "日本" and len(packed) == 5
    assert list(PackedStrings([])) == []
    with pytest.raises(IndexError):
        packed[5]


@pytest.mark.parametrize("package, spec", [("webdataset", "wds:/a.tar"), ("datasets", "hf:name")])
def test_missing_packages(monkeypatch, package, spec):
    monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    assert message_of(open_source, spec) == (
        f"{spec!r} needs the package {package}, which is not installed; run `pip install 'vqdist[data]'`"
    )


class Promising(Source):
    """A source that says what a test wants of its length and its images."""

    def __init__(self, length=4, said="0" * 64):
        self.length, self.said = length, said

    def __len__(self):
        return self.length

    def image(self, index):
        return Image.new("RGB", (16, 16), (index, 0, 0))

    def fingerprint(self):
        return self.said


@pytest.mark.parametrize("length", [-1, 3.0, "a", None])
def test_a_length_that_is_no_number_of_images(length):
    with pytest.raises(UserError, match="length of Promising cannot be used .*number of images"):
        ImageDataset(Promising(length), 16)


@pytest.mark.parametrize("said", [None, 5, "hi", "0" * 63, "g" * 64])
def test_a_fingerprint_that_is_no_sha256(said):
    dataset = ImageDataset(Promising(said=said), 16)
    with pytest.raises(UserError, match="fingerprint of Promising is .*hexadecimal"):
        dataset.fingerprint()
    assert ImageDataset(Promising(), 16).fingerprint() == "0" * 64
