"""`vqdist statistics`, which looks at a set of images once, and `vqdist fidelity`, which compares images with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqdist.cli.evaluate import BATCH_SIZE, add_feature_options, check_loading
from vqdist.cli.loading import loading
from vqdist.cli.parsing import make_parser, parse
from vqdist.cli.protocols import EPILOG as PROTOCOLS
from vqdist.cli.protocols import Asked, add_protocol_option, asked
from vqdist.conventions import IMAGES, STATISTICS
from vqdist.data.config import View
from vqdist.data.specs import check_spec
from vqdist.errors import UserError
from vqdist.sizes import ImageSize, image_size_of, sides_of

if TYPE_CHECKING:
    from vqdist.backends import Backend
    from vqdist.evaluation.extractors import FeatureExtractor
    from vqdist.evaluation.features import Features
    from vqdist.evaluation.references import Reference

KEPT = 10_000  # images whose features a file keeps, as many as ADM's reference batches hold
FIDELITY_EPILOG = """\
Prints one JSON object: fid, sfid, kid, is, precision and recall where the extractor and the reference allow them, and
the protocol: what they were measured on. SAMPLES and --reference may be images (as --data of train), or an .npz of
the ADM evaluator, of pytorch-fid, clean-fid or `vqdist statistics`.

"""
FIDELITY_EPILOG += PROTOCOLS


def statistics(arguments: list[str]) -> int:
    """Write the statistics of a set of images as a file: `vqdist statistics --data DIR --out ref.npz`."""
    parser = _parser(
        "vqdist statistics", "Look at all images of --data once, and write what FID compares with.", PROTOCOLS
    )
    parser.add_argument(
        "--data.folder", type=str | dict[str, Any], required=True, help="Images, as for train (short: --data)."
    )
    parser.add_argument("--out", type=Path, required=True, help="File to write (.npz).")
    parser.add_argument(
        "--keep", type=int, default=KEPT, help="Images whose features are kept, for KID, precision and recall."
    )
    options = parse(parser, arguments)
    choices = asked(options)
    if options.out.suffix != ".npz":
        raise UserError(f"--out {options.out} is no name of statistics; give one that ends in .npz")
    _check_options(options, [options.data.folder])
    with loading("torch"):
        from vqdist.evaluation.fidelity import check_count
        from vqdist.evaluation.references import Reference

        if options.keep != 0:
            check_count(options.keep, "images in --keep (0 keeps none)")
        looking = _Looking(options, choices, [options.data.folder])
    looked, protocol = looking.at(options.data.folder)
    protocol |= choices.said(looking.found(), choices.samples)
    check_count(len(looked), "images in --data")
    if looking.backend.is_main:
        Reference.of(looked, protocol).write(options.out, options.keep)
        print(options.out)
    looking.backend.close()
    return 0


def fidelity(arguments: list[str]) -> int:
    """Compare images with others or with statistics of others: `vqdist fidelity SAMPLES --reference ref.npz`."""
    parser = _parser("vqdist fidelity", "Compare images with others, or with statistics of others.", FIDELITY_EPILOG)
    parser.add_argument("samples", type=str, help="Images: a folder or another source, or an .npz of images (arr_0).")
    parser.add_argument("--reference", type=str, required=True, help="Images, or statistics, to compare with.")
    options = parse(parser, arguments)
    choices = asked(options)
    _check_options(options, [options.samples, options.reference])
    with loading("torch"):
        from vqdist.evaluation.fidelity import fidelity as compare
        from vqdist.protocol import of_making

        looking = _Looking(options, choices, [options.samples, options.reference])
    samples, protocol = looking.at(options.samples)
    reference, of_reference = looking.reference(options.reference)
    splits = choices.samples.splits
    numbers: dict[str, Any] = {**compare(samples, reference, splits=splits), "samples": len(samples)}
    said: dict[str, Any] = {"reference": options.reference, "reference_hash": of_reference.get("data_hash")}
    said |= of_making(of_reference)
    if samples.logits is not None:
        said["inception_score_over"] = splits
    kind = STATISTICS if _is_file(options.reference) else IMAGES
    said |= choices.said({**looking.found(), "images": len(samples), "compared_with": kind}, choices.samples)
    if looking.backend.is_main:
        print(json.dumps({**numbers, "protocol": {**protocol, **said}}))
    looking.backend.close()
    return 0


def _parser(program: str, description: str, epilog: str | None = None):
    parser = make_parser(program, description, epilog)
    add_feature_options(parser)
    add_protocol_option(parser)
    parser.add_argument(
        "--image_size",
        type=int | list[int] | None,
        default=None,
        help="Side in pixels, or [height, width]; by default that of the first image.",
    )
    parser.add_argument("--channels", type=int, default=3, help="Of the images: 1 or 3.")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="Images that a rank looks at at once.")
    parser.add_argument("--num_workers", type=int, default=0, help="Loader processes of each rank.")
    parser.add_argument("--backend", type=str, default="auto", help="`auto`, `local`, `accelerate` or `deepspeed`.")
    return parser


def _check_options(options: Any, specs: list[Any]) -> None:
    """Find the mistakes that can be seen before torch is imported."""
    if options.features is None:
        raise UserError(
            "the option features is missing; give an extractor, as in --features inception, or a --protocol"
        )
    check_loading(options)
    for spec in specs:
        if not _is_file(spec):
            check_spec(spec)
        elif not Path(spec).expanduser().is_file():
            raise UserError(f"there is no file {spec}; check the path")


class _Looking:
    """Looks at sets of images with one extractor, over ranks. Every rank calls every method.

    Args:
        options: as the parser gives them.
        choices: of a named protocol, or vqdist's own.
        specs: what will be looked at; the first one that is no file of statistics says the size of an image.
    """

    def __init__(self, options: Any, choices: Asked, specs: list[Any]):
        from vqdist.backends import create_backend
        from vqdist.evaluation.extractors import load_extractor
        from vqdist.precision import allow_tf32

        self.options, self.choices, self.view = options, choices, choices.view(View().resample)
        self.image_size = _image_size(options.image_size, specs, choices)
        self.extractor: FeatureExtractor = load_extractor(
            options.features,
            channels=options.channels,
            image_size=self.image_size,
            trust_code=options.trust_features,
        )
        self.backend: Backend = create_backend(options.backend)
        allow_tf32(self.backend.device)
        self.extractor.to(self.backend.device)

    def at(self, spec: Any) -> tuple[Features, dict[str, Any]]:
        """Return the features of a set of images, and what the protocol says of it."""
        from vqdist import protocol

        features, said = self._at_file(spec) if _is_file(spec) else self._at_images(spec)
        return features, {**said, **protocol.of_features(self.extractor, None)}

    def reference(self, spec: Any) -> tuple[Features | Reference, dict[str, Any]]:
        """Return what images are compared with, and what the protocol says of it."""
        from vqdist.evaluation.references import ReferenceFile, reference_in

        if not _is_file(spec):
            return self.at(spec)
        file = ReferenceFile(spec)
        file.check_made_by(self.extractor, self.image_size)
        reference = reference_in(file, self.extractor, self.backend, self.options.batch_size)
        return reference, {**file.protocol(), "data_hash": file.digest()}

    def _at_images(self, spec: Any) -> tuple[Features, dict[str, Any]]:
        from torch import nn

        from vqdist import protocol
        from vqdist.cli.measuring import MeasuredRun
        from vqdist.data.dataset import ImageDataset

        size, channels = self.image_size, self.options.channels
        dataset = ImageDataset(spec, size, channels=channels, augment=False, view=self.view)
        run = MeasuredRun(self.options, nn.Identity(), dataset, self.extractor, asked=self.choices).on(self.backend)
        return run.features_of_images(), protocol.of_images(dataset, spec)

    def _at_file(self, spec: str) -> tuple[Features, dict[str, Any]]:
        from vqdist import protocol
        from vqdist.evaluation.references import ReferenceFile, features_in

        file = ReferenceFile(spec)
        features = features_in(file, self.extractor, self.backend, self.options.batch_size)
        said = {"data": str(spec), "data_hash": file.digest(), "images": file.count, "image_size": file.image_size}
        return features, {**protocol.of_program(), **said}

    def found(self) -> dict[str, Any]:
        """Return what a named protocol is compared with."""
        rows, columns = sides_of(self.image_size)
        size = rows if rows == columns else [rows, columns]
        return {"image_size": size, "features": self.extractor.kind, "center": self.view.center}


def _is_file(spec: Any) -> bool:
    """Return whether a spec names a file of arrays, as against images."""
    return isinstance(spec, str) and Path(spec).suffix in (".npz", ".pt")


def _image_size(given: Any, specs: list[Any], choices: Asked) -> ImageSize:
    """Return the size that is given, or else the protocol's, or that of the first image.

    One that a file holds is never another.
    """
    from vqdist.evaluation.references import ReferenceFile

    sizes = [ReferenceFile(spec).image_size for spec in specs if _is_file(spec)]
    held = [one for one in sizes if one is not None]
    if given is None and not held and all(map(_is_file, specs)):
        raise UserError(f"{specs[0]} holds statistics but no images; give images in its place")
    if given is None and not held and choices.convention is not None:
        return choices.convention.image_size
    chosen = image_size_of(given if given is not None else held[0] if held else _size_of_first(specs))
    for one in held:
        if list(sides_of(chosen)) != one:
            raise UserError(f"--image_size {given} is given, and an .npz holds images of {one} pixels; leave it out")
    return chosen


def _size_of_first(specs: list[Any]) -> list[int]:
    """Return height and width of the first image of the first set."""
    from vqdist.data.sources import open_source

    width, height = open_source(next(spec for spec in specs if not _is_file(spec))).image(0).size
    return [height, width]
