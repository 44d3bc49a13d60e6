"""The measures that `validate_with` adds to a validation: LPIPS, and FID and its kin, of all ranks' images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from vqdist import protocol
from vqdist.backends import Backend
from vqdist.errors import UserError
from vqdist.evaluation.extractors import FeatureExtractor, digest_of_weights, load_extractor
from vqdist.evaluation.features import Features, FeatureSet
from vqdist.evaluation.fidelity import (
    check_count,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from vqdist.evaluation.references import Reference, ReferenceFile, reference_in
from vqdist.objectives.lpips import LPIPS, NETS
from vqdist.ranks import on_main
from vqdist.sizes import ImageSize, sides_of
from vqdist.trainers.config import TrainerConfig
from vqdist.trainers.measure import OF_FEATURES, Asked

Numbers = dict[str, float]
# measures that look at the features of each image, and cannot do with their moments
OF_EACH_IMAGE = {"kid", "precision", "recall"}


class FurtherMeasures:
    """The networks of these measures, and what they saw of the images to validate on; empty where none is asked for.

    Everything that can be missing is looked for by the constructor, before there is a process group.

    Args:
        config: names the measures, and where their weights are.
        channels, image_size: of the images.
        count: number of the images to validate on.
        has_images: whether there are images to validate on, and not codes alone.

    Attributes:
        asked: the names of the measures.

    Raises:
        UserError: weights or files are missing, or cannot give these measures.
    """

    def __init__(
        self, config: TrainerConfig, *, channels: int, image_size: ImageSize, count: int, has_images: bool = True
    ):
        self.asked: Asked = config.measures
        self.batch_size, self.count = config.batch_size, count
        self.lpips: LPIPS | None = None
        self.extractor: FeatureExtractor | None = None
        self.reference: ReferenceFile | None = None
        self._real: Reference | None = None  # of the images or the file, on rank 0
        self._is_known = False
        if "lpips" in self.asked.names:
            _check_size(self.asked.net, image_size)  # before its weights are downloaded
            self.lpips = LPIPS(self.asked.weights, net=self.asked.net)
        if self.asked.of_features:
            self._open_extractor(config, channels, image_size)
            self._open_reference(config, image_size, has_images)

    def _open_extractor(self, config: TrainerConfig, channels: int, image_size: ImageSize) -> None:
        check_count(self.count, "images to validate on")
        shape: dict[str, Any] = {"channels": channels, "image_size": image_size}
        self.extractor = load_extractor(config.features, trust_code=config.trust_features, **shape)
        for kind, seen in (("sfid", "spatial"), ("is", "logits")):
            if kind in self.kinds(self.asked.of_features) and seen not in self.extractor.widths:
                raise UserError(
                    f"validate_with names {kind}, and features {config.features} gives none for it; give the features "
                    f"inception, or leave {kind} out"
                )

    def _open_reference(self, config: TrainerConfig, image_size: ImageSize, has_images: bool) -> None:
        extractor, kinds = cast(FeatureExtractor, self.extractor), self.kinds(self.asked.of_features)
        if config.reference is None:
            if not has_images and kinds != {"is"}:
                raise UserError(
                    f"validate_with {','.join(self.asked.of_features)} compares with images, and codes are validated "
                    "on; give --reference FILE, which `vqdist statistics` writes"
                )
            return
        if kinds == {"is"}:
            raise UserError(f"reference {config.reference} does nothing, because inception scores need none")
        self.reference = ReferenceFile(config.reference)
        self.reference.check_made_by(extractor, image_size)
        if not (self.reference.has_moments or self.reference.has_features):
            return
        found = self.reference.reference(extractor.width, extractor.widths.get("spatial"))
        lacking = {"sfid"} if found.spatial is None else set()
        if found.features is None and not self.reference.has_images:
            lacking |= OF_EACH_IMAGE
        if kinds & lacking:
            raise UserError(
                f"reference {config.reference} lacks what {' and '.join(sorted(kinds & lacking))} needs; make it with "
                "`vqdist statistics`, or leave the measure out of validate_with"
            )

    @staticmethod
    def kinds(names: Iterable[str]) -> set[str]:
        """Return the measures of features without the r of reconstructions."""
        return {name[1:] if name in OF_FEATURES else name for name in names}

    def on(self, backend: Backend) -> None:
        """Place the networks on this rank's device; every rank calls this.

        Raises:
            UserError: ranks read other weights or another reference.
        """
        self.backend = backend
        if self.lpips is not None:
            self.lpips.to(backend.device)
        if self.extractor is not None:
            self.extractor.to(backend.device)
        if not self.asked.names:
            return
        marks = backend.gather(torch.tensor([int(self._digest()[:15], 16)], device=backend.device))
        if bool((marks != marks[0]).any()):
            raise UserError(
                "ranks read other weights for validate_with, or another reference; give every host the same files"
            )

    def _digest(self) -> str:
        said = protocol.telling(self.protocol())  # files may have other paths on other hosts
        return hashlib.sha256(str(sorted(said.items())).encode()).hexdigest()

    def protocol(self) -> dict[str, Any]:
        """Return what belongs to a protocol of networks and reference, see `vqdist.protocol`."""
        said: dict[str, Any] = {}
        if self.lpips is not None:
            said = {"lpips": self.lpips.net, "lpips_hash": digest_of_weights(self.lpips.network)}
        return {**said, **protocol.of_features(self.extractor, self.reference)}

    # ------------------------------------------------------------------------------------- numbers

    def of_reconstructions(self, evaluate: Callable[..., Numbers]) -> Numbers:
        """Return what a measurement of reconstructions gives, and further measures of the same; every rank calls this.

        Args:
            evaluate: `evaluate_reconstruction` but for its options `look` and `distances`; goes over this rank's
                images to validate on, each once over all ranks.
        """
        names = [name for name in self.asked.names if name in OF_FEATURES]
        distances = {} if self.lpips is None else {"lpips": self.lpips.distances}
        if not names:
            return evaluate(distances=distances)
        real, again = self._set_of_images(names), self._set(names, self.count)

        def look(image: Tensor, recon: Tensor) -> None:
            if real is not None:
                real.add(image)
            again.add(recon)

        numbers = evaluate(look=look, distances=distances)
        self._know(real)
        found = self._compared(again.over_ranks(), self.kinds(names))
        return {**numbers, **{name: found[name[1:]] for name in names}}

    def of_samples(self, samples: Iterable[Tensor], total: int, images: Callable[[], Iterable[Tensor]]) -> Numbers:
        """Return the measures of drawn images; every rank calls this.

        Args:
            samples: this rank's batches, of blocks of the run's batch size that the ranks take in turn.
            total: images of all ranks.
            images: gives this rank's images to validate on; only called where they were not looked at yet.
        """
        names = self.asked.of_samples
        real, drawn = self._set_of_images(names), self._set(names, total, block=self.batch_size)
        if real is not None:
            for image in images():
                real.add(image)
            self._know(real)
        for sample in samples:
            drawn.add(sample)
        self._know(None)
        return self._compared(drawn.over_ranks(), set(names))

    def _set(self, names: Iterable[str], total: int, **options: Any) -> FeatureSet:
        wanted = {"is": "logits", "sfid": "spatial"}
        seen = {"features", *(wanted[kind] for kind in self.kinds(names) if kind in wanted)}
        return FeatureSet(cast(FeatureExtractor, _Seen(self.extractor, seen)), self.backend, total, **options)

    def _set_of_images(self, names: Sequence[str]) -> FeatureSet | None:
        """Return what collects the features of the images to validate on; None where they are not needed (again).

        All that any measure needs of them is collected at once.
        """
        if self._is_known or self.reference is not None or self.kinds(names) == {"is"}:
            return None
        return self._set([name for name in self.asked.of_features if name not in ("is", "ris")], self.count)

    def _know(self, real: FeatureSet | None) -> None:
        """Keep what was seen of the images, or what the reference holds, for this validation and all later ones."""
        if self._is_known or (real is None and self.reference is None):
            return
        if real is not None:
            seen = real.over_ranks()
            on_main(self.backend, lambda: self._keep(Reference.of(seen)), "the images to validate on cannot be seen")
        else:
            file, extractor = cast(ReferenceFile, self.reference), cast(FeatureExtractor, self.extractor)
            self._keep(reference_in(file, extractor, self.backend, self.batch_size))
        self._is_known = True

    def _keep(self, found: Reference) -> None:
        if not bool(found.moments.covariance.isfinite().all()):
            raise UserError("the features of the images to validate on are not finite; look at the feature extractor")
        each = found.features is not None and bool(self.kinds(self.asked.of_features) & OF_EACH_IMAGE)
        features = cast(Tensor, found.features).cpu() if each else None  # of many images they are gigabytes
        self._real = replace(found, features=features) if self.backend.is_main else None

    def _compared(self, generated: Features, kinds: set[str]) -> Numbers:
        """Return these measures; rank 0 computes them, and every rank gets the same."""
        names = sorted(kinds)
        values = torch.zeros(len(names), dtype=torch.float64)

        def measure() -> None:
            found = _likeness(generated, self._real, kinds)
            values.copy_(torch.tensor([found[name] for name in names], dtype=torch.float64))

        on_main(self.backend, measure, "the measures of validate_with cannot be computed")
        rows = self.backend.gather(values.to(self.backend.device))
        return dict(zip(names, rows[0].tolist(), strict=True))


class _Seen:
    """A feature extractor that gives what is needed of all that it sees: the rest would be gathered for nothing."""

    def __init__(self, extractor: FeatureExtractor | None, names: set[str]):
        self.extractor = cast(FeatureExtractor, extractor)
        self.width = self.extractor.width
        self.widths = {name: width for name, width in self.extractor.widths.items() if name in names}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        seen = self.extractor.outputs(images)
        return {name: seen[name] for name in self.widths}


def _check_size(net: str, image_size: ImageSize) -> None:
    side, smallest = min(sides_of(image_size)), NETS[net].smallest
    if side < smallest:
        raise UserError(
            f"validate_with names lpips, whose {NETS[net].name} needs images of {smallest} pixels, and these have "
            f"{side}; leave it out, or give one of {', '.join(NETS)} that needs less"
        )


def _likeness(generated: Features, real: Reference | None, kinds: set[str]) -> Numbers:
    """Return FID and its kin, those that are asked for; NaN where features are not finite, as a log line shows it."""
    if not bool(generated.features.isfinite().all()):
        return dict.fromkeys(kinds, math.nan)
    numbers: Numbers = {}
    if "is" in kinds:
        numbers |= inception_score(cast(Tensor, generated.logits))
    if real is None:
        return numbers
    if "fid" in kinds:
        numbers["fid"] = frechet_distance(generated.moments(), real.moments)
    if "sfid" in kinds:
        numbers["sfid"] = frechet_distance(cast(Any, generated.spatial_moments()), cast(Any, real.spatial))
    features = generated.features.cpu()
    if "kid" in kinds:
        numbers |= kernel_distance(features, cast(Tensor, real.features))
    if kinds & {"precision", "recall"}:
        numbers |= precision_and_recall(features, cast(Tensor, real.features))
    return numbers
