"""The checks of a library quantizer's options: names, ranges, and options that contradict or need each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeGuard

from vqdist.errors import UserError
from vqdist.names import unknown
from vqdist.options import is_whole

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


def resolved(options: dict[str, Any]) -> dict[str, Any]:
    """Fill in, and return, what the library's constructors make of None."""
    if "ema_update" in options:
        by_gradient = bool(options["directional_reparam"])
        fallback = {
            "ema_update": not by_gradient,
            "learnable_codebook": by_gradient,
            "rotation_trick": not by_gradient,
        }
        options.update({key: value for key, value in fallback.items() if options[key] is None})
    return options


def require(condition: bool, name: str, message: str) -> None:
    """Raise `UserError` with the quantizer's name and the message unless the condition holds."""
    if not condition:
        raise UserError(f"quantizer {name}: {message}")


def check_names(name: str, options: Mapping[str, Any], library_defaults: Mapping[str, Any]) -> None:
    """Raise `UserError` for an option that the library does not have, or that is not passed on."""
    allowed = [key for key in library_defaults if key not in _REFUSED]
    for key in options:
        if key in library_defaults and key in _REFUSED:
            raise UserError(f"quantizer {name} does not take {key}: {_REFUSED[key]}; leave it out")
        if key not in library_defaults:
            raise unknown("option", key, allowed, of=f"quantizer {name}")


def check_sizes(name: str, dim: int, codebook_size: int | None, *, optional: bool) -> None:
    """Raise `UserError` unless `dim` and `codebook_size`, which may be None if `optional`, are possible sizes."""
    require(is_integer(dim) and dim > 0, name, f"dim {dim!r} is not a positive integer")
    if codebook_size is None and optional:
        return
    require(
        is_integer(codebook_size) and codebook_size > 1,
        name,
        f"codebook_size {codebook_size!r} is not an integer of at least 2; try 1024",
    )


def check_ranges(name: str, options: Mapping[str, Any]) -> None:
    """Raise `UserError` for a number out of its range."""
    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() & _AT_LEAST:
        fits = is_integer(given[key]) and given[key] >= _AT_LEAST[key]
        require(fits, name, f"{key} {given[key]!r} is out of range; expected an integer of at least {_AT_LEAST[key]}")
    for key in given.keys() & _BETWEEN:
        low, high = _BETWEEN[key]
        fits = isinstance(given[key], Real) and low <= given[key] <= high
        upper = "" if math.isinf(high) else f" and at most {high}"
        require(fits, name, f"{key} {given[key]!r} is out of range; expected a number of at least {low}{upper}")


def check_needs(name: str, given: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    """Raise `UserError` for an option that would be ignored, because another one is off."""
    for key, value in given.items():
        needed = _NEEDS.get(key)
        if key == "decay" and resolved["threshold_ema_dead_code"]:
            continue  # the count of a code's uses decays even where the codebook does not
        if needed is not None and needed in resolved and value != _OFF.get(key) and not resolved[needed]:
            raise UserError(f"quantizer {name}: {key} does nothing without {needed}; set {needed} or leave {key} out")
    require(
        given.get("sample_codebook_temp") is None
        or bool(resolved.get("stochastic_sample_codes") or resolved.get("straight_through")),
        name,
        "sample_codebook_temp does nothing without stochastic_sample_codes or straight_through; set one of them",
    )


# Values that turn an option of `_NEEDS` off, so that giving them is no mistake.
_OFF = {"orthogonal_reg_active_codes_only": False, "commitment_use_cross_entropy_loss": False, "sync_update_v": 0}


def check_codebook_learning(name: str, options: Mapping[str, Any]) -> None:
    """Raise `UserError` if gradient and EMA would both move the codebook, or one that is needed does not."""
    learnable, ema, cosine = (options[key] for key in ("learnable_codebook", "ema_update", "use_cosine_sim"))
    how = "set ema_update=False" + (" and use_cosine_sim=False" if cosine else "")
    require(
        not (learnable and ema),
        name,
        f"learnable_codebook and ema_update (on unless turned off) would both move the codebook; {how}",
    )
    require(
        not (learnable and cosine),
        name,
        "a codebook learned by gradient (learnable_codebook, directional_reparam) does not work with use_cosine_sim, "
        "which is on by default for vq; set use_cosine_sim=False",
    )
    require(
        learnable or not options["orthogonal_reg_weight"],
        name,
        "orthogonal_reg_weight has a gradient for the codebook, which the EMA would overwrite; "
        f"set learnable_codebook=True and ema_update=False{', use_cosine_sim=False' if cosine else ''}",
    )


def check_gradient_estimator(name: str, options: Mapping[str, Any]) -> None:
    """Raise `UserError` for more than one way of the gradient past the codebook, and for one that cannot work."""
    estimators = [key for key in ("straight_through", "rotation_trick", "directional_reparam") if options[key]]
    require(
        len(estimators) < 2,
        name,
        f"{' and '.join(estimators)} are both on, each a way for the gradient past the codebook; choose one "
        "(for vq rotation_trick is on by default: set rotation_trick=False)",
    )
    require(
        not (options["straight_through"] and options["learnable_codebook"]),
        name,
        "straight_through (Gumbel) does not work with learnable_codebook; leave one of them out",
    )
    require(
        not options["directional_reparam"] or options["threshold_ema_dead_code"] > 0,
        name,
        "directional_reparam needs dead codes replaced; set threshold_ema_dead_code, to 2 for example",
    )


def check_projection(name: str, dim: int, inner: int, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise `UserError` for options of a projection that is not there, or a width that needs one.

    Args:
        name: of the quantizer.
        dim: channels of the features.
        inner: numbers per position that are quantized; features of another width need a projection.
        given: what the user set.
        options: all options.
    """
    projected = options.get("has_projections")
    projected = dim != inner if projected is None else projected
    require(
        projected or dim == inner,
        name,
        f"has_projections=False needs features as wide as the code, {inner}, but dim is {dim}; leave it out",
    )
    for key in ("projection_has_bias", "cosine_sim_project_in"):
        require(
            projected or not given.get(key),
            name,
            f"{key} does nothing: dim {dim} is the width of the code, so nothing is projected; leave it out",
        )


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer and no truth value."""
    return is_whole(value)
