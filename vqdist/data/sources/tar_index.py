"""The regular files of a tar, from its headers alone; a broken, cut or hostile archive is said in one line.

Python's `tarfile` takes a cut header for the end, follows sizes below zero and recurses over long names. Here every
size is compared with that of the file, and the end must be marked by an empty block, as POSIX has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from vqdist.errors import UserError

BLOCK = 512
LARGEST_EXTENSION = 2**20  # bytes of a long name or of extended headers
LONGEST_NAME = 4096
AFTER_THE_END = 2**20  # bytes that may follow the mark of the end: writers fill up to the size of a record
REGULAR = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes: no content follows, whatever size a header says, as of the file of a link."""
LONG_NAME, LONG_LINK, EXTENDED, GLOBAL = b"L", b"K", b"x", b"g"
SPARSE = (b"S",)


class Member(NamedTuple):
    """A regular file of a tar: its name, and where its content lies."""

    name: str
    offset: int
    size: int


class _Broken(Exception):
    """The reason why an archive cannot be read."""


def tar_members(path: str) -> list[Member]:
    """Return the regular files of a tar in their order; links, folders and devices are passed over.

    Raises:
        UserError: there is no such file, or it is no whole, uncompressed tar.
    """
    if not os.path.isfile(path):
        raise UserError(f"no such tar file: {path}; check the path and the numbers between the braces")
    try:
        with open(path, "rb") as file:
            return list(_members(file, os.fstat(file.fileno()).st_size))
    except (_Broken, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read the tar file {path} ({reason}); it must be whole, and not compressed: fetch or pack it again"
        ) from error


def _members(file: BinaryIO, length: int) -> Iterator[Member]:
    extended: dict[str, str] = {}
    at, long_name = 0, None
    while (header := _header(file, at, length)) is not None:
        kind, start = header[156:157], at + BLOCK
        size = 0 if kind in WITHOUT_CONTENT else _size(header, extended, at)
        if start + size > length:
            raise _Broken(f"it ends {start + size - length} bytes too early: the entry at byte {at} has {size} bytes")
        at = start + -(-size // BLOCK) * BLOCK
        if kind == LONG_NAME:
            long_name = _text(_content(file, start, size))
        elif kind == EXTENDED:
            extended = _records(_content(file, start, size))
        elif kind not in (LONG_LINK, GLOBAL):
            name = extended.get("path") or long_name or _name(header)
            if kind in SPARSE or any(key.startswith("GNU.sparse") for key in extended):
                raise _Broken(f"{name[:80]} is a sparse file, whose content does not lie in one piece")
            if kind in REGULAR and not name.endswith("/"):
                yield Member(name, start, size)
            extended, long_name = {}, None
    _check_end(file, at, length)


def _header(file: BinaryIO, at: int, length: int) -> bytes | None:
    """Return the header at a place, or None at the mark of the end."""
    file.seek(at)
    header = file.read(BLOCK)
    if len(header) < BLOCK:
        raise _Broken(
            f"it ends at byte {length} without the empty block that marks the end of a tar"
            if length
            else "it is empty"
        )
    if not any(header):
        return None
    if _octal(header[148:156]) not in _sums(header):
        raise _Broken(f"there is no header of a tar at byte {at}")
    return header


def _sums(header: bytes) -> tuple[int, int]:
    """Return the sums of a header, its own field as spaces: of unsigned bytes, and of signed ones as in old tars."""
    summed = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(summed)
    return unsigned, unsigned - 256 * sum(byte > 127 for byte in summed)


def _check_end(file: BinaryIO, at: int, length: int) -> None:
    """Raise `_Broken` where something follows the mark of the end, as in archives put behind one another."""
    rest = length - at
    file.seek(at)
    if rest > AFTER_THE_END or any(file.read(rest)):
        raise _Broken(
            f"its end is marked at byte {at}, and {rest} bytes follow, as of archives put behind one another"
        )


def _size(header: bytes, extended: dict[str, str], at: int) -> int:
    if "size" in extended:
        digits = extended["size"]
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 20):
            raise _Broken(f"the entry at byte {at} says a size of {digits[:20]!r}")
        return int(digits)
    field = header[124:136]
    if field[0] in (0x80, 0xFF):  # a binary number of two's complement
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    else:
        size = _octal(field)
    if size < 0:
        raise _Broken(f"the entry at byte {at} says a size that is no number of bytes")
    return size


def _octal(field: bytes) -> int:
    """Return an octal number, -1 where there is none."""
    digits = field.split(b"\0")[0].strip()
    return -1 if any(digit not in b"01234567" for digit in digits) else int(digits or b"0", 8)


def _content(file: BinaryIO, start: int, size: int) -> bytes:
    if size > LARGEST_EXTENSION:
        raise _Broken(f"the extended header at byte {start - BLOCK} has {size} bytes")
    file.seek(start)
    return file.read(size)


def _records(content: bytes) -> dict[str, str]:
    """Return the extended headers of the next entry: `LENGTH KEY=VALUE` and a line end each."""
    records: dict[str, str] = {}
    content, at = content.rstrip(b"\0"), 0
    while at < len(content):
        digits, _, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not equals or not len(digits) < length <= len(content) - at:
            raise _Broken("an extended header is broken")
        records[_text(key)] = _text(value)
        at += length
    return records


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    text = field.split(b"\0")[0].decode("utf-8", "surrogateescape")
    if len(text) > LONGEST_NAME:
        raise _Broken(f"a name has {len(text)} characters")
    return text
