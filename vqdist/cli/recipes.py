"""`vqdist recipes`: the configurations that come with vqdist, listed, printed or copied."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from vqdist.cli.parsing import make_parser, parse
from vqdist.errors import UserError
from vqdist.files import writing
from vqdist.names import unknown
from vqdist.shipped import KINDS, files_of

COMMAND = re.compile(r"vqdist train (\w+)")


def recipes(arguments: list[str]) -> int:
    """List the recipes, print one, or copy configurations: `vqdist recipes`, `vqdist recipes NAME --copy FOLDER`."""
    parser = make_parser(
        "vqdist recipes",
        "List the recipes that come with vqdist; `vqdist train MODEL --config NAME` trains by one.",
    )
    parser.add_argument("name", type=str | None, nargs="?", default=None, help="Recipe to print.")
    parser.add_argument(
        "--copy",
        type=Path | None,
        default=None,
        help="Folder to copy the recipe to; without a name all of them, and the configurations of accelerate and "
        "DeepSpeed.",
    )
    options = parse(parser, arguments)
    found = files_of("recipes")
    if options.name is not None and options.name.removesuffix(".yaml") not in found:
        raise unknown("recipe", options.name, found, "; `vqdist recipes` lists them")
    chosen = None if options.name is None else found[options.name.removesuffix(".yaml")]
    if options.copy is not None:
        for path in [chosen] if chosen else [file for kind in KINDS for file in files_of(kind).values()]:
            print(_copied(path, options.copy if chosen else options.copy / path.parent.name))
    elif chosen is not None:
        print(chosen.read_text(encoding="utf-8"), end="")
    else:
        print("\n".join(_line(name, path) for name, path in found.items()))
    return 0


def _copied(path: Path, folder: Path) -> Path:
    target = folder / path.name
    if target.exists():
        raise UserError(f"{target} is there already; give another folder, or remove it")
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return target


def _line(name: str, path: Path) -> str:
    """Return the name of a recipe, its model and its first sentence."""
    text = path.read_text(encoding="utf-8")
    model = COMMAND.search(text)
    words = " ".join(line.removeprefix("#").strip() for line in text.split("\n#   ")[0].splitlines())
    return f"{name:<28} {model[1] if model else '':<6} {words.partition('. ')[0].rstrip('.')}"
