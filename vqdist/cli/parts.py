"""Parts on the command line: `--model.encoder my_nets.Encoder --model.encoder.width 32`, `--model.encoder.help`."""

from __future__ import annotations

import functools
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqdist.cli.screen import in_yaml
from vqdist.errors import UserError, an
from vqdist.files import LARGEST_YAML, read_small
from vqdist.options import in_words
from vqdist.parts import Registry, Spec, arguments_of

Given = tuple[str | None, str | None]
"""An option's name, without dashes, and its value if it has one; what is no option has the name None."""

INDENT = 6 * " "
Parts = Mapping[str, Registry[Any]]
"""The kind of part that each option takes, by the option without dashes."""


def joined(given: list[Given], parts: Parts) -> list[Given]:
    """Return the options with what was said of each part in one value.

    `--X.class_path PATH`, `--X.init_args.NAME VALUE` and the short form `--X.NAME VALUE` change the part that `--X`
    gives, or that a configuration file gives; the result is one `--X` with the whole specification.
    """
    for option in parts:
        pieces: list[Given] = [
            (name, value) for name, value in given if name is not None and name.startswith(f"{option}.")
        ]
        if not pieces:
            continue
        whole = [value for name, value in given if name == option]
        started = value_of(whole[-1]) if whole and whole[-1] is not None else _of_files(given, option)
        specification = _changed(option, started, pieces)
        given = [one for one in given if one not in pieces and one[0] != option]
        given.append((option, json.dumps(specification)))
    return given


def help_asked_for(given: list[Given], parts: Parts) -> str | None:
    """Return the text of `--X.help [NAME]` if it is asked for: what a part takes, or which names there are."""
    for name, value in given:
        option, _, last = (name or "").rpartition(".")
        if last == "help" and option in parts:
            return _help(option, parts[option], value)
    return None


def _help(option: str, registry: Registry[Any], target: str | None) -> str:
    if target is None:
        names = "\n".join(f"  {name:<16} {_first_line(factory)}" for name, factory in registry.items())
        return (
            f"--{option} takes {an(registry.kind)}: one of these names, or the import path of your own, "
            f"my_module.MyClass.\n{names}\n--{option}.help NAME says what one takes."
        )
    factory = registry.factory(target)
    lines = [f"{registry.kind} {target}: {_first_line(factory)}", "", f"arguments, as --{option}.NAME VALUE:"]
    documented, hints = _documented(factory), _hints(factory)
    parameters = [one for one in arguments_of(factory) if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    for parameter in parameters:
        said = [_kind(hints.get(parameter.name, parameter.annotation)), _default(parameter)]
        lines.append(f"  {parameter.name:<20} ({'; '.join(filter(None, said))})")
        if parameter.name in documented:
            lines.append(
                textwrap.fill(documented[parameter.name], 100, initial_indent=INDENT, subsequent_indent=INDENT)
            )
    return "\n".join(lines if parameters else [*lines, "  none"])


def _hints(factory: Any) -> dict[str, Any]:
    """Return the annotations of what a part takes; none where a name in them is not there when vqdist runs."""
    try:
        return typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError, AttributeError):
        return {}


def _kind(annotation: Any) -> str:
    """Return an annotation in words, or as it is written where it was never looked up."""
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else in_words(annotation)


def _default(parameter: inspect.Parameter) -> str:
    return "required" if parameter.default is parameter.empty else f"default: {in_yaml(parameter.default)}"


def _first_line(factory: Any) -> str:
    return (inspect.getdoc(factory) or "").partition("\n")[0]


def _documented(factory: Any) -> dict[str, str]:
    import docstring_parser

    text = "\n\n".join(filter(None, (inspect.getdoc(factory), inspect.getdoc(getattr(factory, "__init__", None)))))
    params = docstring_parser.parse(text).params
    return {param.arg_name: " ".join(param.description.split()) for param in params if param.description}


def _changed(option: str, started: Any, pieces: list[Given]) -> dict[str, Any]:
    """Return the specification `started`, or a new one, with the pieces put in."""
    spec: dict[str, Any] = {"class_path": None, "init_args": {}}
    if started is not None:
        read = Spec.of(started, f"--{option}")
        spec = {"class_path": read.target, "init_args": dict(read.init_args)}
    for name, value in pieces:
        if value is None:
            raise UserError(f"--{name} needs a value")
        inner = str(name).removeprefix(f"{option}.")
        if inner == "class_path":
            spec["class_path"] = value
            continue
        *path, last = inner.removeprefix("init_args.").split(".")
        held = spec["init_args"]
        for key in path:
            held = held.setdefault(key, {})
            if not isinstance(held, dict):
                raise UserError(f"--{name}: {key} is {held!r} and holds no further options; leave it out")
        held[last] = value_of(value)
    if spec["class_path"] is None:
        raise UserError(f"--{pieces[0][0]} is given but no --{option}; say which one, by name or import path")
    return spec


def _of_files(given: list[Given], option: str) -> Any:
    """Return the value of an option in the configuration files, the last of them."""
    import yaml  # type: ignore[import-untyped]

    found = None
    for name, value in given:
        if name != "config" or value is None or not Path(value).is_file():
            continue
        try:
            held = yaml.load(read_small(Path(value), LARGEST_YAML).decode("utf-8"), Loader=_loader())
        except (OSError, UserError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser says so
        for key in option.split("."):
            held = held.get(key) if isinstance(held, Mapping) else None
        found = found if held is None else held
    return found


@functools.cache
def _loader() -> Any:
    """Return a safe loader of YAML that leaves dates as words, for which JSON has no other form."""
    import yaml

    class WithoutDates(yaml.SafeLoader):
        pass

    WithoutDates.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
    return WithoutDates


def value_of(text: str) -> Any:
    """Return a value as YAML reads it, with numbers as 1e-3, too; dates and words as `nan` stay words."""
    import yaml

    try:
        value = yaml.load(text, Loader=_loader())
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and re.search(r"\d", value):
        try:
            return float(value)
        except ValueError:
            return value
    return value
