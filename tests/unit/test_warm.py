"""Processes that begin with everything imported end, fail, read and die as those of a real interpreter do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import environment, run, torchrun, warmed

REPORT = (
    "import json, os, sys; print(json.dumps([sys.argv, sys.path[0], os.getcwd(), os.environ.get('SAID'), __name__]))"
)
# in short pieces: a signal that comes just before a sleep is seen after it
WAITS = "import time; print('here', flush=True); [time.sleep(0.1) for _ in range(1000)]"


def python(*words: str, **options):
    return run([sys.executable, *words], **options)


@pytest.mark.parametrize("warm", [False, True])
def test_a_script_a_module_and_a_line_see_what_python_shows_them(warm, tmp_path):
    (tmp_path / "report.py").write_text(REPORT)
    words = {"-c": ["-c", REPORT], "script": [str(tmp_path / "report.py")], "module": ["-m", "report"]}
    argv = {"-c": "-c", "script": str(tmp_path / "report.py"), "module": str(tmp_path / "report.py")}
    first = {"-c": "", "script": str(tmp_path), "module": str(tmp_path)}
    for kind, start in words.items():
        done = python(*start, "a b", cwd=tmp_path, warm=warm, SAID="something")
        expected = [[argv[kind], "a b"], first[kind], str(tmp_path), "something", "__main__"]
        assert json.loads(done.stdout) == expected, kind


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "line, code, said",
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("raise KeyError('inside')", 1, "KeyError: 'inside'"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", 0, "last"),
        ("import threading, sys, time\ndef f():\n time.sleep(0.1); print('end', file=sys.stderr)\n"
         "threading.Thread(target=f).start()", 0, "end"),
    ],
)  # fmt: skip
def test_ends(warm, line, code, said):
    done = python("-c", line, check=False, warm=warm)
    assert done.returncode == code and (done.stderr.strip().splitlines() or [""])[-1] == said


def begun(line: str) -> subprocess.Popen:
    command, variables = warmed([sys.executable, "-c", line])
    process = subprocess.Popen(command, env=environment(**variables), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    return process


def test_signals_are_passed_on():
    process = begun(f"import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); {WAITS}")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    process = begun(WAITS)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM


def test_who_kills_the_client_kills_the_process():
    process = begun(f"import os; print(os.getpid(), file=open({str(Path(os.devnull))!r}, 'w')); {WAITS}")
    other = begun("import os; print('here'); print(os.getpid(), flush=True); import time; time.sleep(100)")
    pid = int(other.stdout.readline())
    for each in (process, other):
        each.kill()
        each.wait(60)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


def test_ranks_are_warm_and_a_torn_one_ends_the_launch(tmp_path):
    """`torchrun` itself is the real one: it gives each rank its place, and reports who failed."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nrank = int(os.environ['RANK'])\nprint(f'{rank} {\"deepspeed\" in sys.modules}')\n"
    )
    assert sorted(torchrun([str(script)]).stdout.split("\n")) == ["", "0 True", "1 True"]
    script.write_text("import os, sys, time\ntime.sleep(60) if os.environ['RANK'] == '0' else sys.exit(3)\n")
    done = torchrun([str(script)], check=False)
    assert done.returncode == 1 and "exitcode  : 3" in done.stderr


def test_the_limit_of_time_holds_for_all_that_was_started():
    began = time.monotonic()
    with pytest.raises(AssertionError, match="took over 3 s"):
        torchrun(["-m", "timeit", "import time; time.sleep(90)"], timeout=3)
    assert time.monotonic() - began < 60
