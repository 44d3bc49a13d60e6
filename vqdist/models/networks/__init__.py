"""Encoders, decoders and discriminators: the contracts, and one file for each family."""

from __future__ import annotations

from vqdist.models.networks.base import Decoder, Discriminator, Encoder
from vqdist.registries import DECODERS, DISCRIMINATORS, ENCODERS

__all__ = ["DECODERS", "DISCRIMINATORS", "ENCODERS", "Decoder", "Discriminator", "Encoder"]
