"""SimVQ: a frozen codebook seen through a learned linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vqdist.models.quantizers.library import LibraryQuantizer
from vqdist.models.quantizers.vector_quantize import SimVQ


class SimVQQuantizer(LibraryQuantizer):
    """A frozen random codebook seen through a learned linear layer (arXiv 2411.02038)."""

    name = "simvq"
    library_classes = (SimVQ,)

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.inner(tokens)
        # The library rotates in eval mode too, which gives the codes up to rounding only.
        return (quantized if self.training else self._decode(indices)), indices, loss

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        """Nothing that the general checks leave."""
