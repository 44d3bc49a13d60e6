"""The transformers of x-transformers that vqdist uses; imported here only, as the import itself warns."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    from x_transformers.x_transformers import AttentionLayers, Decoder

__all__ = ["AttentionLayers", "Decoder"]
