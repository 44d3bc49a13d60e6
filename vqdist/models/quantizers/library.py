"""The common part of the quantizers of vector-quantize-pytorch (tried with 1.32).

Three things that the library leaves to its caller are done here, once: arithmetic in float32 under every precision,
codebooks that stay equal over ranks whenever the process group was started, and a line for a mistake in an option.
Shapes are those of `base`; `n` is h * w.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.quantizers.base import Float32Quantizer, Quantized, float32_arithmetic, is_distributed
from vqdist.models.quantizers.options import check_names, check_needs, check_ranges, check_sizes, resolved
from vqdist.models.quantizers.vector_quantize import (
    Codebook,
    batched_sample_vectors,
    noop,
    sample_vectors_distributed,
)


class LibraryQuantizer(Float32Quantizer):
    """A quantizer of the library; a subclass says how it is called.

    Args:
        dim: channels of the features.
        codebook_size: codes per level.
        options: of the library's class, complete but for the library's own defaults.

    Attributes:
        name: in `QUANTIZERS` and in messages.
        library_classes: which take the options; the first is built.
        defaults: options where the user says nothing; the library's own defaults hold for all others.
    """

    name: ClassVar[str]
    library_classes: ClassVar[tuple[type[nn.Module], ...]]
    defaults: ClassVar[Mapping[str, Any]] = {}
    inner: Any  # of the library, which has no types

    def __init__(self, dim: int, codebook_size: int | None, options: dict[str, Any]):
        inner: Any = self._build(dim, codebook_size, options)
        super().__init__(dim, inner.codebook_size)
        self.inner = inner
        self.num_levels = self._count_levels()
        self._codebooks_need_init = bool(options.get("kmeans_init"))

    @classmethod
    def of_options(cls, dim: int, codebook_size: int | None, options: Mapping[str, Any]) -> LibraryQuantizer:
        """Build the quantizer of a user's options over `defaults` over the library's own.

        Raises:
            UserError: an option is unknown or out of range, or options contradict each other or would be ignored.
        """
        name, library_defaults = cls.name, library_options(cls)
        options = {
            key: tuple(value) if key == "levels" and isinstance(value, list) else value
            for key, value in options.items()
        }
        check_names(name, options, library_defaults)
        check_sizes(name, dim, codebook_size, optional=options.get("levels") is not None)
        chosen = {**cls.defaults, **options}
        complete = resolved({**library_defaults, **chosen})
        check_ranges(name, options)
        cls.check_options(dim, codebook_size, options, complete)
        check_needs(name, options, complete)
        try:
            return cls(dim, codebook_size, chosen)
        except AssertionError as error:
            set_to = ", ".join(f"{key}={value}" for key, value in chosen.items())
            raise UserError(
                f"quantizer {name} does not work with {set_to}: {error or 'options contradict'}"
            ) from error

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        """Raise `UserError` for combinations that the library would refuse without a message, or ignore.

        Args:
            dim: channels of the features.
            codebook_size: codes per level, as the user gave it.
            given: what the user set.
            options: `given` over the defaults of this module over those of the library.
        """
        raise NotImplementedError

    def forward(self, features: Tensor) -> Quantized:
        """Features (b, d, h, w) -> `Quantized`; in train mode an EMA codebook moves towards them."""
        self._check_features(features)
        height, width = features.shape[-2:]
        self._prepare()
        with float32_arithmetic(features.device):
            tokens, indices, aux_loss = self._encode(rearrange(features.float(), "b d h w -> b (h w) d"))
        quantized = rearrange(tokens, "b (h w) d -> b d h w", h=height).to(features.dtype)
        indices = rearrange(indices.long(), "b (h w) ... -> b h w ...", h=height, w=width)
        aux_loss = aux_loss.float().sum() if self.training else torch.zeros((), device=features.device)
        return Quantized(quantized, indices, aux_loss)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (b, h, w) or (b, h, w, q) -> (b, d, h, w) float32: what `forward` gives for them in eval mode."""
        self._require_codes()
        height = indices.shape[1]
        with float32_arithmetic(indices.device):
            tokens = self._decode(rearrange(indices.long(), "b h w ... -> b (h w) ..."))
        return rearrange(tokens, "b (h w) d -> b d h w", h=height)

    def _build(self, dim: int, codebook_size: int | None, options: dict[str, Any]) -> nn.Module:
        return self.library_classes[0](dim=dim, codebook_size=codebook_size, **options)

    def _count_levels(self) -> int:
        return getattr(self.inner, "num_codebooks", 1)

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n, d) float32 -> quantized (b, n, d), indices (b, n[, q]), loss of any shape to be summed."""
        return self.inner(tokens)

    def _decode(self, indices: Tensor) -> Tensor:
        """(b, n[, q]) -> (b, n, d) float32."""
        return self.inner.indices_to_codes(indices)

    def _check_features(self, features: Tensor) -> None:
        self.check_features(features, self.name)

    def _codebooks(self) -> Iterator[Codebook]:
        return (module for module in self.modules() if isinstance(module, Codebook))

    def _require_codes(self) -> None:
        # The library would run k-means on whatever batch comes first, on one rank alone if only that one evaluates.
        if not self._codebooks_need_init:
            return
        self._codebooks_need_init = not all(bool(codebook.initted) for codebook in self._codebooks())
        if self._codebooks_need_init:
            raise UserError(
                f"the codebook of quantizer {self.name} has no codes yet: k-means makes them from the first training "
                f"batch; train at least one step, load weights, or build it with kmeans_init=False"
            )

    def _prepare(self) -> None:
        if self.training:
            self._follow_process_group()
        else:
            self._require_codes()

    def _follow_process_group(self) -> None:
        # The library decides at construction and caches the answer for the process, but a group may start later. These
        # are the values its constructor would have chosen now; its `replace` compares `replace_sample_fn` by identity.
        distributed = is_distributed()
        for codebook in self._codebooks():
            codebook.use_ddp = distributed
            codebook.all_reduce_fn = codebook.kmeans_all_reduce_fn = dist.all_reduce if distributed else noop
            sample = sample_vectors_distributed if distributed else batched_sample_vectors
            codebook.sample_fn = codebook.replace_sample_fn = sample


def library_options(cls: type[LibraryQuantizer]) -> dict[str, Any]:
    """Options and defaults of the library's class(es), without what `build_quantizer` takes itself."""
    options: dict[str, Any] = {}
    for library_class in cls.library_classes:
        for key, parameter in inspect.signature(library_class).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD and key not in ("dim", "codebook_size"):
                options.setdefault(key, parameter.default)
    return options
