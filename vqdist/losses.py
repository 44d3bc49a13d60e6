"""Losses of the tokenizers: pure functions, each one named part, computed in float32 at least and without autocast.

Shapes: `b` batch, `c` channel, `h w` image; logits have any shape with the batch first. Every loss is 0-d, a mean over
all elements, so that equal shares over ranks average to the whole batch's loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


def reconstruction_loss(recon: Tensor, image: Tensor, kind: Literal["l1", "l2", "smooth_l1", "both"] = "l1") -> Tensor:
    """Mean absolute (`l1`) or mean squared (`l2`) difference of two (b, c, h, w), or the sum of these (`both`).

    `smooth_l1` (arXiv 1504.08083) is half the square below a difference of 1, and linear above.
    """
    losses = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
    if kind not in losses and kind != "both":
        raise ValueError(f"reconstruction loss {kind!r} is not known; expected 'l1', 'l2', 'smooth_l1' or 'both'")
    recon, image = at_least_float32(recon, image)
    if kind == "both":
        return F.l1_loss(recon, image) + F.mse_loss(recon, image)
    return losses[kind](recon, image)


def kl_to_uniform(logits: Tensor, reduction: Literal["mean", "dalle"] = "mean") -> Tensor:
    """KL(softmax(logits) || uniform) = log v - entropy, in nats.

    Args:
        logits: (..., v), codes last.
        reduction: `mean` over all positions, whatever the batch; `dalle` sums over them, as DALLE-pytorch does, so
            that the value grows with the number of images in the micro-batch.
    """
    if reduction not in ("mean", "dalle"):
        raise ValueError(f"kl reduction {reduction!r} is not known; expected 'mean' or 'dalle'")
    (logits,) = at_least_float32(logits)
    log_q = logits.log_softmax(dim=-1)
    divergence = math.log(logits.shape[-1]) + (log_q.exp() * log_q).sum(dim=-1)
    return divergence.mean() if reduction == "mean" else divergence.sum()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean relu(1 - real) + mean relu(1 + fake) (arXiv 1705.02894)."""
    real, fake = at_least_float32(real_logits, fake_logits)
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """- mean fake."""
    (fake,) = at_least_float32(fake_logits)
    return -fake.mean()


def bce_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """- mean log sigmoid(real) - mean log(1 - sigmoid(fake)) (arXiv 1406.2661), finite for every logit."""
    real, fake = at_least_float32(real_logits, fake_logits)
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def bce_generator_loss(fake_logits: Tensor) -> Tensor:
    """- mean log sigmoid(fake): the form that does not saturate, finite for every logit."""
    (fake,) = at_least_float32(fake_logits)
    return F.softplus(-fake).mean()


