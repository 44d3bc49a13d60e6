"""The words of a parser: `--help` names types in plain words, `--print_config` says what each option means."""

from __future__ import annotations

import re
import textwrap
from argparse import SUPPRESS
from collections.abc import Mapping
from typing import Any

from vqdist.cli.names import Alias
from vqdist.options import in_words

WIDTH = 110  # of a comment of --print_config
PRINT_CONFIG = (
    "Print the options as a file for --config, each with what it means, and exit; --print_config=skip_default leaves "
    "out those that are as by default."
)


def kind_of(action: Any) -> Any:
    """Return the annotation of an option, or None of one that has none, as `--config`."""
    return getattr(action, "_typehint", None)  # the only place where jsonargparse keeps it


def said_of(action: Any) -> str:
    """Return what an option means, then its type and its default in words."""
    help_text, kind = " ".join((action.help or "").split()), kind_of(action)
    if kind is None:
        return help_text[:1].upper() + help_text[1:]
    chosen = getattr(action, "chosen", None)
    if chosen is not None:
        return f"{help_text} ({in_words(kind)}; default: {chosen})"
    facts = [*(["required"] if action.required else []), in_words(kind)]
    if not action.required and action.option_strings and action.default is not SUPPRESS:
        facts.append(f"default: {in_yaml(action.default)}")
    return f"{help_text} ({'; '.join(facts)})"


def in_yaml(value: Any) -> str:
    """Return a value as a user would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(in_yaml, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table_of(short: Mapping[str, Alias]) -> str:
    """Return the section of `--help` on short names; empty where there are none."""
    if not short:
        return ""
    lines = "\n".join(f"  --{name:<14} {alias}" for name, alias in short.items())
    return (
        f"short names, the same for every command:\n{lines}\n"
        "The end of any other name will do where no other option ends so.\nFiles of --config have the long names."
    )


def commented(text: str, actions: Mapping[str, Any]) -> str:
    """Return YAML with what each option means above it.

    Args:
        text: as jsonargparse writes it: a key a line, two columns for each level.
        actions: of the parser, by dotted option.
    """
    lines: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        if (found := re.match(r"( *)([\w.]+):", line)) is not None and len(found[1]) // 2 <= len(path):
            path = [*path[: len(found[1]) // 2], found[2]]
            action = actions.get(".".join(path))
            if action is not None and kind_of(action) is not None and action.help is not SUPPRESS:
                start = f"{found[1]}# "
                lines += textwrap.wrap(said_of(action), WIDTH, initial_indent=start, subsequent_indent=start)
        lines.append(line)
    return "\n".join(lines) + "\n"
