"""Files of others, odd or hostile: good pixels are used, and the rest is one line in bounded time and memory."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqdist import Tokenizer
from vqdist.cli import main
from vqdist.data.dataset import ImageDataset
from vqdist.data.images import BadImageError, image_to_tensor, limited_to, open_image
from vqdist.data.sources import open_source
from vqdist.errors import UserError, printable
from vqdist.files import read_json
from vqdist.manifest import read_manifest


def saved(image: Image.Image, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


RAMP = Image.fromarray(np.arange(24 * 20 * 3, dtype=np.uint8).reshape(20, 24, 3))
PNG, JPEG = saved(RAMP, format="PNG"), saved(RAMP, format="JPEG", quality=95)


def chunk(kind: bytes, body: bytes, *, wrong_sum: bool = False) -> bytes:
    checksum = zlib.crc32(kind + body) ^ wrong_sum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


# ------------------------------------------------------------------------------------- metadata


CHUNKS = {
    "a profile of 2 MB": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2**21))),
    "a profile that does not unpack": chunk(b"iCCP", b"name\0\0garbage"),
    "a text of 2 MB, packed": chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**21))),
    "an international text of 2 MB": chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    "a text with a wrong checksum": chunk(b"tEXt", b"key\0value", wrong_sum=True),
    "a short gAMA": chunk(b"gAMA", b"\0"),
    "an empty pHYs": chunk(b"pHYs", b""),
    "a short cHRM": chunk(b"cHRM", b"\0" * 3),
    "an empty sRGB": chunk(b"sRGB", b""),
    "an eXIf of nothing": chunk(b"eXIf", b"MM\0*\0\0\0\xff"),
    "an unknown one": chunk(b"quXX", b"\0" * 9),
    "a time that is none": chunk(b"tIME", b"\xff" * 7),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_a_png_with_odd_metadata_gives_its_pixels(name):
    content = PNG[:33] + CHUNKS[name] + PNG[33:]
    assert np.array_equal(np.asarray(open_image(io.BytesIO(content))), np.asarray(RAMP))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


SEGMENTS = {
    "Exif of garbage": segment(0xE1, b"Exif\0\0" + b"\xff" * 30),
    "Exif that is cut": segment(0xE1, b"Exif\0\0MM\0*"),
    "Exif whose directory leads nowhere": segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f"),
    "a profile in a part that is none": segment(0xE2, b"ICC_PROFILE\0\xff\x00"),
    "Photoshop's, cut": segment(0xED, b"Photoshop 3.0\x008BIM\x04"),
    "an empty APP0": segment(0xE0, b""),
    "several pictures, of nothing": segment(0xE2, b"MPF\0" + b"\xff" * 12),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_jpeg_with_odd_metadata_gives_its_pixels(name):
    content = JPEG[:2] + SEGMENTS[name] + JPEG[2:]
    expected = np.asarray(open_image(io.BytesIO(JPEG)))
    assert np.array_equal(np.asarray(open_image(io.BytesIO(content))), expected)


def test_a_bomb_is_refused_with_odd_metadata_too():
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + PNG[24:29]
    bomb = PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + CHUNKS["a short gAMA"] + PNG[33:]
    with pytest.raises(BadImageError):
        open_image(io.BytesIO(bomb))


# ------------------------------------------------------------------------------------- memory and time


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_grey_takes_no_copies_of_itself(dtype):
    """Of 12 million pixels: not 8 bytes for each and again, as numbers of double precision take."""
    side = 3500
    content = saved(
        Image.fromarray(np.zeros((side, side), dtype=dtype)), format="PNG" if dtype == np.uint16 else "TIFF"
    )
    image = open_image(io.BytesIO(content))
    tracemalloc.start()
    tensor = image_to_tensor(image, image_size=16, channels=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensor.shape == (1, 16, 16) and peak < 6 * side * side


def with_scans(times: int) -> bytes:
    """Return a progressive JPEG whose last scan is there so many times."""
    content = saved(RAMP.resize((200, 160)), format="JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + (content[last:-2]) * times + content[-2:]


def test_a_jpeg_of_many_scans_takes_no_time():
    with limited_to(200 * 160):
        assert open_image(io.BytesIO(with_scans(1))).size == (200, 160)
        with pytest.raises(BadImageError, match=r"32,000 pixels in [\d,]+ scans, too many for max_pixels"):
            open_image(io.BytesIO(with_scans(2000)))


# ------------------------------------------------------------------------------------- names


NAMES = ["\x1b[31mred\x1b[0m.png", "two\nlines.png", "\u202egnp.exe.png", "bell\x07.png", "\x9b2J.png"]


def unprintable(text: str) -> list[str]:
    """Return what a terminal would act on; ends of lines and the bar's returns are the program's own."""
    return [character for character in text if not character.isprintable() and character not in "\n\r"]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_broken_image_is_shown_escaped(tmp_path, name, capfd):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number,) * 3).save(folder / f"{number}.png")
    (folder / name).write_bytes(b"no image")
    options = "--image_size 16 --num_tokens 8 --num_layers 1 --hidden_dim 4 --emb_dim 4 --num_resnet_blocks 0"
    options += " --batch_size 9 --trainer.num_train_steps 1 --data.num_workers 0 --data.valid_frac 0"
    train = ["train", "dvae", "--data", str(folder), *options.split(), "--out"]
    assert main([*train, str(tmp_path / "skips"), "--data.on_bad_image", "skip"]) == 0
    assert main([*train, str(tmp_path / "raises"), "--data.on_bad_image", "raise"]) == 2
    printed = "".join(capfd.readouterr())
    assert printed.count(printable(name)) >= 2 and unprintable(printed) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_member_of_a_tar_is_shown_escaped(tmp_path, name):
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 8
        tar.addfile(member, io.BytesIO(b"no image"))
    with pytest.raises(UserError) as raised:
        ImageDataset(f"wds:{tmp_path / 'some.tar'}", image_size=16).fetch(0, 0)
    assert printable(name) in str(raised.value) and str(raised.value).isprintable()


def test_a_name_in_a_manifest_is_shown_escaped(tmp_path):
    content = {"step": 1, "files": {NAMES[0]: {"bytes": "1"}}, NAMES[1]: 1}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        read_manifest(tmp_path)
    assert str(raised.value).isprintable()


# ------------------------------------------------------------------------------------- nesting and numbers


DEEP = {"lists": "[" * 10**5, "objects": '{"a":' * 10**5, "closed": "[" * 10**5 + "]" * 10**5, "digits": "9" * 10**5}


@pytest.mark.parametrize("form", DEEP)
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "record.json"])
def test_json_that_is_nested_without_end_is_one_line(tmp_path, form, name):
    path: Path = tmp_path / name
    path.write_text('{"model_type": ' + DEEP[form] + "}")
    readers = {"config.json": Tokenizer.from_pretrained, "manifest.json": read_manifest}
    with pytest.raises(UserError) as raised:
        readers.get(name, lambda folder: read_json(folder / name))(tmp_path)
    assert name in str(raised.value) and str(raised.value).isprintable()


@pytest.mark.parametrize("spec", ["wds:{0..9999999999}.tar", "wds:{0..99999}{0..99999}.tar", "wds:{" * 2000])
def test_a_range_of_billions_of_tars_is_one_line(spec):
    with pytest.raises(UserError) as raised:
        open_source(spec)
    assert str(raised.value).isprintable()
