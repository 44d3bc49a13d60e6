"""Stored codes of images, memory-mapped: what `vqdist encode` writes and the second stage trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset


class CodeDataset(Dataset):
    """The codes in a folder that `vqdist encode` wrote.

    Args:
        folder: with `manifest.json` and shards.

    Attributes:
        tokenizer: fingerprint of the tokenizer that made the codes, see `Tokenizer.fingerprint`.
        codebook_size: number of codes (of each level).
        num_codes: codes of an image.
        num_levels: codes per position.
    """

    tokenizer: str
    codebook_size: int
    num_codes: int
    num_levels: int

    def __init__(self, folder: str | Path):
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def fetch(
        self, epoch: int, index: int, *, among: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """The codes (n,) or (n, q) int64 of an image, the same in every epoch; and no names, as none is ever broken."""
        raise NotImplementedError

    def label(self, index: int) -> int | None:
        """The class of an image, or None where the source had none."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the manifest: equal on two nodes if they see the same codes."""
        raise NotImplementedError
