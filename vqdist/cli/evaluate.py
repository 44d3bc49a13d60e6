"""`vqdist evaluate RUN`, for a run of any model, and `vqdist reconstruct RUN`, for one that is an image tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vqdist import protocol
from vqdist.backends.environment import rank_of_launcher
from vqdist.cli.loading import loading
from vqdist.cli.measuring import GeneratorRun, MeasuredRun, TokenizerRun
from vqdist.cli.parsing import MODEL_HELP, add_trust_option, make_parser, parse
from vqdist.cli.protocols import EPILOG as PROTOCOLS
from vqdist.cli.protocols import OWN, Asked, add_protocol_option, asked
from vqdist.cli.sample import add_draw_options, given_draw_options
from vqdist.data.config import CODES, MAX_BAD_FRAC
from vqdist.data.specs import check_spec
from vqdist.draw_options import DrawOptions
from vqdist.errors import UserError, an, printable
from vqdist.export import RECORD
from vqdist.files import METRICS, read_json
from vqdist.locations import check_given, find_export
from vqdist.sizes import ImageSize, image_size_of, sides_of

if TYPE_CHECKING:
    from vqdist.data.codes import CodeDataset
    from vqdist.data.dataset import ImageDataset
    from vqdist.evaluation.extractors import FeatureExtractor
    from vqdist.evaluation.references import ReferenceFile
    from vqdist.models.autoregressive import AutoregressiveModel
    from vqdist.models.tokenizer import Tokenizer, TokenizerModel
    from vqdist.objectives.lpips import LPIPS

BATCH_SIZE = 64
EPILOG = """\
A tokenizer's numbers: L1, PSNR (of the mean error, and as the mean of each image's), SSIM (of all channels, and of
luma), with pixels in [0, 1], codebook usage and perplexity; with --lpips also LPIPS; with --features also rfid, rsfid,
rkid, rprecision and rrecall, which compare its reconstructions with the images, and ris, their inception score.

Those of a prior, VAR or VQ-AR: nll (nats per code), bits_per_code (nll / ln 2), perplexity
and accuracy of the next code, of VAR also for each scale; with --features also fid, sfid, kid, is, precision and
recall of samples against the images. Samples have the classes of the images, as often as they occur there. VQ-AR has a
tokenizer's numbers too. sfid and is need the extractor `inception`.

The protocol is printed with the numbers: which images, sizes, extractor, reference and options they belong to. Only
numbers of one protocol can be compared; `vqdist report RUN RUN ...` does so with the last evaluation of each run.

