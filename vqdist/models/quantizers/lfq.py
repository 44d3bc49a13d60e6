"""Lookup-free quantization: the signs of a few numbers are the code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from vqdist.errors import UserError
from vqdist.models.quantizers.base import mean_over_ranks
from vqdist.models.quantizers.library import LibraryQuantizer
from vqdist.models.quantizers.options import check_projection, require
from vqdist.models.quantizers.vector_quantize import LFQ, lookup_free_quantization


class LFQQuantizer(LibraryQuantizer):
    """The signs of log2(v) numbers are the code: no codebook to learn (MAGVIT-v2, arXiv 2310.05737)."""

    name = "lfq"
    library_classes = (LFQ,)
    defaults = {"diversity_gamma": 4.0}

    def __init__(self, dim: int, codebook_size: int | None, options: dict[str, Any]):
        _repair_entropy_over_ranks()
        super().__init__(dim, codebook_size, options)

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        below = 1 << (cast(int, codebook_size).bit_length() - 1)  # `check_sizes` came first
        require(
            codebook_size == below,
            cls.name,
            f"codebook_size {codebook_size} is no power of 2, as lookup-free codes need; try {below} or {2 * below}",
        )
        check_projection(cls.name, dim, (below.bit_length() - 1) * options["num_codebooks"], given, options)
        clamp, scale = options["soft_clamp_input_value"], options["codebook_scale"]
        require(
            clamp is None or clamp >= scale,
            cls.name,
            f"soft_clamp_input_value {clamp} is below codebook_scale {scale}, so no input reaches a code; raise it",
        )


def _repair_entropy_over_ranks() -> None:
    # The library's function throws the sum over ranks away and divides this rank's probabilities by the world size, so
    # that the batch entropy is that of prob / ranks; it also caches whether there is a process group. LFQ calls it in
    # train mode only.
    if not callable(getattr(lookup_free_quantization, "maybe_distributed_mean", None)):
        raise UserError(
            "this vector-quantize-pytorch has no lookup_free_quantization.maybe_distributed_mean to repair; "
            "install the version that vqdist was made for: pip install 'vector-quantize-pytorch==1.32.*'"
        )
    lookup_free_quantization.maybe_distributed_mean = mean_over_ranks
