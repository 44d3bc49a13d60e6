"""A map of codes for each of several scales, with one codebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vqdist.models.multiscale import (
    V_PATCH_NUMS,
    MultiScaleResidual,
    SharedCodebook,
    VectorQuantizer,
    nearest_code,
    phi_of_scale,
)
from vqdist.models.quantizers.base import Quantized, float32_arithmetic
from vqdist.models.quantizers.library import LibraryQuantizer
from vqdist.models.quantizers.options import is_integer, require
from vqdist.models.quantizers.vector_quantize import Codebook


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
        num_phis: convolutions that repair what enlarging lost; by default 4, or as many as there are scales. A
            learnable codebook may have more than scales, as VAR's files do: the others serve none.
        phi_ratio: share of the convolution in what becomes of the codes; 0 leaves it out.
        phi_rule: which convolution serves a scale: `ticks`, as in VAR, or `proportional`, as in vqdist before.
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
        phi_rule: str = "ticks",
    ):
        if learnable_codebook:
            codebook: SharedCodebook = VectorQuantizer(codebook_size, dim, beta, use_cosine_sim=use_cosine_sim)
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
        phis: dict[str, Any] = {"num_phis": num_phis, "phi_ratio": phi_ratio, "phi_rule": phi_rule}
        super().__init__(codebook, dim, v_patch_nums=v_patch_nums, beta=beta, **phis)


class MultiScaleQuantizer(LibraryQuantizer):
    """A map of codes for each of several scales, each coding what the coarser left over (VAR, arXiv 2404.02905)."""

    name = "multiscale_vq"
    library_classes = (MultiScaleVQ,)
    is_of_before = False  # of an export whose fingerprint did not say the angle and the share of the convolutions
    scales: tuple[int, ...]

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

    @property
    def traits(self) -> str:  # type: ignore[override]  # it changes where an export of before is loaded
        """See `Quantizer`: empty where nothing differs from what was the only choice once."""
        if self.is_of_before:
            return self.traits_of_before
        said = [self.traits_of_before] if self.rule_matters else []
        said += ["nearest by angle"] if self.inner.codebook.use_cosine_sim else []
        said += [f"phi_ratio {self.inner.phi_ratio:g}"] if self.inner.phis and self.inner.phi_ratio != 0.5 else []
        return ", ".join(said)

    @property
    def traits_of_before(self) -> str:
        """Return what fingerprints said once, without the angle and the share of the convolutions."""
        return f"phi_of {self.inner.phi_of}" if self.rule_matters else ""

    @property
    def rule_matters(self) -> bool:
        """Return whether other convolutions serve the scales than by the rule of vqdist before."""
        return self.inner.phi_of != phi_of_scale(len(self.scales), len(self.inner.phis), "proportional")

    def _check_features(self, features: Tensor) -> None:
        super()._check_features(features)
        side = self.scales[-1]
        require(
            features.shape[-2:] == (side, side),
            self.name,
            f"v_patch_nums {list(self.scales)} ends at {side} but the feature map is {features.shape[-2]} by "
            f"{features.shape[-1]}; its side must be the last of v_patch_nums",
        )

    @classmethod
    def check_options(cls, dim: int, codebook_size: int | None, given: Mapping[str, Any], options: Mapping[str, Any]):
        cls._check_scales(options["v_patch_nums"])
        scales, phis = len(options["v_patch_nums"]), options["num_phis"]
        require(
            phis is None or phis <= scales or options["learnable_codebook"],  # VAR has four, however few the scales
            cls.name,
            f"num_phis {phis} is more than the {scales} scales of v_patch_nums; use at most {scales}",
        )
        require(
            phis is None or options["phi_ratio"],
            cls.name,
            "num_phis is given but phi_ratio 0 leaves the convolutions out; leave one of the two out",
        )
        phi_of_scale(scales, scales, options["phi_rule"])  # says which rules there are
        for option in ("decay", "kmeans_init", "kmeans_iters", "threshold_ema_dead_code"):
            require(
                not (options["learnable_codebook"] and given.get(option)),
                cls.name,
                f"{option} does nothing with learnable_codebook, which learns by gradient; leave one of the two out",
            )

    @classmethod
    def _check_scales(cls, sides: Any) -> None:
        valid = isinstance(sides, (list, tuple)) and len(sides) > 0 and all(is_integer(side) for side in sides)
        require(
            valid and sides[0] > 0 and all(small < large for small, large in zip(sides, sides[1:])),
            cls.name,
            f"v_patch_nums {sides} is not a list of growing integers of at least 1; try [1, 2, 4, 8]",
        )
