"""An own quantizer: each of a few numbers is rounded to one of its levels."""

import torch
from torch import nn

from vqdist import Quantized, Quantizer


class Rounded(Quantizer):
    """Project to a few numbers in [-1, 1] and round each to the nearest of evenly spaced levels.

    Args:
        dim: width of the features; vqdist passes it.
        levels: of each number.
        numbers: of each position; there are levels ** numbers codes.
    """

    def __init__(self, dim: int, levels: int = 8, numbers: int = 2):
        super().__init__(dim, codebook_size=levels**numbers)
        self.levels = levels
        self.to_numbers, self.to_features = nn.Conv2d(dim, numbers, 1), nn.Conv2d(numbers, dim, 1)
        self.register_buffer("place_values", levels ** torch.arange(numbers)[:, None, None])

    def forward(self, features):
        """Features (b, d, h, w) -> the codes' features, the codes (b, h, w), and no loss of its own."""
        numbers = self.to_numbers(features).tanh()
        steps = ((numbers + 1) / 2 * (self.levels - 1)).round()
        rounded = numbers + (self._values(steps) - numbers).detach()  # the gradient passes as if nothing was rounded
        indices = (steps.long() * self.place_values).sum(dim=1)
        return Quantized(self.to_features(rounded), indices, torch.zeros((), device=features.device))

    def decode_indices(self, indices):
        """Codes (b, h, w) -> features (b, d, h, w)."""
        steps = indices[:, None] // self.place_values % self.levels
        return self.to_features(self._values(steps.float()))

    def _values(self, steps):
        return steps / (self.levels - 1) * 2 - 1
