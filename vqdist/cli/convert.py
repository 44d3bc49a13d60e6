"""`vqdist convert` and `vqdist models`: the field's tokenizers, in and out, and their published configurations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqdist.cli.loading import loading
from vqdist.cli.parsing import make_parser, parse
from vqdist.errors import UserError
from vqdist.locations import check_given
from vqdist.registries import FAMILIES
from vqdist.sizes import image_size_of

if TYPE_CHECKING:
    from vqdist.models.presets import Preset

DEFAULT_SIDE = 256  # pixels, where neither the file nor the user says another
EPILOG = """examples:
  vqdist convert vq_ds16_c2i.pt --out tokenizers/vq16         what LlamaGen published becomes an export
  vqdist convert last.ckpt --peer_config model.yaml --out tokenizers/mine
  vqdist convert runs/a --to taming --out last.ckpt           the tokenizer of a run in another project's form
"""


def convert(arguments: list[str]) -> int:
    """Turn another project's tokenizer into an export, or a tokenizer into another project's file."""
    options = parse(_parser(), arguments)
    out = Path(options.out).expanduser()
    if out.exists():
        raise UserError(f"--out {out} is there already; give a name that is free, or remove it")
    _check(options)
    with loading("torch and the file"):
        _import(options, out) if options.to is None else _export(options, out)
    print(out)
    return 0


def _parser():
    parser = make_parser("vqdist convert", convert.__doc__ or "", EPILOG)
    parser.add_argument("file", type=str, help="File or folder of another project; with --to a run or an export.")
    parser.add_argument("--out", type=str, required=True, help="Export to write; with --to the file.")
    families = ", ".join(FAMILIES)
    parser.add_argument("--family", type=str | None, default=None, help=f"Of FILE, by default recognised: {families}.")
    parser.add_argument(
        "--peer_config",
        type=str | None,
        default=None,
        help="The project's own configuration of the model, YAML or JSON: it says what shapes of tensors do not.",
    )
    parser.add_argument(
        "--image_size",
        type=int | tuple[int, int] | None,
        default=None,
        help="Side in pixels, or [height, width], of the export's images; by default what FILE says, or 256.",
    )
    parser.add_argument("--to", type=str | None, default=None, help="Family to write, see --family.")
    return parser


def _check(options) -> None:
    """Raise `UserError` for files that are not there, before torch is imported."""
    if options.to is not None:
        check_given(options.file)
        for name in ("family", "peer_config", "image_size"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is for reading a file of another project; leave it out with --to")
    elif not (path := Path(options.file).expanduser()).exists():
        raise UserError(f"no such file: {path}; expected a checkpoint, as .ckpt, .pt, .pth, .bin or .safetensors")
    if options.peer_config is not None and not Path(options.peer_config).expanduser().is_file():
        raise UserError(f"no such file: {options.peer_config}; --peer_config takes YAML or JSON of the project")


def _import(options, out: Path) -> None:
    from vqdist.models.published import OWN_WEIGHTS, is_published, read_to_train
    from vqdist.models.published.critics import Critic, save_critic

    if (Path(options.file).expanduser() / OWN_WEIGHTS).is_file() and not is_published(options.file):
        raise UserError(
            f"{options.file} is an export of vqdist already; give --to and the family that it should become"
        )
    read = read_to_train(options.file, family=options.family, peer_config=options.peer_config)
    model: Any = read[0]  # a tokenizer
    given = model.image_size if options.image_size is None else options.image_size
    model.image_size = image_size_of(DEFAULT_SIDE if given is None else given)
    model.check_image_size(model.image_size)
    model.save_pretrained(out)
    if isinstance(read[1], Critic):
        save_critic(read[1], out)
    elif read[1] is not None:
        print(f"vqdist: {read[1]}", file=sys.stderr)


def _export(options, out: Path) -> None:
    from vqdist.models.pretrained import load_model_of_any_type
    from vqdist.models.published import write_published

    write_published(load_model_of_any_type(options.file), options.to, out)


def models(arguments: list[str]) -> int:
    """List the published configurations of tokenizers, for --model.preset: size, stride, codes, results, licence."""
    from vqdist.models.presets import PRESETS

    parser = make_parser("vqdist models", models.__doc__ or "")
    parser.add_argument("names", type=str, nargs="*", help="Configurations to list; by default all.")
    names = parse(parser, arguments).names or list(PRESETS)
    print("\n".join(_lines_of(name, _known(name)) for name in names))
    return 0


def _known(name: str) -> Preset:
    from vqdist.models.presets import preset_named

    return preset_named(name)


def _lines_of(name: str, preset: Preset) -> str:
    import torch

    from vqdist.models.vqgan import VQGanVAE

    with torch.device("meta"):
        model = VQGanVAE.preset(name, use_vgg_and_gan=False)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    shape = model.code_shape(preset.image_size)
    layout = f"stride {preset.image_size // shape[0]}" if len(shape) == 2 else f"{shape[0]} tokens in a row"
    facts = f"{millions:.1f} M parameters, {layout}, {model.codebook_size} codes, {preset.image_size} pixels"
    return f"{name}\n  {facts}\n  {preset.source}; {preset.numbers}\n  weights: {preset.licence}"
