"""`vqdist evaluate RUN`, for a run of any model, and `vqdist reconstruct RUN`, for one that is an image tokenizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vqdist.backends.environment import rank_of_launcher
from vqdist.cli.loading import loading
from vqdist.cli.parsing import add_trust_option, make_parser, parse
from vqdist.cli.sample import add_draw_options, draw_options, given_draw_options
from vqdist.data.config import CODES, MAX_BAD_FRAC, View
from vqdist.data.specs import check_spec
from vqdist.draw_options import DrawOptions
from vqdist.errors import UserError, an, printable
from vqdist.files import read_json
from vqdist.locations import find_local_export
from vqdist.sizes import ImageSize, image_size_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vqdist.backends import Backend
    from vqdist.data.codes import CodeDataset
    from vqdist.data.dataset import ImageDataset
    from vqdist.data.loader import Batch
    from vqdist.fidelity import FeatureExtractor, FeatureSet
    from vqdist.models.autoregressive import AutoregressiveModel
    from vqdist.models.tokenizer import Tokenizer, TokenizerModel, TokenizerNetwork

NUM_SAMPLES = 1000
BATCH_SIZE = 64
EPILOG = """\
A tokenizer's numbers: L1, PSNR, SSIM (pixels in [0, 1]), codebook usage and perplexity; with --features also rfid and
rkid, the distances of its reconstructions from the images.

Those of a prior, VAR or VQ-AR: nll (nats per code), bits_per_code (nll / ln 2), perplexity
and accuracy of the next code, of VAR also for each scale; with --features also fid, kid, precision and recall of
samples against the images. Samples have the classes of the images, as often as they occur there. VQ-AR has a
tokenizer's numbers too."""


def evaluate(arguments: list[str]) -> int:
    """Measure a run over a set of images, its reconstructions or predictions, and its samples; one JSON object."""
    options = parse(_evaluate_parser(), arguments)
    _check_options(options)
    run, export = Path(options.run).expanduser(), find_local_export(options.run)

    with loading("torch and the run"):
        from vqdist.backends import create_backend
        from vqdist.backends.peers import naming_lost_peers
        from vqdist.models.autoregressive import AutoregressiveModel
        from vqdist.models.pretrained import load_model_of_any_type

        model = load_model_of_any_type(export, trust_code=options.trust_code)
    if isinstance(model, AutoregressiveModel):
        measured: _Run = _open_generator(model, options)
    else:
        measured = _open_tokenizer(cast("TokenizerModel", model), run, export, options)
    backend = create_backend(options.backend)
    with naming_lost_peers():
        numbers = measured.on(backend).numbers()
    if backend.is_main:
        print(json.dumps(numbers))
    backend.close()
    return 0


def reconstruct(arguments: list[str]) -> int:
    """Draw originals beside their reconstructions: `vqdist reconstruct RUN --data DIR --out grid.png`."""
    parser = _run_parser("vqdist reconstruct", "Draw images of --data beside a run's reconstructions of them.")
    parser.add_argument("--out", type=Path, default=Path("reconstructions.png"), help="PNG file to write.")
    parser.add_argument("--num_images", type=int, default=16, help="Images to draw, the first of --data.")
    options = parse(parser, arguments)
    check_spec(options.data.folder)
    if options.num_images < 1:
        raise UserError(f"num_images {options.num_images} is not possible; it must be at least 1")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out} is not the name of a PNG file; give one that ends in .png")
    run, export = Path(options.run).expanduser(), find_local_export(options.run)

    with loading("torch and the run"):
        import torch

        from vqdist.evaluation import reconstruct as reconstruct_images
        from vqdist.models.tokenizer import Tokenizer
        from vqdist.tracking import save_sheet

        tokenizer = Tokenizer.from_pretrained(export, _image_size(run, export, options), trust_code=options.trust_code)
    dataset = _open_images(options, tokenizer)
    count = min(options.num_images, len(dataset))
    fetched = [dataset.fetch(0, index) for index in range(count)]
    images = torch.stack([image for image, _ in fetched])
    for name in (name for _, skipped in fetched for name in skipped):
        print(f"skipped an image that cannot be decoded: {printable(name)}", file=sys.stderr)
    save_sheet(torch.stack([images, reconstruct_images(tokenizer.network, images)], dim=1), options.out)
    print(options.out)
    return 0


