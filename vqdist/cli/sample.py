"""`vqdist sample RUN`: images from a run of any model that predicts codes."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from vqdist.classes import number_of
from vqdist.cli.loading import loading
from vqdist.cli.parsing import MODEL_HELP, add_trust_option, make_parser, parse
from vqdist.draw_options import DrawOptions
from vqdist.errors import UserError, an
from vqdist.locations import check_given
from vqdist.sizes import sides_of

LARGEST_SHEET = 2  # GiB of pixels
MOST = 10**9


def sample(arguments: list[str]) -> int:
    """Draw images: `vqdist sample RUN --num 64 --class 3 --cfg 2 --out samples.png`."""
    parser = make_parser("vqdist sample", "Draw images from a run of a prior, VAR or VQ-AR model.")
    parser.add_argument("run", type=str, help=MODEL_HELP)
    parser.add_argument(
        "--num",
        type=int,
        default=64,
        help="Images to draw; under torchrun say --num_images, since it takes --num for an option of its own.",
    )
    parser.add_argument(
        "--class",
        type=str | int | None,
        default=None,
        help="Class of all images, by its name or number; by default all classes in turn, where the model knows any.",
    )
    add_draw_options(parser)
    add_trust_option(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="PNG file of one sheet, or a folder for one PNG file an image, which the same command goes on to fill.",
    )
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        default=None,
        help="Tokenizer to decode with, in any form of `run`: that of the training, or one with another decoder.",
    )
    parser.add_argument("--columns", type=int | None, default=None, help="Images in a row of the sheet.")
    parser.add_argument("--backend", type=str, default="auto", help="`auto`, `local`, `accelerate` or `deepspeed`.")
    options = parse(parser, arguments)
    _check(options)

    with loading("torch and the run"):
        from vqdist.backends import create_backend
        from vqdist.backends.peers import naming_lost_peers
        from vqdist.drawing import SampleFolder, draw_batches, gather_images, weights_mark
        from vqdist.precision import allow_tf32
        from vqdist.ranks import on_main

        model = open_generator(options.run, options.trust_code)
    if options.tokenizer is not None:
        _take_tokenizer(model, options.tokenizer, options.trust_code)
    _check_sheet(model, options)
    drawn = draw_options(options, model)
    labels = _labels(model, options)
    backend = create_backend(options.backend)
    allow_tf32(backend.device)  # as in training
    model.to(backend.device)
    draw = partial(draw_batches, model, labels, drawn, seed=options.seed, batch_size=options.batch_size)
    with naming_lost_peers():
        if options.out.suffix.lower() == ".png":
            batches = with_progress(draw(backend=backend), options, backend)
            shape = (options.num, model.channels, *sides_of(model.image_size))
            images = gather_images(batches, shape, backend)
            on_main(backend, lambda: _save_sheet(images, options), f"--out {options.out} cannot be written")
        else:
            folder = SampleFolder(options.out, _plan(options, drawn, weights_mark(model)))
            folder.begin(backend)
            folder.write(with_progress(draw(backend=backend, is_done=folder.has), options, backend))
            backend.barrier()
    if backend.is_main:
        print(options.out)
    backend.close()
    return 0


def _plan(options, drawn, mark: str) -> dict[str, Any]:
    """Return all that the images of a folder depend on."""
    given = {name: getattr(options, name) for name in ("num", "class", "seed", "batch_size")}
    return {**given, **asdict(drawn), "weights": mark}


def add_draw_options(parser) -> None:
    """`--temperature`, `--top_k`, `--top_p`, `--min_p`, `--cfg`, `--seed` and `--batch_size`."""
    help_of = _field_docs(DrawOptions)
    for field in fields(DrawOptions):
        kind = int | None if field.name == "top_k" else float | None
        parser.add_argument(
            f"--{field.name}", type=kind, default=None, help=f"{help_of[field.name]} By default the model's choice."
        )
    parser.add_argument("--seed", type=int, default=0, help="Same seed, same pictures, for any number of processes.")
    parser.add_argument(
        "--batch_size", type=int, default=16, help="Images at once in one process; processes take batches in turn."
    )


def draw_options(options, model) -> Any:
    """Return the `DrawOptions` that were given, over the model's own."""
    if options.batch_size < 1:
        raise UserError(f"batch_size {options.batch_size} is not possible; it must be at least 1")
    drawn = DrawOptions(**{**model.draw_defaults, **given_draw_options(options)})
    if drawn.cfg != 1 and not model.num_classes:
        raise UserError(f"cfg {drawn.cfg:g} is given but the model knows no classes; leave it out")
    return drawn


