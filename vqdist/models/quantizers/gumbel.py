"""Gumbel-softmax quantization: the features are logits over the codes, and training draws from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist import sampling
from vqdist.models.quantizers.base import Float32Quantizer, Quantized, float32_arithmetic
from vqdist.models.quantizers.options import check_sizes, require

NAME = "gumbel"
LOG_EPS = 1e-10


class Gumbel(Float32Quantizer):
    """A draw from a distribution over the codes that a 1x1 convolution gives each position (arXiv 1611.01144).

    In training a code is drawn with Gumbel noise; in eval mode the likeliest is taken, so that an image always has the
    same codes.

    Args:
        dim: channels of the features, and of a code's vector.
        codebook_size: number of codes.
        kl_weight: weight of KL(a position's distribution || uniform), the mean over positions.
        temperature: of the draw in training.
        straight_through: give the drawn code with the gradient of the soft mixture; false gives the mixture.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int = 8192,
        *,
        kl_weight: float = 5e-4,
        temperature: float = 1.0,
        straight_through: bool = True,
    ):
        check_sizes(NAME, dim, codebook_size, optional=False)
        require(temperature > 0, NAME, f"temperature {temperature} is not possible; it must be above 0")
        require(kl_weight >= 0, NAME, f"kl_weight {kl_weight} is not possible; it must be at least 0")
        super().__init__(dim, codebook_size)
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.straight_through = straight_through
        self.proj = nn.Conv2d(dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, dim)

    def forward(self, features: Tensor) -> Quantized:
        """Features (b, d, h, w) -> `Quantized`; in train mode the codes are drawn."""
        self.check_features(features, NAME)
        with float32_arithmetic(features.device):
            logits = self.logits(features)
            if self.training:
                noise = sampling.gumbel_noise(logits.shape, logits.device)
                quantized, indices = self.drawn(logits, noise)
                loss = self.kl_weight * self.kl_loss(logits)
            else:
                indices, loss = logits.argmax(dim=-1), torch.zeros((), device=features.device)
                quantized = self.decode_indices(indices)
        return Quantized(quantized.to(features.dtype), indices, loss)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (b, h, w) -> (b, d, h, w) float32: what `forward` gives for them in eval mode."""
        return rearrange(F.embedding(indices.long(), self.embed.weight.float()), "b h w d -> b d h w")

    def logits(self, features: Tensor) -> Tensor:
        """Features (b, d, h, w) -> logits over the codes, (b, h, w, v) float32."""
        return rearrange(self.proj(features.float()), "b v h w -> b h w v")

    def drawn(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and Gumbel noise (b, h, w, v) -> features (b, d, h, w) and the drawn codes (b, h, w)."""
        soft = sampling.gumbel_softmax(logits, noise, self.temperature)
        weights = sampling.straight_through(soft) if self.straight_through else soft
        return rearrange(weights @ self.embed.weight.float(), "b h w d -> b d h w"), soft.argmax(dim=-1)

    def kl_loss(self, logits: Tensor) -> Tensor:
        """KL(softmax(logits) || uniform) of logits (b, h, w, v), the mean over positions; 0-d, nats."""
        probs = logits.softmax(dim=-1)
        return (probs * (probs * self.codebook_size + LOG_EPS).log()).sum(dim=-1).mean()
