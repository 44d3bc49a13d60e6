"""Numbers of a run: averages of training metrics on the device, and the quality of reconstructions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from vqdist.backends.base import Backend
from vqdist.models.quantizers import Quantizer, code_histogram


class RunningMeans:
    """Means of named 0-d tensors since the last `reset`, kept on the device: adding waits for nothing."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one value of each name; names may differ from call to call."""
        for name, value in values.items():
            value = value.detach().to(torch.float32)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, Tensor]:
        """The mean of each name, as 0-d tensors of this rank."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}


class ReconstructionMetrics:
    """L1, PSNR, SSIM, codebook usage and perplexity over a set of images that is spread over ranks.

    Args:
        quantizer: whose codes are counted.
        backend: adds the ranks' numbers; torchmetrics does its own part through the process group.
        image_size: side of the images in pixels; below 11 the window of SSIM shrinks to fit.
    """

    def __init__(self, quantizer: Quantizer, backend: Backend, image_size: int):
        self.quantizer = quantizer
        self.backend = backend
        side = max(1, (image_size - 1) // 2 * 2 - 1)  # odd, with room for the padding that torchmetrics reflects
        window = {} if image_size >= 11 else {"gaussian_kernel": False, "kernel_size": side}
        self.metrics = nn.ModuleDict(
            {
                "l1": MeanMetric(),
                "psnr": PeakSignalNoiseRatio(data_range=1.0),
                "ssim": StructuralSimilarityIndexMeasure(data_range=1.0, **window),
            }
        ).to(backend.device)
        self.histogram = torch.zeros(
            quantizer.num_levels * quantizer.codebook_size, dtype=torch.int64, device=backend.device
        )
        self.images = torch.zeros((), dtype=torch.int64, device=backend.device)

    def update(self, image: Tensor, recon: Tensor, indices: Tensor) -> None:
        """Count a batch: images and reconstructions (b, c, h, w), codes (b, ...)."""
        image, recon = image.to(torch.float32), recon.to(torch.float32).clamp(0, 1)
        self.metrics["l1"].update((recon - image).abs().mean(dim=(1, 2, 3)))
        self.metrics["psnr"].update(recon, image)
        self.metrics["ssim"].update(recon, image)
        self.histogram += code_histogram(indices, self.quantizer)
        self.images += len(image)

    def compute(self) -> dict[str, float]:
        """The numbers over all ranks' images; every rank calls this and gets the same."""
        values = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        histogram = self.backend.sum(self.histogram.clone())
        usage, perplexity = codebook_usage(histogram, self.quantizer.num_levels)
        return {
            **values,
            "codebook_usage": usage,
            "codebook_perplexity": perplexity,
            "images": int(self.backend.sum(self.images.clone())),
        }


def codebook_usage(histogram: Tensor, num_levels: int = 1) -> tuple[float, float]:
    """Share of the codes that occur, and exp(entropy) of their frequencies, each averaged over the levels.

    Args:
        histogram: how often each code occurs, (num_levels * codebook_size,).
        num_levels: residual levels.
    """
    counts = histogram.view(num_levels, -1).to(torch.float64)
    frequency = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(frequency, frequency).sum(dim=1)
    return float((counts > 0).double().mean()), float(entropy.exp().mean())
