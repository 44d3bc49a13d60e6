"""`wds:` gives the samples of the webdataset library, at any index."""

import gzip
import io
import os

import pytest
from PIL import Image
from source_files import encoded, message_of, same_after_pickling, write_tar

from vqdist.data.sources import open_source


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
