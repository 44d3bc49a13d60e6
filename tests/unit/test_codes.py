"""Folders of codes: what is read from them, by whom, and how broken ones are refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from source_files import message_of, save
from test_tokenizer import build

from vqdist import Tokenizer, UserError
from vqdist.backends import create_backend
from vqdist.data import codes as codes_module
from vqdist.data.codes import CodeDataset, code_dtype, num_shards, row_shape, shard_range
from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import train_loader, valid_loader
from vqdist.encoding import CodeWriter
from vqdist.files import sha256_of

COUNT, SHARD = 70, 32


def images_of(tokenizer: Tokenizer, source: str = f"synthetic:{COUNT}") -> ImageDataset:
    return ImageDataset(source, tokenizer.image_size, channels=tokenizer.channels, augment=False)


def write(tokenizer: Tokenizer, folder: Path, source: str = f"synthetic:{COUNT}", **options) -> Path:
    """Return a finished folder of codes."""
    sizes = {"batch_size": 8, "shard_size": SHARD, **options}
    CodeWriter(tokenizer, images_of(tokenizer, source), folder, **sizes).write(create_backend("local"), num_workers=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build("dvae"))


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory) -> Path:
    return write(tokenizer, tmp_path_factory.mktemp("codes") / "codes")


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """Return a copy to be broken."""
    return shutil.copytree(written, tmp_path / "codes")


def change_manifest(folder: Path, **facts) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


# --------------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize(
    "codebook_size, expected",
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**32, "uint32")],
)
def test_the_smallest_type_that_holds_the_codebook(codebook_size, expected):
    assert code_dtype(codebook_size) == expected
    assert np.iinfo(code_dtype(codebook_size)).max >= codebook_size - 1


def test_a_codebook_that_no_type_holds():
    assert "at most 4294967296" in message_of(code_dtype, 2**32 + 1)


@pytest.mark.parametrize("count, shard_size", [(70, 32), (64, 32), (1, 8), (5, 1)])
def test_shards_cover_every_image_once(count, shard_size):
    ranges = [shard_range(shard, count, shard_size) for shard in range(num_shards(count, shard_size))]
    assert [index for rows in ranges for index in rows] == list(range(count))
    assert {len(rows) for rows in ranges[:-1]} <= {shard_size} and len(ranges[-1]) >= 1


def test_rows():
    assert row_shape(16, 1) == (16,) and row_shape(16, 3) == (16, 3)


# --------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["dvae", "residual_vq"])
def test_codes_and_labels_are_those_of_the_images_in_order(kind, tmp_path):
    tokenizer = Tokenizer(build(kind))
    codes, images = CodeDataset(write(tokenizer, tmp_path / "codes")), images_of(tokenizer)
    expected = torch.cat([tokenizer.encode(torch.stack([images[i] for i in rows])) for rows in batches_of(SHARD, 8)])
    read = torch.stack([codes.fetch(0, index)[0] for index in range(COUNT)])
    assert read.dtype == torch.int64 and torch.equal(read, expected)
    assert [codes.label(index) for index in range(COUNT)] == [images.label(index) for index in range(COUNT)]
    assert len(read.unique()) > 4


def batches_of(shard_size: int, batch_size: int) -> list[range]:
    """Return the batches in which the codes were made: none spans two shards."""
    shards = [shard_range(shard, COUNT, shard_size) for shard in range(num_shards(COUNT, shard_size))]
    starts = [(start, rows.stop) for rows in shards for start in range(rows.start, rows.stop, batch_size)]
    return [range(start, min(stop, start + batch_size)) for start, stop in starts]


def test_facts(written, tokenizer):
    codes = CodeDataset(written)
    assert len(codes) == COUNT
    assert (codes.tokenizer, codes.data) == (tokenizer.fingerprint(), images_of(tokenizer).fingerprint())
    assert (codes.codebook_size, codes.num_codes, codes.num_levels) == (32, 16, 1)
    assert (codes.image_size, codes.channels, codes.code_side, codes.scales) == (16, 3, 4, None)
    assert (codes.model_type, codes.classes_seen) == ("dvae", 10)


def test_an_index_from_the_end_and_none_at_all(written):
    codes = CodeDataset(written)
    assert torch.equal(codes[-1], codes[COUNT - 1]) and torch.equal(codes[3, -1], codes[-1])
    for index in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError, match="out of range"):
            codes.fetch(0, index)
        with pytest.raises(IndexError, match="out of range"):
            codes.label(index)


def test_fetch_gives_the_same_in_every_epoch_and_a_tensor_of_its_own(written):
    codes = CodeDataset(written)
    first, bad = codes.fetch(0, 40, among=[1, 2])
    again, _ = codes.fetch(7, 40)
    assert bad == () and torch.equal(first, again)
    first.zero_()
    assert torch.equal(codes[40], again)


def test_images_without_labels_have_none(tokenizer, tmp_path):
    for index in range(5):
        save(tmp_path / "images" / f"{index}.png", value=40 * index, size=(16, 16))
    codes = CodeDataset(write(tokenizer, tmp_path / "codes", str(tmp_path / "images")))
    assert codes.classes_seen == 0 and [codes.label(index) for index in range(5)] == [None] * 5


def test_opening_maps_nothing_and_reading_maps_one_shard(written, monkeypatch):
    opened = []
    load = np.load

    def counted(path, **options):
        assert options["mmap_mode"] == "r"
        opened.append(Path(path).name)
        array = load(path, **options)
        assert isinstance(array, np.memmap)
        return array

    monkeypatch.setattr(codes_module.np, "load", counted)
    codes = CodeDataset(written)
    assert opened == []
    for index in (33, 34, 63):
        codes.fetch(0, index)
    assert opened == ["codes_00001.npy"]
    codes.label(33)
    assert opened == ["codes_00001.npy", "labels_00001.npy"]
    pickle.loads(pickle.dumps(codes)).fetch(0, 33)
    assert opened[2:] == ["codes_00001.npy"]


def test_more_shards_than_may_be_open(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(codes_module, "MAX_OPEN", 2)
    codes = CodeDataset(write(tokenizer, tmp_path / "codes", shard_size=8))
    twice = [codes[index] for _ in range(2) for index in range(COUNT)]
    assert codes._maps["codes"].cache_info().currsize == 2
    assert all(torch.equal(first, again) for first, again in zip(twice[:COUNT], twice[COUNT:], strict=True))


def test_a_pickle_carries_no_codes(written):
    codes = CodeDataset(written)
    codes.fetch(0, 0)
    small = pickle.dumps(codes)
    assert len(small) < 4000
    assert torch.equal(pickle.loads(small)[5], codes[5])


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_pairs_of_codes_and_labels(written, tokenizer, workers):
    codes, images = CodeDataset(written), images_of(tokenizer)
    assert_pairs(codes, images, workers)


def assert_pairs(codes: CodeDataset, images: ImageDataset, workers: int) -> None:
    everything = torch.arange(COUNT)
    settings = {"batch_size": 10, "rank": 0, "world_size": 1, "num_workers": workers, "labels": True}
    stream = {"seed": 3, "position": 0, "pin_memory": False, "prefetch_factor": 2}
    ours, theirs = (train_loader(data, everything, **stream, **settings) for data in (codes, images))
    for _ in range(COUNT // 10):
        batch, pixels = next(ours), next(theirs)
        assert batch.item.shape == (10, 16) and batch.item.dtype == torch.int64 and batch.bad == []
        assert torch.equal(batch.label, pixels.label) and len(batch.label.unique()) > 2
    valid = list(valid_loader(codes, everything, **settings))
    assert torch.equal(torch.cat([batch.item for batch in valid]), torch.stack([codes[i] for i in range(COUNT)]))
    assert torch.cat([batch.label for batch in valid]).tolist() == [images.label(i) for i in range(COUNT)]


def test_the_training_order_is_that_of_the_images(written, tokenizer):
    """Codes on the fly and stored codes: the same batches."""
    options = {
        "seed": 5,
        "batch_size": 8,
        "rank": 0,
        "world_size": 1,
        "position": 0,
        "num_workers": 0,
        "pin_memory": False,
        "prefetch_factor": 2,
    }
    everything = torch.arange(COUNT)
    stored = next(train_loader(CodeDataset(written), everything, **options)).item
    pixels = next(train_loader(images_of(tokenizer), everything, **options)).item
    assert torch.equal(stored, tokenizer.encode(pixels))


# --------------------------------------------------------------------------------------------- whose codes they are


def test_codes_of_another_tokenizer_are_refused(written, tokenizer):
    codes = CodeDataset(written)
    codes.check_tokenizer(tokenizer.fingerprint())
    other = build("dvae")
    with torch.no_grad():
        other.codebook.weight[0, 0] += 1
    message = message_of(codes.check_tokenizer, Tokenizer(other).fingerprint())
    assert tokenizer.fingerprint()[:12] in message and "encode again" in message


def test_the_fingerprint_is_that_of_the_content(folder, written):
    before = CodeDataset(folder).fingerprint()
    assert before == CodeDataset(written).fingerprint() == sha256_of(folder / "manifest.json")
    change_manifest(folder, classes_seen=9)
    assert CodeDataset(folder).fingerprint() != before


# --------------------------------------------------------------------------------------------- broken folders


def test_no_folder_and_a_folder_of_something_else(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        assert f"there are no codes in {folder}: it has no manifest.json" in message_of(CodeDataset, folder)


def test_unfinished(folder):
    (folder / "manifest.json").unlink()
    assert "was not finished: run the same `vqdist encode` command again" in message_of(CodeDataset, folder)


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe"])
def test_manifest_that_is_no_json(folder, content):
    (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(folder / "manifest.json") in message_of(CodeDataset, folder)


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({"version": 2}, "has the version 2, and this vqdist reads 1"),
        ({"count": 0}, "'count'"),
        ({"count": "70"}, "'count'"),
        ({"codebook_size": None}, "'codebook_size'"),
        ({"scales": 3}, "'scales'"),
        ({"shards": []}, "'shards'"),
        ({"shards": [{}, {}, {}]}, "'shards'"),
        ({"shards": [1, 2, 3]}, "'shards'"),
    ],
)
def test_manifest_that_cannot_be_right(folder, facts, expected):
    change_manifest(folder, **facts)
    message = message_of(CodeDataset, folder)
    assert expected in message and "manifest.json" in message


@pytest.mark.parametrize("name", ["codes_00001.npy", "labels_00001.npy"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    message = message_of(CodeDataset, folder)
    assert str(folder / name) in message and "is missing" in message


@pytest.mark.parametrize("name", ["codes_00001.npy", "labels_00001.npy"])
def test_file_of_another_size(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    message = message_of(CodeDataset, folder)
    assert str(folder / name) in message and f"{len(content) - 1} bytes" in message


@pytest.mark.parametrize("change", ["header", "type", "pickle"])
def test_file_of_the_right_size_that_is_something_else(folder, change):
    path = folder / "codes_00001.npy"
    content = path.read_bytes()
    if change == "header":
        path.write_bytes(b"x" * len(content))
    if change == "type":
        path.write_bytes(content.replace(b"'|u1'", b"'|i1'"))
    if change == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}).ljust(len(content), b"."))
    assert path.stat().st_size == len(content)
    codes = CodeDataset(folder)
    codes.fetch(0, 0)
    message = message_of(codes.fetch, 0, SHARD)
    assert str(path) in message and "is damaged" in message


def test_code_beyond_the_codebook_and_a_changed_byte(folder):
    path = folder / "codes_00001.npy"
    CodeDataset(folder).verify()
    content = bytearray(path.read_bytes())
    content[-1] = 32
    path.write_bytes(content)
    codes = CodeDataset(folder)
    codes.fetch(0, 2 * SHARD - 2)
    assert "the code 32 of a codebook of 32" in message_of(codes.fetch, 0, 2 * SHARD - 1)
    message = message_of(codes.verify)
    assert str(path) in message and "SHA-256" in message


def test_loaders_pass_the_one_line_on(folder):
    (folder / "codes_00000.npy").write_bytes(b"x" * (folder / "codes_00000.npy").stat().st_size)
    loader = valid_loader(CodeDataset(folder), torch.arange(COUNT), batch_size=8, rank=0, world_size=1, num_workers=1)
    with pytest.raises(UserError, match=r"codes_00000.npy is damaged \(.*\); remove it"):
        next(loader)
