"""Quantizers: features to codes and back. `base` has the contract, and each further file one kind of quantizer."""

from __future__ import annotations

from typing import Any

from vqdist.models.quantizers.base import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    float32_arithmetic,
    is_distributed,
    mean_over_ranks,
)
from vqdist.models.quantizers.build import build_quantizer
from vqdist.models.quantizers.library import LibraryQuantizer

# in the order in which messages and --help list them
from vqdist.models.quantizers.vq import VQQuantizer  # isort: skip
from vqdist.models.quantizers.lfq import LFQQuantizer  # isort: skip
from vqdist.models.quantizers.fsq import FSQ_LEVELS, FSQQuantizer  # isort: skip
from vqdist.models.quantizers.simvq import SimVQQuantizer  # isort: skip
from vqdist.models.quantizers.residual_vq import ResidualVQQuantizer  # isort: skip
from vqdist.models.quantizers.multiscale_vq import EMACodebook, MultiScaleQuantizer, MultiScaleVQ  # isort: skip
from vqdist.models.quantizers.gradient_vq import GradientVQ  # isort: skip
from vqdist.models.quantizers.ibq import IBQ  # isort: skip
from vqdist.models.quantizers.gumbel import Gumbel  # isort: skip
from vqdist.models.quantizers.rotation import rotated_onto  # isort: skip

DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    cls.name: dict(cls.defaults)
    for cls in (VQQuantizer, LFQQuantizer, FSQQuantizer, SimVQQuantizer, ResidualVQQuantizer, MultiScaleQuantizer)
}
"""Options that `build_quantizer` passes to the library's where the user says nothing; its own hold for all others."""

__all__ = [
    "DEFAULT_OPTIONS",
    "FSQ_LEVELS",
    "IBQ",
    "QUANTIZERS",
    "EMACodebook",
    "FSQQuantizer",
    "GradientVQ",
    "Gumbel",
    "LFQQuantizer",
    "LibraryQuantizer",
    "MultiScaleQuantizer",
    "MultiScaleVQ",
    "Quantized",
    "Quantizer",
    "ResidualVQQuantizer",
    "SimVQQuantizer",
    "VQQuantizer",
    "build_quantizer",
    "float32_arithmetic",
    "is_distributed",
    "mean_over_ranks",
    "rotated_onto",
]
