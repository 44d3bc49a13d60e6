"""The transformers of x-transformers that vqdist uses; imported here only, as the import itself warns."""

from __future__ import annotations

import warnings

from vqdist.errors import UserError
from vqdist.models.einx_later import einx_later

with warnings.catch_warnings(), einx_later():
    warnings.simplefilter("ignore", FutureWarning)
    from x_transformers.attend import Intermediates
    from x_transformers.x_transformers import AttentionLayers, Decoder

__all__ = ["AttentionLayers", "Decoder", "Intermediates", "check_heads"]


def check_heads(dim: int, heads: int, dim_head: int) -> None:
    """Raise `UserError` for a single head of another width than the transformer: the library leaves it unprojected."""
    if dim < 2 or (heads == 1 and dim_head != dim):
        raise UserError(
            f"dim {dim} does not go with heads {heads} and dim_head {dim_head}; a single head must be as wide as dim, "
            "which must be at least 2: use more heads, or the same width"
        )
