"""Configuration files of the command line: found by name, read, and named with the line where something is wrong."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vqdist.cli.parts import Given, value_of
from vqdist.errors import UserError
from vqdist.files import LARGEST_YAML, read_small
from vqdist.names import near
from vqdist.shipped import files_of, resolve

SHIPPED = {"config": "recipes", "deepspeed_config": "deepspeed_configs"}


def with_paths(given: Iterable[Given]) -> list[Given]:
    """Return the options with the paths of what comes with vqdist in place of its names."""
    return [
        (name, resolve(SHIPPED[name], value)) if name in SHIPPED and value is not None else (name, value)
        for name, value in given
    ]


class ConfigFiles:
    """The files of `--config`, with the line of each of their options.

    Args:
        given: the options of a command line.

    Raises:
        UserError: a file is no YAML, or no options by name; names the file and the line.
    """

    def __init__(self, given: Iterable[Given]):
        given = list(given)
        self._said = {name for name, _ in given}
        self._lines: dict[str, tuple[str, int]] = {}  # of each dotted option, its file and line
        self._values: dict[str, str] = {}  # of each dotted option, as the file writes it
        for name, value in given:
            if name == "config" and value is not None:
                _check_file(value)
                self._read(value)

    def _read(self, name: str) -> None:
        import yaml  # type: ignore[import-untyped]

        try:
            text = read_small(Path(name), LARGEST_YAML).decode("utf-8")
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if isinstance(root, yaml.MappingNode):
                self._note(name, text, root, yaml.SafeLoader("").flatten_mapping)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{name}, line {mark.line + 1}" if mark else name
            raise UserError(f"{where}: no YAML: {' '.join(filter(None, (error.problem, error.context)))}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: no YAML: {' '.join(str(error).split())}") from error
        except (OSError, RecursionError):
            return  # the parser says it
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise UserError(f"{name}, line {root.start_mark.line + 1}: options by name are expected, as `data:`")

    def _note(self, name: str, text: str, node: Any, flatten: Callable[[Any], None], prefix: str = "") -> None:
        flatten(node)  # `<<` stands for the options of another mapping
        for key, value in node.value:
            option = f"{prefix}{key.value}" if isinstance(key.value, str) else prefix
            self._lines[option] = (name, key.start_mark.line + 1)
            self._values[option] = " ".join(text[value.start_mark.index : value.end_mark.index].split())
            if value.id == "mapping" and option.count(".") < 16:
                self._note(name, text, value, flatten, f"{option}.")

    def placed(self, message: str) -> str:
        """Return a message of the parser with the file and the line of the option that it names, if a file says it."""
        for option in _named(message):
            if option not in self._said and (place := self.place(option)) is not None:
                return f"{place}: {message}"
        return message

    def place(self, option: str) -> str | None:
        """Return the file and the line that say an option, or None."""
        return None if option not in self._lines else "{}, line {}".format(*self._lines[option])

    def values(self) -> dict[str, Any]:
        """Return what the files say, by dotted option."""
        return {option: value_of(text) for option, text in self._values.items()}

    def value(self, option: str) -> str | None:
        """Return the value of an option as a file writes it, or None."""
        return self._values.get(option)


def _named(message: str) -> list[str]:
    """Return the options that a message may be about, the likeliest first."""
    if (found := re.search(r"[Gg]roup '([\w.]+)' does not accept option '([\w.]+)'", message)) is not None:
        return [".".join(found.groups()), found[2]]
    return re.findall(r"(?:key|option|Option|Key) ['\"]([\w.]+)['\"]", message)


def _check_file(given: str) -> None:
    """Raise `UserError` unless a file of options is one that can be read."""
    path = Path(given)
    if given and path.is_dir():
        raise UserError(f"configuration {given} is a folder; give a YAML file")
    if not given or not path.exists():
        found = near(path.stem, files_of("recipes"))
        raise UserError(f"there is no configuration {given!r}, as a file or a recipe{found}; see `vqdist recipes`")
    if not _is_regular(path):  # nobody may ever write into a pipe
        raise UserError(f"configuration {given} is a pipe, socket or device; give a regular file")


def _is_regular(path: Path) -> bool:
    """Return whether a path is a file that can be read to its end: of a pipe nobody knows whether one comes."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
