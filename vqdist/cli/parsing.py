"""Shared by all commands: options under several names, configurations from files, and one line for a mistake."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vqdist.cli.config_files import ConfigFiles, with_paths
from vqdist.cli.parts import Given, Parts, help_asked_for, joined
from vqdist.errors import UserError
from vqdist.names import near, unknown


@dataclass(frozen=True)
class Alias:
    """Another name of an option, and what it stands for.

    Attributes:
        option: the option, without dashes.
        value: the option's value, of a bare flag; None if a value follows the name.
        words: the option's word for each word that may follow the name; None if any value may.
        note: what differs from what people may know under this name.
    """

    option: str
    value: str | None = None
    words: Mapping[str, str] | None = None
    note: str = ""

    def resolve(self, name: str, value: str | None) -> str | None:
        """Return the option's value where `--name value` was given; raise `UserError` if there is no such value."""
        if self.value is not None:
            if value is not None:
                raise UserError(f"--{name} takes no value, but {value!r} follows it; it is short for {self}")
            return self.value
        if self.words is None or value is None:
            return value
        if value.lower() not in self.words:
            raise UserError(f"--{name} {value!r} is not known; choose one of {', '.join(self.words)}")
        return self.words[value.lower()]

    @property
    def in_a_file(self) -> str:
        """The same in a configuration file, by dotted option."""
        return self.option if self.value is None else f"{self.option}: {self.value}"

    def __str__(self) -> str:
        return f"--{self.option}" if self.value is None else f"--{self.option} {self.value}"


# short names of the options that every run has
DATA_ALIASES = {
    "data": Alias("data.folder"),
    "image_size": Alias("data.image_size"),
    "on_bad_image": Alias("data.on_bad_image"),
    "max_bad_frac": Alias("data.max_bad_frac"),
}


def make_parser(program: str, description: str, epilog: str | None = None):
    """Return a parser with `--config` and no further options; the epilog keeps its line breaks in `--help`."""
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        pass

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program, description=description, epilog=epilog, formatter_class=Formatter, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with these options; the command line goes first.")
    return parser


def parse(parser, arguments: list[str], aliases: Mapping[str, Alias] = DATA_ALIASES, parts: Parts | None = None):
    """Parse; whatever is wrong becomes one line that names the nearest option.

    Args:
        parser: as `make_parser` gives it.
        arguments: of the command line.
        aliases: other names of options, where the parser has these options.
        parts: the kind of part that an option takes.
    """
    from jsonargparse import ArgumentError

    known = [action.dest for action in parser._actions]
    aliases = {name: alias for name, alias in aliases.items() if alias.option in known}
    given = with_paths(_read(arguments))
    if parts and (text := help_asked_for(given, parts)) is not None:
        print(text)
        raise SystemExit(0)
    _refuse_unknown(given, [*known, *aliases])
    files = ConfigFiles(given)
    parts = parts or {}
    given = joined(_spell_out(given, aliases), parts)
    try:
        return parser.parse_args(_as_arguments(given, parts))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UserError(files.placed(_one_line(str(error), known, aliases))) from error


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


def _refuse_unknown(given: list[Given], known: list[str]) -> None:
    for name, _ in given:
        if name is not None and not _is_known(name, known):
            raise unknown("option", name, _options(known), "; see --help", written=f"--{name}")


def _options(known: Iterable[str]) -> list[str]:
    return [option for option in known if option != "help"]


def _is_known(option: str, known: list[str]) -> bool:
    """Options of dictionaries (model.vq_kwargs.decay) are known by their dictionary; `+` adds to a list."""
    parts = option.removesuffix("+").split(".")
    return any(".".join(parts[:count]) in known for count in range(len(parts), 0, -1) if count != 1 or len(parts) == 1)


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


def _one_line(message: str, known: list[str], aliases: Mapping[str, Alias]) -> str:
    """jsonargparse's message on one line, with the nearest option where it names one that is not there."""
    message = " ".join(message.split())
    if (required := re.search(r"arguments are required: (.*)", message)) is not None:
        short = {alias.option: name for name, alias in DATA_ALIASES.items()}  # people know the short names
        return f"missing: {', '.join('--' + short.get(option, option) for option in required[1].split(', '))}"
    for pattern in (
        r"[Gg]roup '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'",
        r"(?P<group>)Option '(?P<name>[\w.]+)' is not accepted",
        r"(?P<group>)[Kk]ey '(?P<name>[\w.]+)' is not expected",
        r"(?P<group>)Unrecognized arguments: --(?P<name>[\w.]+)",
    ):
        if (found := re.search(pattern, message)) is not None:
            name = ".".join(filter(None, (found["group"], found["name"])))
            alias = aliases.get(name.rpartition(".")[2])
            hint = near(name, _options(known)) or "; see --help"
            return f"{message}{hint if alias is None else f'; in a file it is {alias.in_a_file}'}"
    return message
