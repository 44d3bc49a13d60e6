"""Writing the codes of a set of images, by all ranks, so that a killed run goes on where it was.

The work is cut into shards of a fixed number of images, and a shard into batches that begin with it. Neither depends
on the number of ranks, so neither does a byte of what is written. `vqdist.data.codes` says what the files are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vqdist.backends.base import Backend
from vqdist.data.codes import (
    FORMAT_VERSION,
    KINDS,
    LABEL_DTYPE,
    MANIFEST,
    PLAN,
    code_dtype,
    facts_of,
    map_array,
    num_shards,
    row_shape,
    shard_file,
    shard_range,
)
from vqdist.data.dataset import ImageDataset, most_bad, too_many_bad
from vqdist.data.loader import Batch, default_workers, listed_loader
from vqdist.data.sources import folder_of
from vqdist.errors import UserError
from vqdist.files import LEASE_SECONDS, LOCK, FolderLock, lock_folder, read_json, sha256_of, write_json, writing
from vqdist.metrics import code_histogram, codebook_usage, few_codes
from vqdist.models.tokenizer import Tokenizer
from vqdist.ranks import on_main


class Progress(Protocol):
    """Is told of every batch of a rank."""

    def __call__(self, images: int, *, of: int, replaced: list[str]) -> None:
        """So many images are done, of so many that are this rank's; these names could not be decoded."""


def say_nothing(images: int, *, of: int, replaced: list[str]) -> None:
    """Do nothing: a `Progress` for nobody."""


