"""Lines of metrics.jsonl read many at once: four times as fast as `json.loads` of each, and the same numbers.

A run writes lines of one form, `{"step": 100, "loss": 0.5, "lr": 1e-05}`. Lines whose keys are equal are columns of
text, which numpy reads at once. Any other line is left to `json.loads`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

WIDTH, LONGEST = 18, 26
"""Characters of a number that are read, which an int64 has room for, and of one that is read at once at all."""
MOST_FORMS = 8
NUMBER = re.compile(rb"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
NOT_FINITE = (b"null", b"NaN", b"Infinity", b"-Infinity")
STEP = b"step"

POWERS = 10.0 ** np.array([*range(100), *range(-120, 0)])
"""Powers of ten by their exponents, of which negative ones count from the end."""

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]


@dataclass
class Rows:
    """Lines with the same keys.

    Attributes:
        names: (k,) of the keys, as they stand in the file.
        values: (n, k) float64; NaN for a number that is not finite.
        places: (n,) of the lines among those of the block.
    """

    names: list[str]
    values: NDArray[np.float64]
    places: Places


def parse(block: bytes) -> tuple[list[Rows], Places, list[tuple[int, int]]]:
    """Read the lines of a block that have the form of a run's.

    Args:
        block: whole lines, each with its end.

    Returns:
        Groups of lines, the places of all others, and beginning and end of each line in the block.
    """
    text = np.frombuffer(block + b" " * LONGEST, dtype=np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    quotes = np.flatnonzero(text == ord('"'))
    first = np.searchsorted(quotes, starts)
    counts = np.diff(np.append(first, len(quotes)))
    rows, others = [], [np.flatnonzero((counts < 2) | (counts % 2 == 1))]
    for count in np.flatnonzero(np.bincount(counts)):
        if count >= 2 and count % 2 == 0:
            places = np.flatnonzero(counts == count)
            at = quotes[first[places][:, None] + np.arange(count)]
            group = _Group(block, text, places, starts[places], ends[places], at)
            found, left = group.rows()
            rows += found
            others.append(left)
    return rows, np.sort(np.concatenate(others)), list(zip(starts.tolist(), ends.tolist(), strict=True))


class _Group:
    """Lines with equally many quotation marks.

    Args:
        block: of all lines.
        text: the same as numbers, and more than the longest number.
        places: (n,) of the lines.
        starts: (n,) of the lines in the text.
        ends: (n,) likewise.
        quotes: (n, 2 k) likewise.
    """

    def __init__(self, block: bytes, text: Bytes, places: Places, starts: Places, ends: Places, quotes: Places):
        self.block, self.text = block, text
        self.places, self.starts, self.ends = places, starts, ends
        self.opening, self.closing = quotes[:, 0::2], quotes[:, 1::2]

    def rows(self) -> tuple[list[Rows], Places]:
        """Return the lines by their keys, and the places of those that are of no such form."""
        found, left = [], []
        waiting = np.flatnonzero(self._is_flat())
        left.append(np.delete(self.places, waiting))
        for _ in range(MOST_FORMS):
            if not len(waiting):
                break
            same = self._with_keys_of(waiting)
            of_form = waiting[same]
            waiting = waiting[~same]
            rows, broken = self._read(of_form)
            found += rows
            left.append(broken)
        return found, np.concatenate([*left, self.places[waiting]])

    def _is_flat(self) -> NDArray[np.bool_]:
        """Say of each line whether it is `{"...": ..., "...": ...}` with nothing else between keys and values."""
        text, between = self.text, self.opening[:, 1:]
        flat = (self.opening[:, 0] == self.starts + 1) & (text[self.starts] == ord("{"))
        flat &= text[self.ends - 1] == ord("}")
        flat &= ((text[self.closing + 1] == ord(":")) & (text[self.closing + 2] == ord(" "))).all(axis=1)
        return flat & ((text[between - 2] == ord(",")) & (text[between - 1] == ord(" "))).all(axis=1)

    def _with_keys_of(self, lines: Places) -> NDArray[np.bool_]:
        """Say of each of these lines whether it has the keys of the first of them."""
        opening, closing = self.opening[lines], self.closing[lines]
        lengths = closing - opening - 1
        same: NDArray[np.bool_] = (lengths == lengths[0]).all(axis=1)
        for number, length in enumerate(lengths[0].tolist()):
            if length:
                begin = np.where(same, opening[:, number], opening[0, number]) + 1
                keys = sliding_window_view(self.text, length)[begin]
                same &= (keys == keys[0]).all(axis=1)
        return same

    def _read(self, lines: Places) -> tuple[list[Rows], Places]:
        """Return the numbers of lines with the same keys, and the places of lines with anything else for a value."""
        keys = [self.block[a + 1 : b] for a, b in zip(self.opening[lines[0]], self.closing[lines[0]], strict=True)]
        plain = all(key.isascii() and b"\\" not in key for key in keys)
        if not plain or keys.count(STEP) != 1 or len(set(keys)) < len(keys):
            return [], self.places[lines]
        begin = self.closing[lines] + 3
        end = np.concatenate([self.opening[lines][:, 1:] - 2, self.ends[lines][:, None] - 1], axis=1)
        values, is_whole, is_regular = _numbers(self.text, begin.ravel(), end.ravel())
        values, is_regular = values.reshape(begin.shape), is_regular.reshape(begin.shape)
        for line, column in np.argwhere(~is_regular):
            number = self._number(int(begin[line, column]), int(end[line, column]))
            if number is not None:
                values[line, column], is_regular[line, column] = number, True
        fine = is_regular.all(axis=1) & is_whole.reshape(begin.shape)[:, keys.index(STEP)]
        names = [key.decode("ascii") for key in keys]
        return [Rows(names, values[fine], self.places[lines][fine])], self.places[lines][~fine]

    def _number(self, begin: int, end: int) -> float | None:
        """Return a number that is not read at once, NaN where it is not finite, None where it is none."""
        text = self.block[begin:end]
        if text in NOT_FINITE:
            return float("nan")
        if end - begin > 2 * LONGEST or not NUMBER.fullmatch(text):
            return None
        number = float(text)
        return number if abs(number) < float("inf") else float("nan")


def _numbers(
    text: Bytes, begin: Places, end: Places
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Read numbers; of more than 18 characters the rest of the fraction is left out.

    Args:
        text: of all of them.
        begin: (n,) their first characters.
        end: (n,) behind their last ones.

    Returns:
        The numbers (n,), of each whether it is a whole number, and whether it could be read.
    """
    exponent, has_exponent, end = _exponents(text, begin, end)
    length = end - begin
    is_regular = (length > 0) & (length <= LONGEST)
    digits, fraction = np.zeros(len(begin), dtype=np.int64), np.zeros(len(begin), dtype=np.int8)
    dotted = np.zeros(len(begin), dtype=bool)
    characters = np.ascontiguousarray(sliding_window_view(text, WIDTH)[begin].T)
    negative = characters[0] == ord("-")
    for place in range(min(WIDTH, int(length.max(initial=0)))):
        within = length > place
        digit = characters[place] - np.uint8(ord("0"))
        is_digit = (digit <= 9) & within
        digits = np.where(is_digit, digits * 10 + digit, digits)
        fraction += is_digit & dotted
        dot = (characters[place] == ord(".")) & within
        is_regular &= is_digit | (dot & ~dotted) | ~within | (negative if place == 0 else False)
        dotted |= dot
    leading = np.where(negative, characters[1], characters[0])
    following = np.where(negative, characters[2], characters[1]) - np.uint8(ord("0"))
    is_regular &= (leading - np.uint8(ord("0")) <= 9) & (~dotted | (fraction > 0))
    is_regular &= (leading != ord("0")) | (following > 9) | (length <= 1 + negative)
    for place in range(WIDTH, LONGEST):  # digits of a fraction that are left out
        beyond = np.flatnonzero(is_regular & (length > place))
        if not len(beyond):
            break
        is_regular[beyond] = dotted[beyond] & (text[begin[beyond] + place] - np.uint8(ord("0")) <= 9)
    values = digits * POWERS[exponent - fraction]
    return np.where(negative, -values, values), is_regular & ~dotted & ~has_exponent, is_regular


