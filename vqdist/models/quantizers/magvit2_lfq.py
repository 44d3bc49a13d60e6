"""Lookup-free quantization as in Open-MAGVIT2: signs are bits, the least significant first, of one or more numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vqdist.models.multiscale import straight_through
from vqdist.models.quantizers.base import Float32Quantizer, Quantized, float32_arithmetic
from vqdist.models.quantizers.entropy import CodeEntropy, code_entropy
from vqdist.models.quantizers.options import is_integer, require

NAME = "magvit2_lfq"
MOST_BITS = 24  # of an entropy over all codes


class MagvitLFQ(Float32Quantizer):
    """The signs of the features are the code (MAGVIT-v2, arXiv 2310.05737), as Open-MAGVIT2 has it (arXiv 2409.04410).

    The first channel is the least significant bit; `lfq` begins with the most significant one. With p the softmax of
    2 z c / temperature over all codes c of -1 and 1, the loss is commitment_weight MSE(z, sg(sign z)) + entropy_weight
    (sample_minimization_weight H(position) - batch_maximization_weight H(mean)).

    Args:
        dim: channels of the features: bits of a code.
        codebook_size: number of codes, 2 ** dim.
        factorized_bits: give several numbers a position instead of one, of so many bits each, the first channels
            first: [6, 12] for a model that predicts 64 and 4096 codes in place of 262,144.
        commitment_weight: of the distance between features and signs.
        entropy_weight: of the entropy loss; 0 leaves it out.
        entropy_temperature: of the distributions whose entropies are taken.
        sample_minimization_weight: of the mean entropy of a position's distribution.
        batch_maximization_weight: of the entropy of the mean distribution over all ranks.
    """

    places: Tensor  # (d,), the value of each bit within its number
    owners: Tensor  # (q, d), 1 where a bit belongs to a number

    def __init__(
        self,
        dim: int,
        codebook_size: int | None = None,
        *,
        factorized_bits: Sequence[int] | None = None,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        sample_minimization_weight: float = 1.0,
        batch_maximization_weight: float = 1.0,
    ):
        bits = [dim] if factorized_bits is None else list(factorized_bits)
        _check(dim, codebook_size, bits)
        require(entropy_temperature > 0, NAME, f"entropy_temperature {entropy_temperature} must be above 0")
        require(
            dim <= MOST_BITS or not entropy_weight,
            NAME,
            f"the entropy over the codes of {dim} bits needs too much memory; set entropy_weight 0",
        )
        super().__init__(dim, 2 ** max(bits), num_levels=len(bits))
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.sample_minimization_weight = sample_minimization_weight
        self.batch_maximization_weight = batch_maximization_weight
        self.traits = f"bits {bits} least significant first"
        places = [2**place for count in bits for place in range(count)]
        owners = [
            [int(owner == number) for owner, count in enumerate(bits) for _ in range(count)]
            for number in range(len(bits))
        ]
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.register_buffer("owners", torch.tensor(owners), persistent=False)

    def forward(self, features: Tensor) -> Quantized:
        """Features (b, d, h, w) -> `Quantized`; the gradient passes straight through."""
        self.check_features(features, NAME)
        with float32_arithmetic(features.device):
            rows = rearrange(features.float(), "b d h w -> b h w d")
            codes = _signs(rows > 0)
            loss = self.loss(rows, codes) if self.training else torch.zeros((), device=features.device)
            quantized = straight_through(codes, rows) if self.training else codes
        quantized = rearrange(quantized, "b h w d -> b d h w").to(features.dtype)
        return Quantized(quantized, self._numbers(codes > 0), loss)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (b, h, w), or (b, h, w, q) of factors, -> (b, d, h, w) float32; bits beyond a factor's are lost."""
        indices = indices.long()
        numbers = indices[..., None] if self.num_levels == 1 else indices
        of_bits = (numbers[..., None] * self.owners).sum(dim=-2)  # a product of whole numbers, which CUDA lacks
        return rearrange(_signs(of_bits.div(self.places, rounding_mode="floor") % 2 == 1), "b h w d -> b d h w")

    def loss(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Return commitment and entropy loss, weighted, of features (..., d) and their signs; 0-d."""
        loss = self.commitment_weight * F.mse_loss(rows, codes.detach())
        if not self.entropy_weight:
            return loss
        sample, batch = self.entropies(rows)
        of_entropy = self.sample_minimization_weight * sample - self.batch_maximization_weight * batch
        return loss + self.entropy_weight * of_entropy

    def entropies(self, rows: Tensor) -> CodeEntropy:
        """Return the entropies of features (..., d) over all codes."""
        every = torch.arange(2**self.dim, device=rows.device)[:, None]
        codebook = _signs((every >> torch.arange(self.dim, device=rows.device)) % 2 == 1)
        return code_entropy(rows.flatten(0, -2), codebook, _closeness, self.entropy_temperature)

    def _numbers(self, bits: Tensor) -> Tensor:
        """Bits (b, h, w, d) -> codes (b, h, w), or (b, h, w, q) of factors."""
        numbers = (bits[..., None, :] * self.places * self.owners).sum(dim=-1)
        return numbers[..., 0] if self.num_levels == 1 else numbers


def _signs(positive: Tensor) -> Tensor:
    return torch.where(positive, 1.0, -1.0)


def _closeness(rows: Tensor, codebook: Tensor) -> Tensor:
    """Return minus the squared distances (m, v), less what is equal for all codes."""
    return 2 * rows @ codebook.T


def _check(dim: Any, codebook_size: Any, bits: list[Any]) -> None:
    require(is_integer(dim) and 1 <= dim <= 62, NAME, f"dim {dim!r} is no number of bits from 1 to 62")
    require(
        codebook_size in (None, 2**dim),
        NAME,
        f"codebook_size {codebook_size} is not 2 ** {dim}, the codes of {dim} bits; set {2**dim}, or another dim",
    )
    good = bool(bits) and all(is_integer(count) and count > 0 for count in bits) and sum(bits) == dim
    require(good, NAME, f"factorized_bits {bits} is not possible; give numbers above 0 whose sum is dim {dim}")
