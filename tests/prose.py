"""A check of `make lint`: docstrings and pages without the openings and the words that CONTRIBUTING.md bans.

    python tests/prose.py [FILE ...]

Without files it reads every Markdown file, and every Python file that pyproject.toml does not list as unchecked: the
files whose `per-file-ignores` name D401.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vqdist", "tests", "benchmarks", "launch")

# a sentence starts at the docstring's start, after an empty line, or after the end of another
OPENING = re.compile(r"(?:\A|(?<=[.!?])\s+|\n\s*\n\s*)(What|Whoever|As|How)\b(?!\.)")
WORDS = {
    r"pulses?": "heartbeat",
    r"lines? of numbers": "log line",
    r"what is told": "the option, or the message",
}
CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
BANNED = {re.compile(rf"\b{words}\b", re.IGNORECASE): instead for words, instead in WORDS.items()}


def problems(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the description of each banned opening and word in the docstrings of a file."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node, clean=False)
        if text is None:
            continue
        yield from problems_of_text(text, node.body[0].lineno)


def problems_of_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield the same of a page of Markdown; code is passed over."""
    return problems_of_text(CODE.sub(lambda found: re.sub(r"[^\n]", "", found[0]), text), 1)


def problems_of_text(text: str, first: int) -> Iterator[tuple[int, str]]:
    """Yield the same of a text that begins on this line."""
    for found in OPENING.finditer(text):
        line = first + text.count("\n", 0, found.start(1))
        yield line, f"a sentence begins with {found[1]!r}; begin with the thing, or with the verb"
    for pattern, instead in BANNED.items():
        for found in pattern.finditer(text):
            line = first + text.count("\n", 0, found.start())
            yield line, f"{found[0]!r} is no word of the field; use {instead}"


def unchecked() -> list[str]:
    """Return the paths, or patterns of paths, that pyproject.toml leaves out."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ignored = settings["tool"]["ruff"]["lint"]["per-file-ignores"]
    return [path for path, rules in ignored.items() if "D401" in rules]


def files() -> list[Path]:
    """Return the files to check, sorted."""
    left_out = unchecked()
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(
        path
        for path in [*found, ROOT / "setup.py", *pages]
        if not any(fnmatch.fnmatch(str(path.relative_to(ROOT)), pattern) for pattern in left_out)
    )


def main(arguments: list[str]) -> int:
    """Print every problem, one a line, and return 1 if there is one."""
    gone = [path for path in unchecked() if not any(ROOT.glob(path))]
    for path in gone:
        print(f"pyproject.toml: per-file-ignores names {path}, which is not there; remove the line")
    count = len(gone)
    for path in [Path(argument).resolve() for argument in arguments] or files():
        check = problems_of_page if path.suffix == ".md" else problems
        for line, problem in check(path.read_text(encoding="utf-8")):
            print(f"{path.relative_to(ROOT)}:{line}: {problem}")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
