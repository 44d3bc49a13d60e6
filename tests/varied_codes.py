"""An untrained encoder gives nearly every position the same code; tests that look at codes need more of them."""

from __future__ import annotations

import torch

from vqdist import DiscreteVAE


@torch.no_grad()
def vary_codes(model: DiscreteVAE) -> DiscreteVAE:
    """Set the encoder's last layer so that images of noise take most of the codes; equal on every call."""
    generator = torch.Generator().manual_seed(6)
    hidden = model.norm(torch.rand(8, model.channels, 16, 16, generator=generator))
    for module in list(model.encoder)[:-1]:
        hidden = module(hidden)
    last = model.encoder[-1]
    directions = torch.randn(last.weight.shape[:2], generator=generator) / hidden.std((0, 2, 3)).clamp(min=1e-3)
    last.weight.copy_(directions[..., None, None])
    last.bias.copy_(-directions @ hidden.mean((0, 2, 3)))
    return model
