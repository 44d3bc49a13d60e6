"""Runs that `vqdist evaluate` measures over the images, or the stored codes, of a dataset."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from vqdist import protocol
from vqdist.cli.protocols import Asked
from vqdist.cli.sample import draw_options
from vqdist.conventions import IMAGES, STATISTICS, Choices
from vqdist.errors import printable
from vqdist.sizes import ImageSize, sides_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vqdist.backends import Backend
    from vqdist.data.codes import CodeDataset
    from vqdist.data.dataset import ImageDataset
    from vqdist.data.loader import Batch
    from vqdist.evaluation.extractors import FeatureExtractor
    from vqdist.evaluation.features import Features, FeatureSet
    from vqdist.evaluation.references import Reference, ReferenceFile
    from vqdist.models.autoregressive import AutoregressiveModel
    from vqdist.models.tokenizer import TokenizerNetwork
    from vqdist.objectives.lpips import LPIPS


@dataclass
class MeasuredRun:
    """A run that is measured over the images (or codes) of `dataset`. Every rank calls every method."""

    options: Any  # as the parser gives them
    network: nn.Module
    dataset: ImageDataset | CodeDataset
    extractor: FeatureExtractor | None
    reference: ReferenceFile | None = None  # in place of the images themselves
    lpips: LPIPS | None = None
    asked: Asked = Asked(None)
    weights: str | None = None  # `averaged` or `live`, where that is known
    _real: Features | Reference | None = None

    def on(self, backend: Backend) -> MeasuredRun:
        """Return this run, with its networks on the backend's device."""
        from vqdist.trainers.bad_images import BadImages

        self.backend = backend
        # of stored codes none is bad
        self.bad_images = BadImages(backend, len(self.dataset), getattr(self.dataset, "max_bad_frac", 0.0))
        self.network.to(backend.device)
        if self.extractor is not None:
            self.extractor.to(backend.device)
        return self

    def numbers(self) -> dict[str, float]:
        """Measure what there is to measure."""
        raise NotImplementedError

    def protocol(self) -> dict[str, Any]:
        """Return what the numbers were measured on, see `vqdist.protocol`."""
        from vqdist.evaluation.extractors import digest_of_weights

        said = protocol.of_images(self.dataset, self.options.data.folder)
        said["pixels"] = self.asked.pixels(self.choices)
        if self.lpips is not None:
            said |= {"lpips": self.lpips.net, "lpips_hash": digest_of_weights(self.lpips.network)}
        if self.weights is not None:
            said["weights"] = self.weights
        said |= protocol.of_features(self.extractor, self.reference, self.choices.splits)
        return said | self.asked.said(self.found(), self.choices, self.found_of_samples())

    @property
    def choices(self) -> Choices:
        """The choices of the images that are measured."""
        return self.asked.reconstructions

    def found(self) -> dict[str, Any]:
        """Return what a named protocol is compared with."""
        found: dict[str, Any] = {"images": len(self.dataset), "pixels": self.asked.pixels(self.choices)}
        if hasattr(self.dataset, "view"):
            rows, columns = sides_of(self.dataset.image_size)
            found |= {"image_size": rows if rows == columns else [rows, columns], "center": self.dataset.view.center}
        if self.extractor is not None:
            found["features"] = self.extractor.kind
            found["compared_with"] = IMAGES if self.reference is None else STATISTICS
        return found

    def found_of_samples(self) -> dict[str, Any]:
        """Return it of samples that are drawn beside reconstructions; empty where there are none."""
        return {}

    def feature_set(self, count: int, **options: Any) -> FeatureSet:
        """Return what collects the features of so many images; only where there is an extractor."""
        from vqdist.evaluation.features import FeatureSet

        return FeatureSet(cast("FeatureExtractor", self.extractor), self.backend, count, **options)

    def batches(self, title: str, *, labels: bool = False) -> Iterator[Batch]:
        """Yield this rank's share of the data, on its device."""
        import torch

        from vqdist.data.loader import valid_loader

        loader = valid_loader(
            self.dataset,
            torch.arange(len(self.dataset)),
            batch_size=self.options.batch_size,
            rank=self.backend.rank,
            world_size=self.backend.world_size,
            num_workers=self.options.num_workers,
            labels=labels,
        )
        for batch in self.progress(loader, title, -(-len(self.dataset) // self.backend.world_size)):
            self.report_skipped(batch.bad)
            device = self.backend.device
            yield batch._replace(item=batch.item.to(device), label=batch.label.to(device))
        self.bad_images.count_over_ranks()
        self.bad_images.check()

    def progress(self, batches: Iterator, title: str, items: int) -> Iterator:
        """Return these batches of so many items, with a bar on a terminal."""
        from tqdm import tqdm

        shown = self.backend.is_main and sys.stderr.isatty()
        return tqdm(batches, title, -(-items // self.options.batch_size), unit="batch", disable=not shown)

    def report_skipped(self, names: list[str]) -> None:
        """Say it once of an image, however often the data is gone through."""
        for name in self.bad_images.add(names):
            print(f"skipped an image that cannot be decoded: {printable(name)}", file=sys.stderr)
        self.bad_images.check()

    def reconstruction_numbers(self, network: TokenizerNetwork, image_size: ImageSize) -> dict[str, float]:
        """Measure the reconstructions of the images, and with an extractor their distance from the images."""
        from vqdist.evaluation import evaluate_reconstruction

        images = (batch.item for batch in self.batches("reconstruct"))
        distances = {} if self.lpips is None else {"lpips": self.lpips.to(self.backend.device).distances}
        choices = self.asked.reconstructions
        options: dict[str, Any] = {"distances": distances, "rounded": self.asked.pixels(choices)}
        if self.extractor is None:
            return evaluate_reconstruction(network, images, self.backend, image_size=image_size, **options)
        real = None if self.reference is not None else self.feature_set(len(self.dataset))
        again = self.feature_set(len(self.dataset))

        def look(image: Tensor, recon: Tensor) -> None:
            if real is not None:
                real.add(image)
            again.add(recon)

        numbers = evaluate_reconstruction(network, images, self.backend, image_size=image_size, look=look, **options)
        if real is not None:
            self._real = real.over_ranks()
        return {**numbers, **_distances(self.compared_with(), again.over_ranks(), choices.splits)}

    def features_of_images(self) -> Features:
        """Return the features of the images."""
        real = self.feature_set(len(self.dataset))
        for batch in self.batches("features"):
            real.add(batch.item)
        return real.over_ranks()

    def compared_with(self) -> Features | Reference:
        """Return what samples and reconstructions are compared with: the images, or the reference in their place."""
        from vqdist.evaluation.references import reference_in

        if self._real is None and self.reference is None:
            self._real = self.features_of_images()
        elif self._real is None:
            extractor, reference = cast("FeatureExtractor", self.extractor), cast("ReferenceFile", self.reference)
            self._real = reference_in(reference, extractor, self.backend, self.options.batch_size)
        return self._real


class TokenizerRun(MeasuredRun):
    """A run of a model that is an image tokenizer and nothing else; `network` is its `TokenizerNetwork`."""

    network: TokenizerNetwork
    dataset: ImageDataset

    def numbers(self) -> dict[str, float]:
        """Of its reconstructions."""
        return self.reconstruction_numbers(self.network, self.dataset.image_size)


class GeneratorRun(MeasuredRun):
    """A run of an `AutoregressiveModel`."""

    network: AutoregressiveModel

    def check(self) -> None:
        """Find what is wrong with the labels and the samples before anything is computed."""
        from vqdist.evaluation.fidelity import check_count

        if self.network.num_classes:
            for index in {0, len(self.dataset) // 2, len(self.dataset) - 1}:
                self.network.check_label(self.dataset.label(index))
        if self.extractor is not None:
            self.draw_options = draw_options(self.options, self.network)
            given = self.options.num_samples
            self.num_samples = self.asked.samples.images if given is None else given
            check_count(self.num_samples, "samples")

    def numbers(self) -> dict[str, float]:
        """Of its predictions, of its reconstructions if it has a codebook of its own, and of its samples."""
        from vqdist.evaluation import evaluate_prediction

        numbers = evaluate_prediction(self.network, self.items_and_labels(), self.backend)
        if self.reconstructs:
            numbers |= self.reconstruction_numbers(cast("TokenizerNetwork", self.network), self.network.image_size)
        if self.extractor is not None:
            numbers |= self.fidelity_numbers()
        return numbers

    def items_and_labels(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images or codes with the classes of the images, as the model wants them."""
        known = self.network.num_classes
        for batch in self.batches("predict", labels=known > 0):
            for label in batch.label.unique().tolist() if known else ():
                self.network.check_label(label)
            yield batch.item, batch.label if known else batch.label.new_zeros(len(batch.label))

    def fidelity_numbers(self) -> dict[str, float]:
        """Of the samples against the images."""
        from vqdist.evaluation.fidelity import fidelity

        drawn, splits = self.features_of_samples(), self.asked.samples.splits
        return {**fidelity(drawn, self.compared_with(), splits=splits), "samples": self.num_samples}

    @property
    def reconstructs(self) -> bool:
        """Return whether the model has a codebook of its own."""
        from vqdist.models.tokenizer import TokenizerNetwork

        return isinstance(self.network, TokenizerNetwork)

    @property
    def choices(self) -> Choices:
        """Those of samples; of a model that reconstructs, of its reconstructions."""
        return self.asked.reconstructions if self.reconstructs else self.asked.samples

    def found(self) -> dict[str, Any]:
        """Return also the number of samples, as that of the images that are measured, where nothing else is."""
        drawn = self.extractor is not None and not self.reconstructs
        return super().found() | ({"images": self.num_samples} if drawn else {})

    def found_of_samples(self) -> dict[str, Any]:
        if self.extractor is None or not self.reconstructs:
            return {}
        found = {name: value for name, value in super().found().items() if name in vars(self.asked.samples)}
        return found | {"images": self.num_samples, "pixels": self.asked.pixels(self.asked.samples)}

    def protocol(self) -> dict[str, Any]:
        """Return also how the samples were drawn, and in what they are measured otherwise than reconstructions."""
        said = super().protocol()
        if self.extractor is None:
            return said
        samples = self.asked.samples
        choices = {"pixels": self.asked.pixels(samples), "inception_score_over": samples.splits}
        others = {name: value for name, value in choices.items() if said.get(name, value) != value}
        drawn = {"samples": self.num_samples, "seed": self.options.seed or 0, **asdict(self.draw_options)}
        return {**said, **drawn, **{f"{protocol.SAMPLES}{name}": value for name, value in others.items()}}

    def features_of_samples(self) -> Features:
        """Return the features of images that the model draws."""
        from vqdist.drawing import draw_batches
        from vqdist.metrics import as_pixels

        pixels = self.asked.pixels(self.asked.samples)
        size, seed = self.options.batch_size, self.options.seed or 0
        drawn = self.feature_set(self.num_samples, block=size)
        batches = draw_batches(
            self.network, self.sample_labels(), self.draw_options, seed=seed, batch_size=size, backend=self.backend
        )
        for _, images in self.progress(batches, "sample", -(-self.num_samples // self.backend.world_size)):
            drawn.add(as_pixels(images, pixels))
        return drawn.over_ranks()

    def sample_labels(self) -> Tensor:
        """(N,) classes of images that lie evenly over the data: in any order of it, each class as often as there."""
        import torch

        model, count = self.network, self.num_samples
        if not model.num_classes:
            return model.labels(None, count)
        labels = [self.dataset.label(number * len(self.dataset) // count) for number in range(count)]
        return model.labels(torch.tensor([model.check_label(label) for label in labels]), count)


def _distances(real: Features | Reference, reconstructions: Features, splits: str) -> dict[str, float]:
    """Return `rfid`, `rsfid`, `rkid`, `rprecision`, `rrecall` and `ris`, the inception score of reconstructions."""
    from vqdist.evaluation.fidelity import fidelity

    numbers = fidelity(reconstructions, real, splits=splits)
    names = ("fid", "sfid", "kid", "is", "precision", "recall")
    return {f"r{name}": numbers[name] for name in names if name in numbers}
