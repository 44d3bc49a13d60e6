"""Drawing many images from a model, spread over ranks: the same images for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqdist.backends.base import Backend
from vqdist.errors import UserError
from vqdist.files import LOCK, FolderLock, lock_folder, read_json, write_json
from vqdist.models.autoregressive import AutoregressiveModel
from vqdist.ranks import checksum, on_main
from vqdist.sampling import DrawOptions, uniform_per_image
from vqdist.seeding import derive_seed
from vqdist.tracking.pictures import save_image


def draw_batches(
    model: AutoregressiveModel,
    labels: Tensor,
    options: DrawOptions,
    *,
    seed: int,
    batch_size: int,
    backend: Backend,
    is_done: Callable[[range], bool] = lambda _: False,
) -> Iterator[tuple[range, Tensor]]:
    """Return this rank's batches of the images 0 .. len(labels) - 1.

    An image depends on (seed, its number) and its label. Batches are cut by number, whatever the number of ranks, and
    taken by the ranks in turn: the same products of the same shapes, so the same picture to the bit on the same kind
    of device.

    Args:
        model: to draw from.
        labels: (count,) int64, the class of each image; `num_classes` for none.
        options: how to draw.
        seed: of all images.
        batch_size: images at once.
        backend: says which batches are this rank's.
        is_done: whether the images of these numbers are there already, and the batch is left out.

    Yields:
        The numbers of a batch, and its images (b, c, h, w) in [0, 1] on the backend's device.
    """
    starts = range(0, len(labels), batch_size)
    for start in starts[backend.rank :: backend.world_size]:
        numbers = range(start, min(start + batch_size, len(labels)))
        if is_done(numbers):
            continue
        yield numbers, draw_numbers(model, numbers, labels[start : numbers.stop], options, seed=seed)


def draw_numbers(
    model: AutoregressiveModel, numbers: Sequence[int], labels: Tensor, options: DrawOptions, *, seed: int
) -> Tensor:
    """Return the images (b, c, h, w) in [0, 1] of these numbers, with labels (b,)."""
    seeds = (derive_seed("sample", seed, number) for number in numbers)
    return model.sample_from(uniform_per_image(model.num_codes, seeds), labels, options)


PLAN = "samples.json"
END_OF_PNG = b"IEND\xaeB`\x82"


class SampleFolder:
    """A folder with one PNG file an image, which the same command goes on to fill where it was ended.

    Args:
        folder: is made.
        plan: all that the images depend on, as JSON; it is written beside them.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]):
        self.folder = folder
        self.plan = plan
        self._lock: FolderLock | None = None

    @staticmethod
    def check(folder: Path) -> None:
        """Raise `UserError` for a folder that holds anything else than samples and their plan."""
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if PLAN not in found and found - {LOCK, f"{PLAN}.partial"}:
            raise UserError(
                f"--out {folder} is not empty and holds no {PLAN}: samples would mix with what is there; give another "
                "one"
            )

    def begin(self, backend: Backend) -> None:
        """Write the plan, or compare it with the one that is there; every rank calls this.

        Raises:
            UserError: the folder holds other samples, or another process writes it.
        """
        on_main(backend, self._begin, f"--out {self.folder} cannot be written")

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        path = self.folder / PLAN
        if not path.is_file():
            write_json(path, self.plan)
        before = read_json(path)
        changed = [name for name in self.plan if before.get(name) != self.plan[name]]
        if changed:
            raise UserError(
                f"--out {self.folder} holds samples of another command ({changed[0]} is {before.get(changed[0])} "
                f"there and {self.plan[changed[0]]} here); give another folder, or the same options"
            )

    def path(self, number: int) -> Path:
        """Return the file of an image."""
        return self.folder / f"{number:06d}.png"

    def has(self, numbers: range) -> bool:
        """Return whether these images are all there, to their ends."""
        return all(map(self._is_whole, numbers))

    def _is_whole(self, number: int) -> bool:
        try:
            return self.path(number).read_bytes().endswith(END_OF_PNG)
        except OSError:
            return False

    def write(self, batches: Iterator[tuple[range, Tensor]]) -> None:
        """Write the images of these batches, each of which appears whole."""
        for numbers, images in batches:
            for number, image in zip(numbers, images, strict=True):
                save_image(image, self.path(number))


def weights_mark(model: AutoregressiveModel) -> str:
    """Return a number (hex) that depends on every weight and buffer of a model, and of its tokenizer."""
    digest = hashlib.sha256(b"" if model.tokenizer is None else model.tokenizer.fingerprint().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {int(checksum(tensor.cpu()))}".encode())
    return digest.hexdigest()[:16]


def gather_images(batches: Iterator[tuple[range, Tensor]], shape: tuple[int, ...], backend: Backend) -> Tensor:
    """All ranks' batches in one tensor of this shape, (count, c, h, w), on every rank. Every rank calls this."""
    images = torch.zeros(shape, device=backend.device)
    for numbers, batch in batches:
        images[numbers.start : numbers.stop] = batch
    return backend.sum(images)
