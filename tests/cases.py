"""Tables of cases: functions that are named after the options that they try."""

from __future__ import annotations

from collections.abc import Callable

Case = Callable[..., None]


class Cases(dict[str, Case]):
    """Cases by option; the table itself is the decorator that adds one.

    Args:
        prefix: of the functions' names, before the name of the option.
    """

    def __init__(self, prefix: str = ""):
        super().__init__()
        self.prefix = prefix

    def __call__(self, function: Case) -> Case:
        """Add a function under its name without the prefix."""
        self[function.__name__.removeprefix(self.prefix)] = function
        return function
