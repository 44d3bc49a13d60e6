"""The options of drawing codes. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vqdist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """The options by which codes are drawn from a generator's logits.

    The cut is decided by the model's own probabilities, before the temperature; where several limits are given
    a code must pass all of them.
    """

    temperature: float = 1.0
    """Divisor of the logits of the codes that are kept; 0 takes the most probable code."""
    top_k: int | None = None
    """Sample from the k most probable codes; ties with the k-th are kept."""
    top_p: float | None = None
    """Nucleus sampling: keep the smallest set of codes whose probabilities sum to this (arXiv 1904.09751)."""
    min_p: float | None = None
    """Keep codes whose probability is at least this share of the largest (arXiv 2407.01082)."""
    cfg: float = 1.0
    """Classifier-free guidance: logits are unconditional + cfg * (conditional - unconditional) (arXiv 2207.12598)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature} is not possible; it must be at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} is not possible; it must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} {value} is not possible; it must be above 0 and at most 1")
        if not 0 <= self.cfg < math.inf:
            raise UserError(f"cfg {self.cfg} is not possible; it must be at least 0 (1 does not guide)")