def _exponents(text: Bytes, begin: Places, end: Places) -> tuple[Places, NDArray[np.bool_], Places]:
    """Return the exponents (n,) of numbers as Python writes them, `e-05`, who has one, and the ends without them."""
    marked = (text[end - 4] == ord("e")) & (end - begin > 4)
    exponent, at = np.zeros(len(begin), dtype=np.int64), np.flatnonzero(marked)
    sign, tens, ones = (text[end[at] - place] for place in (3, 2, 1))
    fine = ((sign == ord("-")) | (sign == ord("+"))) & (tens - np.uint8(48) <= 9) & (ones - np.uint8(48) <= 9)
    at = at[fine]
    size = (tens[fine] - np.int64(48)) * 10 + ones[fine] - 48
    exponent[at] = np.where(sign[fine] == ord("-"), -size, size)
    has_exponent = exponent != 0
    return exponent, has_exponent, end - 4 * has_exponent


def blocks_of(file: BinaryIO, size: int, longest: int, *, to_the_end: bool) -> Iterator[tuple[bytes, int]]:
    """Yield whole lines of a file, some megabytes at once, and where the next one begins.

    Args:
        file: opened at the beginning of a line.
        size: bytes to read at once.
        longest: bytes of a line; of a longer one nothing is kept.
        to_the_end: whether a last line without an end is one; it may be half written.
    """
    rest, is_inside = b"", False  # of a line that is too long
    while chunk := file.read(size):
        whole, end, rest = (rest + chunk).rpartition(b"\n")
        if is_inside and end:
            whole, is_inside = whole.partition(b"\n")[2], False
        if len(rest) > longest:
            is_inside, rest = True, b""
        if is_inside and not end:
            rest = b""
        if whole:
            yield whole + b"\n", file.tell() - len(rest)
    if rest and to_the_end:
        yield rest + b"\n", file.tell()
