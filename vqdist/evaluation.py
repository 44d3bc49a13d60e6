"""How well a tokenizer reconstructs a set of images that is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vqdist.backends.base import Backend
from vqdist.metrics import ReconstructionMetrics
from vqdist.models.vqgan import VQAutoencoder


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: VQAutoencoder, batches: Iterable[Tensor], backend: Backend, *, image_size: int
) -> dict[str, float]:
    """L1, PSNR, SSIM, codebook usage and perplexity, and the number of images. Every rank calls this.

    Args:
        autoencoder: evaluated in eval mode; its mode is restored.
        batches: this rank's images, (b, c, h, w) in [0, 1] on the backend's device.
        backend: adds the ranks' numbers.
        image_size: side of the images in pixels.
    """
    training = autoencoder.training
    autoencoder.eval()
    metrics = ReconstructionMetrics(autoencoder.quantizer, backend, image_size)
    for image in batches:
        out = autoencoder(image)
        metrics.update(image, out.recon, out.indices)
    autoencoder.train(training)
    return metrics.compute()


@torch.no_grad()
def reconstruct(autoencoder: VQAutoencoder, image: Tensor) -> Tensor:
    """Images (b, c, h, w) in [0, 1] -> their reconstructions in [0, 1], in eval mode; the mode is restored."""
    training = autoencoder.training
    autoencoder.eval()
    recon = autoencoder(image).recon.clamp(0, 1)
    autoencoder.train(training)
    return recon
