"""The features of a set of images, gathered over ranks, and their moments.

Shapes: b batch, c channel, h w image, N images, f features, s spatial features, k classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from vqdist.backends.base import Backend
from vqdist.evaluation.extractors import FeatureExtractor


@dataclass(frozen=True)
class Moments:
    """Mean (f,) and covariance (f, f) of features, both float64; the covariance is over N - 1.

    Attributes:
        factor: (f, N), times its transpose the covariance; where there are no more images than features.
    """

    mean: Tensor
    covariance: Tensor
    factor: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return the moments of features (N, f)."""
        features = features.double().cpu()
        count, width = features.shape
        mean, covariance = features.mean(dim=0), torch.atleast_2d(features.T.cov())
        return cls(mean, covariance, (features - mean).T / math.sqrt(count - 1) if 1 < count <= width else None)


@dataclass(frozen=True)
class Features:
    """All that an extractor sees of N images.

    Attributes:
        features: (N, f).
        spatial: (N, s), for sFID; None where the extractor has none.
        logits: (N, k), for IS; None where it has none.
    """

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def moments(self) -> Moments:
        """Return those of `features`."""
        return Moments.of(self.features)

    def spatial_moments(self) -> Moments | None:
        """Return those of `spatial`, if there are any."""
        return None if self.spatial is None else Moments.of(self.spatial)


class FeatureSet:
    """The features of a set of images that is spread over ranks in blocks: block i belongs to rank i % world_size.

    Args:
        extractor: on the backend's device.
        backend: gathers the ranks' features.
        total: number of images over all ranks.
        block: images of a block; the last one may have fewer.
    """

    def __init__(self, extractor: FeatureExtractor, backend: Backend, total: int, *, block: int = 1):
        self.extractor, self.backend, self.total, self.block = extractor, backend, total, block
        self._parts: list[Mapping[str, Tensor]] = []

    def add(self, images: Tensor) -> None:
        """Look at this rank's next images, (b, c, h, w) in [0, 1]."""
        self._parts.append(self.extractor.outputs(images))

    def over_ranks(self) -> Features:
        """Return the features of all images in their order; every rank calls this and gets the same."""
        return Features(**{name: self._gathered(name, width) for name, width in self.extractor.widths.items()})

    def _gathered(self, name: str, width: int) -> Tensor:
        mine = torch.cat([torch.zeros(0, width, device=self.backend.device), *(part[name] for part in self._parts)])
        blocks = -(-self.total // self.block)
        rows = -(-blocks // self.backend.world_size) * self.block  # of the rank that has most
        shares = self.backend.gather(pad(mine, (0, 0, 0, rows - len(mine))))
        return rearrange(shares, "rank (i block) f -> (i rank block) f", block=self.block)[: self.total]
