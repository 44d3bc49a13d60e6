"""What ends a command with one line instead of a traceback."""


class UserError(ValueError):
    """A mistake in what the user wrote or gave: one line with what was found, what was expected and what to do.

    The command line prints the message alone and exits with 2; in Python it is a `ValueError`.
    """


class RanksDiverged(RuntimeError):
    """Two ranks hold different weights or codebooks: what they would train from here on is not one model."""
