"""Commands that begin with everything imported: a server forks itself for each, and `programs()` lead there.

Importing the trainers takes ten seconds of a core, and a run on two ranks takes them twice. A command that a test
starts through `programs()` is a fork of a process that has imported everything once. It has its own environment,
folder, files and session. Two things differ from a real start: a library that reads a variable while it is imported
has read the server's, and a module that is imported late is there already. Tests of such matters start real processes
(`launching.run(..., warm=False)`). CPU seconds of every process are added to the file that WARM_TIMES names.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = Path(sys.executable).parent
# what may be started: console scripts of the environment, and its interpreter
PROGRAMS = ("vqdist", "torchrun", "accelerate", "deepspeed", "python")


@functools.cache
def programs() -> Path:
    """Return the folder of programs that are started warm; their server runs until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="vqdist-warm-")) / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        script = folder / name
        words = [sys.executable, "-S", "-E", HERE / "client.py", folder / "socket", BIN / name]
        script.write_text(f'#!/bin/sh\nexec {" ".join(map(str, words))} "$@"\n')
        script.chmod(0o755)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # to import what is preloaded; a job brings its own
    server = subprocess.Popen(
        [sys.executable, str(HERE / "server.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_end, server)
    if server.stdout.readline() != "ready\n":
        raise AssertionError("the server of warm processes did not start; its error stands above")
    return folder


class Job:
    """A process that begins with everything imported. A signal to `pid` reaches it itself, SIGKILL too.

    It ends when nobody holds this object any more.

    Args:
        arguments: of the interpreter, as `-m vqdist train`, or a script and what it takes.
        environment: all of its variables.
        log: gets what it prints.
        cwd: its folder.
    """

    def __init__(self, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path, cwd: Path = ROOT):
        self.log = log
        self.code: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(programs() / "socket"))
        asked = {"program": str(BIN / "python"), "arguments": [*map(str, arguments)], "cwd": str(cwd)}
        job = json.dumps({**asked, "environment": dict(environment)}).encode()
        with log.open("ab") as file, open(os.devnull, "rb") as nothing:
            descriptors = [nothing.fileno(), file.fileno(), file.fileno()]
            socket.send_fds(self._server, [len(job).to_bytes(8, "big")], descriptors)
        self._server.sendall(job)
        self._answers = self._server.makefile()
        self.pid = int(self._answers.readline())

    @property
    def printed(self) -> str:
        """All that it has printed until now."""
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """Return its exit code, or minus the signal that ended it; None while it runs."""
        return self._code_within(0)

    def wait(self, timeout: float) -> int:
        """Return the same once it has ended; past the limit it is killed."""
        code = self._code_within(timeout)
        if code is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"process {self.pid} took over {timeout} s\n{self.printed[-4000:]}")
        return code

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _code_within(self, seconds: float) -> int | None:
        if self.code is None and select.select([self._server], [], [], seconds)[0]:
            self.code = int(self._answers.readline())
            self._answers.close()
            self._server.close()
        return self.code


def _end(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait(30)
