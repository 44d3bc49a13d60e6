"""Quantizers behind one interface: the only adapter to vector-quantize-pytorch (tried with 1.32).

Shapes: `b` batch, `d` feature channels, `h w` positions, `n` = h * w, `q` levels (codes per position), `L` codes of
all scales of an image.

What the library leaves to its caller is done here, once: arithmetic in float32 under every precision, codebooks that
stay equal over ranks whenever the process group was started, and a mistake in an option said in one line.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize, lookup_free_quantization
from vector_quantize_pytorch.vector_quantize_pytorch import (
    Codebook,
    batched_sample_vectors,
    noop,
    sample_vectors_distributed,
)

from vqdist.errors import UserError
from vqdist.models.multiscale import V_PATCH_NUMS, MultiScaleResidual, VectorQuantizer, nearest_code

_VQ_DEFAULTS = {
    "codebook_dim": 256,
    "decay": 0.8,
    "commitment_weight": 1.0,
    "kmeans_init": True,
    "use_cosine_sim": True,
}

# What `build_quantizer` passes where the user says nothing; the library's own defaults hold for all other options.
# residual_vq measures Euclidean distances: a cosine codebook holds unit vectors only, so no level could leave less
# than the one before. It passes gradients straight through: the rotation trick multiplies them by |code| / |residual|,
# which has no bound where a level before left almost nothing, and was seen to end in nan.
DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    "vq": _VQ_DEFAULTS,
    "lfq": {"diversity_gamma": 4.0},
    "fsq": {},
    "simvq": {},
    "residual_vq": {**_VQ_DEFAULTS, "use_cosine_sim": False, "rotation_trick": False, "num_quantizers": 4},
    "multiscale_vq": {},
}

# Levels by nominal codebook size: table 1 of arXiv 2309.15505.
FSQ_LEVELS: dict[int, tuple[int, ...]] = {
    2**8: (8, 6, 5),
    2**10: (8, 5, 5, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}

_LAYOUT = "the layout is fixed: features (b, d, h, w), indices (b, h, w) or (b, h, w, q)"
_SYNCHRONISED = "ranks would drift apart without a word; codebooks are synchronised whenever a process group is up"
_AFFINE = "in the library it changes state during evaluation and decodes indices to other vectors than it encoded to"
_OPTIMIZER = "nothing in vqdist makes these updates by hand; leave the codebook to its EMA, or set learnable_codebook"
_ONE_CODE = "one code is given per position; for several, use residual_vq with num_quantizers"
_FLOAT32 = "codebook arithmetic is float32 under every precision"
_DECODING = "the library does not apply it when it decodes indices, so that codes would not give back their images"

# Options of the library that are not passed on, and why.
_REFUSED = {
    "sync_codebook": _SYNCHRONISED,
    "sync_kmeans": _SYNCHRONISED,
    "sync_affine_param": _AFFINE,
    "affine_param": _AFFINE,
    "affine_param_batch_decay": _AFFINE,
    "affine_param_codebook_decay": _AFFINE,
    "channel_last": _LAYOUT,
    "channel_first": _LAYOUT,
    "accept_image_fmap": _LAYOUT,
    "accept_3d_fmap": _LAYOUT,
    "keep_num_codebooks_dim": _LAYOUT,
    "return_indices": _LAYOUT,
    "return_zeros_for_masked_padding": "images have no padding",
    "heads": _ONE_CODE,
    "separate_codebook_per_head": _ONE_CODE,
    "force_quantization_f32": _FLOAT32,
    "allowed_dtypes": _FLOAT32,
    "manual_ema_update": _OPTIMIZER,
    "in_place_codebook_optimizer": _OPTIMIZER,
    "manual_in_place_optimizer_update": _OPTIMIZER,
    "vq_bridge": _DECODING,
    "diveq": _DECODING,
    "scale": "the library reads it nowhere",
}

# Options that the library ignores unless another one is on.
_NEEDS = {
    "kmeans_iters": "kmeans_init",
    "decay": "ema_update",
    "orthogonal_reg_active_codes_only": "orthogonal_reg_weight",
    "orthogonal_reg_max_codes": "orthogonal_reg_weight",
    "codebook_diversity_temperature": "codebook_diversity_loss_weight",
    "commitment_use_cross_entropy_loss": "commitment_weight",
    "input_to_quantize_commit_loss_weight": "commitment_weight",
    "directional_reparam_variance": "directional_reparam",
    "sync_update_v": "learnable_codebook",
    "entropy_loss_offset": "experimental_softplus_entropy_loss",
    "cosine_sim_project_in_scale": "cosine_sim_project_in",
    "noise_dropout": "preserve_symmetry",
    "mlp_kwargs": "implicit_neural_codebook",
    "quantize_dropout_cutoff_index": "quantize_dropout",
    "quantize_dropout_multiple_of": "quantize_dropout",
    "eval_beam_size": "beam_size",
    "beam_score_quantizer_weights": "beam_size",
}

# The library takes a negative weight for none, and a decay of 1 never learns.
_AT_LEAST = {  # integers
    "codebook_dim": 1,
    "kmeans_iters": 1,
    "num_codebooks": 1,
    "num_quantizers": 1,
    "quantize_dropout_cutoff_index": 0,
    "quantize_dropout_multiple_of": 1,
    "orthogonal_reg_max_codes": 1,
    "beam_size": 2,
    "eval_beam_size": 1,
    "frozen_codebook_dim": 1,
    "num_phis": 1,
}
_BETWEEN = {  # numbers, both ends included
    "decay": (0, 0.999999),
    "threshold_ema_dead_code": (0, math.inf),
    "commitment_weight": (0, math.inf),
    "input_to_quantize_commit_loss_weight": (0, math.inf),
    "commitment_loss_weight": (0, math.inf),
    "orthogonal_reg_weight": (0, math.inf),
    "codebook_diversity_loss_weight": (0, math.inf),
    "sync_update_v": (0, 1),
    "frac_per_sample_entropy": (1e-6, 1),
    "noise_dropout": (0, 1),
    "beta": (0, math.inf),
    "phi_ratio": (0, 1),
}


class Quantized(NamedTuple):
    """What a quantizer makes of features.

    Attributes:
        quantized: (b, d, h, w), in the dtype of the features.
        indices: codes, int64, (b, h, w), or (b, h, w, q) where a position has several; -1 for a level that
            `quantize_dropout` left out. Of several scales: (b, L), the coarsest first.
        aux_loss: commitment, codebook and entropy losses, weighted and summed; 0-d float32, 0 in eval mode.
    """

    quantized: Tensor
    indices: Tensor
    aux_loss: Tensor


class Quantizer(nn.Module):
    """Maps features to the nearest of finitely many codes; a subclass says how the library is called.

    In train mode, with a process group of several processes up, `forward` holds collectives: every rank must call it.
    In eval mode it holds none and changes nothing.

    Args:
        dim: channels of the features.
        codebook_size: codes per level.
        options: of the library's class, complete but for the library's own defaults.

    Attributes:
        codebook_size: codes per level.
        num_levels: codes per position.
        scales: sides of the maps of codes, growing, where there are several; None for one map of the features' size.
    """

    name: ClassVar[str]
    library_classes: ClassVar[tuple[type[nn.Module], ...]]
    scales: tuple[int, ...] | None = None

    def __init__(self, dim: int, codebook_size: int | None, options: dict[str, Any]):
        super().__init__()
        self.dim = dim
        self.inner = self._build(dim, codebook_size, options)
        self.codebook_size: int = self.inner.codebook_size
        self.num_levels: int = self._count_levels()
        self._codebooks_need_init = bool(options.get("kmeans_init"))

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
        if features.ndim != 4 or features.shape[1] != self.dim:
            raise UserError(
                f"quantizer {self.name} got features of shape {tuple(features.shape)}; expected (batch, {self.dim}, "
                f"height, width), or build it with another dim"
            )

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # `model.bfloat16()` leaves a quantizer alone: its codebook and projections stay as precise as trained.
        return super()._apply(lambda tensor: _move_only(fn, tensor), recurse)


class VQQuantizer(Quantizer):
    """Nearest code of an EMA or learnable codebook (VQ-VAE, arXiv 1711.00937)."""

    name = "vq"
    library_classes = (VectorQuantize,)

    def _build(self, dim: int, codebook_size: int | None, options: dict[str, Any]) -> nn.Module:
        unsynchronised = {"sync_codebook": False, "sync_kmeans": False}  # until `_follow_process_group` knows
        return self.library_classes[0](dim=dim, codebook_size=codebook_size, **unsynchronised, **options)

    def _decode(self, indices: Tensor) -> Tensor:
        return self.inner.get_output_from_indices(indices)

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        projected = (options["codebook_dim"] or dim) != dim
        _require(
            projected or not given.get("layernorm_after_project_in"),
            cls.name,
            f"layernorm_after_project_in has no projection to follow: codebook_dim equals dim {dim}; set another one",
        )
        _check_codebook_learning(cls.name, options)
        _check_gradient_estimator(cls.name, options)


class LFQQuantizer(Quantizer):
    """The signs of log2(v) numbers are the code: no codebook to learn (MAGVIT-v2, arXiv 2310.05737)."""

    name = "lfq"
    library_classes = (LFQ,)

    def __init__(self, dim: int, codebook_size: int | None, options: dict[str, Any]):
        _repair_entropy_over_ranks()
        super().__init__(dim, codebook_size, options)

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        below = 1 << (codebook_size.bit_length() - 1)
        _require(
            codebook_size == below,
            cls.name,
            f"codebook_size {codebook_size} is no power of 2, as lookup-free codes need; try {below} or {2 * below}",
        )
        _check_projection(cls.name, dim, (below.bit_length() - 1) * options["num_codebooks"], given, options)
        clamp, scale = options["soft_clamp_input_value"], options["codebook_scale"]
        _require(
            clamp is None or clamp >= scale,
            cls.name,
            f"soft_clamp_input_value {clamp} is below codebook_scale {scale}, so no input reaches a code; raise it",
        )


class FSQQuantizer(Quantizer):
    """Each of a few numbers is rounded to one of its levels: no codebook and no loss (arXiv 2309.15505)."""

    name = "fsq"
    library_classes = (FSQ,)

    def _build(self, dim: int, codebook_size: int | None, options: dict[str, Any]) -> nn.Module:
        levels = options.pop("levels", None) or FSQ_LEVELS[codebook_size]
        return FSQ(dim=dim, levels=list(levels), **options)

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices = self.inner(tokens)
        return quantized, indices, quantized.new_zeros(())

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        levels = given.get("levels")
        if levels is None:
            cls._check_table_size(codebook_size)
            levels = FSQ_LEVELS[codebook_size]
        else:
            cls._check_levels(levels, codebook_size, options["preserve_symmetry"])
        _check_projection(cls.name, dim, len(levels) * options["num_codebooks"], given, options)

    @classmethod
    def _check_table_size(cls, codebook_size: int) -> None:
        table = ", ".join(f"{size} (levels {list(levels)})" for size, levels in FSQ_LEVELS.items())
        _require(
            codebook_size in FSQ_LEVELS,
            cls.name,
            f"codebook_size {codebook_size} has no levels in the table of the paper; try {table}, or give levels",
        )

    @classmethod
    def _check_levels(cls, levels: Any, codebook_size: int | None, preserve_symmetry: bool) -> None:
        smallest = 2 if preserve_symmetry else 3
        valid = isinstance(levels, (list, tuple)) and len(levels) > 0 and all(_is_integer(n) for n in levels)
        _require(
            valid and min(levels) >= smallest,
            cls.name,
            f"levels {levels} is not a list of integers of at least {smallest} (2 needs preserve_symmetry=True); "
            f"try [8, 5, 5, 5]",
        )
        product = math.prod(levels)
        _require(
            codebook_size in (None, product),
            cls.name,
            f"levels {list(levels)} make {product} codes but codebook_size is {codebook_size}; set codebook_size to "
            f"{product}, or leave one of the two out",
        )


class SimVQQuantizer(Quantizer):
    """A frozen random codebook seen through a learned linear layer (arXiv 2411.02038)."""

    name = "simvq"
    library_classes = (SimVQ,)

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.inner(tokens)
        # The library rotates in eval mode too, which gives the codes up to rounding only.
        return (quantized if self.training else self._decode(indices)), indices, loss

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        """Nothing that the general checks leave."""


class ResidualVQQuantizer(VQQuantizer):
    """Each level codes what the levels before it left over (SoundStream, arXiv 2107.03312)."""

    name = "residual_vq"
    library_classes = (ResidualVQ, VectorQuantize)

    def _count_levels(self) -> int:
        return self.inner.num_quantizers

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        _require(
            not given.get("layernorm_after_project_in"),
            cls.name,
            "layernorm_after_project_in is set but the levels have no projection of their own; leave it out",
        )
        cls._check_levels(options)
        cls._check_beams(options)
        if options["implicit_neural_codebook"]:
            contradicted = {"learnable_codebook": False, "ema_update": True}
            for option, value in contradicted.items():
                _require(
                    given.get(option) is not value,
                    cls.name,
                    f"{option}={value} contradicts implicit_neural_codebook, which learns by gradient; leave it out",
                )
            options = {**options, "learnable_codebook": True, "ema_update": False}
        _check_codebook_learning(cls.name, options)
        _check_gradient_estimator(cls.name, options)

    @classmethod
    def _check_levels(cls, options: Mapping[str, Any]) -> None:
        levels, cutoff = options["num_quantizers"], options["quantize_dropout_cutoff_index"]
        if options["quantize_dropout"]:
            _require(
                levels > 1 and 0 <= cutoff < levels,
                cls.name,
                f"quantize_dropout has no level to drop: num_quantizers is {levels} and quantize_dropout_cutoff_index "
                f"{cutoff}; it must be at least 0 and below num_quantizers, which must be at least 2",
            )

    @classmethod
    def _check_beams(cls, options: Mapping[str, Any]) -> None:
        weights, levels = options["beam_score_quantizer_weights"], options["num_quantizers"]
        _require(
            weights is None or len(weights) == levels,
            cls.name,
            f"beam_score_quantizer_weights {weights} needs one weight for each of num_quantizers {levels} levels",
        )
        for option in ("kmeans_init", "commitment_use_cross_entropy_loss"):
            _require(
                not (options["beam_size"] and options[option]),
                cls.name,
                f"beam_size does not work with {option} in the library; set {option}=False",
            )


class EMACodebook(nn.Module):
    """The library's codebook, which the averages of what it coded move: a `SharedCodebook` of several scales.

    Args:
        dim: of a code's vector.
        codebook_size: number of codes.
        use_cosine_sim: nearest by angle instead of by distance; the codes themselves keep their lengths.
        **options: of the library's `Codebook`.
    """

    def __init__(self, dim: int, codebook_size: int, *, use_cosine_sim: bool, **options: Any):
        super().__init__()
        self.codebook_size = codebook_size
        self.use_cosine_sim = use_cosine_sim
        self.inner = Codebook(dim, codebook_size, **options)

    def nearest(self, vectors: Tensor) -> Tensor:
        """See `SharedCodebook`."""
        return nearest_code(vectors, self.inner.embed[0], cosine=self.use_cosine_sim)

    def lookup(self, indices: Tensor) -> Tensor:
        """See `SharedCodebook`."""
        return nn.functional.embedding(indices, self.inner.embed[0])

    @property
    def has_codes(self) -> bool:
        """See `SharedCodebook`."""
        return bool(self.inner.initted)

    def start(self, vectors: Tensor) -> None:
        """k-means of vectors (b, n, d), over all ranks."""
        self.inner.init_embed_(rearrange(vectors, "b n d -> 1 (b n) d"))

    @torch.no_grad()
    def follow(self, vectors: Tensor, indices: Tensor) -> None:
        """Move the codes towards vectors (b, n, d) that were given indices (b, n), and replace dead ones."""
        self.inner.update_indices(vectors, indices)


class MultiScaleVQ(MultiScaleResidual):
    """`MultiScaleResidual` with its codebook, and with the options that `multiscale_vq` has.

    Args:
        dim: channels of the features.
        codebook_size: number of codes.
        v_patch_nums: sides of the scales' maps, growing; the last is the side of the feature map.
        beta: weight of the commitment loss.
        learnable_codebook: learn the codebook by gradient, as VAR does, instead of by averages (EMA).
        use_cosine_sim: the nearest code by angle instead of by distance.
        decay: of the averages.
        kmeans_init: make the first codes from the first training batch.
        kmeans_iters: iterations of that.
        threshold_ema_dead_code: replace codes whose average number of uses in a batch is below this; 0 replaces none.
        num_phis: convolutions that repair what enlarging lost; by default 4, or as many as there are scales.
        phi_ratio: share of the convolution in what becomes of the codes; 0 leaves it out.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        v_patch_nums: Sequence[int] = V_PATCH_NUMS,
        beta: float = 0.25,
        learnable_codebook: bool = False,
        use_cosine_sim: bool = False,
        decay: float = 0.9,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        num_phis: int | None = None,
        phi_ratio: float = 0.5,
    ):
        if learnable_codebook:
            codebook = VectorQuantizer(codebook_size, dim, beta, use_cosine_sim=use_cosine_sim)
        else:
            codebook = EMACodebook(
                dim,
                codebook_size,
                use_cosine_sim=use_cosine_sim,
                decay=decay,
                kmeans_init=kmeans_init,
                kmeans_iters=kmeans_iters,
                threshold_ema_dead_code=threshold_ema_dead_code,
                sync_kmeans=False,  # until `_follow_process_group` knows
            )
        super().__init__(codebook, dim, v_patch_nums=v_patch_nums, beta=beta, num_phis=num_phis, phi_ratio=phi_ratio)


