"""The parser of all commands. Imports jsonargparse, which `vqdist --help` does without."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from vqdist.cli.names import short_names
from vqdist.cli.screen import commented, said_of, table_of


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The text of `--help`: the type of an option in words; description and epilog keep their line breaks."""

    # jsonargparse would show "(required, type: str | null, default: null)"; it is bounded to the minor that was tried
    def _get_help_string(self, action: Any) -> str:
        return said_of(action).replace("%", "%%")

    def _expand_help(self, action: Any) -> str:
        return said_of(action)


class Parser(ArgumentParser):
    """A parser that shows its short names, and comments in what it prints for `--config`."""

    def format_help(self, *arguments: Any, **options: Any) -> str:
        """Return the text of `--help`, with the short names below the description."""
        described = self.description
        table = table_of(short_names(action.dest for action in self._actions))
        try:
            self.description = "\n\n".join(filter(None, (described, table)))
            return super().format_help(*arguments, **options)
        finally:
            self.description = described

    def dump(self, *arguments: Any, **options: Any) -> str:
        """Return a configuration as YAML, each option below what it means."""
        return commented(super().dump(*arguments, **options), {action.dest: action for action in self._actions})