# --------------------------------------------------------------------------------------------- options


def _run_parser(program: str, description: str, epilog: str | None = None):
    """Return a parser of what `evaluate` and `reconstruct` share: a run, images, and how to load them."""
    parser = make_parser(program, description, epilog)
    parser.add_argument("run", type=str, help="Run folder, or a folder that save_pretrained wrote.")
    parser.add_argument(
        "--data.folder", type=str | dict[str, Any], required=True, help="Images, as for train (short: --data)."
    )
    parser.add_argument(
        "--data.image_size",
        type=int | list[int] | None,
        default=None,
        help="Side in pixels, or [height, width] (short: --image_size); by default the run's.",
    )
    parser.add_argument(
        "--data.on_bad_image", type=str, default="raise", help="`raise` or `skip` (short: --on_bad_image)."
    )
    parser.add_argument(
        "--data.max_bad_frac",
        type=float,
        default=MAX_BAD_FRAC,
        help="Largest share of the images that `skip` may pass over, but at least one (short: --max_bad_frac).",
    )
    add_trust_option(parser)
    return parser


def _evaluate_parser():
    parser = _run_parser("vqdist evaluate", "Measure a run over all images of --data.", EPILOG)
    parser.add_argument("--num_workers", type=int, default=0, help="Loader processes of each rank.")
    parser.add_argument("--backend", type=str, default="auto", help="`auto`, `local`, `accelerate` or `deepspeed`.")
    parser.add_argument(
        "--features",
        type=str | None,
        default=None,
        help="Feature extractor of FID, KID, precision and recall: `inception`, `vgg16`, a file with the weights of "
        "one of them, or, with --trust_features, a TorchScript file: images (b, c, h, w) float32 in [0, 1] -> "
        "features (b, f).",
    )
    parser.add_argument(
        "--trust_features",
        type=bool,
        default=False,
        help="Whether --features may be a TorchScript file. That is a program: it can read and write your files.",
    )
    parser.add_argument(
        "--num_samples",
        type=int | None,
        default=None,
        help=f"Samples to draw from a prior, VAR or VQ-AR for --features; by default {NUM_SAMPLES}.",
    )
    add_draw_options(parser)
    parser.set_defaults(batch_size=BATCH_SIZE, seed=None)
    return parser


def _check_options(options) -> None:
    from vqdist.backends import resolve_backend

    resolve_backend(options.backend)
    DrawOptions(**given_draw_options(options))
    if options.batch_size < 1 or options.num_workers < 0:
        raise UserError(
            f"batch_size {options.batch_size} and num_workers {options.num_workers} are not possible; they must be at "
            "least 1 and 0"
        )
    if options.features is None:
        if options.trust_features:
            raise UserError("--trust_features true is given but --features is not; give a file or leave it out")
        _refuse_sampling(options, "samples are drawn for --features only; give a feature extractor or leave it out")

    if not str(options.data.folder).startswith(CODES):
        check_spec(options.data.folder)


def _refuse_sampling(options, reason: str) -> None:
    for name in ("num_samples", "seed", "temperature", "top_k", "top_p", "min_p", "cfg"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} {getattr(options, name)} is given but {reason}")


# --------------------------------------------------------------------------------------------- runs and data


def _image_size(run: Path, export: Path, options) -> ImageSize:
    """Return what the user says, else the run's configuration, else that of an export alone."""
    if options.data.image_size is not None:
        return image_size_of(options.data.image_size)
    folder = run if (run / "config.json").is_file() else export
    content = read_json(folder / "config.json")
    size = content.get("trainer", content).get("image_size")
    if size is None:
        raise UserError(f"{run} does not say on which image size it was trained; give --image_size")
    return image_size_of(size)


def _open_images(options, model: Tokenizer | AutoregressiveModel) -> ImageDataset:
    from vqdist.data.dataset import ImageDataset

    return ImageDataset(
        options.data.folder,
        model.image_size,
        channels=model.channels,
        augment=False,
        view=View(resample=(getattr(model, "tokenizer", None) or model).resample),
        on_bad_image=options.data.on_bad_image,
        max_bad_frac=options.data.max_bad_frac,
    )


