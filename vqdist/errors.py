"""The exceptions that end a command with one line instead of a traceback."""

EXIT_PEER_LOST = 69  # EX_UNAVAILABLE of sysexits.h: not 75, since the same may happen again if nobody looks


class UserError(ValueError):
    """A mistake in what the user wrote or gave: one line with what was found, what was expected and what to do.

    The command line prints the message alone and exits with 2; in Python it is a `ValueError`.
    """


class RanksDiverged(RuntimeError):
    """Two ranks hold different weights or codebooks: what they would train from here on is not one model."""


class PeerLost(RuntimeError):
    """An exchange with the other ranks failed, since some of them ended, or cannot be reached.

    The command line prints the message alone and exits with `code`. In a script the process had better end: what is
    left of the process group is of no use.

    Attributes:
        ranks: the ranks that are gone; none if all still answer.
        code: 69 (EX_UNAVAILABLE), or that of a rank that left on purpose and said so, as a signal asks for it.
    """

    def __init__(self, ranks: tuple[int, ...], message: str, code: int = EXIT_PEER_LOST):
        super().__init__(message)
        self.ranks = ranks
        self.code = code
