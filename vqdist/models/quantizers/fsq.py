"""Finite scalar quantization: each of a few numbers is rounded to one of its levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from vqdist.models.quantizers.library import LibraryQuantizer
from vqdist.models.quantizers.options import check_projection, is_integer, require
from vqdist.models.quantizers.vector_quantize import FSQ

# Levels by nominal codebook size: table 1 of arXiv 2309.15505.
FSQ_LEVELS: dict[int, tuple[int, ...]] = {
    2**8: (8, 6, 5),
    2**10: (8, 5, 5, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}


class FSQQuantizer(LibraryQuantizer):
    """Each of a few numbers is rounded to one of its levels: no codebook and no loss (arXiv 2309.15505)."""

    name = "fsq"
    library_classes = (FSQ,)

    def _build(self, dim: int, codebook_size: int | None, options: dict[str, Any]) -> nn.Module:
        levels = options.pop("levels", None) or FSQ_LEVELS[cast(int, codebook_size)]  # `check_options` came first
        return FSQ(dim=dim, levels=list(levels), **options)

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices = self.inner(tokens)
        return quantized, indices, quantized.new_zeros(())

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        levels = given.get("levels")
        if levels is None:
            cls._check_table_size(codebook_size)
            levels = FSQ_LEVELS[cast(int, codebook_size)]
        else:
            cls._check_levels(levels, codebook_size, options["preserve_symmetry"])
        check_projection(cls.name, dim, len(levels) * options["num_codebooks"], given, options)

    @classmethod
    def _check_table_size(cls, codebook_size: int | None) -> None:
        table = ", ".join(f"{size} (levels {list(levels)})" for size, levels in FSQ_LEVELS.items())
        require(
            codebook_size in FSQ_LEVELS,
            cls.name,
            f"codebook_size {codebook_size} has no levels in the table of the paper; try {table}, or give levels",
        )

    @classmethod
    def _check_levels(cls, levels: Any, codebook_size: int | None, preserve_symmetry: bool) -> None:
        smallest = 2 if preserve_symmetry else 3
        valid = isinstance(levels, (list, tuple)) and len(levels) > 0 and all(is_integer(n) for n in levels)
        require(
            valid and min(levels) >= smallest,
            cls.name,
            f"levels {levels} is not a list of integers of at least {smallest} (2 needs preserve_symmetry=True); "
            f"try [8, 5, 5, 5]",
        )
        product = math.prod(levels)
        require(
            codebook_size in (None, product),
            cls.name,
            f"levels {list(levels)} make {product} codes but codebook_size is {codebook_size}; set codebook_size to "
            f"{product}, or leave one of the two out",
        )
