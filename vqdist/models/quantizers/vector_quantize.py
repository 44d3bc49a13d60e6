"""The parts of vector-quantize-pytorch that vqdist uses; imported here only, and only for a quantizer made of them."""

from __future__ import annotations

from vqdist.models.einx_later import einx_later

with einx_later():
    from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize, lookup_free_quantization
    from vector_quantize_pytorch.vector_quantize_pytorch import (
        Codebook,
        batched_sample_vectors,
        noop,
        sample_vectors_distributed,
    )

__all__ = [
    "FSQ",
    "LFQ",
    "Codebook",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
    "batched_sample_vectors",
    "lookup_free_quantization",
    "noop",
    "sample_vectors_distributed",
]
