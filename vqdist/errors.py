"""The exceptions that end a command with one line instead of a traceback."""

import re

LONGEST_WORD, LONGEST_LINE = 400, 2000
"""Characters of one word, and of a whole message, beyond which their middle is left out."""

EXIT_PEER_LOST = 69  # EX_UNAVAILABLE of sysexits.h: not 75, since the same may happen again if nobody looks


def printable(text: str) -> str:
    """Return a text as one line of visible characters.

    A file may have any name. Escape sequences, line ends and marks that turn the direction of writing are shown as
    `\\x1b`, `\\n` and `\\u202e`; bytes that are no UTF-8 as `\\xff`.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


class UserError(ValueError):
    """A mistake in what the user wrote or gave: one line with what was found, what was expected and what to do.

    The command line prints the message alone and exits with 2; in Python it is a `ValueError`. Characters of a
    file's name that cannot be printed are escaped, see `printable`. Of a very long value the message keeps both ends.
    """

    def __init__(self, message: object = ""):
        line = printable(str(message))
        line = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: shortened(word[0], LONGEST_WORD), line)
        super().__init__(shortened(line, LONGEST_LINE))


def shortened(text: str, longest: int) -> str:
    """Return a text, without its middle where it has more characters than `longest`."""
    if len(text) <= longest:
        return text
    kept = longest - 40
    head = kept * 2 // 3
    return f"{text[:head]}...({len(text) - kept} characters)...{text[len(text) - kept + head :]}"


def an(noun: str) -> str:
    """Return a noun behind its article: "an encoder", "a decoder"; "a UNet" as it is spoken."""
    vowel = re.match(r"[aeioAEIO]|[uU](?!ni|se|[A-Z])", noun)
    return f"{'an' if vowel else 'a'} {noun}"


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