"""
EPILOG += PROTOCOLS


def evaluate(arguments: list[str]) -> int:
    """Measure a run over a set of images, its reconstructions or predictions, and its samples; one JSON object."""
    options = parse(_evaluate_parser(), arguments)
    choices = asked(options)
    _check_options(options)
    check_given(options.run)
    run = Path(options.run).expanduser()

    with loading("torch and the run"):
        from vqdist.backends import create_backend
        from vqdist.backends.peers import naming_lost_peers
        from vqdist.models.autoregressive import AutoregressiveModel
        from vqdist.precision import allow_tf32

        model, step = _load(options)
    of_codes: dict[str, bool] = {}
    if isinstance(model, AutoregressiveModel):
        measured: MeasuredRun = _open_generator(model, options, choices)
    else:
        measured = _open_tokenizer(cast("TokenizerModel", model), options, choices)
        of_codes = _said_of_codes(cast("TokenizerModel", model), _image_size(options))
    measured.weights = _weights_of(find_export(options.run))
    backend = create_backend(options.backend)
    allow_tf32(backend.device)  # as in training
    with naming_lost_peers():
        numbers = measured.on(backend).numbers()
    if backend.is_main:
        found = {**numbers, protocol.KEY: measured.protocol()}
        print(json.dumps({**found, **of_codes}))
        if step >= 0:
            _keep(run, find_export(run), step, found)
    backend.close()
    return 0


def _said_of_codes(model: TokenizerModel, image_size: ImageSize | None) -> dict[str, bool]:
    """Return whether the codes are still those that training began from, and say it; nothing where it is unknown."""
    from vqdist.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(model, image_size)
    unchanged = tokenizer.keeps_codes_of_source()
    if unchanged is None:
        return {}
    if rank_of_launcher() == 0:
        source = printable(str(tokenizer.source_of_training))
        told = f"codes unchanged from {source}" if unchanged else f"other codes than {source}, from which it began"
        print(f"vqdist: {told}", file=sys.stderr)
    return {"codes_unchanged": unchanged}


def _load(options) -> tuple[Any, int]:
    """Return a model and the step that it is of. A run that trains exchanges its export for a newer one."""
    from vqdist.models.pretrained import load_model_of_any_type

    export = find_export(options.run)
    while True:
        step, model = _step_of(export), load_model_of_any_type(options.run, trust_code=options.trust_code)
        if step == _step_of(export):
            return model, step


def _step_of(export: Path) -> int:
    """Return the step that an export is of; -1 where it does not say."""
    step = _recorded(export, "step")
    return step if isinstance(step, int) else -1


def _weights_of(export: Path) -> str | None:
    """Return `averaged` or `live`, as an export says it; None where it does not."""
    weights = _recorded(export, "weights")
    return weights if weights in ("averaged", "live") else None


def _recorded(export: Path, name: str) -> Any:
    """Return a field of the record of an export; None where there is none."""
    try:
        return read_json(export / RECORD).get(name) if (export / RECORD).is_file() else None
    except UserError:
        return None


def _keep(run: Path, export: Path, step: int, found: dict[str, Any]) -> None:
    """Add an evaluation to those of a run, and to the card of its export, where it is the folder of a run.

    A run of others may not be written to.
    """
    if (run / METRICS).is_file():
        from vqdist.model_card import write_card

        try:
            protocol.keep(run, step, found)
            write_card(run, export)
        except UserError as error:
            print(f"vqdist: the numbers are not kept for `vqdist report`: {error}", file=sys.stderr)


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
    check_given(options.run)

    with loading("torch and the run"):
        import torch

        from vqdist.evaluation import reconstruct as reconstruct_images
        from vqdist.models.tokenizer import Tokenizer
        from vqdist.tracking import save_sheet

        tokenizer = Tokenizer.from_pretrained(options.run, _image_size(options), trust_code=options.trust_code)
    dataset = _open_images(options, tokenizer, Asked(None))
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
    parser.add_argument("run", type=str, help=MODEL_HELP)
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
    add_feature_options(parser)
    add_protocol_option(parser)
    parser.add_argument(
        "--reference",
        type=str | None,
        default=None,
        help="File of statistics to compare with in place of the images of --data: of `vqdist statistics`, the ADM "
        "evaluator, pytorch-fid or clean-fid (.npz), or of torch-fidelity (.pt). clean-fid's want inception_clean.",
    )
    parser.add_argument(
        "--lpips",
        type=str | None,
        default=None,
        help="Also measure LPIPS of reconstructions, by the network `vgg`, `alex` or `squeeze`; with weights from a "
        "file as in vgg:vgg16.pth.",
    )
    parser.add_argument(
        "--round_pixels",
        type=bool | str | None,
        default=None,
        help="Round reconstructions and samples to 8 bits before all measures, as where they are written to files "
        "first: true, or `down` to cut off. By default as --protocol says, or false.",
    )
    parser.add_argument(
        "--num_samples",
        type=int | None,
        default=None,
        help=f"Samples to draw from a prior, VAR or VQ-AR for --features; by default {OWN.images}, or as --protocol "
        "says.",
    )
    add_draw_options(parser)
    parser.set_defaults(batch_size=BATCH_SIZE, seed=None)
    return parser


def add_feature_options(parser) -> None:
    """`--features` and `--trust_features`, of commands that compare images by their features."""
    parser.add_argument(
        "--features",
        type=str | None,
        default=None,
        help="Feature extractor of FID, KID, precision and recall: `inception`, `inception_clean` (the resize of "
        "clean-fid), `vgg16`, `dinov2` (FD-DINOv2), another DINOv2 as `dinov2_vits14`, or a network of torchvision, "
        "such as `resnet50`, `convnext_base`, `vit_b_16` or `inception_v3`. Weights are given as in dinov2:FILE (.pth "
        "or .safetensors), or downloaded, but for DINOv2. With --trust_features also a TorchScript file: images "
        "(b, c, h, w) float32 in [0, 1] -> features (b, f).",
    )
    parser.add_argument(
        "--trust_features",
        type=bool,
        default=False,
        help="Whether --features may be a TorchScript file. That is a program: it can read and write your files.",
    )


def check_loading(options) -> None:
    """Raise `UserError` for a backend, batch size or number of processes that cannot be; torch is not imported."""
    from vqdist.backends import resolve_backend

    resolve_backend(options.backend)
    if options.batch_size < 1 or options.num_workers < 0:
        raise UserError(
            f"batch_size {options.batch_size} and num_workers {options.num_workers} are not possible; they must be at "
            "least 1 and 0"
        )


def _check_options(options) -> None:
    check_loading(options)
    DrawOptions(**given_draw_options(options))
    if options.features is None:
        if options.trust_features:
            raise UserError("--trust_features true is given but --features is not; give a file or leave it out")
        if options.reference is not None:
            raise UserError(f"--reference {options.reference} is given but --features is not; give the extractor")
        _refuse_sampling(options, "samples are drawn for --features only; give a feature extractor or leave it out")

    if not str(options.data.folder).startswith(CODES):
        check_spec(options.data.folder)


def _refuse_sampling(options, reason: str) -> None:
    for name in ("num_samples", "seed", "temperature", "top_k", "top_p", "min_p", "cfg"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} {getattr(options, name)} is given but {reason}")


# --------------------------------------------------------------------------------------------- runs and data


def _image_size(options) -> ImageSize | None:
    """Return what the user says, else a run's configuration; None where the model itself says it."""
    size = options.data.image_size
    config = Path(options.run).expanduser() / "config.json"
    if size is None and config.is_file():
        size = read_json(config).get("trainer", {}).get("image_size")
    return None if size is None else image_size_of(size)


