"""Mistakes on a command line and in its files, in sentences: what was found, what is expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from vqdist.cli.config_files import ConfigFiles
from vqdist.cli.names import Alias, short_name
from vqdist.cli.parts import Given, Parts, value_of
from vqdist.cli.screen import kind_of
from vqdist.errors import UserError
from vqdist.names import near
from vqdist.options import in_words, is_of

FLAGS = ("help", "print_config")
PRINT_FLAGS = ("skip_default", "skip_unset")
A_PART = "a name, an import path, or class_path and init_args"


def together(*checks: Callable[[], object]) -> None:
    """Run all checks, and raise one `UserError` with all that they found."""
    found: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        numbered = [f"({number}) {sentence}" for number, sentence in enumerate(found, 1)]
        raise UserError(f"{len(found)} mistakes: {' '.join(numbered)}")


class Mistakes:
    """Turns what is wrong with a command line into sentences.

    Args:
        actions: of the parser, by option.
        aliases: other names of options.
        parts: the kind of part that an option takes.
        given: options by their full names, with their values.
        written: the name that each was given by.
        files: the configurations.
    """

    def __init__(
        self,
        actions: Mapping[str, Any],
        aliases: Mapping[str, Alias],
        parts: Parts,
        given: list[Given],
        written: Mapping[str, str],
        files: ConfigFiles,
    ):
        self.actions, self.aliases, self.parts = actions, aliases, parts
        self.given, self.written, self.files = given, written, files

    def refuse_unread(self) -> None:
        """Raise `UserError` for words that belong to no option, and for options without their value."""
        places = [action for action in self.actions.values() if not action.option_strings]
        words = [str(value) for name, value in self.given if name is None]
        for word in words:
            if re.match(r"-\D", word):
                raise UserError(f"there is no option {word}; options begin with two dashes, see --help")
        if len(words) > len(places) and not any(action.nargs in ("*", "+") for action in places):
            takes = f"{' and '.join(_shown_place(action) for action in places)} only" if places else "options only"
            raise UserError(f"{words[len(places)]!r} belongs to no option, and the command takes {takes}")
        for name, value in self.given:
            if name == "print_config" and value not in (None, *PRINT_FLAGS):
                raise UserError(f"--print_config={value} is not possible; it takes {' or '.join(PRINT_FLAGS)}")
            if name is not None and value is None and name in self.actions and name not in FLAGS:
                raise UserError(f"--{self.short(name)} needs a value: {self.wanted(name)}")

    def refuse_null(self, said: Mapping[str, Any]) -> None:
        """Raise `UserError` for an option that is set to null and cannot be: in a file jsonargparse lets it pass."""
        for option, value in said.items():
            kind = kind_of(self.actions[option]) if option in self.actions else None
            if value is None and kind is not None and not is_of(None, kind):
                raise UserError(self._of_value(option) or option)

    def refuse(self, message: str) -> None:
        """Raise `UserError` for what jsonargparse found."""
        raise UserError(self.sentence(message))

    def sentence(self, message: str) -> str:
        """Return a message of jsonargparse as a sentence, with file and line where a file says what is wrong."""
        message = " ".join(message.split())
        if (missing := re.search(r"arguments are required: (.*)", message)) is not None:
            return f"missing: {', '.join(map(self._shown, missing[1].split(', ')))}"
        if (name := _unknown_in(message)) is not None:
            return self._of_unknown(name)
        if (found := re.search(r'Parser key "([\w.]+)\+?"', message)) is not None:
            if (sentence := self._of_value(found[1])) is not None:
                return sentence
        return self.files.placed(message)

    def _of_unknown(self, name: str) -> str:
        last = name.rpartition(".")[2]
        alias = self.aliases.get(name) or self.aliases.get(last)
        if alias is not None:
            return self._placed(name, f"there is no option {name}; in a file it is {alias.in_a_file}")
        hint = near(name, [option for option in self.actions if option != "help"]) or "; see --help"
        return self._placed(name, f"there is no option {name}{hint}")

    def _of_value(self, option: str) -> str | None:
        """Return what is wrong with the value of an option; None of an option that is not known."""
        if option not in self.actions:
            return None
        kind, said = kind_of(self.actions[option]), dict(self.given)
        on_line, in_file = said.get(option), self.files.value(option)
        fits = kind is not None and on_line is not None and is_of(value_of(on_line), kind)
        if on_line is not None and not (fits and in_file is not None):
            found = "is empty" if on_line == "" else f"{on_line!r} is not possible"
            return f"--{self.short(option)} {found}; give {self.wanted(option)}"
        if in_file is None:
            return None
        return self._placed(option, f"{option} {in_file} is not possible; give {self.wanted(option)}", always=True)

    def _placed(self, option: str, sentence: str, always: bool = False) -> str:
        place = self.files.place(option)
        on_line = any(name == option for name, _ in self.given) and not always
        return sentence if place is None or on_line else f"{place}: {sentence}"

    def wanted(self, option: str) -> str:
        """Return what an option takes, in words."""
        kind = kind_of(self.actions[option])
        if option == "config":
            return "a YAML file, or the name of a recipe"
        if kind is None:
            inner = next((name for name in self.actions if name.startswith(f"{option}.")), None)
            return f"options of this group, as {inner}" if inner else "a value"
        if option in self.parts:
            return A_PART if not in_words(kind).startswith("a list") else f"a list, each item {A_PART}"
        return in_words(kind)

    def short(self, option: str) -> str:
        """Return the name that an option was given by, or else the one that people know it by."""
        return self.written.get(option, short_name(option, self.aliases))

    def _shown(self, option: str) -> str:
        action = self.actions.get(option)
        is_place = action is not None and not action.option_strings
        return _shown_place(action) if is_place else f"--{self.short(option)}"


def _shown_place(action: Any) -> str:
    return str(action.metavar or action.dest).upper()


def _unknown_in(message: str) -> str | None:
    """Return the option that a message of jsonargparse says is not there."""
    for pattern in (
        r"[Gg]roup '(?P<group>[\w.]+)' does not accept option '(?P<name>[^']+)'",
        r"(?P<group>)Option '(?P<name>[^']+)' is not accepted",
        r"(?P<group>)[Kk]ey '(?P<name>[^']+)' is not expected",
        r"(?P<group>)Unrecognized arguments: --(?P<name>[\w.]+)",
    ):
        if (found := re.search(pattern, message)) is not None:
            return ".".join(filter(None, (found["group"], found["name"])))
    return None
