"""The objective of a tokenizer's generator: the terms, one file each, and their sum."""

from __future__ import annotations

from vqdist.objectives.base import TERMS, Term
from vqdist.objectives.objective import AtTheCut, Objective
from vqdist.objectives.perceptual import Perceptual, PerceptualLoss
from vqdist.objectives.reconstruction import Reconstruction

__all__ = ["TERMS", "AtTheCut", "Objective", "Perceptual", "PerceptualLoss", "Reconstruction", "Term"]
