"""Training a model that predicts codes: end to end (VQ-AR), or over a frozen tokenizer (prior, VAR)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqdist.backends import Engine
from vqdist.backends.environment import rank_of_launcher
from vqdist.data.codes import CodeDataset
from vqdist.data.config import CODES
from vqdist.data.loader import Batch
from vqdist.drawing import draw_batches, draw_numbers
from vqdist.errors import UserError, an, printable
from vqdist.evaluation import evaluate_prediction, evaluate_reconstruction, reconstruct
from vqdist.metrics import (
    CodeHistogram,
    CodePredictionMetrics,
    RunningMeans,
    code_histogram,
    codebook_usage,
    few_codes,
)
from vqdist.models.autoregressive import AutoregressiveModel
from vqdist.models.tokenizer import Tokenizer, TokenizerNetwork
from vqdist.sampling import DrawOptions, uniform_per_image
from vqdist.seeding import derive_seed
from vqdist.tracking import Tracker
from vqdist.trainers.ar_config import IMAGE_OPTIONS, ARTrainerConfig
from vqdist.trainers.base import Trainer
from vqdist.trainers.data import Images
from vqdist.trainers.feed import mark_last
from vqdist.trainers.measure import LPIPS, OF_FEATURES, OF_PREDICTIONS
from vqdist.trainers.tokenizer import names_of_reconstruction


class ARTrainer(Trainer):
    """Trains a model that predicts codes: `VQImageAutoregressiveAutoencoder`, `Prior` or `VAR`.

    The classes that are hidden (`label_dropout`) depend on the seed and on an image's place in the data order only, as
    do the samples of a picture on the seed and on their number: not on how images are spread over ranks.

    Args:
        model: what to train; the tokenizer of a `Prior` or `VAR` stays as it is.
        dataset: see `Trainer`; also a `CodeDataset`.
        **options: the fields of `ARTrainerConfig`.
    """

    config_class = ARTrainerConfig
    config: ARTrainerConfig
    model: AutoregressiveModel
    model_argument = "model"
    _absent_classes: str | None = None  # a line about them
    picture_name = "samples"
    measure = OF_PREDICTIONS

    def __init__(self, model: AutoregressiveModel, **options):
        super().__init__(model, **options)

    @property
    def with_labels(self) -> bool:
        """True if batches come with the classes of their images."""
        return self.model.num_classes > 0

    def check_model(self) -> None:
        model, config = self.model, self.config
        if not isinstance(model, AutoregressiveModel):
            raise UserError(
                f"the model is {an(type(model).__name__)}; ARTrainer trains a Prior, a VAR or a VQ-AR model"
            )
        if config.image_size is None:
            self.config = config = replace(config, image_size=cast(int, model.image_size))
        if config.image_size != model.image_size:
            raise UserError(
                f"image_size {config.image_size} is given but the model is for {model.image_size}; leave it out"
            )
        reconstructs = isinstance(model, TokenizerNetwork)
        for name in () if reconstructs else config.measures.names:
            if name == LPIPS or name in OF_FEATURES:
                raise UserError(
                    f"validate_with names {name}, but {an(type(model).__name__)} reconstructs no images; give a "
                    "measure of its samples, as fid"
                )
        if not model.num_classes:
            config.refuse_set("label_dropout", "sample_cfg", because="the model knows no classes (num_classes 0)")
        elif config.label_dropout == 0 and config.sample_cfg not in (None, 1):
            raise UserError(
                f"sample_cfg {config.sample_cfg:g} needs a model that can do without a class, but label_dropout is 0; "
                "set it, to 0.1 for example"
            )

    def _open_data(self, dataset: Dataset | None, valid_dataset: Dataset | None) -> tuple[Images, Images]:
        config = self.config
        if isinstance(dataset, CodeDataset):
            self._check_makes_no_codes()
            config.refuse_set("folder", *IMAGE_OPTIONS, because="codes are given as the dataset")
        if config.codes_folder is not None and dataset is None:
            self._check_makes_no_codes()
            dataset = CodeDataset(config.codes_folder)
        if isinstance(dataset, CodeDataset):
            opened: tuple[Images, Images] = self._checked(dataset), self._codes_to_validate_on(dataset, valid_dataset)
        else:
            opened = super()._open_data(dataset, valid_dataset)
        if self.with_labels:
            self._count_classes(*opened)
            for images in {id(images): images for images in opened}.values():
                self._check_labels(images)
        return opened

    def _count_classes(self, *datasets: Images) -> None:
        """Let classes have the numbers that they had when the run began; the model keeps their names."""
        names = self.run.classes_before(datasets[0].class_names)
        for dataset in dict.fromkeys(reversed(datasets)):  # of those to train on last, whose absence counts
            self._absent_classes = dataset.use_classes(names)
        self.model.class_names = datasets[0].class_names

    def _go_on(self) -> None:
        super()._go_on()
        if self._absent_classes is not None:
            self.report.print(printable(self._absent_classes))
        if isinstance(self.dataset, CodeDataset) and (few := _few_codes_in(self.dataset)) is not None:
            self.report.warn("codebook", few)

    def _codes_to_validate_on(self, dataset: CodeDataset, valid_dataset: Dataset | None) -> CodeDataset:
        """Return those that are given, or those that are trained on, which are split."""
        if valid_dataset is None and self.config.valid is None:
            return dataset
        if valid_dataset is None and str(self.config.valid).startswith(CODES):
            valid_dataset = CodeDataset(str(self.config.valid).removeprefix(CODES))
        if not isinstance(valid_dataset, CodeDataset):
            raise UserError(f"codes are trained on, and images were given to validate on; give {CODES}FOLDER, too")
        return self._checked(valid_dataset)

    def _checked(self, dataset: CodeDataset) -> CodeDataset:
        dataset.check_made_by(cast(Tokenizer, self.model.tokenizer))
        if rank_of_launcher() == 0:  # one reader is enough to find damaged files
            dataset.verify()
        return dataset

    def _check_makes_no_codes(self) -> None:
        if self.model.tokenizer is None:
            raise UserError(
                f"{an(type(self.model).__name__)} makes its codes itself and trains on images; {CODES} is for prior, "
                "var"
            )

    def _check_labels(self, dataset: Images) -> None:
        for index in {0, len(dataset) // 2, len(dataset) - 1}:
            self.model.check_label(dataset.label(index))

    def build_engines(self) -> dict[str, Engine]:
        if self.config.compile:
            self.model.compile()
        optimizer = self.make_optimizer(self.model)
        self.engine = self.backend.prepare(self.model, optimizer, max_grad_norm=self.config.max_grad_norm)
        return {"model": self.engine}

    def _set_up_networks(self) -> None:
        super()._set_up_networks()
        # of a tokenizer that is trained along: its codebook may die, one that is frozen cannot
        self.codes = CodeHistogram(cast(TokenizerNetwork, self.model), self.device) if self._is_tokenizer else None
        # of a frozen one it is counted from the start on whether few of its codes are in use
        self._seen: Tensor | None = None
        if not self._is_tokenizer and not isinstance(self.dataset, CodeDataset):
            self._seen = torch.zeros(self.model.codebook_size, dtype=torch.int64, device=self.device)
        scales = self.model.scale_lengths  # the likelihood of all codes is the loss already, that of each scale is not
        self.predicted = CodePredictionMetrics(
            self.model.num_codes, scales, self.device, likelihood=scales is not None
        )

    def take(self, batch: Batch) -> tuple[Tensor, Tensor, range]:
        """Return images (b, c, h, w) or codes (b, n), classes (b,), both on this rank's device, and places."""
        known = self.model.num_classes
        if known:
            self.model.check_label(int(batch.label.min()))
            self.model.check_label(int(batch.label.max()))
        label = batch.label if known else torch.zeros_like(batch.label)
        return self.to_device(batch.item), label.to(self.device, non_blocking=True), batch.places

    def update(self, micro_batches: list[tuple[Tensor, Tensor, range]]) -> dict[str, Tensor]:
        """One update of the whole network."""
        means = RunningMeans()
        for (item, label, places), last in mark_last(micro_batches):
            inputs = self.model.inputs(item, self.hide_labels(label, places))
            with self.engine.micro_step(last=last):
                out = self.engine(*inputs)
                loss, parts = self.model.loss(out, *inputs)
                self.engine.backward(loss)
            means.add({"loss": loss, **parts})
            self.predicted.update(out.logits.detach(), out.indices)
            if self.codes is not None:
                self.codes.add(out.indices)
            if self._seen is not None:
                self._seen += code_histogram(out.indices, codebook_size=len(self._seen))
        numbers = self.step_engine("model", means.means(), lr=self.learning_rate(self.config.lr))
        numbers["lr"] = torch.tensor(self.learning_rate(self.config.lr))
        return numbers

    def hide_labels(self, label: Tensor, positions: range) -> Tensor:
        """Classes (b,) of the images at these places of the data order, some of them replaced by "no class"."""
        if not self.with_labels or not self.config.label_dropout:
            return label
        seeds = (derive_seed("label dropout", self.config.seed, position) for position in positions)
        hidden = uniform_per_image(1, seeds)[:, 0] < self.config.label_dropout
        return label.masked_fill(hidden.to(label.device, non_blocking=True), self.model.num_classes)

    def numbers_over_ranks(self) -> dict[str, float]:
        """Accuracy (and the cross-entropy of each scale) on the training images since the last line; codes in use."""
        predicted = self.predicted.compute(self.backend)
        self.predicted.reset()
        numbers = {name: value for name, value in predicted.items() if name.startswith(("accuracy", "nll_scale"))}
        if self.codes is not None:
            numbers |= self.codes.usage(self.backend)
            self.report.watch_codebook(self.codes.few)
            self.codes.reset()
        if self._seen is not None:
            self._watch_codes(self._seen)
        return numbers

    def _watch_codes(self, seen: Tensor) -> None:
        """Look at the codes of a frozen tokenizer, until it is clear that enough are in use."""
        counts = self.backend.sum(seen.clone())
        few = few_codes(codebook_usage(counts)[0], int(counts.sum()), len(counts))
        self.report.watch_codebook(few)
        if few is None:
            self._seen = None

    def evaluate(self) -> dict[str, float]:
        """Measure the predictions of the validation images' codes; of VQ-AR also the reconstructions.

        Samples are drawn and measured where `validate_with` asks for it, and `validate_samples_every` does.
        """
        with self.averaged_model() as network:
            numbers = evaluate_prediction(network, (batch[:2] for batch in self.valid_batches()), self.backend)
            if self._is_tokenizer:
                numbers |= self.further.of_reconstructions(
                    partial(
                        evaluate_reconstruction,
                        cast(TokenizerNetwork, network),
                        self._valid_items(),
                        self.backend,
                        image_size=self.model.image_size,
                    )
                )
            if self.config.measures.of_samples and self._draws_now:
                numbers |= self._measured_samples(network)
        return numbers

    def _measured_samples(self, network: AutoregressiveModel) -> dict[str, float]:
        count = self.config.validate_samples
        return self.further.of_samples(self._drawn(network, count), count, self._valid_items)

    def validate_end(self) -> dict[str, float]:
        """Return the numbers of the last step; one that `patience` makes the last may have been without samples."""
        numbers = super().validate_end()
        if not numbers or not self.has_ended_early or numbers.keys() >= {*self.config.measures.of_samples}:
            return numbers

        def evaluate() -> dict[str, float]:
            with self.averaged_model() as network:
                return {**numbers, **self._measured_samples(network)}

        return self.report.validate(evaluate)

    def _valid_items(self) -> Iterator[Tensor]:
        return (item for item, *_ in self.valid_batches())

    @property
    def _draws_now(self) -> bool:
        """Return whether the validation of this step is one of those that draw samples."""
        config = self.config
        every = config.validate_every * config.validate_samples_every
        always = config.validate_samples_every == 1 or not every or self.step >= self.last_step
        return always or self.step % every == 0

    def _drawn(self, network: AutoregressiveModel, count: int) -> Iterator[Tensor]:
        """Yield this rank's batches (b, c, h, w) of samples to measure, the same for any number of ranks.

        Raises:
            BrokenOff: a rank got a signal; raised on every rank at the same batch, and so only where all are taken.
        """
        size, seed = self.config.batch_size, self.config.seed
        labels = self._labels_to_draw(network, count)
        batches = draw_batches(
            network, labels, self.draw_options(network), seed=seed, batch_size=size, backend=self.backend
        )
        for _ in range(0, count, size * self.backend.world_size):
            self.stop.break_off_if_asked()
            drawn = next(batches, None)
            if drawn is not None:
                yield drawn[1]

    def _labels_to_draw(self, network: AutoregressiveModel, count: int) -> Tensor:
        """(count,) classes of images to validate on that lie evenly over them, as `vqdist evaluate` draws them."""
        if not network.num_classes:
            return network.labels(None, count)
        indices = self.split.valid
        chosen = (int(indices[number * len(indices) // count]) for number in range(count))
        labels = [network.check_label(self.valid_dataset.label(index)) for index in chosen]
        return network.labels(torch.tensor(labels), count)

    def validation_protocol(self) -> dict[str, Any]:
        said = super().validation_protocol()
        if self.config.measures.of_samples:
            drawn = asdict(self.draw_options(self.model))
            said |= {"samples": self.config.validate_samples, "seed": self.config.seed, **drawn}
        return said

    def validation_names(self) -> set[str]:
        count = len(self.model.scale_lengths or ())
        scales = range(1, count + 1) if count > 1 else ()
        of_scales = {f"{name}_scale_{number}" for name in ("nll", "accuracy") for number in scales}
        names = {"nll", "bits_per_code", "perplexity", "accuracy", *of_scales, *self.config.measures.names}
        return names | names_of_reconstruction(cast(TokenizerNetwork, self.model)) if self._is_tokenizer else names

    def save_pictures(self, path: Path) -> None:
        """Draw a sheet of samples, the classes in turn; of VQ-AR also one of originals beside reconstructions."""
        with self.averaged_model() as network:
            if self.tracker is not None:  # on rank 0
                self.report.draw_alone(partial(self._draw_sheets, self.tracker, network, path))

    def _draw_sheets(self, tracker: Tracker, network: AutoregressiveModel, path: Path) -> None:
        self._draw_samples(tracker, network, path)
        if self._is_tokenizer:
            path = path.with_name(f"{path.stem}_reconstructions.png")
            self._draw_reconstructions(tracker, cast(TokenizerNetwork, network), path)

    def _draw_samples(self, tracker: Tracker, network: AutoregressiveModel, path: Path) -> None:
        count = self.config.num_images_save
        samples = self.samples(network, count)[:, None]
        tracker.picture(self.step, self.picture_name, samples, path, columns=round(count**0.5))

    def _draw_reconstructions(self, tracker: Tracker, network: TokenizerNetwork, path: Path) -> None:
        images = self.picture_images()
        both = torch.stack([images, reconstruct(network, images)], dim=1)
        tracker.picture(self.step, "reconstructions", both, path, columns=8)

    def samples(self, model: AutoregressiveModel, count: int) -> Tensor:
        """Images (count, c, h, w) drawn from a network; the same at every step but for it."""
        label = torch.arange(count) % model.num_classes if model.num_classes else None
        labels, options = model.labels(label, count), self.draw_options(model)
        return draw_numbers(model, range(count), labels, options, seed=self.config.seed)

    def draw_options(self, model: AutoregressiveModel) -> DrawOptions:
        """Return the options of drawing: those that were given, over the model's own."""
        return DrawOptions(**{**model.draw_defaults, **self.config.sample_options})

    def counts_to_come(self) -> dict[str, Tensor]:
        """Return what the next log line counts, besides the means."""
        counts = {"predicted": self.predicted.sums, "images": self.predicted.images}
        return counts if self.codes is None else {**counts, "codes": self.codes.counts}

    @contextmanager
    def averaged_model(self) -> Iterator[AutoregressiveModel]:
        with self.averaged_network() as model:
            yield cast(AutoregressiveModel, model)

    @property
    def _is_tokenizer(self) -> bool:
        """True if the model makes its codes itself, end to end."""
        return isinstance(self.model, TokenizerNetwork)


def _few_codes_in(codes: CodeDataset) -> str | None:
    """Return a sentence where stored codes are of a small part of the codebook, else None."""
    if codes.codebook_usage is None:
        return None
    return few_codes(codes.codebook_usage, len(codes) * codes.num_codes, codes.codebook_size)
