"""`hf:` finds split, images and labels in datasets of the Hub, of a folder and of `save_to_disk`."""

import importlib

import pytest
from source_files import encoded, message_of, same_after_pickling, save

from vqdist.data.sources import open_source


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


@pytest.mark.parametrize("form", ["struct", "bytes"])
@pytest.mark.parametrize("column", ["image", "jpg"])
def test_hf_parquet_of_others(tmp_path, form, column):
    """The bytes of files alone or beside a path, in columns of no special type."""
    parquet, arrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    files = [encoded(i) for i in range(4)]
    images = [{"bytes": file, "path": f"{i}.png"} for i, file in enumerate(files)] if form == "struct" else files
    table = arrow.table({column: images, "cls": [2, 0, 1, 2], "caption": list("abcd")})
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data/train-00000.parquet")
    source = open_source(f"hf:{tmp_path}/data")
    assert [source.image(i).getpixel((0, 0)) for i in range(4)] == [0, 1, 2, 3]
    assert [source.label(i) for i in range(4)] == [2, 0, 1, 2] and source.class_names is None
    named = open_source(f"hf:{tmp_path}/data?label=caption")
    assert [named.label(i) for i in range(4)] == [0, 1, 2, 3] and named.class_names == list("abcd")
    assert "no image column 'cls'" in message_of(open_source, f"hf:{tmp_path}/data?image=cls")


def test_hf_class_names(tmp_path, pictures):
    pictures.save_to_disk(tmp_path / "saved")
    assert open_source(f"hf:{tmp_path}/saved").class_names == ["a", "b", "c"]