def non_saturating_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Mean softplus(- m real) + mean softplus(m fake), where m is the mean logit of each image, as in SEED-Voken."""
    real, fake = at_least_float32(real_logits, fake_logits)
    return F.softplus(-real.flatten(1).mean(dim=1)).mean() + F.softplus(fake.flatten(1).mean(dim=1)).mean()


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """Mean softplus(- m fake), where m is the mean logit of each image; patches are averaged first."""
    (fake,) = at_least_float32(fake_logits)
    return F.softplus(-fake.flatten(1).mean(dim=1)).mean()


def lecam_per_logit(real_logits: Tensor, fake_logits: Tensor, averages: Tensor) -> Tensor:
    """Mean relu(real - average fake)^2 + mean relu(average real - fake)^2 (arXiv 2104.03310), as in SEED-Voken.

    Args:
        real_logits, fake_logits: (b, ...).
        averages: (2,), moving averages of the mean logits of real images and of reconstructions.
    """
    real, fake = at_least_float32(real_logits, fake_logits)
    return F.relu(real - averages[1]).square().mean() + F.relu(averages[0] - fake).square().mean()


def lecam_of_means(real_mean: Tensor, fake_mean: Tensor, averages: Tensor) -> Tensor:
    """Return the same of the two mean logits of a batch (0-d), as in 1d-tokenizer."""
    real, fake = at_least_float32(real_mean, fake_mean)
    return F.relu(real - averages[1]).square() + F.relu(averages[0] - fake).square()


def gradient_penalty(
    discriminator: nn.Module | Callable[[Tensor], Tensor],
    image: Tensor,
    weight: float = 10.0,
    kind: Literal["unit_norm", "r1"] = "unit_norm",
) -> Tensor:
    """weight * mean over images of (|d D(image) / d image| - 1)^2, with D summed over patches.

    The penalty of arXiv 1704.00028, but at real images only.

    Args:
        discriminator: images (b, c, h, w) -> logits (b, ...); the bare network, whose weights get the gradient.
        image: (b, c, h, w), real images; gets no gradient.
        weight: of the penalty.
        kind: `unit_norm`, or `r1`: weight / 2 * mean of |d D(image) / d image|^2 (arXiv 1801.04406).
    """
    (image,) = at_least_float32(image)
    with torch.enable_grad(), _no_autocast(image):
        image = image.detach().requires_grad_()
        return gradient_penalty_of_logits(discriminator(image), image, weight, kind)


def gradient_penalty_of_logits(
    logits: Tensor | list[Tensor],
    image: Tensor,
    weight: float = 10.0,
    kind: Literal["unit_norm", "r1"] = "unit_norm",
) -> Tensor:
    """Return `gradient_penalty` of logits that were computed already: saves a forward where they are needed anyway.

    Args:
        logits: (b, ...), the discriminator's for `image`, or a list of such.
        image: (b, c, h, w), which the logits were computed from with `requires_grad`.
        weight, kind: of the penalty.
    """
    logits = [logits] if isinstance(logits, Tensor) else list(logits)
    ones = [torch.ones_like(output) for output in logits]
    (gradient,) = torch.autograd.grad(logits, image, ones, create_graph=True)
    if kind == "r1":
        return weight / 2 * gradient.flatten(1).square().sum(dim=1).mean()
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return weight * (norm - 1).square().mean()


@torch.no_grad()
def adaptive_weight(
    reference_grad: Tensor,
    adversarial_grad: Tensor,
    max_weight: float = 1e4,
    eps: float = 1e-8,
    form: Literal["muse", "taming"] = "muse",
) -> Tensor:
    """Return the weight that gives the adversarial loss as much gradient as the reference (arXiv 2012.09841, eq. 7).

    Args:
        reference_grad: of the perceptual or reconstruction loss with respect to the last layer's weight, any shape.
        adversarial_grad: of the generator's adversarial loss, the same shape. Both averaged over ranks
            already: the norm of an average is not the average of norms.
        max_weight: upper bound of the result.
        eps: lower bound of the denominator, for muse's form.
        form: `muse`, or `taming`, which adds 1e-4 to the denominator.

    Returns:
        |reference| / max(|adversarial|, eps) or |reference| / (|adversarial| + 1e-4), at most `max_weight`; 0-d on
        the device, without a gradient.
    """
    reference, adversarial = at_least_float32(reference_grad, adversarial_grad)
    denominator = adversarial.norm() + 1e-4 if form == "taming" else adversarial.norm().clamp_min(eps)
    return (reference.norm() / denominator).clamp(0, max_weight)


@torch.no_grad()
def last_layer_grads(
    hidden: Tensor,
    weight_shape: torch.Size | tuple[int, ...],
    *output_grads: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Gradients with respect to the weight of a 2d convolution, from those with respect to its output.

    With the graph cut at the output of a network that ends in this convolution, this is what `torch.autograd.grad` of
    each loss with respect to its weight would be; it needs neither graph nor weight.

    Args:
        hidden: (b, d, h, w), the layer's input.
        weight_shape: of the layer, (c, d / groups, kernel height, kernel width).
        *output_grads: k tensors (b, c, h', w').
        stride, padding, dilation, groups: of the layer.

    Returns:
        (k, elements of the weight): one tensor, so that one exchange averages all of them over ranks.
    """
    hidden, *gradients = at_least_float32(hidden, *output_grads)
    layer = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    with _no_autocast(hidden):
        grads = [conv2d_weight(hidden, tuple(weight_shape), grad, **layer) for grad in gradients]
    return torch.stack([grad.flatten() for grad in grads])


def surrogate(output: Tensor, gradient: Tensor, *losses: Tensor | None) -> Tensor:
    """Return a 0-d tensor whose backward gives `gradient` to a network's output, and each of the losses its own.

    Where the graph is cut at the output, this is what goes to the one backward pass of the network; its value means
    nothing.

    Args:
        output: of the network, with its graph.
        gradient: of everything behind the cut with respect to the output; the same shape.
        *losses: 0-d, with graphs of their own into the network; None for one that is not there.
    """
    total = (output * gradient).sum()
    for loss in losses:
        total = total if loss is None else total + loss
    return total


def over_outputs(loss: Callable[..., Tensor], *outputs: list[Tensor]) -> Tensor:
    """Return the mean of a loss over the outputs of a discriminator with several, as one at each of three scales.

    Args:
        loss: takes a tensor of logits from each of `outputs`.
        *outputs: lists of equal length.
    """
    values = [loss(*logits) for logits in zip(*outputs, strict=True)]
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """All in their common dtype, or in float32 where that is less precise."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(device_type=tensor.device.type, enabled=False)
