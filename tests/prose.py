"""A check of `make lint`: docstrings and pages without the openings and the words that CONTRIBUTING.md bans.

    python tests/prose.py [FILE ...]

Without files it reads every Markdown and every Python file of the project.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vqdist", "tests", "benchmarks", "launch")

# a sentence starts at the docstring's start, after an empty line, or after the end of another
OPENING = re.compile(r"(?:\A|(?<=[.!?])\s+|\n\s*\n\s*)(What|Whoever|As|How)\b(?!\.)")
# these may begin a later sentence, "Where a name stands twice, ..."; a docstring begins with its subject or its verb
FIRST = re.compile(r"\A(Whether|Where)\b")
WORDS = {
    r"pulses?": "heartbeat",
    r"lines? of numbers": "log line",
    r"what is told": "the option, or the message",
}
CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
BANNED = {re.compile(rf"\b{words}\b", re.IGNORECASE): instead for words, instead in WORDS.items()}


def problems(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the description of each banned opening and word in the docstrings of a file.

    The string below a field or a constant, which describes it, is one of them.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        text = node.value.value
        if isinstance(text, str):
            yield from problems_of_text(text, node.lineno, FIRST, OPENING)


def problems_of_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield the same of a page of Markdown; code is passed over."""
    return problems_of_text(CODE.sub(lambda found: re.sub(r"[^\n]", "", found[0]), text), 1, OPENING)


def problems_of_text(text: str, first: int, *openings: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Yield the same of a text that begins on this line, with these banned openings."""
    for found in (match for opening in openings for match in opening.finditer(text)):
        line = first + text.count("\n", 0, found.start(1))
        yield line, f"a sentence begins with {found[1]!r}; begin with the thing, or with the verb"
    for pattern, instead in BANNED.items():
        for found in pattern.finditer(text):
            line = first + text.count("\n", 0, found.start())
            yield line, f"{found[0]!r} is no word of the field; use {instead}"


def files() -> list[Path]:
    """Return the files to check, sorted."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted([*found, ROOT / "setup.py", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def main(arguments: list[str]) -> int:
    """Print every problem, one a line, and return 1 if there is one."""
    count = 0
    for path in [Path(argument).resolve() for argument in arguments] or files():
        check = problems_of_page if path.suffix == ".md" else problems
        for line, problem in check(path.read_text(encoding="utf-8")):
            print(f"{path.relative_to(ROOT)}:{line}: {problem}")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
