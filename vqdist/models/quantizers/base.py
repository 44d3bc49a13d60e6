"""The contract of a quantizer, and what every quantizer may need: float32 arithmetic and a mean over ranks.

Shapes: `b` batch, `d` feature channels, `h w` positions, `q` levels (codes per position), `L` codes of all scales of
an image.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.precision import without_tf32


class Quantized(NamedTuple):
    """Features as a quantizer gives them back, their codes and its loss.

    Attributes:
        quantized: (b, d, h, w), in the dtype of the features.
        indices: codes, int64, (b, h, w), or (b, h, w, q) where a position has several; -1 for a level that
            `quantize_dropout` left out. Of several scales: (b, L), the coarsest first.
        aux_loss: commitment, codebook and entropy losses, weighted and summed; 0-d float32, 0 in eval mode.
    """

    quantized: Tensor
    indices: Tensor
    aux_loss: Tensor


class Quantizer(nn.Module, ABC):
    """The contract: maps features to the nearest of finitely many codes. Derive your own from it.

    A quantizer of your own needs none of the library that vqdist's are made of. It is given by its import path, or
    registered with `@QUANTIZERS.add("name")`. Its constructor gets the `init_args`, and `dim` and `codebook_size`
    where it has parameters of these names:

        class Signs(Quantizer):
            def __init__(self, dim: int):
                super().__init__(dim, codebook_size=2**dim)
                self.register_buffer("bits", 2 ** torch.arange(dim)[:, None, None])

            def forward(self, features):
                codes = torch.where(features > 0, 1.0, -1.0)
                indices = ((features > 0) * self.bits).sum(dim=1)
                return Quantized(features + (codes - features).detach(), indices, torch.zeros(()).to(features.device))

            def decode_indices(self, indices):
                return torch.where(indices[:, None] // self.bits % 2 == 1, 1.0, -1.0)

    In train mode, with a process group of several processes up, `forward` may hold collectives: every rank calls it.
    In eval mode it holds none and changes nothing. Under bfloat16 it runs within autocast: `float32_arithmetic` turns
    that off, and a codebook of running means needs it.

    A moving average of the network averages the parameters that learn by gradient and copies all other tensors, see
    `is_averaged`.

    Args:
        dim: channels of the features.
        codebook_size: codes per level.
        num_levels: codes per position.

    Attributes:
        dim: channels of the features, and of what the quantizer gives back.
        codebook_size: codes per level.
        num_levels: codes per position.
        scales: sides of the maps of codes, growing, where there are several; None for one map of the features' size.
            A quantizer that has them also has the method `next_scale_inputs` of `MultiScaleQuantizer`.
        traits: what decides, besides the tensors, which codes an image gets and what they decode to; a part of the
            tokenizer's fingerprint.
    """

    scales: tuple[int, ...] | None = None
    traits: str = ""

    def __init__(self, dim: int, codebook_size: int, num_levels: int = 1):
        super().__init__()
        self.dim = dim
        self.codebook_size = codebook_size
        self.num_levels = num_levels

    def __repr__(self) -> str:
        """Return one line: of the parts of a quantizer nothing can be seen that its arguments do not say."""
        levels = [] if self.num_levels == 1 else [f"{self.num_levels} levels"]
        scales = [] if self.scales is None else [f"scales {'-'.join(map(str, self.scales))}"]
        facts = [f"{self.codebook_size} codes", *levels, *scales, f"features of {self.dim}"]
        return f"{type(self).__name__}({', '.join(facts)})"

    @abstractmethod
    def forward(self, features: Tensor) -> Quantized:
        """Map features (b, d, h, w) to `Quantized`; in train mode a codebook may move towards them."""

    @abstractmethod
    def decode_indices(self, indices: Tensor) -> Tensor:
        """Return (b, d, h, w) float32, which `forward` gives in eval mode, for its `indices`."""

    def is_averaged(self, name: str, tensor: Tensor) -> bool:
        """Return whether a moving average of the network averages a tensor of this quantizer; if not, it copies it.

        The default averages parameters that learn by gradient. Buffers and frozen parameters are copied: codebooks of
        running means, counts of uses, flags of k-means. Override this where a buffer is changed by gradients, or where
        a parameter is moved by anything else.

        Args:
            name: of the tensor within this module, as `named_parameters` and `named_buffers` say it.
            tensor: the live one.
        """
        return isinstance(tensor, nn.Parameter) and tensor.requires_grad


class Float32Quantizer(Quantizer):
    """A quantizer whose weights stay float32 in a model that is turned into another precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Quantizer:
        # `model.bfloat16()` leaves a quantizer alone: its codebook and projections stay as precise as trained.
        return super()._apply(lambda tensor: _move_only(fn, tensor), recurse)

    def check_features(self, features: Tensor, name: str) -> None:
        """Raise `UserError` unless these are features (b, dim, h, w); the message calls the quantizer by the name."""
        if features.ndim != 4 or features.shape[1] != self.dim:
            raise UserError(
                f"quantizer {name} got features of shape {tuple(features.shape)}; expected (batch, {self.dim}, "
                f"height, width), or build it with another dim"
            )


def _move_only(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved


def checked(given: Any, features: Tensor, quantizer: Quantizer) -> Quantized:
    """Return what a quantizer gave for features (b, d, h, w); raise `UserError` unless it has the shapes it promises.

    Values are not looked at, since that would wait for the device.
    """
    name = type(quantizer).__name__
    if not isinstance(given, tuple) or len(given) != 3 or not all(isinstance(one, Tensor) for one in given):
        types = ", ".join(type(one).__name__ for one in given) if isinstance(given, tuple) else type(given).__name__
        raise UserError(f"quantizer {name} gave {types}; give three tensors, Quantized(quantized, indices, aux_loss)")
    quantized, indices, aux_loss = given
    if quantized.shape != features.shape or not quantized.is_floating_point():
        raise UserError(
            f"quantizer {name} gave {quantized.dtype} of shape {tuple(quantized.shape)}; expected that of "
            f"the encoder's, {tuple(features.shape)}"
        )
    if quantizer.scales is None:
        batch, _, height, width = features.shape
        expected = (batch, height, width, *([quantizer.num_levels] if quantizer.num_levels > 1 else []))
        alone = quantizer.num_levels == 1 and tuple(indices.shape) == (*expected, 1)
        if tuple(indices.shape) != expected and not alone:
            raise UserError(f"quantizer {name} gave codes of shape {tuple(indices.shape)}; expected {expected}")
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise UserError(f"quantizer {name} gave codes of {indices.dtype}; expected whole numbers, torch.int64")
    if aux_loss.ndim or not aux_loss.is_floating_point():
        raise UserError(
            f"quantizer {name} gave an aux_loss of {aux_loss.dtype} of shape {tuple(aux_loss.shape)}; expected one "
            "number, a 0-d tensor of floats"
        )
    return Quantized(quantized, indices, aux_loss)


@contextlib.contextmanager
def float32_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 within: the library itself turns off CUDA autocast only, and not around projections."""
    with torch.autocast(device_type=device.type, enabled=False), without_tf32():
        yield


def is_distributed() -> bool:
    """Return whether several processes are in a process group now."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean over ranks, with the gradient of this rank's share alone; every rank must call it.

    DDP averages gradients over ranks: d f(mean) / d weights of the whole batch is the average of f'(mean) * d tensor,
    which is what this rank's share gives, without a collective in the backward pass.
    """
    if not is_distributed():
        return tensor
    mean = tensor.detach().clone()
    dist.all_reduce(mean)
    return tensor + (mean / dist.get_world_size() - tensor).detach()
