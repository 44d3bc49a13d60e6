"""One code of an EMA or learnable codebook per position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from vqdist.models.quantizers.library import LibraryQuantizer
from vqdist.models.quantizers.options import check_codebook_learning, check_gradient_estimator, require
from vqdist.models.quantizers.vector_quantize import VectorQuantize

VQ_DEFAULTS = {
    "codebook_dim": 256,
    "decay": 0.8,
    "commitment_weight": 1.0,
    "kmeans_init": True,
    "use_cosine_sim": True,
}


class VQQuantizer(LibraryQuantizer):
    """Nearest code of an EMA or learnable codebook (VQ-VAE, arXiv 1711.00937)."""

    name = "vq"
    library_classes: ClassVar[tuple[type[nn.Module], ...]] = (VectorQuantize,)
    defaults = VQ_DEFAULTS

    def _build(self, dim: int, codebook_size: int | None, options: dict[str, Any]) -> nn.Module:
        unsynchronised = {"sync_codebook": False, "sync_kmeans": False}  # until `_follow_process_group` knows
        return self.library_classes[0](dim=dim, codebook_size=codebook_size, **unsynchronised, **options)

    def _decode(self, indices: Tensor) -> Tensor:
        return self.inner.get_output_from_indices(indices)

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        projected = (options["codebook_dim"] or dim) != dim
        require(
            projected or not given.get("layernorm_after_project_in"),
            cls.name,
            f"layernorm_after_project_in has no projection to follow: codebook_dim equals dim {dim}; set another one",
        )
        check_codebook_learning(cls.name, options)
        check_gradient_estimator(cls.name, options)
