"""Image files without their metadata, for pixels that are good where a text, a profile or a date is not.

Decoders refuse a whole file for a chunk that no pixel depends on. The rest of the file decodes to the same pixels.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
PNG_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"}
PNG_ORIENTATION = b"eXIf"

ADOBE, EXIF, COMMENT = 0xEE, 0xE1, 0xFE
APPLICATION = range(0xE0, 0xF0)
SCAN = 0xDA
ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length


def without_metadata(content: bytes) -> Iterator[bytes]:
    """Yield the file without the metadata that no pixel depends on: first with its orientation, then without.

    Nothing for formats other than PNG and JPEG, and for files that would stay as they are.
    """
    strip = _strip_png if content.startswith(PNG) else _strip_jpeg if content.startswith(JPEG) else None
    before = content
    for keep_orientation in (True, False):
        stripped = strip(content, keep_orientation) if strip is not None else content
        if stripped != before:
            yield stripped
        before = stripped


def _strip_png(content: bytes, keep_orientation: bool) -> bytes:
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind, end = content[at + 4 : at + 8], at + 12 + length
        if kind in PNG_PIXELS or (kind == PNG_ORIENTATION and keep_orientation and _has_right_sum(content[at:end])):
            parts.append(content[at:end])
        if kind == b"IEND":
            break
        at = end
    return b"".join(parts)


def _has_right_sum(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _strip_jpeg(content: bytes, keep_orientation: bool) -> bytes:
    """Leave out application segments and comments before the first scan, but for the colours' meaning (Adobe)."""
    parts, at = [JPEG], len(JPEG)
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker == SCAN:
            break
        end = at + 2 if marker in ALONE else at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if not _is_metadata(marker, content[at + 4 : end], keep_orientation):
            parts.append(content[at:end])
        at = end
    return b"".join([*parts, content[at:]])


def _is_metadata(marker: int, body: bytes, keep_orientation: bool) -> bool:
    if marker == ADOBE and body.startswith(b"Adobe") and len(body) >= 12:
        return False
    if marker == EXIF and body.startswith(b"Exif\0\0"):
        return not keep_orientation
    return marker in APPLICATION or marker == COMMENT


def num_scans(content: bytes) -> int:
    """Return how often the decoder goes over the picture: the scans of a JPEG file, else 1.

    Within the data of a scan the marker cannot occur, because a byte of 255 is followed by a zero there.
    """
    return max(1, content.count(bytes((0xFF, SCAN)))) if content.startswith(JPEG) else 1