def given_draw_options(options) -> dict[str, Any]:
    """Return what was said of the draw; `DrawOptions` of it raises what is not possible."""
    given = {field.name: getattr(options, field.name) for field in fields(DrawOptions)}
    return {name: value for name, value in given.items() if value is not None}


def open_generator(name_or_path: str, trust_code: bool = False):
    """Return the model of a run that images can be drawn from."""
    from vqdist.models.autoregressive import AutoregressiveModel
    from vqdist.models.pretrained import load_model_of_any_type

    model = load_model_of_any_type(name_or_path, trust_code=trust_code)
    if not isinstance(model, AutoregressiveModel):
        raise UserError(
            f"{name_or_path} holds {an(type(model).__name__)}, which makes no images of its own; give a run of a "
            "prior, var or vq_ar (train a prior over it: `vqdist train prior --tokenizer ...`)"
        )
    return model


def with_progress(batches: Iterator, options, backend) -> Iterator:
    """Return the batches, with a progress bar of rank 0's share on standard error."""
    from tqdm import tqdm

    count = -(-options.num // options.batch_size)
    mine = len(range(backend.rank, count, backend.world_size))
    return tqdm(
        batches,
        total=mine,
        desc=f"sample x{backend.world_size}",
        unit="batch",
        disable=not backend.is_main,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )


def _check(options) -> None:
    from vqdist.backends import resolve_backend
    from vqdist.backends.environment import rank_of_launcher

    resolve_backend(options.backend)
    DrawOptions(**given_draw_options(options))
    for name in ("num", "batch_size", "columns"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"{name} {value} is not possible; it must be at least 1 and at most {MOST}")
    if options.out.suffix.lower() != ".png":
        if options.out.suffix:
            raise UserError(f"--out {options.out} is neither the name of a PNG file nor of a folder; give one of both")
        if options.columns is not None:
            raise UserError(f"--columns {options.columns} is of a sheet, but --out {options.out} is a folder")
        _check_runs(options)
        if rank_of_launcher() == 0:
            from vqdist.drawing import SampleFolder

            SampleFolder.check(options.out)
        _make_writable(options.out)
    else:
        _check_runs(options)
        _make_writable(options.out.parent)


def _check_runs(options) -> None:
    for name in filter(None, (options.run, options.tokenizer)):
        check_given(name)


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written ({error.strerror}); give another place") from error


def _check_sheet(model, options) -> None:
    """Raise `UserError` for a sheet too large for the memory of the one process that puts it together."""
    gigabytes = 4 * options.num * model.channels * math.prod(sides_of(model.image_size)) / 2**30
    if options.out.suffix.lower() == ".png" and gigabytes > LARGEST_SHEET:
        raise UserError(
            f"a sheet of {options.num} images of {model.image_size} pixels takes {gigabytes:.0f} GiB of memory, over "
            f"{LARGEST_SHEET}; give --out FOLDER for a file an image"
        )


def _take_tokenizer(model, name_or_path: str, trust_code: bool) -> None:
    from vqdist.models.autoregressive import SecondStage
    from vqdist.models.tokenizer import Tokenizer

    if model.tokenizer is None:
        raise UserError(
            f"--tokenizer is given but {an(type(model).__name__)} has its codebook in itself; leave it out"
        )
    trained_over = model.tokenizer.fingerprint()
    given = Tokenizer.from_pretrained(name_or_path, fingerprint=trained_over, trust_code=trust_code)
    same_codes = given.codes_fingerprint() == model.tokenizer.codes_fingerprint()
    if same_codes and isinstance(model, SecondStage):
        model.decode_with(given)  # its decoder may be another
    elif given.fingerprint() != trained_over:
        raise UserError(
            f"the tokenizer {name_or_path} is not the one that the run was trained over (weights differ): codes would "
            "mean other pictures. Leave --tokenizer out: the run holds its own"
        )


def _labels(model, options):
    """(num,) int64: the class of each image."""
    import torch

    given = getattr(options, "class")
    if not model.num_classes:
        if given is not None:
            raise UserError(f"class {given} is asked for but the model knows no classes; leave it out")
        return model.labels(None, options.num).cpu()
    if given is None:
        return torch.arange(options.num) % model.num_classes
    return model.labels(number_of(str(given), model.class_names, model.num_classes), options.num).cpu()


def _save_sheet(images, options) -> None:
    from vqdist.tracking import save_sheet

    columns = options.columns or max(1, round(options.num**0.5))
    save_sheet(images[:, None], options.out, columns=columns)


def _field_docs(cls: type) -> dict[str, str]:
    """Return the line under each field of a dataclass."""
    import docstring_parser

    return {param.arg_name: param.description or "" for param in docstring_parser.parse_from_object(cls).params}
