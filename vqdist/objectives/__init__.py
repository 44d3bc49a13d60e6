"""The objective of a tokenizer's generator: the terms, one file each, and their sum."""

from __future__ import annotations

from vqdist.objectives.base import Term
from vqdist.objectives.convnext import ConvNeXtLogits
from vqdist.objectives.lpips import LPIPS
from vqdist.objectives.objective import AtTheCut, Objective
from vqdist.objectives.perceptual import Perceptual, PerceptualLoss
from vqdist.objectives.reconstruction import Reconstruction
from vqdist.registries import TERMS

__all__ = [
    "LPIPS",
    "TERMS",
    "AtTheCut",
    "ConvNeXtLogits",
    "Objective",
    "Perceptual",
    "PerceptualLoss",
    "Reconstruction",
    "Term",
]