class MultiScaleQuantizer(Quantizer):
    """A map of codes for each of several scales, each coding what the coarser left over (VAR, arXiv 2404.02905)."""

    name = "multiscale_vq"
    library_classes = (MultiScaleVQ,)

    def __init__(self, dim: int, codebook_size: int | None, options: dict[str, Any]):
        super().__init__(dim, codebook_size, options)
        self.scales = self.inner.scales
        self._codebooks_need_init = True  # by default, unlike in the library

    def forward(self, features: Tensor) -> Quantized:
        """Features (b, d, h, w) -> `Quantized` with codes (b, L); in train mode an EMA codebook moves."""
        self._check_features(features)
        self._prepare()
        with float32_arithmetic(features.device):
            quantized, indices, loss = self.inner(features.float())
        aux_loss = loss if self.training else torch.zeros((), device=features.device)
        return Quantized(quantized.to(features.dtype), indices, aux_loss)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes (b, L), or of the first scales only, -> (b, d, h, w) float32: what `forward` gives in eval mode."""
        self._require_codes()
        with float32_arithmetic(indices.device):
            return self.inner.decode(indices.long())

    def next_scale_inputs(self, indices: Tensor) -> Tensor:
        """Codes (b, L), or of the first scales only, -> what they say of the next ones, (b, n, d) float32.

        For each scale from the second to the one after the last that is given: the features so far, at its size.
        """
        self._require_codes()
        with float32_arithmetic(indices.device):
            return self.inner.next_scale_inputs(indices.long())

    def _check_features(self, features: Tensor) -> None:
        super()._check_features(features)
        side = self.scales[-1]
        _require(
            features.shape[-2:] == (side, side),
            self.name,
            f"v_patch_nums {list(self.scales)} ends at {side} but the feature map is {features.shape[-2]} by "
            f"{features.shape[-1]}; its side must be the last of v_patch_nums",
        )

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        cls._check_scales(options["v_patch_nums"])
        scales, phis = len(options["v_patch_nums"]), options["num_phis"]
        _require(
            phis is None or phis <= scales,
            cls.name,
            f"num_phis {phis} is more than the {scales} scales of v_patch_nums; use at most {scales}",
        )
        _require(
            phis is None or options["phi_ratio"],
            cls.name,
            "num_phis is given but phi_ratio 0 leaves the convolutions out; leave one of the two out",
        )
        for option in ("decay", "kmeans_init", "kmeans_iters", "threshold_ema_dead_code"):
            _require(
                not (options["learnable_codebook"] and given.get(option)),
                cls.name,
                f"{option} does nothing with learnable_codebook, which learns by gradient; leave one of the two out",
            )

    @classmethod
    def _check_scales(cls, sides: Any) -> None:
        valid = isinstance(sides, (list, tuple)) and len(sides) > 0 and all(_is_integer(side) for side in sides)
        _require(
            valid and sides[0] > 0 and all(small < large for small, large in zip(sides, sides[1:])),
            cls.name,
            f"v_patch_nums {sides} is not a list of growing integers of at least 1; try [1, 2, 4, 8]",
        )


QUANTIZERS: dict[str, type[Quantizer]] = {
    cls.name: cls
    for cls in (
        VQQuantizer,
        LFQQuantizer,
        FSQQuantizer,
        SimVQQuantizer,
        ResidualVQQuantizer,
        MultiScaleQuantizer,
    )
}


def build_quantizer(name: str, *, dim: int, codebook_size: int | None = None, **options: Any) -> Quantizer:
    """The quantizer of this name.

    Args:
        name: a key of `QUANTIZERS`.
        dim: channels of the features, and of what the quantizer gives back.
        codebook_size: codes per level; None only for `fsq` with `levels`.
        **options: of the library's class, over `DEFAULT_OPTIONS`; `fsq` takes `levels`, or finds them in `FSQ_LEVELS`
            (its codebook then has as many codes as the levels make, 64000 for 65536).

    Raises:
        UserError: for an unknown name or option, a value out of range, and options that contradict each other or would
            be ignored.
    """
    if name not in QUANTIZERS:
        raise UserError(
            f"quantizer {name!r} is not known;{_nearest(name, QUANTIZERS)} there are: {', '.join(QUANTIZERS)}"
        )
    cls = QUANTIZERS[name]
    library_defaults = _library_options(cls)
    options = {
        key: tuple(value) if key == "levels" and isinstance(value, list) else value for key, value in options.items()
    }
    _check_names(name, options, library_defaults)
    _check_sizes(name, dim, codebook_size, optional=options.get("levels") is not None)
    chosen = {**DEFAULT_OPTIONS[name], **options}
    resolved = _resolve({**library_defaults, **chosen})
    _check_ranges(name, options)
    cls.check_options(dim, codebook_size, options, resolved)
    _check_needs(name, options, resolved)
    try:
        return cls(dim, codebook_size, chosen)
    except AssertionError as error:
        set_to = ", ".join(f"{key}={value}" for key, value in chosen.items())
        raise UserError(f"quantizer {name} does not work with {set_to}: {error or 'options contradict'}") from error


@contextlib.contextmanager
def float32_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 within: the library itself turns off CUDA autocast only, and not around projections."""
    try:
        previous = torch.get_float32_matmul_precision()
    except RuntimeError:  # set per backend through torch.backends, which torch lets nobody mix with this
        previous = None
    with torch.autocast(device_type=device.type, enabled=False):
        if previous is not None:
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if previous is not None:
                torch.set_float32_matmul_precision(previous)