class CodeWriter:
    """Encodes a dataset into a folder that `CodeDataset` reads.

    Args:
        tokenizer: makes the codes; `write` moves it to the backend's device.
        dataset: images of the tokenizer's size and channels, not augmented.
        folder: new, empty, or begun by a writer with the same arguments.
        batch_size: images that are encoded at once; a shard's last batch may be smaller.
        shard_size: images of a shard.

    Attributes:
        plan: what is encoded, by what and how; written to `encode.json` before the first shard.

    Raises:
        UserError: a wrong argument, or a folder that holds something else or codes of another plan.
    """

    def __init__(
        self, tokenizer: Tokenizer, dataset: ImageDataset, folder: str | Path, *, batch_size: int, shard_size: int
    ):
        if batch_size < 1 or shard_size < 1:
            raise UserError(
                f"batch_size {batch_size} and shard_size {shard_size} are not possible; both must be at least 1"
            )
        if dataset.augment:
            raise UserError(
                "the images are augmented; open them with augment=False, so that an image has one row of codes"
            )
        self.folder = Path(folder).expanduser()
        check_folder(self.folder)
        self.tokenizer = tokenizer
        self.dataset = dataset
        self._bad: set[str] = set()  # images that could not be decoded
        self.plan = make_plan(tokenizer, dataset, batch_size=batch_size, shard_size=shard_size)
        self._refuse_other_plan()

    @torch.no_grad()
    def write(
        self, backend: Backend, *, num_workers: int | None = None, progress: Progress = say_nothing
    ) -> dict[str, Any]:
        """Encode what is missing and finish the folder; every rank calls this.

        Args:
            backend: its ranks share the shards.
            num_workers: loader processes of each rank; by default as the cores allow.
            progress: called after every batch of this rank.

        Returns:
            `count` and `shards` of the folder, `encoded` (images of this call, over all ranks), `images_per_second`
            (None if there was nothing to encode), `replaced` (images that could not be decoded, over all ranks),
            `codebook_usage` and `codebook_perplexity` over all codes, `few` (a sentence if few codes are in use, else
            None); the same on every rank.
        """
        try:
            return self._write(backend, num_workers, progress)
        finally:
            self._lock: FolderLock | None = None

    def _write(self, backend: Backend, num_workers: int | None, progress: Progress) -> dict[str, Any]:
        self._begin(backend)
        missing = self._missing(backend)
        if not missing and not backend.any(not (self.folder / MANIFEST).is_file()):
            return self._summary(read_json(self.folder / MANIFEST), encoded=0, seconds=0.0, replaced=0)
        began = time.perf_counter()
        workers = default_workers() if num_workers is None else num_workers
        replaced = self._encode(missing[backend.rank :: backend.world_size], backend, workers, progress)
        total = backend.sum(torch.tensor([replaced], device=backend.device))  # waits for every rank's last shard
        seconds = time.perf_counter() - began
        return self._summary(self._finish(backend), self._count(missing), seconds, int(total))

    # ------------------------------------------------------------------------------------- whose folder it is

    def _refuse_other_plan(self) -> None:
        path = self.folder / PLAN
        if not path.is_file():
            return
        before = read_json(path)
        keys = [key for key in self.plan if before.get(key) != self.plan[key]]
        if before.get("codes_fingerprint") == self.plan["codes_fingerprint"]:
            keys = [key for key in keys if key != "tokenizer"]  # with another decoder
        elif "codes_fingerprint" not in before:  # begun by an older version
            keys.remove("codes_fingerprint")
        if keys:
            lines = "; ".join(f"{key}: {_brief(before.get(key))} -> {_brief(self.plan[key])}" for key in keys)
            raise UserError(
                f"{self.folder} holds codes of another encoding ({lines}); give another --out, or the same options"
            )

    def _begin(self, backend: Backend) -> None:
        """Rank 0 writes the plan; every rank must see it, and have made the same one."""
        on_main(backend, self._write_plan, self._unwritable)
        if backend.any(not (self.folder / PLAN).is_file()):
            raise UserError(f"{self.folder} is not visible to every process; use a folder on a shared file system")
        marks = torch.tensor([_number_of(json.dumps(value)) for value in self.plan.values()], device=backend.device)
        differs = (backend.gather(marks) != marks).any(dim=0).tolist()
        names = [name for name, differing in zip(self.plan, differs, strict=True) if differing]
        if names:
            raise UserError(
                f"the {names[0]} differs between processes or nodes; give all of them the same files and options"
            )

    def _write_plan(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder, patience=LEASE_SECONDS)
        if not (self.folder / PLAN).is_file():
            write_json(self.folder / PLAN, self.plan)

    @property
    def _unwritable(self) -> str:
        return f"the folder of codes {self.folder} cannot be written"

    # ------------------------------------------------------------------------------------- shards

    def _shards(self) -> range:
        return range(num_shards(self.plan["count"], self.plan["shard_size"]))

    def _rows(self, shard: int) -> range:
        return shard_range(shard, self.plan["count"], self.plan["shard_size"])

    def _count(self, shards: list[int]) -> int:
        return sum(len(self._rows(shard)) for shard in shards)

    def _array(self, kind: str, shard: int) -> np.ndarray:
        """Return a file of a shard, memory-mapped; raise `UserError` unless it is whole."""
        codes = kind == "codes"
        dtype = code_dtype(self.plan["codebook_size"]) if codes else LABEL_DTYPE
        row = self._row_shape if codes else ()
        return map_array(self.folder / shard_file(kind, shard), dtype, (len(self._rows(shard)), *row))

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return row_shape(self.plan["num_codes"], self.plan["num_levels"])

    def _is_complete(self, shard: int) -> bool:
        try:
            for kind in KINDS:
                self._array(kind, shard)
        except UserError:
            return False
        return True

    def _missing(self, backend: Backend) -> list[int]:
        """Shards that have to be encoded, as rank 0 sees it: file systems tell other nodes late."""
        there = torch.zeros(len(self._shards()), dtype=torch.int64, device=backend.device)
        if backend.is_main:
            there = torch.tensor([int(self._is_complete(shard)) for shard in self._shards()], device=backend.device)
        return (backend.sum(there) == 0).nonzero().flatten().tolist()

    def _encode(self, shards: list[int], backend: Backend, num_workers: int, progress: Progress) -> int:
        """Encode and write these shards; returns how many of their images could not be decoded."""
        self.tokenizer.to(backend.device)
        batches = listed_loader(
            self.dataset,
            (batch for shard in shards for batch in self._batches(shard)),
            batch_size=min(self.plan["batch_size"], self.plan["shard_size"]),
            num_workers=num_workers,
            pin_memory=backend.device.type == "cuda",
        )
        told = partial(progress, of=self._count(shards))
        return sum(self._encode_shard(shard, batches, backend.device, told) for shard in shards)

    def _encode_shard(self, shard: int, batches: Iterator[Batch], device: torch.device, progress: Callable) -> int:
        images = self._rows(shard)
        codes = torch.empty(len(images), *self._row_shape, dtype=torch.int64, device=device)
        labels = torch.empty(len(images), dtype=torch.int64)
        replaced = 0
        for indices in self._batches(shard):
            batch = next(batches)
            rows = slice(indices.start - images.start, indices.stop - images.start)
            codes[rows] = self.tokenizer.encode(batch.item.to(device, non_blocking=True))
            labels[rows] = batch.label
            names = self._replaced(batch, indices)
            replaced += len(names)
            progress(len(indices), replaced=names)
        self._write_shard(shard, codes.cpu(), labels)
        return replaced

    def _batches(self, shard: int) -> Iterator[range]:
        rows, size = self._rows(shard), self.plan["batch_size"]
        for start in range(rows.start, rows.stop, size):
            yield range(start, min(rows.stop, start + size))

    def _replaced(self, batch: Batch, indices: range) -> list[str]:
        """Names of the images of a batch that could not be decoded; the loader also names others on the way."""
        bad = set(batch.bad)
        self._bad |= bad
        if len(self._bad) > most_bad(len(self.dataset), self.dataset.max_bad_frac):
            raise too_many_bad(len(self._bad), len(self.dataset), self.dataset.max_bad_frac, sorted(self._bad))
        return [self.dataset.name(index) for index in indices if self.dataset.name(index) in bad] if bad else []

    def _write_shard(self, shard: int, codes: Tensor, labels: Tensor) -> None:
        """Both files, each whole or absent; the codes appear last."""
        assert 0 <= int(codes.min()) and int(codes.max()) < self.plan["codebook_size"]
        arrays = {"labels": labels.numpy(), "codes": codes.numpy().astype(code_dtype(self.plan["codebook_size"]))}
        paths = {kind: self.folder / shard_file(kind, shard) for kind in KINDS}
        partial = {kind: path.with_name(path.name + ".partial") for kind, path in paths.items()}
        for kind in KINDS:
            _write_array(partial[kind], arrays[kind])
        for kind in KINDS:
            partial[kind].replace(paths[kind])

    # ------------------------------------------------------------------------------------- the manifest

    def _finish(self, backend: Backend) -> dict[str, float]:
        """Every rank reads its part of the shards once more; rank 0 writes the manifest. Gives the numbers in it."""
        digests = torch.zeros(len(self._shards()), len(KINDS), 32, dtype=torch.int64, device=backend.device)
        histogram = torch.zeros(
            self.plan["num_levels"] * self.plan["codebook_size"], dtype=torch.int64, device=backend.device
        )
        for shard in self._shards()[backend.rank :: backend.world_size]:
            for number, kind in enumerate(KINDS):
                digest = bytes.fromhex(sha256_of(self.folder / shard_file(kind, shard)))
                digests[shard, number] = torch.tensor(list(digest))
            histogram += self._histogram(shard).to(backend.device)
        digests, histogram = backend.sum(digests).cpu(), backend.sum(histogram)
        usage, perplexity = codebook_usage(histogram, self.plan["num_levels"])
        numbers = {"codebook_usage": usage, "codebook_perplexity": perplexity}

        def write_manifest() -> None:
            shards = [self._shard_entry(shard, digests[shard]) for shard in self._shards()]
            names = {} if self.dataset.class_names is None else {"classes": self.dataset.class_names}
            found = {"classes_seen": self._classes_seen(), **names, **numbers, "shards": shards}
            write_json(self.folder / MANIFEST, {**self.plan, **found})

        on_main(backend, write_manifest, self._unwritable)
        return numbers

    def _shard_entry(self, shard: int, digests: Tensor) -> dict[str, Any]:
        entry = {}
        for kind, digest in zip(KINDS, digests.tolist(), strict=True):
            path = self.folder / shard_file(kind, shard)
            entry[kind] = {"file": path.name, "bytes": path.stat().st_size, "sha256": bytes(digest).hex()}
        return entry

    def _histogram(self, shard: int) -> Tensor:
        codes = torch.from_numpy(self._array("codes", shard).astype(np.int64))
        return code_histogram(codes, codebook_size=self.plan["codebook_size"], num_levels=self.plan["num_levels"])

    def _classes_seen(self) -> int:
        seen = [np.unique(self._array("labels", shard)) for shard in self._shards()]
        return int((np.unique(np.concatenate(seen)) >= 0).sum())

    def _summary(self, numbers: dict[str, Any], encoded: int, seconds: float, replaced: int) -> dict[str, Any]:
        drawn = self.plan["count"] * self.plan["num_codes"]
        return {
            "count": self.plan["count"],
            "shards": len(self._shards()),
            "encoded": encoded,
            "images_per_second": encoded / seconds if encoded else None,
            "replaced": replaced,
            "codebook_usage": numbers["codebook_usage"],
            "codebook_perplexity": numbers["codebook_perplexity"],
            "few": few_codes(numbers["codebook_usage"], drawn, self.plan["codebook_size"]),
        }


