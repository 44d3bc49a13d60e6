"""The nearest code of a codebook that learns by gradient: taming's, LDM's, LlamaGen's."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist.models.multiscale import nearest_code, straight_through
from vqdist.models.quantizers.base import Float32Quantizer, Quantized, float32_arithmetic
from vqdist.models.quantizers.entropy import code_entropy
from vqdist.models.quantizers.options import check_sizes, require

CODEBOOK_LOSSES = ("fixed", "legacy")
NAME = "gradient_vq"


class GradientVQ(Float32Quantizer):
    """The nearest of vectors that learn by gradient (VQ-VAE, arXiv 1711.00937), as in taming, LDM and LlamaGen.

    With c = MSE(sg(codes), features), which moves the encoder, and k = MSE(codes, sg(features)), which moves the
    codes, the loss is `fixed`: beta c + k, as in the paper and in LlamaGen, or `legacy`: c + beta k, as in taming, LDM
    and diffusers.

    Args:
        dim: channels of the features.
        codebook_size: number of codes.
        beta: weight of one of the two terms.
        codebook_loss: `fixed` or `legacy`.
        l2_norm: bring features and codes to length 1, for the lookup, for what comes out, and for the losses.
        l2_norm_output: bring only what comes out to length 1, as transformers' Janus does with codes that it decodes.
        entropy_weight: of the entropy of each position's distribution over the codes less that of their mean.
        entropy_temperature: of that distribution, softmax(-squared distances / temperature).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int = 1024,
        *,
        beta: float = 0.25,
        codebook_loss: str = "fixed",
        l2_norm: bool = False,
        l2_norm_output: bool = False,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ):
        check_sizes(NAME, dim, codebook_size, optional=False)
        require(beta >= 0, NAME, f"beta {beta} is not possible; it must be at least 0")
        require(
            codebook_loss in CODEBOOK_LOSSES,
            NAME,
            f"codebook_loss {codebook_loss!r} is not known; choose {' or '.join(CODEBOOK_LOSSES)}",
        )
        require(entropy_temperature > 0, NAME, f"entropy_temperature {entropy_temperature} must be above 0")
        super().__init__(dim, codebook_size)
        self.beta = beta
        self.codebook_loss = cast(Literal["fixed", "legacy"], codebook_loss)
        self.l2_norm = l2_norm
        self.l2_norm_output = l2_norm_output
        self.traits = "l2_norm" if l2_norm else "l2_norm_output" if l2_norm_output else ""
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        if l2_norm:
            self.embedding.weight.data.copy_(F.normalize(self.embedding.weight.data, dim=-1))

    def forward(self, features: Tensor) -> Quantized:
        """Features (b, d, h, w) -> `Quantized`; the gradient passes straight through."""
        self.check_features(features, NAME)
        with float32_arithmetic(features.device):
            rows = self._normed(rearrange(features.float(), "b d h w -> b h w d"))
            codebook = self.codebook()
            indices = nearest_code(rows, codebook)
            codes = F.embedding(indices, codebook)
            loss = self.loss(rows, codes, codebook) if self.training else torch.zeros((), device=features.device)
            given = self._given(codes)
            quantized = straight_through(given, rows) if self.training else given
        return Quantized(rearrange(quantized, "b h w d -> b d h w").to(features.dtype), indices, loss)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (b, h, w) -> (b, d, h, w) float32: what `forward` gives for them in eval mode."""
        codes = F.embedding(indices.long(), self.codebook())
        return rearrange(self._given(codes), "b h w d -> b d h w")

    def codebook(self) -> Tensor:
        """Return the codes' vectors, (v, d) float32, of length 1 with `l2_norm`."""
        return self._normed(self.embedding.weight.float())

    def loss(self, rows: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
        """Return the weighted losses of features (..., d), their codes (..., d) and all codes (v, d); 0-d."""
        of_encoder, of_codes = F.mse_loss(rows, codes.detach()), F.mse_loss(codes, rows.detach())
        weights = (self.beta, 1.0) if self.codebook_loss == "fixed" else (1.0, self.beta)
        total = weights[0] * of_encoder + weights[1] * of_codes
        return total + self.entropy_weight * self.entropy(rows, codebook) if self.entropy_weight else total

    def entropy(self, rows: Tensor, codebook: Tensor) -> Tensor:
        """Return the mean entropy of the positions' distributions less that of their mean over all ranks; 0-d."""
        sample, batch = code_entropy(rows.flatten(0, -2), codebook, _closeness, self.entropy_temperature)
        return sample - batch

    def _given(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=-1) if self.l2_norm_output else codes

    def _normed(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors


def _closeness(rows: Tensor, codebook: Tensor) -> Tensor:
    """Return minus the squared distances (m, v) of rows (m, d) to codes (v, d)."""
    lengths = rows.square().sum(dim=-1, keepdim=True) + codebook.square().sum(dim=-1)
    return 2 * rows @ codebook.T - lengths