def _open_codes(folder: str, model: AutoregressiveModel, options) -> CodeDataset:
    """Return stored codes, where the model takes them and nothing asks for images."""
    from vqdist.data.codes import CodeDataset

    if model.tokenizer is None:
        raise UserError(f"{an(type(model).__name__)} makes its codes itself; give images in place of {CODES}{folder}")
    if options.features is not None:
        raise UserError(f"--features looks at images, and {CODES}{folder} holds none; give the images with --data")
    codes = CodeDataset(folder)
    codes.check_made_by(model.tokenizer)
    return codes


def _open_extractor(options, model: Tokenizer | AutoregressiveModel, images: int) -> FeatureExtractor | None:
    from vqdist.fidelity import check_count, load_extractor

    if options.features is None:
        return None
    check_count(images, "images in --data")
    shape: dict[str, Any] = {"channels": model.channels, "image_size": model.image_size}
    return load_extractor(options.features, trust_code=options.trust_features, **shape)


def _open_tokenizer(model: TokenizerModel, run: Path, export: Path, options) -> _TokenizerRun:
    from vqdist.models.tokenizer import Tokenizer

    _refuse_sampling(options, f"{run} is a tokenizer, which draws no samples; leave it out")
    tokenizer = Tokenizer(model, _image_size(run, export, options))
    dataset = _open_images(options, tokenizer)
    return _TokenizerRun(options, tokenizer.network, dataset, _open_extractor(options, tokenizer, len(dataset)))


def _open_generator(model: AutoregressiveModel, options) -> _GeneratorRun:
    size = options.data.image_size
    if size is not None and image_size_of(size) != model.image_size:
        raise UserError(f"image_size {size} is given but the model is for {model.image_size}; leave it out")
    folder = options.data.folder
    stored = folder.removeprefix(CODES) if isinstance(folder, str) and folder.startswith(CODES) else None
    dataset = _open_images(options, model) if stored is None else _open_codes(stored, model, options)

    if model.num_classes:
        absent = dataset.use_classes(model.class_names)
        if absent is not None and rank_of_launcher() == 0:
            print(f"vqdist: {printable(absent)}", file=sys.stderr)
    run = _GeneratorRun(options, model, dataset, _open_extractor(options, model, len(dataset)))
    run.check()
    return run


# --------------------------------------------------------------------------------------------- measuring


