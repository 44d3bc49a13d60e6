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
import os
import subprocess
import sys
import tempfile
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


def _end(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait(30)