def is_distributed() -> bool:
    """Whether several processes are in a process group now."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks, with the gradient of this rank's share alone; every rank must call it.

    DDP averages gradients over ranks: d f(mean) / d weights of the whole batch is the average of f'(mean) * d tensor,
    which is what this rank's share gives, without a collective in the backward pass.
    """
    if not is_distributed():
        return tensor
    mean = tensor.detach().clone()
    dist.all_reduce(mean)
    return tensor + (mean / dist.get_world_size() - tensor).detach()


def _repair_entropy_over_ranks() -> None:
    # The library's function throws the sum over ranks away and divides this rank's probabilities by the world size, so
    # that the batch entropy is that of prob / ranks; it also caches whether there is a process group. LFQ calls it in
    # train mode only.
    if not callable(getattr(lookup_free_quantization, "maybe_distributed_mean", None)):
        raise UserError(
            "this vector-quantize-pytorch has no lookup_free_quantization.maybe_distributed_mean to repair; "
            "install the version that vqdist was made for: pip install 'vector-quantize-pytorch==1.32.*'"
        )
    lookup_free_quantization.maybe_distributed_mean = mean_over_ranks


def _move_only(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved


def _library_options(cls: type[Quantizer]) -> dict[str, Any]:
    """Options and defaults of the library's class(es), without what `build_quantizer` takes itself."""
    options: dict[str, Any] = {}
    for library_class in cls.library_classes:
        for key, parameter in inspect.signature(library_class).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD and key not in ("dim", "codebook_size"):
                options.setdefault(key, parameter.default)
    return options


def _resolve(options: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the library's constructors make of None."""
    if "ema_update" in options:
        by_gradient = bool(options["directional_reparam"])
        fallback = {
            "ema_update": not by_gradient,
            "learnable_codebook": by_gradient,
            "rotation_trick": not by_gradient,
        }
        options.update({key: value for key, value in fallback.items() if options[key] is None})
    return options


def _require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise UserError(f"quantizer {name}: {message}")


def _nearest(word: str, words: Any) -> str:
    nearest = difflib.get_close_matches(word, list(words), n=3)
    return f" nearest: {', '.join(nearest)};" if nearest else ""


def _check_names(name: str, options: Mapping[str, Any], library_defaults: Mapping[str, Any]) -> None:
    allowed = [key for key in library_defaults if key not in _REFUSED]
    for key in options:
        if key in library_defaults and key in _REFUSED:
            raise UserError(f"quantizer {name} does not take {key}: {_REFUSED[key]}; leave it out")
        if key not in library_defaults:
            raise UserError(
                f"quantizer {name} has no option {key!r};{_nearest(key, allowed)} there are: {', '.join(allowed)}"
            )


def _check_sizes(name: str, dim: int, codebook_size: int | None, *, optional: bool) -> None:
    _require(_is_integer(dim) and dim > 0, name, f"dim {dim!r} is not a positive integer")
    if codebook_size is None and optional:
        return
    _require(
        _is_integer(codebook_size) and codebook_size > 1,
        name,
        f"codebook_size {codebook_size!r} is not an integer of at least 2; try 1024",
    )


def _check_ranges(name: str, options: Mapping[str, Any]) -> None:
    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() & _AT_LEAST:
        fits = _is_integer(given[key]) and given[key] >= _AT_LEAST[key]
        _require(fits, name, f"{key} {given[key]!r} is out of range; expected an integer of at least {_AT_LEAST[key]}")
    for key in given.keys() & _BETWEEN:
        low, high = _BETWEEN[key]
        fits = isinstance(given[key], Real) and low <= given[key] <= high
        upper = "" if math.isinf(high) else f" and at most {high}"
        _require(fits, name, f"{key} {given[key]!r} is out of range; expected a number of at least {low}{upper}")


def _check_needs(name: str, given: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    for key, value in given.items():
        needed = _NEEDS.get(key)
        if key == "decay" and resolved["threshold_ema_dead_code"]:
            continue  # the count of a code's uses decays even where the codebook does not
        if needed in resolved and value != _OFF.get(key) and not resolved[needed]:
            raise UserError(f"quantizer {name}: {key} does nothing without {needed}; set {needed} or leave {key} out")
    _require(
        given.get("sample_codebook_temp") is None
        or bool(resolved.get("stochastic_sample_codes") or resolved.get("straight_through")),
        name,
        "sample_codebook_temp does nothing without stochastic_sample_codes or straight_through; set one of them",
    )


# Values that turn an option of `_NEEDS` off, so that giving them is no mistake.
_OFF = {"orthogonal_reg_active_codes_only": False, "commitment_use_cross_entropy_loss": False, "sync_update_v": 0}


def _check_codebook_learning(name: str, options: Mapping[str, Any]) -> None:
    learnable, ema, cosine = (options[key] for key in ("learnable_codebook", "ema_update", "use_cosine_sim"))
    how = "set ema_update=False" + (" and use_cosine_sim=False" if cosine else "")
    _require(
        not (learnable and ema),
        name,
        f"learnable_codebook and ema_update (on unless turned off) would both move the codebook; {how}",
    )
    _require(
        not (learnable and cosine),
        name,
        "a codebook learned by gradient (learnable_codebook, directional_reparam) does not work with use_cosine_sim, "
        "which is on by default for vq; set use_cosine_sim=False",
    )
    _require(
        learnable or not options["orthogonal_reg_weight"],
        name,
        "orthogonal_reg_weight has a gradient for the codebook, which the EMA would overwrite; "
        f"set learnable_codebook=True and ema_update=False{', use_cosine_sim=False' if cosine else ''}",
    )


def _check_gradient_estimator(name: str, options: Mapping[str, Any]) -> None:
    estimators = [key for key in ("straight_through", "rotation_trick", "directional_reparam") if options[key]]
    _require(
        len(estimators) < 2,
        name,
        f"{' and '.join(estimators)} are both on, each a way for the gradient past the codebook; choose one "
        "(for vq rotation_trick is on by default: set rotation_trick=False)",
    )
    _require(
        not (options["straight_through"] and options["learnable_codebook"]),
        name,
        "straight_through (Gumbel) does not work with learnable_codebook; leave one of them out",
    )
    _require(
        not options["directional_reparam"] or options["threshold_ema_dead_code"] > 0,
        name,
        "directional_reparam needs dead codes replaced; set threshold_ema_dead_code, to 2 for example",
    )


def _check_projection(name: str, dim: int, inner: int, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """`inner`: numbers per position that are quantized; features of another width need a projection."""
    projected = options.get("has_projections")
    projected = dim != inner if projected is None else projected
    _require(
        projected or dim == inner,
        name,
        f"has_projections=False needs features as wide as the code, {inner}, but dim is {dim}; leave it out",
    )
    for key in ("projection_has_bias", "cosine_sim_project_in"):
        _require(
            projected or not given.get(key),
            name,
            f"{key} does nothing: dim {dim} is the width of the code, so nothing is projected; leave it out",
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --------------------------------------------------------------------------------------- the rotation trick alone


def rotated_onto(source: Tensor, target: Tensor) -> Tensor:
    """`target` in value, with the gradient of `source` turned and scaled as `source` is onto it (arXiv 2410.06424).

    Args:
        source: (..., d).
        target: (..., d); gets no gradient.

    Returns:
        (..., d) float32: lambda * R source, where the rotation R in the plane of both and lambda = |target| / |source|
        are held fixed.
    """
    with float32_arithmetic(source.device):
        return _RotatedOnto.apply(source.float(), target.detach().float())


class _RotatedOnto(torch.autograd.Function):
    """The library computes lambda * R source to get `target`; only its gradient needs the arithmetic."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(source, target)
        return target.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """lambda * R^T gradient, with R = 1 - 2 r r^T + 2 q e^T for unit vectors: e source, q target, r between."""
        source, target = ctx.saved_tensors
        length, aim = (vector.norm(dim=-1, keepdim=True).clamp(min=1e-6) for vector in (source, target))
        e, q = source / length, target / aim
        r = nn.functional.normalize(e + q, dim=-1, eps=1e-6)
        along_r, along_q = ((gradient * axis).sum(dim=-1, keepdim=True) for axis in (r, q))
        return (gradient - 2 * along_r * r + 2 * along_q * e) * (aim / length), None
