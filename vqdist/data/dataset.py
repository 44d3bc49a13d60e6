"""The images of a source as tensors of one size, ready for a loader."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqdist.classes import missing, numbers_among
from vqdist.data.config import MAX_PIXELS, STILL, View
from vqdist.data.images import BadImageError, check_channels, limited_to
from vqdist.data.sources import Source, TensorSource, not_empty, open_source
from vqdist.data.sources.base import checked_fingerprint, checked_index, checked_label
from vqdist.errors import UserError, an
from vqdist.options import is_whole
from vqdist.seeding import derive_seed
from vqdist.sizes import ImageSize, image_size_of, pixels, sides_of

LARGEST_SIDE = 2**16  # in pixels


class ImageDataset(Dataset):
    """The images of a source as tensors of one size; what comes out depends on (seed, epoch, index) only.

    `dataset[index]` is the image in epoch 0, `dataset[epoch, index]` in another; both are (c, h, w) float32 in [0, 1].
    `dataset.fetch` also tells which files were broken. The shorter side is resized to `image_size` and the centre cut
    out; training images are mirrored with probability 0.5 where the source allows it (not digits). A `view` says more.

    Args:
        source: a spec (see `vqdist.data.sources`), also as class_path and init_args, a `Source`, another
            `ImageDataset` of the same size and channels (its images are looked at anew; augmented only if both
            are), or any map-style dataset of float tensors (c, h, w) in [0, 1], which are taken as they are.
        image_size: side in pixels, or (height, width).
        channels: 1, 3 or 4.
        exts: file name extensions to read from a folder or tar files; by default every image format that is known.
        augment: False gives the view for validation: the centre of the image, with the filter of `view`.
        view: crop, filter and flip of an image, `vqdist.data.config.View`.
        seed: of the augmentation.
        on_bad_image: what to do with an image that cannot be decoded: `raise`, or `skip`, which puts the next good
            image in its place.
        max_bad_frac: the largest share of the images that may be passed over for one, but at least one.
        max_pixels: of an image; a larger one cannot be decoded.

    Raises:
        UserError: a wrong argument, or a source that cannot be opened or is empty.
    """

    ON_BAD_IMAGE = ("raise", "skip")

    def __init__(
        self,
        source: Source | Dataset | str | Mapping[str, Any] | os.PathLike,
        image_size: ImageSize,
        *,
        channels: int = 3,
        exts: Iterable[str] | str | None = None,
        augment: bool = True,
        view: View = STILL,
        seed: int = 0,
        on_bad_image: str = "raise",
        max_bad_frac: float = 1.0,
        max_pixels: int = MAX_PIXELS,
    ):
        sides = image_size if isinstance(image_size, (list, tuple)) else (image_size,)
        if not all(is_whole(side) and 1 <= side <= LARGEST_SIDE for side in sides):
            raise UserError(
                f"image_size {image_size!r} is not possible; give the side in pixels, a whole number from 1 to "
                f"{LARGEST_SIDE}"
            )
        check_channels(channels)
        if on_bad_image not in self.ON_BAD_IMAGE:
            raise UserError(f"on_bad_image {on_bad_image!r} is not known; choose {' or '.join(self.ON_BAD_IMAGE)}")
        if isinstance(source, ImageDataset):
            augment = augment and source.augment
            source = source._source_for(image_size_of(image_size), channels)
        self.source = _as_source(source, exts)
        self.image_size = image_size_of(image_size)
        self.channels = channels
        self.augment: bool = augment
        self.view = view
        self._check_view()
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.max_bad_frac = max_bad_frac
        self.max_pixels = max_pixels
        names = self.source.class_names
        self.class_names = None if names is None else list(names)
        self._numbers: list[int] | None = None  # of the source's classes, where they are counted in another way

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        """Return one line: the source, and how its images are looked at."""
        colours = f"{self.channels} channel{'s' if self.channels > 1 else ''}"
        augmented = ", augmented" if self.augment else ""
        return f"ImageDataset({self.source!r}, {pixels(self.image_size)}, {colours}{augmented})"

    @property
    def item_bytes(self) -> int:
        """Bytes of an image as `fetch` gives it."""
        sides = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return self.channels * math.prod(sides) * torch.float32.itemsize

    def __getitem__(self, place: int | tuple[int, int]) -> Tensor:
        epoch, index = place if isinstance(place, tuple) else (0, place)
        return self.fetch(epoch, index)[0]

    def fetch(
        self, epoch: int, index: int, *, among: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """One image, and the names of the broken ones that were passed over to find it.

        With `on_bad_image="skip"` a broken image is replaced by the next good one: index + 1, index + 2, ... and on
        from the start after the last. The augmentation stays that of `index`.

        Args:
            epoch: from 0.
            index: 0 <= index < len, or counted from the end if negative.
            among: sorted indices to replace from, so that a split never gives an image of the other; by default all.

        Returns:
            (c, h, w) float32 in [0, 1]; the names.

        Raises:
            IndexError: there is no such index.
            BadImageError: the image cannot be decoded and `on_bad_image` is `raise`.
            UserError: not one image can be decoded.
        """
        item, _, bad = self._first_good(epoch, index, among)
        return item, bad

    def fetch_labelled(
        self, epoch: int, index: int, *, among: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, int | None, tuple[str, ...]]:
        """Return the result of `fetch`, and the class of its image or None.

        The image may be the next good one, and then so is the class.
        """
        item, candidate, bad = self._first_good(epoch, index, among)
        return item, self.label(candidate), bad

    def _first_good(
        self, epoch: int, index: int, among: Sequence[int] | Tensor | None
    ) -> tuple[Tensor, int, tuple[str, ...]]:
        """Return the image, its own index, and the names of those passed over."""
        index = checked_index(index, len(self))
        bad: list[str] = []
        first: BadImageError | None = None
        for candidate in self._candidates(index, among):
            try:
                return self._view(epoch, index, candidate), candidate, tuple(bad)
            except BadImageError as error:
                if self.on_bad_image == "raise":
                    raise
                bad.append(self.source.name(candidate))
                first = first or error
                if len(bad) > most_bad(len(self), self.max_bad_frac):
                    raise too_many_bad(len(bad), len(self), self.max_bad_frac, bad) from first
        problem = first.problem if first is not None else "there are none"
        raise UserError(f"none of the {len(bad)} images could be decoded; first: {problem}")

    def label(self, index: int) -> int | None:
        """Return the class of the image at an index (of this very index, also where a broken image is replaced)."""
        label = checked_label(self.source, checked_index(index, len(self)))
        return label if label is None or self._numbers is None else self._numbers[label]

    def use_classes(self, known: Sequence[str] | None) -> str | None:
        """Let labels be the numbers of the classes of a model, by their names.

        Args:
            known: the model's names; None for a model from before names were kept.

        Returns:
            A line about classes without images, or None.

        Raises:
            UserError: the images have a class that the model does not know.
        """
        own = self.source.class_names
        known = self.source.first_class_names if known is None else known
        if own is None or known is None:  # then numbers are all there is
            return None
        self._numbers, self.class_names = numbers_among(own, known), list(known)
        return missing(own, known)

    def name(self, index: int) -> str:
        """Return the path or name of the image at an index."""
        return self.source.name(checked_index(index, len(self)))

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return checked_fingerprint(self.source)

    def _source_for(self, image_size: ImageSize, channels: int) -> Source:
        if (self.image_size, self.channels) != (image_size, channels):
            raise UserError(
                f"the dataset has image_size {self.image_size} and channels {self.channels}; expected {image_size} "
                f"and {channels}: build it with these, or change the options"
            )
        return self.source

    def _view(self, epoch: int, index: int, candidate: int) -> Tensor:
        rng = None
        if self.augment and (self.source.flip or self.view.crop != STILL.crop):
            rng = torch.Generator().manual_seed(derive_seed("augmentation", self.seed, epoch, index))
        # a source of somebody else's may have a `tensor` from before there were views
        more = {} if self.view == STILL else {"view": self.view}
        with limited_to(self.max_pixels):
            return self.source.tensor(candidate, image_size=self.image_size, channels=self.channels, rng=rng, **more)

    def _check_view(self) -> None:
        """Raise `UserError` for a crop of images that are not augmented, and for any of ready-made tensors."""
        tensors = isinstance(self.source, TensorSource)
        reason = "the dataset gives tensors, taken as they are" if tensors else "the images are not augmented"
        for name, acts in {
            "crop": self.augment and not tensors,
            "resample": not tensors,
            "center": not tensors,
        }.items():
            given = getattr(self.view, name)
            if not acts and given != getattr(STILL, name):
                raise UserError(f"{name} {given} does nothing, because {reason}; leave it out")
        rows, columns = sides_of(self.image_size)
        if self.view.center != STILL.center and rows != columns:
            raise UserError(
                f"center {self.view.center} is of square images but image_size is {rows} x {columns}; give one side"
            )

    def _candidates(self, index: int, among: Sequence[int] | Tensor | None) -> Iterator[int]:
        yield index
        others = np.arange(len(self)) if among is None else np.asarray(among)
        start = int(np.searchsorted(others, index, side="right"))
        for offset in range(len(others)):
            candidate = int(others[(start + offset) % len(others)])
            if candidate != index:
                yield candidate


def most_bad(total: int, max_bad_frac: float) -> int:
    """Return how many of so many images may be skipped."""
    return max(1, int(total * max_bad_frac))


def too_many_bad(count: int, total: int, max_bad_frac: float, names: Sequence[str]) -> UserError:
    """Return the one message for more images that cannot be decoded than may be skipped."""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return UserError(
        f"{count} of {total} images cannot be decoded ({some}), and max_bad_frac {max_bad_frac:g} allows "
        f"{most_bad(total, max_bad_frac)} to be skipped; look whether the storage is whole, or raise max_bad_frac"
    )


def _as_source(
    source: Source | Dataset | str | Mapping[str, Any] | os.PathLike, exts: Iterable[str] | str | None
) -> Source:
    if source is None or isinstance(source, str | os.PathLike | Mapping):
        return open_source(source, exts=exts)
    if exts is not None:
        raise UserError(f"exts {exts!r} has no meaning for {an(type(source).__name__)} that is open; leave it out")
    return not_empty(source) if isinstance(source, Source) else TensorSource(source)
