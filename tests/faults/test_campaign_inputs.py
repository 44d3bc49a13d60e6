"""Seeded mutations of good images and tars: decoded or refused in one line, in bounded time and memory."""

from __future__ import annotations

import io
import os
import random
import resource
import signal
import struct
import tarfile
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from campaign import SEED
from PIL import Image, PngImagePlugin, features

from vqdist.data.dataset import ImageDataset
from vqdist.data.images import BadImageError, image_to_tensor, limited_to, open_image
from vqdist.errors import UserError

IMAGES, TARS = 500, 100
SECONDS = 20.0  # for one of them, on a busy machine
MEMORY = 2 * 2**30  # bytes beyond what the process has before
PIXELS = 4_000_000


def picture(size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Image.Image:
    ramp = np.linspace(0, 255, size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    return Image.fromarray(ramp).convert(mode)


def good_images() -> dict[str, bytes]:
    """Return files of the formats that are common, by a name."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a picture", zip=True)
    text.add_itxt("Title", "Bild", "de", "Bild", zip=True)
    made: dict[str, tuple[Image.Image, dict]] = {
        "png": (picture(), {"format": "PNG", "pnginfo": text, "dpi": (72, 72), "icc_profile": b"\0" * 400}),
        "png grey": (picture(mode="L"), {"format": "PNG"}),
        "png alpha": (picture(mode="RGBA"), {"format": "PNG"}),
        "png palette": (picture(mode="P"), {"format": "PNG", "transparency": 3}),
        "png deep": (Image.fromarray(np.arange(1920, dtype=np.uint16).reshape(40, 48) * 30), {"format": "PNG"}),
        "jpeg": (picture(), {"format": "JPEG", "exif": b"Exif\0\0MM\0*\0\0\0\x08" + b"\0" * 40, "comment": b"text"}),
        "jpeg progressive": (picture((200, 160)), {"format": "JPEG", "progressive": True}),
        "jpeg cmyk": (picture(mode="CMYK"), {"format": "JPEG"}),
        "gif": (picture(mode="P"), {"format": "GIF", "save_all": True, "append_images": [picture(mode="P")]}),
        "bmp": (picture(), {"format": "BMP"}),
        "tiff": (picture(), {"format": "TIFF", "compression": "tiff_lzw"}),
        "tiff deep": (Image.fromarray(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)), {"format": "TIFF"}),
        "ppm": (picture(), {"format": "PPM"}),
        "tga": (picture(), {"format": "TGA", "compression": "tga_rle"}),
        "ico": (picture((32, 32)), {"format": "ICO"}),
        "pcx": (picture(), {"format": "PCX"}),
        "sgi": (picture(), {"format": "SGI"}),
    }
    for name, feature in {"webp": "webp", "jp2": "jpg_2000", "avif": "avif"}.items():
        if features.check(feature):
            made[name] = picture(), {"format": {"webp": "WEBP", "jp2": "JPEG2000", "avif": "AVIF"}[name]}
    return {name: _saved(*how) for name, how in made.items()}


def _saved(image: Image.Image, how: dict) -> bytes:
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


# ------------------------------------------------------------------------------------- mutations


def bytes_changed(content: bytes, chance: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(chance.choice([1, 2, 5, 20])):
        out[chance.randrange(len(out))] = chance.randrange(256)
    return bytes(out)


def header_changed(content: bytes, chance: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(chance.choice([1, 2, 4])):
        out[chance.randrange(min(64, len(out)))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    return bytes(out)


def large_number(content: bytes, chance: random.Random) -> bytes:
    """Two or four bytes near the beginning, where sizes stand, become a large number in either order."""
    number = chance.choice([0xFFFF, 0x7FFF, 0xFFFFFFFF, 0x7FFFFFFF, 65_000, 100_000, 2**20])
    form = chance.choice([">I", "<I"]) if number > 0xFFFF else chance.choice([">H", "<H"])
    packed, at = struct.pack(form, number), chance.randrange(min(200, len(content)))
    return content[:at] + packed + content[at + len(packed) :]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def repeated(content: bytes, chance: random.Random) -> bytes:
    first, second = sorted(chance.randrange(len(content)) for _ in range(2))
    return content[:second] + content[first:second] * chance.choice([1, 3, 50]) + content[second:]


def left_out(content: bytes, chance: random.Random) -> bytes:
    first, second = sorted(chance.randrange(len(content)) for _ in range(2))
    return content[:first] + content[second:]


def chunk_added(content: bytes, chance: random.Random) -> bytes:
    """Put a chunk of metadata with odd content in front of a PNG's pixels, its checksum right or wrong."""
    if not content.startswith(b"\x89PNG") or len(content) < 40:
        return bytes_changed(content, chance)
    kind = chance.choice(
        [b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"eXIf", b"tRNS", b"acTL"]
    )
    body = chance.choice([b"", b"\0", bytes(chance.randrange(256) for _ in range(40)), zlib.compress(bytes(2**22))])
    checksum = zlib.crc32(kind + body) ^ chance.choice([0, 0, 1])
    return content[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum) + content[33:]


def png_of_a_size(content: bytes, chance: random.Random) -> bytes:
    """Let the header of a PNG, checksum and all, claim another size."""
    if not content.startswith(b"\x89PNG") or len(content) < 40:
        return large_number(content, chance)
    size = struct.pack(">II", *(chance.choice([0, 1, 49, 5000, 60_000, 2**31 - 1]) for _ in range(2)))
    header = b"IHDR" + size + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


Mutation = Callable[[bytes, random.Random], bytes]
OF_FILES: list[Mutation] = [bytes_changed, header_changed, large_number, cut, repeated, left_out]
OF_IMAGES: list[Mutation] = [*OF_FILES, chunk_added, png_of_a_size]


# ------------------------------------------------------------------------------------- limits


def outcomes_of(cases: list[bytes], outcome: Callable[[bytes], str]) -> list[str]:
    """Return what comes of each case, in a process whose memory and time are limited; a crash of it fails."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a decoder in C comes to no handler of Python
            lines = []
            for case in cases:
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                lines.append(_guarded(outcome, case))
            signal.setitimer(signal.ITIMER_REAL, 0)
            with os.fdopen(writing, "w") as file:
                file.write("\0".join(lines))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the process ended with {code}" + (", by its time" if code == -signal.SIGALRM else "")
    return text.split("\0")


def _guarded(outcome: Callable[[bytes], str], case: bytes) -> str:
    try:
        return outcome(case)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def decoded(content: bytes) -> str:
    """Decode as a run does."""
    try:
        with limited_to(PIXELS):
            image = open_image(io.BytesIO(content), name="fuzzed")
            tensor = image_to_tensor(image, image_size=16, channels=3)
    except BadImageError as error:
        return "bad" if "\n" not in str(error) else f"two lines: {error}"
    return "decoded" if tensor.shape == (3, 16, 16) and bool(((tensor >= 0) & (tensor <= 1)).all()) else "odd pixels"


@pytest.mark.timeout(3000)
def test_fuzzed_images(tried):
    chance, good = random.Random(f"{SEED} images"), good_images()
    assert outcomes_of(list(good.values()), decoded) == ["decoded"] * len(good)
    names = list(good)
    cases = [chance.choice(OF_IMAGES)(good[names[number % len(names)]], chance) or b"\0" for number in range(IMAGES)]
    began = time.monotonic()
    seen = [line for start in range(0, IMAGES, 25) for line in outcomes_of(cases[start : start + 25], decoded)]
    odd = {number: line for number, line in enumerate(seen) if line not in ("bad", "decoded")}
    print(f"{time.monotonic() - began:.0f} s")
    assert len(seen) == IMAGES and odd == {}
    tried(
        f"images of {len(good)} kinds with bytes, sizes, lengths and metadata changed",
        IMAGES,
        f"{seen.count('decoded')} decoded, {seen.count('bad')} refused in one line; none took "
        f"{MEMORY // 2**30} GiB or {SECONDS:.0f} s",
    )


# ------------------------------------------------------------------------------------- tars


def good_tar(form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for number in range(4):
            names = {"png": _saved(picture((16, 16)), {"format": "PNG"}), "cls": str(number).encode()}
            for kind, content in names.items():
                long = "a" * 80 + "/" + "b" * 60 if number == 3 else "sample"
                member = tarfile.TarInfo(f"{long}_{number}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def field_changed(content: bytes, chance: random.Random) -> bytes:
    """Make a field of a header odd, and the header's checksum right again."""
    starts = [at for at in range(0, len(content) - 512, 512) if content[at + 257 : at + 262] == b"ustar"]
    at = chance.choice(starts)
    begin, length = chance.choice([(0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8)])
    odd = [b"\xff" * length, b"7" * length, b"-1".ljust(length, b"\0"), b"\0" * length, b"\x80".ljust(length, b"\xff")]
    odd.append(bytes(chance.randrange(256) for _ in range(length)))
    header = bytearray(content[at : at + 512])
    header[begin : begin + length] = chance.choice(odd)[:length]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


def opened(content: bytes) -> str:
    """Open a tar and read all that is in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzzed.tar")
        path.write_bytes(content)
        try:
            data = ImageDataset(f"wds:{path}", image_size=16, augment=False, max_pixels=PIXELS)
            for index in range(len(data)):
                data.fetch_labelled(0, index)
        except UserError as error:
            return "bad" if "\n" not in str(error) else f"two lines: {error}"
        return "read" if len(data) <= 8 else f"{len(data)} samples"


@pytest.mark.timeout(3000)
def test_fuzzed_tars(tried):
    chance = random.Random(f"{SEED} tars")
    good = [good_tar(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    assert outcomes_of(good, opened) == ["read"] * len(good)
    mutations = [*OF_FILES, field_changed, field_changed, field_changed, field_changed]
    cases = [chance.choice(mutations)(good[number % len(good)], chance) or b"\0" for number in range(TARS)]
    seen = [line for start in range(0, TARS, 10) for line in outcomes_of(cases[start : start + 10], opened)]
    odd = {number: line for number, line in enumerate(seen) if line not in ("bad", "read")}
    assert len(seen) == TARS and odd == {}
    tried(
        "tars with bytes, lengths and fields of headers changed",
        TARS,
        f"{seen.count('read')} read, {seen.count('bad')} refused in one line; none took {MEMORY // 2**30} GiB or "
        f"{SECONDS:.0f} s",
    )