def _open_images(options, model: Tokenizer | AutoregressiveModel, choices: Asked) -> ImageDataset:
    from vqdist.data.dataset import ImageDataset

    return ImageDataset(
        options.data.folder,
        model.image_size,
        channels=model.channels,
        augment=False,
        view=choices.view((getattr(model, "tokenizer", None) or model).resample),
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
    from vqdist.evaluation.extractors import load_extractor
    from vqdist.evaluation.fidelity import check_count

    if options.features is None:
        return None
    check_count(images, "images in --data")
    shape: dict[str, Any] = {"channels": model.channels, "image_size": model.image_size}
    return load_extractor(options.features, trust_code=options.trust_features, **shape)


def _open_reference(
    options, extractor: FeatureExtractor | None, model: Tokenizer | AutoregressiveModel
) -> ReferenceFile | None:
    from vqdist.evaluation.references import ReferenceFile

    if options.reference is None or extractor is None:
        return None
    file = ReferenceFile(options.reference)
    file.check_made_by(extractor, model.image_size)
    if file.has_moments or file.has_features:
        # of another extractor, or another order: said before anything is computed
        file.reference(extractor.width, extractor.widths.get("spatial"))
    return file


def _open_lpips(options, model: Tokenizer | AutoregressiveModel) -> LPIPS | None:
    from vqdist.objectives.lpips import LPIPS

    if options.lpips is None:
        return None
    net, _, weights = options.lpips.partition(":")
    lpips = LPIPS(weights or None, net=net)
    lpips.check_image_size(min(sides_of(model.image_size)))
    return lpips


def _open_tokenizer(model: TokenizerModel, options, choices: Asked) -> TokenizerRun:
    from vqdist.models.tokenizer import Tokenizer

    _refuse_sampling(options, f"{options.run} is a tokenizer, which draws no samples; leave it out")
    tokenizer = Tokenizer(model, _image_size(options))
    dataset = _open_images(options, tokenizer, choices)
    extractor = _open_extractor(options, tokenizer, len(dataset))
    reference, lpips = _open_reference(options, extractor, tokenizer), _open_lpips(options, tokenizer)
    return TokenizerRun(options, tokenizer.network, dataset, extractor, reference, lpips, choices)


def _refuse_reconstructing(options, model: AutoregressiveModel) -> None:
    """Raise `UserError` for what is about reconstructions, of a model that makes none; samples can be rounded."""
    none = f"is given but {an(type(model).__name__)} reconstructs no images"
    if options.lpips:
        raise UserError(f"--lpips {none}; leave it out, or evaluate its tokenizer")
    if options.round_pixels is not None and options.features is None:
        raise UserError(f"--round_pixels {none}, and draws samples for --features only; give them, or leave it out")


def _open_generator(model: AutoregressiveModel, options, choices: Asked) -> GeneratorRun:
    from vqdist.models.tokenizer import TokenizerNetwork

    size = options.data.image_size
    if size is not None and image_size_of(size) != model.image_size:
        raise UserError(f"image_size {size} is given but the model is for {model.image_size}; leave it out")
    folder = options.data.folder
    stored = folder.removeprefix(CODES) if isinstance(folder, str) and folder.startswith(CODES) else None
    dataset = _open_images(options, model, choices) if stored is None else _open_codes(stored, model, options)

    if model.num_classes:
        absent = dataset.use_classes(model.class_names)
        if absent is not None and rank_of_launcher() == 0:
            print(f"vqdist: {printable(absent)}", file=sys.stderr)
    extractor = _open_extractor(options, model, len(dataset))
    reference, lpips = _open_reference(options, extractor, model), None
    if isinstance(model, TokenizerNetwork):
        lpips = _open_lpips(options, model)
    else:
        _refuse_reconstructing(options, model)
    run = GeneratorRun(options, model, dataset, extractor, reference, lpips, choices)
    run.check()
    return run
