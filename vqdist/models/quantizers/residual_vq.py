"""Several codes per position: each level codes what the levels before it left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqdist.models.quantizers.options import check_codebook_learning, check_gradient_estimator, require
from vqdist.models.quantizers.vector_quantize import ResidualVQ, VectorQuantize
from vqdist.models.quantizers.vq import VQ_DEFAULTS, VQQuantizer


class ResidualVQQuantizer(VQQuantizer):
    """Each level codes what the levels before it left over (SoundStream, arXiv 2107.03312)."""

    name = "residual_vq"
    library_classes = (ResidualVQ, VectorQuantize)
    # Distances are Euclidean: a cosine codebook holds unit vectors only, so no level could leave less than the one
    # before. Gradients go straight through: the rotation trick multiplies them by |code| / |residual|, which has no
    # bound where a level before left almost nothing, and was seen to end in nan.
    defaults = {**VQ_DEFAULTS, "use_cosine_sim": False, "rotation_trick": False, "num_quantizers": 4}

    def _count_levels(self) -> int:
        return self.inner.num_quantizers

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        require(
            not given.get("layernorm_after_project_in"),
            cls.name,
            "layernorm_after_project_in is set but the levels have no projection of their own; leave it out",
        )
        cls._check_levels(options)
        cls._check_beams(options)
        if options["implicit_neural_codebook"]:
            contradicted = {"learnable_codebook": False, "ema_update": True}
            for option, value in contradicted.items():
                require(
                    given.get(option) is not value,
                    cls.name,
                    f"{option}={value} contradicts implicit_neural_codebook, which learns by gradient; leave it out",
                )
            options = {**options, "learnable_codebook": True, "ema_update": False}
        check_codebook_learning(cls.name, options)
        check_gradient_estimator(cls.name, options)

    @classmethod
    def _check_levels(cls, options: Mapping[str, Any]) -> None:
        levels, cutoff = options["num_quantizers"], options["quantize_dropout_cutoff_index"]
        if options["quantize_dropout"]:
            require(
                levels > 1 and 0 <= cutoff < levels,
                cls.name,
                f"quantize_dropout has no level to drop: num_quantizers is {levels} and quantize_dropout_cutoff_index "
                f"{cutoff}; it must be at least 0 and below num_quantizers, which must be at least 2",
            )

    @classmethod
    def _check_beams(cls, options: Mapping[str, Any]) -> None:
        weights, levels = options["beam_score_quantizer_weights"], options["num_quantizers"]
        require(
            weights is None or len(weights) == levels,
            cls.name,
            f"beam_score_quantizer_weights {weights} needs one weight for each of num_quantizers {levels} levels",
        )
        for option in ("kmeans_init", "commitment_use_cross_entropy_loss"):
            require(
                not (options["beam_size"] and options[option]),
                cls.name,
                f"beam_size does not work with {option} in the library; set {option}=False",
            )
