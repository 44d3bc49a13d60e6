"""`vqdist report RUN ...`: the numbers of runs as a table, or as a page for a browser, without loading a model."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from vqdist.cli.parsing import make_parser, parse
from vqdist.errors import UserError, printable
from vqdist.files import writing

EPILOG = """\
Prints the last numbers of training, validation and evaluation, and below them each curve in a line.
--html writes one file that needs no network and no server: curves (zoom, log scale, by steps, images or hours, several
runs laid over each other), pictures and codes over the steps, evaluations by protocol, differences of configuration,
environment and events. --serve shows the same page as the runs go on; Ctrl-C ends it."""
PICTURES = 20


def report(arguments: list[str]) -> int:
    """Print the last numbers of runs side by side, or make a page of curves: `vqdist report RUN --html a.html`."""
    parser = make_parser("vqdist report", "The numbers of runs: a table, or a page of curves and pictures.", EPILOG)
    parser.add_argument("runs", type=str, nargs="+", help="Run folders.")
    parser.add_argument("--html", type=str | None, default=None, help="File of the page to write (.html).")
    parser.add_argument(
        "--overwrite", type=bool, default=False, help="Whether the page replaces a file that is no such page."
    )
    parser.add_argument(
        "--pictures", type=int, default=PICTURES, help="Most sheets of pictures of a run on the page, over its steps."
    )
    parser.add_argument("--serve", type=bool, default=False, help="Serve the page to a browser on this machine.")
    parser.add_argument("--port", type=int, default=0, help="Of --serve; by default one that is free.")
    options = parse(parser, arguments)
    out = _check(options)
    from vqdist.reports.record import RunRecord

    runs = [RunRecord(Path(run).expanduser(), title) for run, title in zip(options.runs, _titles(options.runs))]
    for run in runs:
        run.read(to_the_end=not options.serve)
    if out is not None:
        _write_page(out, runs, options.pictures)
    if options.serve:
        return _serve(runs, options)
    if out is None:
        _print_table(runs)
    return 0


def _check(options: Any) -> Path | None:
    """Find the mistakes that can be seen before a run is read; return the file to write, if one is asked for."""
    if not 2 <= options.pictures <= 1000:
        raise UserError(f"pictures {options.pictures} is not possible; it must be at least 2 and at most 1000")
    if not 0 <= options.port <= 65535:
        raise UserError(f"port {options.port} is not possible; it must be at most 65535, or 0 for a free one")
    if options.port and not options.serve:
        raise UserError(f"port {options.port} is of --serve; add it, or leave the port out")
    if options.html is None:
        if options.overwrite:
            raise UserError("--overwrite is of the file of --html; name one, or leave it out")
        return None
    out = Path(options.html).expanduser()
    if out.is_dir():
        raise UserError(f"--html {out} is a folder; give the name of a file, as in {out / 'report.html'}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html {out} is no name of a page; give one that ends in .html")
    if out.exists() and not options.overwrite:
        from vqdist.reports.page import is_ours

        if not out.is_file() or not is_ours(out):
            raise UserError(f"--html {out} is there, and no page of vqdist; give another name, or --overwrite")
    return out


def _titles(given: list[str]) -> list[str]:
    """Return short names of the runs, that of the folder above too where two are alike."""
    paths = [Path(run).expanduser().resolve() for run in given]
    names = [path.name or str(path) for path in paths]
    return [
        f"{path.parent.name}/{path.name}" if names.count(name) > 1 and len({*paths}) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]


def _write_page(out: Path, runs: list[Any], pictures: int) -> None:
    from vqdist.reports.page import data_of, page_of

    page = page_of(data_of(runs, pictures))
    partial = out.with_name(out.name + ".partial")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    for run in runs:
        for problem in run.problems:
            print(f"warning: {printable(f'{run.folder}: {problem}')}", file=sys.stderr)
    print(out)


def _serve(runs: list[Any], options: Any) -> int:
    from vqdist.reports.server import open_server

    with open_server(runs, options.pictures, options.port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ shows the runs as they go on; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("vqdist: the report is no longer served", file=sys.stderr)
    return 0


def _print_table(runs: list[Any]) -> None:
    from vqdist.reports.table import BLOCKS, PLAIN, curves, printed, table_of

    columns, differing = table_of(runs)
    titles = [run.folder.name or str(run.folder) for run in runs]
    print(printed(titles, columns))
    if text := curves(titles, runs, shutil.get_terminal_size((100, 24)).columns, BLOCKS if _has_blocks() else PLAIN):
        print(f"\n{text}")
    for line in differing:
        print(line)


def _has_blocks() -> bool:
    """Return whether standard output is a terminal that shows block characters; a file or a program gets ASCII."""
    try:
        "▁█".encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
