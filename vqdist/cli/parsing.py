"""Shared by all commands: options under several names, configurations from files, and one line for a mistake."""

from __future__ import annotations

import os
import re
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, get_args

from vqdist.cli.chosen import Choice, chosen
from vqdist.cli.config_files import ConfigFiles, with_paths
from vqdist.cli.mistakes import Mistakes, together
from vqdist.cli.names import Alias, full_name, short_names
from vqdist.cli.parts import Given, Parts, help_asked_for, joined, value_of
from vqdist.cli.screen import PRINT_CONFIG, kind_of
from vqdist.data.config import CODES
from vqdist.errors import UserError

IMAGES = ("data.folder", "data.valid")


def make_parser(program: str, description: str, epilog: str | None = None):
    """Return a parser with `--config` and no further options; the epilog keeps its line breaks in `--help`."""
    from jsonargparse import set_parsing_settings

    from vqdist.cli.parser import Formatter, Parser

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog=program, description=description, epilog=epilog, formatter_class=Formatter, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with these options; the command line goes first.")
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.help = PRINT_CONFIG
    return parser


def parse(
    parser,
    arguments: list[str],
    aliases: Mapping[str, Alias] | None = None,
    parts: Parts | None = None,
    choices: Mapping[str, Choice] | None = None,
    names: set[str] | None = None,
):
    """Parse; whatever is wrong becomes one line that says what was found and what is expected.

    Args:
        parser: as `make_parser` gives it.
        arguments: of the command line.
        aliases: names of options beside the short ones, where the parser has these options.
        parts: the kind of part that an option takes.
        choices: options that are chosen by others where nobody says them.
        names: where given, the options that somebody says are added to it.
    """
    from jsonargparse import ArgumentError

    actions = {_option_of(action): action for action in parser._actions}
    known, parts = list(actions), parts or {}
    own = {name: alias for name, alias in (aliases or {}).items() if alias.option in actions}
    aliases = {**short_names(known), **own}
    read = list(_read(arguments))
    given = with_paths((name and full_name(name, known, aliases), value) for name, value in read)
    if (text := help_asked_for(given, parts)) is not None:
        print(text)
        raise SystemExit(0)
    files = ConfigFiles(given)
    given = joined([_with_value(one, actions) for one in _spell_out(given, aliases)], parts)
    mistakes = Mistakes(actions, aliases, parts, given, _written(read, known, aliases), files)
    mistakes.refuse_unread()
    said = files.values() | {name: value_of(value) for name, value in given if name and value is not None}
    mistakes.refuse_null(said)
    if names is not None:
        names |= {name for name, value in said.items() if value is not None}
    given += [(option, str(value)) for option, value in chosen(choices or {}, said).items()]
    try:
        return parser.parse_args(_as_arguments(given, parts))
    except (ArgumentError, UnicodeDecodeError) as error:
        problem = str(error)
        together(lambda: mistakes.refuse(problem), *(partial(check_images, said, option) for option in IMAGES))
        raise


def check_images(said: Any, option: str) -> None:
    """Raise `UserError` for images, or stored codes, that are not there.

    Args:
        said: options by name.
        option: one of `IMAGES`.
    """
    from vqdist.data.specs import absolute_path, check_spec

    given = said.get(option)
    if isinstance(given, str) and given.startswith(CODES):
        folder = absolute_path(given.removeprefix(CODES))
        if not os.path.isdir(folder):
            raise UserError(f"there are no codes in {folder}: no such folder; give one that `vqdist encode` wrote")
    elif given is not None:
        check_spec(given)


def _option_of(action) -> str:
    """Return the name of an option, which jsonargparse suppresses of those that are none of the configuration."""
    return action.option_strings[-1].lstrip("-") if action.dest == SUPPRESS else action.dest


def _written(read: list[Given], known: list[str], aliases: Mapping[str, Alias]) -> dict[str, str]:
    """Return the name that each option was given by, the last of several."""
    written = {}
    for name, _ in read:
        if name is not None:
            full = full_name(name, known, aliases)
            written[aliases[full].option if full in aliases else full] = name
    return written


def _with_value(one: Given, actions: Mapping[str, Any]) -> Given:
    """Return an option with its value: a bare one that is true or false is true."""
    name, value = one
    kind = kind_of(actions[name]) if name is not None and name in actions else None
    return (name, "true") if value is None and (kind is bool or bool in get_args(kind)) else one


MODEL_HELP = (
    "Run folder, an export (a folder that save_pretrained wrote, or a repository of the Hub), or a file of another "
    "project."
)
"""The places that a model can be taken from, the same for every command."""


def add_trust_option(parser) -> None:
    """`--trust_code`, of commands that load a model that somebody else may have written."""
    parser.add_argument(
        "--trust_code",
        type=bool,
        default=False,
        help="Whether the model's config.json may name networks that do not come with vqdist; their code is run.",
    )


def without_local_rank(arguments: Iterable[str]) -> list[str]:
    """Return the arguments but `--local_rank N`, `--local_rank=N`, and the same with a hyphen.

    Launchers add it to what they write into the environment, where ranks are read from.
    """
    kept, rest = [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(argument)
        elif not re.fullmatch(r"-?\d+", value := value if equals else next(rest, "")):
            raise UserError(f"{name} {value!r} is no number; launchers add it, leave it out")
    return kept


# ----------------------------------------------------------------------------------------- the words of a command line


def _read(arguments: list[str]) -> Iterable[Given]:
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            yield None, argument
            continue
        name, equals, value = argument[2:].partition("=")
        followed = rest and not rest[0].startswith("--") and name not in ("help", "print_config")
        yield name, value if equals else rest.pop(0) if followed else None


def _spell_out(given: list[Given], aliases: Mapping[str, Alias]) -> list[Given]:
    """Return the options without aliases; `UserError` where two names of one option say different things of it."""
    spelled: list[Given] = []
    said: dict[str, dict[str, tuple[str | None, str]]] = {}
    for name, value in given:
        if name is None:
            spelled.append((name, value))
            continue
        alias = aliases.get(name)
        option, meant = (name, value) if alias is None else (alias.option, alias.resolve(name, value))
        spelled.append((option, meant))
        said.setdefault(option, {})[name] = (meant, f"--{name}" if value is None else f"--{name} {value}")
    for option, by_name in said.items():
        _refuse_contradiction(option, list(by_name.values()))
    return spelled


def _as_arguments(given: list[Given], parts: Parts) -> list[str]:
    """Return what the parser reads, the configuration files first.

    A whole part comes after a word that replaces what a file says: jsonargparse would mix the two, and fails where the
    file's part is a dictionary.
    """
    arguments: list[str] = []
    for name, value in given:
        if name is None:
            arguments.append(str(value))
            continue
        is_dictionary = value is not None and value.lstrip().startswith("{")
        if is_dictionary and (name in parts or "class_path" in str(value)):
            arguments.append(f"--{name}=replaced")
        arguments.append(f"--{name}" if value is None else f"--{name}={value}")
    return sorted(arguments, key=lambda argument: not argument.startswith("--config="))


def _refuse_contradiction(option: str, said: list[tuple[str | None, str]]) -> None:
    (first, first_words), *others = said
    for value, words in others:
        if value != first:
            raise UserError(
                f"{first_words} and {words} contradict each other: {option} is {first} or {value}; leave one out"
            )
