"""`vqdist encode` against the tokenizer alone: the cost of loading, ordering, writing and hashing.

The bare side calls `tokenizer.encode` on batches that are ready in memory. The other side does what the command does,
from image files to a finished folder, and makes the same codes, which is checked. Both have the allocator that the
command sets, which a forward gains much by. It is measured
- as it is by default: where there is a second core, a loader process has it;
- without loader processes, so that decoding takes turns with the tokenizer on one core.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import IMAGE_SIZE, Row, Timing, build_vae, ratio, take_turns
from benchmarks.worker import timed
from vqdist import Tokenizer
from vqdist.allocator import keep_freed_memory
from vqdist.backends import create_backend
from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.data.images import tensor_to_image
from vqdist.data.sources import SyntheticSource
from vqdist.encoding import CodeWriter

BATCH_SIZE = 64
SHARD_SIZE = 1024
TARGET = 0.9  # of the bare forward's images per second, by default
WORKERS = {"default": None, "no loader processes": 0}


def write_images(folder: Path, count: int) -> None:
    """Pictures as JPEG files of twice the size that is encoded."""
    source = SyntheticSource(f"synthetic:{count}")
    folder.mkdir()
    for index in range(count):
        picture = source.tensor(index, image_size=2 * IMAGE_SIZE, channels=3)
        tensor_to_image(picture).save(folder / f"{index:05d}.jpg", quality=90)


def bare_forward(tokenizer: Tokenizer, dataset: ImageDataset) -> Callable[[], Tensor]:
    """Encode all images, which are ready in memory, and return their codes."""
    batches = torch.stack([dataset[index] for index in range(len(dataset))]).split(BATCH_SIZE)
    return lambda: torch.cat([tokenizer.encode(batch) for batch in batches])


def whole_command(
    tokenizer: Tokenizer, dataset: ImageDataset, folder: Path, num_workers: int | None
) -> Callable[[], Path]:
    """Encode all images into a new folder each time, and return it."""
    numbers, backend = itertools.count(), create_backend("local")

    def encode() -> Path:
        out = folder / f"{next(numbers)}"
        writer = CodeWriter(tokenizer, dataset, out, batch_size=BATCH_SIZE, shard_size=SHARD_SIZE)
        writer.write(backend, num_workers=num_workers)
        return out

    return encode


def measure(folder: Path, *, count: int, rounds: int) -> dict[str, Timing]:
    """Seconds for all images: the bare forward, and the command with and without loader processes."""
    keep_freed_memory(torch.device("cpu"))
    write_images(folder / "images", count)
    tokenizer = Tokenizer(build_vae("vq"), IMAGE_SIZE)
    dataset = ImageDataset(str(folder / "images"), IMAGE_SIZE, augment=False)
    bare = bare_forward(tokenizer, dataset)
    sides = {name: whole_command(tokenizer, dataset, folder / name, workers) for name, workers in WORKERS.items()}
    expected = bare()
    for encode in sides.values():
        codes = CodeDataset(encode())
        assert torch.equal(torch.stack([codes[index] for index in range(count)]), expected)
    turns = {name: timed(step) for name, step in {"bare forward": bare, **sides}.items()}
    return take_turns(turns, steps=1, rounds=rounds, warmup=0)


def run(quick: bool = False) -> list[Row]:
    """Rows of the table: images per second over the bare forward's.

    To start a loader process takes a few tenths of a second: of a few thousand images it is a tenth, so `quick` is too
    short to keep the bound.
    """
    count, rounds = (2048, 3) if quick else (8192, 3)
    with tempfile.TemporaryDirectory() as folder:
        timings = measure(Path(folder), count=count, rounds=rounds)
    bare = timings["bare forward"]
    rows = []
    for name in WORKERS:
        detail = (
            f"{count / (timings[name].milliseconds / 1000):.0f} against {count / (bare.milliseconds / 1000):.0f} "
            f"images/s; fastest turns {min(bare.wall) / min(timings[name].wall):.3f}, CPU time of this process "
            f"{ratio(bare.cpu, timings[name].cpu):.3f}"
        )
        value = ratio(bare.wall, timings[name].wall)
        what = f"encode, {name} / bare forward, images per second"
        rows.append(Row(what, value, at_least=TARGET if name == "default" else None, detail=detail))
    return rows