@dataclass
class _Run:
    """A run that is measured over the images (or codes) of `dataset`. Every rank calls every method."""

    options: Any  # as the parser gives them
    network: nn.Module
    dataset: ImageDataset | CodeDataset
    extractor: FeatureExtractor | None
    skipped: set[str] = field(default_factory=set)

    def on(self, backend: Backend) -> _Run:
        """Return this run, with its networks on the backend's device."""
        self.backend = backend
        self.network.to(backend.device)
        if self.extractor is not None:
            self.extractor.to(backend.device)
        return self

    def numbers(self) -> dict[str, float]:
        """Measure what there is to measure."""
        raise NotImplementedError

    def feature_set(self, count: int, **options: Any) -> FeatureSet:
        """Return what collects the features of so many images; only where there is an extractor."""
        from vqdist.fidelity import FeatureSet

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

    def progress(self, batches: Iterator, title: str, items: int) -> Iterator:
        """Return these batches of so many items, with a bar on a terminal."""
        from tqdm import tqdm

        shown = self.backend.is_main and sys.stderr.isatty()
        return tqdm(batches, title, -(-items // self.options.batch_size), unit="batch", disable=not shown)

    def report_skipped(self, names: list[str]) -> None:
        """Say it once of an image, however often the data is gone through."""
        from vqdist.data.dataset import most_bad, too_many_bad

        for name in names:
            if name not in self.skipped:
                print(f"skipped an image that cannot be decoded: {printable(name)}", file=sys.stderr)
                self.skipped.add(name)
        share, total = self.options.data.max_bad_frac, len(self.dataset)
        if len(self.skipped) > most_bad(total, share):
            raise too_many_bad(len(self.skipped), total, share, sorted(self.skipped))

    def reconstruction_numbers(self, network: TokenizerNetwork, image_size: ImageSize) -> dict[str, float]:
        """Measure the reconstructions of the images."""
        from vqdist.evaluation import evaluate_reconstruction

        images = (batch.item for batch in self.batches("reconstruct"))
        return evaluate_reconstruction(network, images, self.backend, image_size=image_size)

    def features_of_images(self, *, and_reconstructions: bool) -> tuple[Tensor, Tensor | None]:
        """Features (M, f) of the images, and those of their reconstructions."""
        from vqdist.evaluation import reconstruct

        real = self.feature_set(len(self.dataset))
        again = self.feature_set(len(self.dataset)) if and_reconstructions else None
        for batch in self.batches("features"):
            real.add(batch.item)
            if again is not None:
                again.add(reconstruct(cast("TokenizerNetwork", self.network), batch.item))
        return real.over_ranks(), None if again is None else again.over_ranks()


class _TokenizerRun(_Run):
    """A run of a model that is an image tokenizer and nothing else; `network` is its `TokenizerNetwork`."""

    network: TokenizerNetwork
    dataset: ImageDataset

    def numbers(self) -> dict[str, float]:
        """Of its reconstructions."""
        numbers = self.reconstruction_numbers(self.network, self.dataset.image_size)
        if self.extractor is not None:
            real, again = self.features_of_images(and_reconstructions=True)
            numbers |= _distances(real, cast("Tensor", again))
        return numbers


class _GeneratorRun(_Run):
    """A run of an `AutoregressiveModel`."""

    network: AutoregressiveModel

    def check(self) -> None:
        """Find what is wrong with the labels and the samples before anything is computed."""
        from vqdist.fidelity import check_count

        if self.network.num_classes:
            for index in {0, len(self.dataset) // 2, len(self.dataset) - 1}:
                self.network.check_label(self.dataset.label(index))
        if self.extractor is not None:
            self.draw_options = draw_options(self.options, self.network)
            self.num_samples = NUM_SAMPLES if self.options.num_samples is None else self.options.num_samples
            check_count(self.num_samples, "samples")

    def numbers(self) -> dict[str, float]:
        """Of its predictions, of its reconstructions if it has a codebook of its own, and of its samples."""
        from vqdist.evaluation import evaluate_prediction
        from vqdist.models.tokenizer import TokenizerNetwork

        numbers = evaluate_prediction(self.network, self.items_and_labels(), self.backend)
        is_tokenizer = isinstance(self.network, TokenizerNetwork)
        if is_tokenizer:
            network = cast(TokenizerNetwork, self.network)
            numbers |= self.reconstruction_numbers(network, self.network.image_size)
        if self.extractor is not None:
            numbers |= self.fidelity_numbers(is_tokenizer)
        return numbers

    def items_and_labels(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images or codes with the classes of the images, as the model wants them."""
        known = self.network.num_classes
        for batch in self.batches("predict", labels=known > 0):
            for label in batch.label.unique().tolist() if known else ():
                self.network.check_label(label)
            yield batch.item, batch.label if known else batch.label.new_zeros(len(batch.label))

    def fidelity_numbers(self, is_tokenizer: bool) -> dict[str, float]:
        """Of the samples against the images; and of the reconstructions."""
        from vqdist.fidelity import fidelity

        real, again = self.features_of_images(and_reconstructions=is_tokenizer)
        numbers = {**fidelity(self.features_of_samples(), real), "samples": self.num_samples}
        return numbers if again is None else {**numbers, **_distances(real, again)}

    def features_of_samples(self) -> Tensor:
        """Features (N, f) of images that the model draws."""
        from vqdist.drawing import draw_batches

        size, seed = self.options.batch_size, self.options.seed or 0
        drawn = self.feature_set(self.num_samples, block=size)
        batches = draw_batches(
            self.network, self.sample_labels(), self.draw_options, seed=seed, batch_size=size, backend=self.backend
        )
        for _, images in self.progress(batches, "sample", -(-self.num_samples // self.backend.world_size)):
            drawn.add(images)
        return drawn.over_ranks()

    def sample_labels(self) -> Tensor:
        """(N,) classes of images that lie evenly over the data: in any order of it, each class as often as there."""
        import torch

        model, count = self.network, self.num_samples
        if not model.num_classes:
            return model.labels(None, count)
        labels = [self.dataset.label(number * len(self.dataset) // count) for number in range(count)]
        return model.labels(torch.tensor([model.check_label(label) for label in labels]), count)


def _distances(images: Tensor, reconstructions: Tensor) -> dict[str, float]:
    """`rfid` and `rkid`: how far the reconstructions are from the images."""
    from vqdist.fidelity import fidelity

    numbers = fidelity(reconstructions, images, coverage=False)
    return {f"r{name}": numbers[name] for name in ("fid", "kid")}
