"""Index backpropagation (IBQ): the gradient reaches every code through the softmax over all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist.models.quantizers.base import Float32Quantizer, Quantized, float32_arithmetic
from vqdist.models.quantizers.entropy import code_entropy, in_chunks
from vqdist.models.quantizers.options import check_sizes, require

NAME = "ibq"


class IBQ(Float32Quantizer):
    """The code with the largest product with a feature, learnt through the softmax of all products (arXiv 2412.02692).

    With q the code's vector whose one-hot has the gradient of the softmax, and e that vector alone, the loss is
    MSE(q, z) + MSE(sg(e), z) + beta MSE(e, sg(z)) + entropy_weight (sample_minimization_weight H(position) -
    batch_maximization_weight H(mean)).

    Args:
        dim: channels of the features.
        codebook_size: number of codes. Products with all of them are made of some positions at a time, so that
            262,144 fit into memory.
        beta: weight of the last distance.
        entropy_weight: of the entropy loss; 0 leaves it out.
        entropy_temperature: of the distributions whose entropies are taken.
        sample_minimization_weight: of the mean entropy of a position's distribution.
        batch_maximization_weight: of the entropy of the mean distribution.
    """

    traits = "largest product"  # of a codebook whose tensor has the name that `gradient_vq` gives it

    def __init__(
        self,
        dim: int,
        codebook_size: int = 16384,
        *,
        beta: float = 0.25,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
        sample_minimization_weight: float = 1.0,
        batch_maximization_weight: float = 1.0,
    ):
        check_sizes(NAME, dim, codebook_size, optional=False)
        require(beta >= 0, NAME, f"beta {beta} is not possible; it must be at least 0")
        require(entropy_temperature > 0, NAME, f"entropy_temperature {entropy_temperature} must be above 0")
        super().__init__(dim, codebook_size)
        self.beta = beta
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.sample_minimization_weight = sample_minimization_weight
        self.batch_maximization_weight = batch_maximization_weight
        self.embedding = nn.Embedding(codebook_size, dim)

    def forward(self, features: Tensor) -> Quantized:
        """Features (b, d, h, w) -> `Quantized`; the gradient reaches the features and all codes."""
        self.check_features(features, NAME)
        batch, _, height, _ = features.shape
        with float32_arithmetic(features.device):
            rows = rearrange(features.float(), "b d h w -> (b h w) d")
            codebook = self.embedding.weight.float()
            quantized, indices, loss = self._train(rows, codebook) if self.training else self._evaluate(rows, codebook)
        quantized = rearrange(quantized, "(b h w) d -> b d h w", b=batch, h=height).to(features.dtype)
        return Quantized(quantized, rearrange(indices, "(b h w) -> b h w", b=batch, h=height), loss)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (b, h, w) -> (b, d, h, w) float32: what `forward` gives for them in eval mode."""
        return rearrange(F.embedding(indices.long(), self.embedding.weight.float()), "b h w d -> b d h w")

    def quantization_loss(self, rows: Tensor, quantized: Tensor, codes: Tensor) -> Tensor:
        """Return the three distances, weighted and summed, of (n, d) each; 0-d."""
        both, to_codes = F.mse_loss(quantized, rows), F.mse_loss(rows, codes.detach())
        return both + to_codes + self.beta * F.mse_loss(codes, rows.detach())

    def entropy_loss(self, rows: Tensor, codebook: Tensor) -> Tensor:
        """Return the two entropies, weighted, of rows (n, d) over codes (v, d); 0-d."""
        sample, batch = code_entropy(rows, codebook, _products, self.entropy_temperature)
        return self.sample_minimization_weight * sample - self.batch_maximization_weight * batch

    def _train(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = in_chunks(rows, codebook, _propagated)
        quantized, indices = (torch.cat(list(part)) for part in zip(*parts, strict=True))
        loss = self.quantization_loss(rows, quantized, F.embedding(indices, codebook))
        if self.entropy_weight:
            loss = loss + self.entropy_weight * self.entropy_loss(rows, codebook)
        return quantized, indices, loss

    def _evaluate(self, rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = torch.cat([part for (part,) in in_chunks(rows, codebook, _chosen)])
        return F.embedding(indices, codebook), indices, torch.zeros((), device=rows.device)


def _products(rows: Tensor, codebook: Tensor) -> Tensor:
    return rows @ codebook.T


def _chosen(rows: Tensor, codebook: Tensor) -> tuple[Tensor]:
    return (_products(rows, codebook).argmax(dim=-1),)


def _propagated(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes' vectors (m, d) with the gradient of (onehot - sg(soft) + soft) @ codebook, and codes (m,)."""
    logits = _products(rows, codebook)
    indices = logits.argmax(dim=-1)
    mixture = logits.softmax(dim=-1) @ codebook.detach()
    return F.embedding(indices, codebook) + (mixture - mixture.detach()), indices