def make_plan(tokenizer: Tokenizer, dataset: ImageDataset, *, batch_size: int, shard_size: int) -> dict[str, Any]:
    """Return what decides over every byte of a folder of codes, as JSON.

    The batch size is a part of it: how a convolution adds up may depend on the size of the batch, and a code on the
    last bit. The treatment of broken images is not: a run that met one may go on with `on_bad_image="skip"`.
    """
    return {
        "version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint(),
        "codes_fingerprint": tokenizer.codes_fingerprint(),
        **facts_of(tokenizer),
        "data": dataset.fingerprint(),
        "count": len(dataset),
        "shard_size": shard_size,
        "batch_size": batch_size,
        **_order_of_classes(dataset),
    }


def _order_of_classes(dataset: ImageDataset) -> dict[str, Any]:
    """Return the classes where they were once counted in another order: shards of both must not mix."""
    names, first = dataset.source.class_names, dataset.source.first_class_names
    return {} if names is None or first is None or list(names) == list(first) else {"classes": list(names)}


def check_folder(folder: Path, images: Any = None) -> None:
    """Raise `UserError` if codes cannot go into this folder.

    Args:
        folder: for the codes.
        images: the spec of the images.
    """
    source = folder_of(images)
    if source is not None and folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"the folder of codes {folder} lies in the folder of the images, {source}; give another --out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a folder for the codes is expected; give another --out")
    if folder.is_dir() and not (folder / PLAN).is_file():
        # a process that was killed while it wrote the plan leaves only these
        others = sorted(path.name for path in folder.iterdir() if path.name not in (f"{PLAN}.partial", LOCK))
        if others:
            raise UserError(
                f"{folder} holds {others[0]} and no {PLAN}: it is no folder of codes; give a new or empty one as --out"
            )


def _write_array(path: Path, array: np.ndarray) -> None:
    with writing(path), path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _number_of(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:13]}..."
