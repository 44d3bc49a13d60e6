"""Quality of reconstructions and of predicted codes, over a set of images that is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vqdist.backends.base import Backend
from vqdist.metrics import CodePredictionMetrics, ReconstructionMetrics, as_pixels
from vqdist.models.autoregressive import AutoregressiveModel
from vqdist.models.proxy import ByTarget
from vqdist.models.tokenizer import TokenizerNetwork
from vqdist.sizes import ImageSize


@torch.no_grad()
def evaluate_reconstruction(
    network: TokenizerNetwork,
    batches: Iterable[Tensor],
    backend: Backend,
    *,
    image_size: ImageSize,
    look: Callable[[Tensor, Tensor], None] | None = None,
    **options: Any,
) -> dict[str, float]:
    """L1, PSNR, SSIM, codebook usage and perplexity, and the number of images. Every rank calls this.

    Args:
        network: evaluated in eval mode; its mode is restored.
        batches: this rank's images, (b, c, h, w) in [0, 1] on the backend's device.
        backend: adds the ranks' numbers.
        image_size: of the images.
        look: called with the images and reconstructions of each batch, (b, c, h, w) in [0, 1]; these are rounded.
        options: of `ReconstructionMetrics`: further distances, and rounding.
    """
    metrics = ReconstructionMetrics(network, backend, image_size, **options)
    with in_eval_mode(network):
        for image in batches:
            recon, indices = network.reconstruct(image)
            metrics.update(image, recon, indices)
            if look is not None:
                look(image, as_pixels(recon, metrics.pixels))
    return metrics.compute()


def evaluate_proxy(
    network: ByTarget, batches: Iterable[Tensor], backend: Backend, *, image_size: ImageSize, **options: Any
) -> dict[str, float]:
    """Measure the first stage of TiTok: `evaluate_reconstruction` of the target's images, and how its codes are met.

    Args:
        network: with the target.
        batches, backend, image_size, options: of `evaluate_reconstruction`.

    Returns:
        Also `proxy_loss`, the cross-entropy in nats a code, and `proxy_accuracy`, the share of the target's codes that
        are the likeliest.
    """
    numbers = evaluate_reconstruction(network, batches, backend, image_size=image_size, **options)
    hits = network.hits.to(backend.device)
    found, codes, loss = backend.sum(torch.cat([hits, network.loss.to(backend.device)[None]])).tolist()
    return {**numbers, "proxy_loss": loss / codes, "proxy_accuracy": found / codes} if codes else numbers


@torch.no_grad()
def evaluate_prediction(
    model: AutoregressiveModel, batches: Iterable[tuple[Tensor, Tensor]], backend: Backend
) -> dict[str, float]:
    """Measure the prediction of the codes of images, see `CodePredictionMetrics`; every rank calls this.

    Args:
        model: evaluated in eval mode and float32; its mode is restored.
        batches: this rank's images or codes with their labels (b,), as for `AutoregressiveModel.inputs`.
        backend: adds the ranks' numbers.
    """
    metrics = CodePredictionMetrics(model.num_codes, model.scale_lengths, backend.device)
    with in_eval_mode(model):
        for item, label in batches:
            out = model(*model.inputs(item, label))
            metrics.update(out.logits, out.indices)
    return metrics.compute(backend)


@torch.no_grad()
def reconstruct(network: TokenizerNetwork, image: Tensor) -> Tensor:
    """Images (b, c, h, w) in [0, 1] -> their reconstructions in [0, 1], in eval mode; the mode is restored."""
    with in_eval_mode(network):
        return network.reconstruct(image)[0].clamp(0, 1)


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Within this context the network is in eval mode."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
