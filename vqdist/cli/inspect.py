"""`vqdist inspect RUN|EXPORT|FILE`: facts of a saved model, and what it makes of an image as one picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqdist.cli.loading import loading
from vqdist.cli.parsing import add_trust_option, make_parser, parse
from vqdist.errors import UserError, an, printable
from vqdist.registries import FAMILIES
from vqdist.sizes import image_size_of

if TYPE_CHECKING:
    from vqdist.inspection import Found

EPILOG = """examples:
  vqdist inspect runs/a                          what the run has come to: size by part, codes, hash, licence
  vqdist inspect vq_ds16_c2i.pt                  the same of a file of another project, and whose shapes it has
  vqdist inspect runs/a --image photo.jpg        original, reconstruction, difference, code map and codes in use
"""
PICTURE = Path("inspection.png")


def inspect(arguments: list[str]) -> int:
    """Say what a run, an export or a published file holds; with --image draw what it makes of one."""
    options = parse(_parser(), arguments)
    _check(options)
    with loading("torch and the model"):
        from vqdist.inspection import facts_of, find

        found = find(
            options.model, trust_code=options.trust_code, family=options.family, peer_config=options.peer_config
        )
        size = None if options.image_size is None else image_size_of(options.image_size)
        if options.image is None:
            facts = facts_of(found, size)
            print(json.dumps(facts) if options.json else "\n".join(lines_of(facts)))
        else:
            print(_draw(found, size, options))
    return 0


def _parser():
    parser = make_parser("vqdist inspect", inspect.__doc__ or "", EPILOG)
    parser.add_argument("model", type=str, help="Run, export, or file or folder of another project.")
    parser.add_argument("--image", type=Path | None, default=None, help="Image to draw in place of the facts.")
    parser.add_argument("--out", type=Path | None, default=None, help=f"PNG file to write; by default {PICTURE}.")
    parser.add_argument(
        "--image_size",
        type=int | list[int] | None,
        default=None,
        help="Side in pixels, or [height, width], of a tokenizer's images; by default what the model says.",
    )
    parser.add_argument("--json", type=bool, default=False, help="Print the facts as one JSON object.")
    families = ", ".join(FAMILIES)
    parser.add_argument(
        "--family", type=str | None, default=None, help=f"Of a file, by default recognised: {families}."
    )
    parser.add_argument(
        "--peer_config",
        type=str | None,
        default=None,
        help="Configuration of another project's file, YAML or JSON: it says what shapes of tensors do not.",
    )
    add_trust_option(parser)
    return parser


def _check(options) -> None:
    """Raise `UserError` for files that are not there and options that nothing reads, before torch is imported."""
    from vqdist.inspection import check_kept

    if options.image is None and options.out is not None:
        raise UserError(f"--out {options.out} is given but --image is not; give an image to draw, or leave it out")
    if options.image is not None and options.json:
        raise UserError("--json is for the facts, and --image draws a picture; give one of the two")
    if options.image is not None and not options.image.expanduser().is_file():
        raise UserError(f"no such file: {options.image}; --image takes an image, as photo.jpg")
    if options.out is not None and options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out} is not the name of a PNG file; give one that ends in .png")
    check_kept(options.model)


def _draw(found: Found, size: Any, options) -> Path:
    """Write the picture of an image, and return its path."""
    from einops import rearrange

    from vqdist.inspection import tokenizer_of
    from vqdist.tracking.code_picture import code_picture, save_code_picture

    tokenizer = tokenizer_of(found, size)
    if tokenizer is None:
        kind = an(type(found.model).__name__)
        raise UserError(f"{found.path} holds {kind}, which makes no codes of images; give its tokenizer")
    images = tokenizer.preprocess(options.image.expanduser())
    codes = tokenizer.encode(images)
    maps = [rearrange(row, "... -> (...)") for row in codes[0].reshape(tokenizer.num_codes, -1).unbind(dim=1)]
    if tokenizer.network.scales is not None:
        sides = tokenizer.network.scales
        maps = [one.reshape(side, side) for one, side in zip(maps[0].split([side**2 for side in sides]), sides)]
    elif len(tokenizer.code_shape) == 2:
        maps = [one.reshape(tokenizer.code_shape) for one in maps]
    picture = code_picture(images[0], tokenizer.decode(codes)[0], maps, tokenizer.codebook_size)
    out = options.out or PICTURE
    save_code_picture(out, picture)
    return out


# ------------------------------------------------------------------------------------------- facts in words


def lines_of(facts: Mapping[str, Any]) -> list[str]:
    """Return the facts of a model for a terminal."""
    rows = list(_rows(facts))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {printable(value)}".rstrip() for name, value in rows]


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    family = f" of family {facts['family']}" if "family" in facts else ""
    yield facts["kind"] + family, f"{facts['path']}: {facts['class']}{_progress(facts)}"
    if "image_size" in facts:
        height, width = facts["image_size"]
        channels = f"{facts['channels']} channel{'s' if facts['channels'] > 1 else ''}"
        yield "images", f"{height} x {width} pixels, {channels}, resized {facts['resample']}"
    if "codes" in facts:
        yield "codes", _codes_in_words(facts["codes"])
    if "classes" in facts:
        yield "classes", str(facts["classes"])
    yield from _rows_of_parameters(facts["parameters"])
    for name, title in {"tokenizer_hash": "tokenizer", "codes_hash": "its codes", "begun_from": "begun from"}.items():
        if name in facts:
            yield title, facts[name]
    if "shapes_of_preset" in facts:
        preset = facts["shapes_of_preset"]
        yield "preset", f"has the shapes of {preset['name']}: {preset['source']}"
        yield "if it is that file", f"{preset['numbers']}; licence: {preset['licence']}"
    if "evaluation" in facts:
        yield "evaluated", _evaluation_in_words(facts["evaluation"])
    yield "licence", facts["licence"]


def _progress(facts: Mapping[str, Any]) -> str:
    if "step" not in facts:
        return ""
    end = f" of {facts['steps']}" if "steps" in facts else f", {facts['epochs']:g} epochs" if "epochs" in facts else ""
    return f", step {facts['step']}{end}"


def _codes_in_words(codes: Mapping[str, Any]) -> str:
    if "shape" not in codes:
        return f"{codes['positions']} of {codes['codebook_size']}"
    maps = " + ".join(f"{side} x {side}" for side in codes.get("scales", ())) or " x ".join(map(str, codes["shape"]))
    levels = f", {codes['levels']} levels" if codes["levels"] > 1 else ""
    return f"{maps}{levels}, each one of {codes['codebook_size']}: {codes['bits']:g} bits an image"


def _rows_of_parameters(parts: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, str]]:
    whole = {part: count for part, count in parts.items() if part != "discriminator"}
    yield "parameters", f"{sum(count.get('parameters', 0) for count in whole.values()):,}"
    for part, count in parts.items():
        buffers = f", and {count['buffers']:,} numbers in buffers" if "buffers" in count else ""
        apart = ", for training alone" if part == "discriminator" else ""
        yield f"  {part}", f"{count.get('parameters', 0):,}{buffers}{apart}"


def _evaluation_in_words(found: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in found.items() if isinstance(value, int | float) and name != "step"}
    return f"at step {found['step']}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
