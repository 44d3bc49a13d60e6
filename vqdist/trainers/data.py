"""The data of a run: images to train on, images to validate on, and the batches of a rank."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqdist import protocol
from vqdist.backends import Backend
from vqdist.backends.environment import world_size_of_launcher
from vqdist.data.codes import CodeDataset
from vqdist.data.config import STILL, View
from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import (
    Batch,
    Split,
    default_workers,
    drawn,
    first_items,
    split_indices,
    train_loader,
    valid_loader,
)
from vqdist.data.sources import Source, TensorSource, folder_of
from vqdist.data.workers import GIVE_UP, SLOW
from vqdist.errors import UserError

if TYPE_CHECKING:
    from vqdist.trainers.config import TrainerConfig

Images = ImageDataset | CodeDataset
SHARE_OF_TIMEOUT = 0.8  # of `dist_timeout`, for a loader process that gives nothing
SMALL = 512  # images to validate on for which no loader process is started


def open_images(
    config: TrainerConfig, channels: int, dataset: Dataset | None, valid_dataset: Dataset | None
) -> tuple[Images, Images]:
    """Return the images to train on, and those to validate on as they are, without random augmentation.

    Both views are of the same images, which `RunData` splits, unless some to validate on are given.

    Args:
        config: says where they are, unless datasets do, and how they are looked at.
        channels: of an image.
        dataset: in place of `config.folder`.
        valid_dataset: in place of `config.valid`; a dataset of one's own that augments must not augment here.

    Raises:
        UserError: none or two are given to train on, or two to validate on; or they cannot be opened.
    """
    if (dataset is None) == (config.folder is None):
        given = "neither" if dataset is None else "both"
        raise UserError(f"folder or dataset must be given, and {given} was; see `vqdist train --help` for sources")
    if valid_dataset is not None:
        config.refuse_set("valid", because="valid_dataset is given")
    skipping = {name: getattr(config, name) for name in ("on_bad_image", "max_bad_frac", "max_pixels")}
    view: dict[str, Any] = {"image_size": config.image_size, "channels": channels, "seed": config.seed, **skipping}
    source: Any = config.folder if dataset is None else dataset
    train = ImageDataset(source, exts=config.exts, augment=config.augment, view=config.view, **view)
    chosen: Any = config.valid if valid_dataset is None else valid_dataset
    exts = config.exts if valid_dataset is None and chosen is not None else None
    images: Any = train.source if chosen is None else chosen
    # tensors of somebody's own are never resized
    as_it_is = not isinstance(images, Source | ImageDataset | str | Mapping) or isinstance(images, TensorSource)
    still = STILL if as_it_is else View(resample=config.resample)
    return train, ImageDataset(images, exts=exts, augment=False, view=still, **view)


class RunData:
    """The data of a run, the same on every rank.

    Args:
        config: of the run.
        train: images to train on.
        valid: images to validate on: others, or a view of the same, which are split.
        own_valid: whether they are others.

    Attributes:
        train: the images to train on.
        valid: the images to validate on.
        split: indices into `train` and into `valid`.
    """

    def __init__(self, config: TrainerConfig, train: Images, valid: Images, *, own_valid: bool):
        self.config = config
        self.train = train
        self.valid = valid
        self.own_valid = own_valid
        if own_valid:
            config.refuse_share()
            split = Split(torch.arange(len(train)), torch.arange(len(valid)))
        else:
            split = split_indices(len(train), valid_frac=config.valid_frac, seed=config.random_split_seed)
        self.split = split._replace(valid=drawn(split.valid, config.valid_images, seed=config.random_split_seed))
        self._check_length()

    def _check_length(self) -> None:
        config, images = self.config, len(self.split.train)
        if config.epochs is not None and round(config.epochs * images) < 1:
            raise UserError(
                f"epochs {config.epochs:g} of {images} images is less than one image; give more, or num_train_steps"
            )
        world_size = world_size_of_launcher()
        global_batch = config.batch_size * config.grad_accum_every * world_size
        if global_batch > images:
            raise UserError(
                f"one optimizer step takes {global_batch} images (batch_size {config.batch_size} x grad_accum_every "
                f"{config.grad_accum_every} x {world_size} processes) but there are {images} to train on; "
                "lower one of them"
            )

    def overlap(self) -> str | None:
        """Return a line where the folder of images to validate on lies in that of those to train on, else None."""
        train, valid = folder_of(self.config.folder), folder_of(self.config.valid)
        if train is None or valid is None or not valid.resolve().is_relative_to(train.resolve()):
            return None
        return f"{valid} lies in {train}, so images to validate on are trained on, too; give folders beside each other"

    def fingerprint(self) -> str:
        """Return that of the images to train on, which a resumed run compares."""
        return self.train.fingerprint()

    def fingerprint_of_valid(self) -> str | None:
        """Return that of the images to validate on, likewise; None for a share of those to train on."""
        return self.valid.fingerprint() if self.own_valid else None

    def protocol_of_valid(self) -> dict[str, Any]:
        """Return what a protocol says of the images to validate on; a part of a set has a hash of its own."""
        given = self.config.valid if self.own_valid else self.config.folder
        said = protocol.of_images(self.valid, "a dataset" if given is None else given)
        said |= {} if self.own_valid else {"split": "validation"}
        if len(self.split.valid) == len(self.valid):
            return said
        part = f"{said['data_hash']} {self.split.valid.tolist()}"
        digest = hashlib.sha256(part.encode()).hexdigest()[:16]
        return {**said, "data_hash": digest, "images": len(self.split.valid)}

    def fingerprint_of_all(self) -> str:
        """Return one of all images, which the ranks compare; of one source it is that of the source."""
        if not self.own_valid:
            return self.fingerprint()
        return hashlib.sha256(f"{self.fingerprint()} {self.valid.fingerprint()}".encode()).hexdigest()

    def train_batches(self, backend: Backend, position: int, *, labels: bool) -> Generator[Batch, None, None]:
        """Return the micro-batches of this rank from a position of the data order on, without an end."""
        return train_loader(
            self.train,
            self.split.train,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            position=position,
            num_workers=self.num_workers,
            **self._loading(backend, labels),
        )

    def valid_batches(self, backend: Backend, *, labels: bool) -> Iterator[Batch]:
        """Return this rank's share of the images to validate on; it may be a batch shorter than another's."""
        return valid_loader(
            self.valid,
            self.split.valid,
            batch_size=self.config.batch_size,
            num_workers=self.num_workers if len(self.split.valid) > SMALL else 0,
            **self._loading(backend, labels),
        )

    def shown(self, count: int) -> Tensor:
        """Return the images (n, c, h, w) of pictures, at most so many and the same at every step."""
        indices = self.split.valid if len(self.split.valid) else self.split.train
        return first_items(self.valid, indices, count)

    @property
    def num_workers(self) -> int:
        """Loader processes of this rank."""
        return default_workers() if self.config.num_workers is None else self.config.num_workers

    def pin_memory(self, device: torch.device) -> bool:
        """Return whether batches for a device are loaded into page-locked memory."""
        return device.type == "cuda" if self.config.pin_memory is None else self.config.pin_memory

    def _loading(self, backend: Backend, labels: bool) -> dict[str, Any]:
        return {
            "rank": backend.rank,
            "world_size": backend.world_size,
            "pin_memory": self.pin_memory(backend.device),
            "prefetch_factor": self.config.prefetch_factor,
            "labels": labels,
            "patience": self._patience(backend),
        }

    def _patience(self, backend: Backend) -> float:
        """Return the seconds in which a loader process must give a batch.

        They end before the other ranks, which wait in an exchange, give up this one: then all can still save.
        """
        if backend.world_size == 1:
            return GIVE_UP
        return min(GIVE_UP, max(SLOW, SHARE_OF_TIMEOUT * 60 * self.config.dist_timeout))
