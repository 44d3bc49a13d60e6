"""The headers of tars: whole ones of every format, and no broken, cut or hostile one without a line."""

from __future__ import annotations

import io
import random
import tarfile

import pytest
from source_files import message_of

from vqdist.data.sources.tar_index import tar_members

CONTENT = b"x" * 700
FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
LONG = "a" * 60 + "/" + "b" * 70


def write(path, names=("0.jpg", "1.jpg", "2.jpg"), kind=tarfile.GNU_FORMAT, **fields):
    with tarfile.open(path, "w", format=kind) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(CONTENT)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(CONTENT))
    return path


def header(**fields) -> bytes:
    """Return the header of a tar, with its sum."""
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    for place, value in fields.values():
        block[place : place + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_as_the_library_does(tmp_path, kind):
    path = write(tmp_path / "a.tar", [f"{LONG}/{number}é.jpg" for number in range(3)], FORMATS[kind])
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [tuple(member) for member in tar_members(str(path))] == expected


def test_old_tars_sum_signed_bytes(tmp_path):
    """Sun's tar, and others of its time, took the bytes of a name that is no ASCII as negative."""
    block = bytearray(header(name=(0, "é.jpg".encode()), size=(124, b"00000001274\0")))
    signed = sum(block[:148] + block[156:]) + 8 * 32 - 2 * 256
    block[148:156] = b"%06o\0 " % signed
    (tmp_path / "a.tar").write_bytes(bytes(block) + CONTENT + bytes(1024 - len(CONTENT)) + END)
    assert [tuple(member) for member in tar_members(str(tmp_path / "a.tar"))] == [("é.jpg", 512, 700)]


def test_links_and_folders_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, kind in enumerate((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{number}")
            info.type, info.linkname = kind, "0"
            tar.addfile(info)
    assert tar_members(str(tmp_path / "a.tar")) == []


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_what_has_no_content_may_say_a_size(tmp_path, kind):
    """A link that of its file, a folder the room that it may take: the next header follows at once."""
    path = tmp_path / "a.tar"
    sized = header(kind=(156, kind), size=(124, b"00000001274\0"))
    path.write_bytes(sized + write(path).read_bytes())
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert [tuple(member) for member in tar_members(str(path))] == expected and len(expected) == 3


def test_no_cut_is_silent(tmp_path):
    content = write(tmp_path / "a.tar").read_bytes()
    end = 3 * (512 + 1024)
    for length in sorted({*range(0, end + 512, 97), *range(0, end + 512, 512), *range(0, end, 1536)}):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        assert "cannot read the tar file" in message_of(tar_members, str(tmp_path / "cut.tar")), length
    (tmp_path / "cut.tar").write_bytes(content[: end + 512])
    assert len(tar_members(str(tmp_path / "cut.tar"))) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header(size=(124, b"\xff" + b"\xff" * 10 + b"\x00")) + END, "says a size that is no number of bytes"),
        (header(size=(124, b"-0000000100\0")) + END, "says a size that is no number of bytes"),
        (header(size=(124, b"77777777777\0")) + END, "bytes too early"),
        (header(kind=(156, b"L"), size=(124, b"00077777777\0")) + bytes(2**24 + 512), "extended header at byte 0 has"),
        (header(kind=(156, b"S")) + END, "is a sparse file"),
        (header(kind=(156, b"x"), size=(124, b"00000000003\0")) + b"9 x" + bytes(509) + END, "header is broken"),
        (b"no tar at all" * 100, "there is no header of a tar at byte 0"),
        (b"", "it is empty"),
        (header() + END + header() + END, "bytes follow, as of archives put behind one another"),
    ],
)
def test_broken_archives(tmp_path, content, reason):
    (tmp_path / "a.tar").write_bytes(content)
    assert reason in message_of(tar_members, str(tmp_path / "a.tar"))


@pytest.mark.parametrize("size", ["4611686018427387904", "-512", "1e3", "9" * 5000])
def test_sizes_of_extended_headers(tmp_path, size):
    path = write(tmp_path / "a.tar", ["a.jpg"], tarfile.PAX_FORMAT, pax_headers={"size": size})
    assert "cannot read the tar file" in message_of(tar_members, str(path))


def test_three_hundred_long_names_before_one_entry(tmp_path):
    block = header(kind=(156, b"L"), size=(124, b"00000000006\0")) + b"b.jpg\0" + bytes(506)
    (tmp_path / "a.tar").write_bytes(block * 300 + header() + END)
    assert [member.name for member in tar_members(str(tmp_path / "a.tar"))] == ["b.jpg"]


def test_flipped_bytes_are_a_line_or_nothing(tmp_path):
    content, chance = write(tmp_path / "a.tar").read_bytes(), random.Random(0)
    for _ in range(200):
        flipped = bytearray(content)
        for _ in range(4):
            flipped[chance.randrange(4608)] = chance.randrange(256)
        (tmp_path / "b.tar").write_bytes(flipped)
        try:
            assert len(tar_members(str(tmp_path / "b.tar"))) == 3
        except ValueError as error:
            assert "cannot read the tar file" in str(error)
