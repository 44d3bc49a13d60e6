"""The page of a report from a server of this machine, which reads the runs again as they train."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vqdist.errors import UserError
from vqdist.reports.page import as_json, data_of, page_of
from vqdist.reports.record import Picture, RunRecord

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine that a browser may ask by; any other is a page of somebody else that was led here."""
PICTURE = "/picture/"


class Live:
    """The runs as they are now; each file is read anew only if it has changed.

    Args:
        runs: which were read.
        pictures: most sheets of one run.
    """

    def __init__(self, runs: list[RunRecord], pictures: int):
        self.runs, self.most = runs, pictures
        self._lock = threading.Lock()
        self._pictures: dict[str, Picture] = {}
        self._state = ""
        self._json = b""
        self._page = b""

    def page(self) -> bytes:
        """Return the page with the numbers of now."""
        with self._lock:
            self._refresh()
            return self._page

    def data(self) -> tuple[bytes, str]:
        """Return the numbers of now as JSON, and a mark that changes with them."""
        with self._lock:
            self._refresh()
            return self._json, self._state

    def picture(self, key: str) -> tuple[bytes, str] | None:
        """Return the content of a picture that the page names, and its type."""
        with self._lock:
            picture = self._pictures.get(key)
        return None if picture is None else picture.content()

    def _refresh(self) -> None:
        state = _state_of(self.runs)
        if state == self._state:
            return
        for run in self.runs:
            try:
                run.read(to_the_end=False)
            except UserError as error:  # between two lines, or while a run gives way to another
                run.problems.append(str(error))
        data = data_of(self.runs, self.most, self._address)
        self._json, self._page = as_json(data).encode(), page_of(data, live=True).encode()
        self._state = state

    def _address(self, picture: Picture) -> str:
        status = picture.path.stat()
        address = _mark(f"{picture.path} {status.st_mtime_ns} {status.st_size}")
        if address not in self._pictures:
            picture.content()  # raises where it cannot be read
            self._pictures[address] = picture
        return PICTURE + address


def _state_of(runs: list[RunRecord]) -> str:
    """Return a mark of all files that a report reads, by their sizes and times."""
    marks = []
    for run in runs:
        for path in sorted([*run.folder.glob("*.json*"), run.folder / "results"]):
            marks.append(f"{path} {_status(path)}")
    return _mark("\n".join(marks))


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _status(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "gone"
    return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of the page, its data and its pictures; everything else is refused."""

    live: Live

    def do_GET(self) -> None:
        """Answer one request."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in NAMES and host not in NAMES:
            return self._send(403, b"vqdist report serves this machine only\n", "text/plain")
        path = self.path.partition("?")[0]
        if path == "/":
            return self._send(200, self.live.page(), "text/html; charset=utf-8")
        if path == "/data.json":
            content, state = self.live.data()
            if self.headers.get("If-None-Match") == f'"{state}"':
                return self._send(304, b"", "application/json", state)
            return self._send(200, content, "application/json", state)
        try:
            found = self.live.picture(path.removeprefix(PICTURE)) if path.startswith(PICTURE) else None
        except UserError:
            found = None
        if found is None:
            return self._send(404, b"there is nothing here\n", "text/plain")
        return self._send(200, *found)

    def _send(self, code: int, content: bytes, kind: str, state: str | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        if state is not None:
            self.send_header("ETag", f'"{state}"')
        if code != 304:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if code != 304:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that went away."""


def open_server(runs: list[RunRecord], pictures: int, port: int) -> ThreadingHTTPServer:
    """Return a server of this machine only, which `serve_forever` starts.

    Args:
        runs: which were read.
        pictures: most sheets of one run.
        port: 0 takes one that is free.

    Raises:
        UserError: the port cannot be had.
    """
    handler = type("Handler", (_Handler,), {"live": Live(runs, pictures)})
    try:
        return _Server((HOST, port), handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be had: {error.strerror}; give another one, or none") from error
