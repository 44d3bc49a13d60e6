"""Quantizers: features to codes and back. `base` has the contract, and each further file one kind of quantizer.

Those made of vector-quantize-pytorch are imported when they are first used, because the library takes a while.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vqdist.models.quantizers.base import (
    Quantized,
    Quantizer,
    float32_arithmetic,
    is_distributed,
    mean_over_ranks,
)
from vqdist.models.quantizers.build import build_quantizer
from vqdist.models.quantizers.rotation import rotated_onto
from vqdist.registries import QUANTIZERS

if TYPE_CHECKING:
    from vqdist.models.quantizers.cvq import CVQ
    from vqdist.models.quantizers.fsq import FSQ_LEVELS, FSQQuantizer
    from vqdist.models.quantizers.gradient_vq import GradientVQ
    from vqdist.models.quantizers.gumbel import Gumbel
    from vqdist.models.quantizers.ibq import IBQ
    from vqdist.models.quantizers.lfq import LFQQuantizer
    from vqdist.models.quantizers.library import LibraryQuantizer
    from vqdist.models.quantizers.magvit2_lfq import MagvitLFQ
    from vqdist.models.quantizers.multiscale_vq import EMACodebook, MultiScaleQuantizer, MultiScaleVQ
    from vqdist.models.quantizers.residual_vq import ResidualVQQuantizer
    from vqdist.models.quantizers.simvq import SimVQQuantizer
    from vqdist.models.quantizers.vq import VQQuantizer

    DEFAULT_OPTIONS: dict[str, dict[str, Any]]
    """Options that `build_quantizer` passes to the library's where the user says nothing; its own hold for others."""

_LATER = {
    "CVQ": "cvq",
    "EMACodebook": "multiscale_vq",
    "FSQQuantizer": "fsq",
    "FSQ_LEVELS": "fsq",
    "GradientVQ": "gradient_vq",
    "Gumbel": "gumbel",
    "IBQ": "ibq",
    "LFQQuantizer": "lfq",
    "LibraryQuantizer": "library",
    "MagvitLFQ": "magvit2_lfq",
    "MultiScaleQuantizer": "multiscale_vq",
    "MultiScaleVQ": "multiscale_vq",
    "ResidualVQQuantizer": "residual_vq",
    "SimVQQuantizer": "simvq",
    "VQQuantizer": "vq",
}

__all__ = [
    "CVQ",
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
    "MagvitLFQ",
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


def __getattr__(name: str) -> Any:
    if name == "DEFAULT_OPTIONS":
        with_defaults = {name: factory for name, factory in QUANTIZERS.items() if hasattr(factory, "defaults")}
        return {name: dict(factory.defaults) for name, factory in with_defaults.items()}
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
