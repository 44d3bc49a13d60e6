"""Starting processes from tests: torchrun on the CPU, one thread each, always with a time limit.

Unless `warm=False` says otherwise, they begin with everything imported; `warm` says what that changes.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from warm import PROGRAMS, Job, programs

ROOT = Path(__file__).resolve().parent.parent
# what tests and their workers import by name: helpers, and what one test has of another
IMPORTED_FROM = [ROOT / "tests", *(ROOT / "tests" / kind for kind in ("unit", "conformance", "contract", "cli"))]
BIN = Path(sys.executable).parent
# how a connection ends of which the other process is killed: it depends on what was on its way
BROKEN = "connection closed by peer", "connection reset by peer", "broken pipe"


def environment(**extra: str) -> dict[str, str]:
    """Return this environment without a launcher's variables, one thread a process, the repository importable."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "TORCHELASTIC_", "OMPI_", "SLURM_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    }
    path = os.pathsep.join(map(str, [ROOT, *IMPORTED_FROM]))
    search = os.pathsep.join([str(BIN), inherited.get("PATH", "")])
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PATH": search, **extra}


# Between the ports of Slurm jobs (launch/slurm/functions.sh) and those that the kernel gives to whoever asks for any;
# some for each process of pytest-xdist.
_PORTS = range(31_000, 32_760)
_OF_A_WORKER = 220


def _ports_in_turn() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw7").removeprefix("gw"))
    start = worker * _OF_A_WORKER % len(_PORTS)
    ports = _PORTS[start : start + _OF_A_WORKER]
    shift = os.getpid() % len(ports)
    return itertools.cycle([*ports[shift:], *ports[:shift]])


_ports = _ports_in_turn()


def free_port() -> int:
    """Return a TCP port that is free now, and that nobody else is given soon."""
    for port in _ports:
        with socket.socket() as server, suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def kill_all(process: subprocess.Popen) -> None:
    """End a process that leads its session, and all that descend from it: torchrun's ranks lead their own."""

    def kill(pid: int) -> None:
        with suppress(OSError):
            children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
            os.kill(pid, signal.SIGKILL)
            for child in sum(children, []):
                kill(int(child))

    if process.poll() is None:
        kill(process.pid)
    with suppress(OSError):  # of those whose parent has ended
        os.killpg(process.pid, signal.SIGKILL)


def end_of(process: subprocess.Popen, timeout: float) -> tuple[str, str]:
    """Return a process's words on standard output and error until it ends; past the limit it is killed."""
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        stdout, stderr = process.communicate(timeout=60)
        command = " ".join(map(str, process.args))
        raise AssertionError(f"{command} took over {timeout} s\n{stdout[-3000:]}\n{stderr[-6000:]}") from None


def last_step(out: Path) -> int:
    """Return the step of the last log line that a run has written."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # one may be half written
    return json.loads(lines[-1])["step"] if lines else 0


def warmed(command: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command and the variables that start it, and the ranks that it starts, with everything imported."""
    folder = programs()
    name = "python" if command[0] == sys.executable else command[0]
    search = os.pathsep.join([str(folder), environment()["PATH"]])
    variables = {"PYTHON_EXEC": str(folder / "python"), "PATH": search}  # torchrun reads the first
    return [str(folder / name) if name in PROGRAMS else name, *command[1:]], variables


def run(
    command: list[str],
    *,
    timeout: float = 240,
    check: bool = True,
    cwd: Path = ROOT,
    warm: bool = True,
    **extra: str,
):
    """Run a command to its end; past the time limit it and all that it started are killed.

    Returns:
        The completed process, with `stdout` and `stderr` as text.
    """
    variables: dict[str, str] = {}
    if warm:
        command, variables = warmed(command)
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**{**variables, **extra}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stdout, stderr = end_of(process, timeout)
    if check and process.returncode:
        raise AssertionError(f"{' '.join(command)} exited {process.returncode}\n{stdout[-3000:]}\n{stderr[-6000:]}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def torchrun(arguments: list[str], *, processes: int = 2, **options):
    """`torchrun --nproc_per_node processes arguments` on a free port; `options` are those of `run`."""
    command = ["torchrun", "--nproc_per_node", str(processes), "--master_port", str(free_port()), *arguments]
    return run(command, **options)


def start_ranks(arguments: list[str], logs: Path, *, ranks: int = 2, **extra: str) -> list[Job]:
    """Start the ranks of a command without a launcher, warm, each seen as it is; they print into `logs`/rank_N.log."""
    logs.mkdir(parents=True, exist_ok=True)
    place: dict[str, str] = {}
    if ranks > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    jobs = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        variables = environment(**{**place, **own, **extra})
        jobs.append(Job(arguments, environment=variables, log=logs / f"rank_{rank}.log"))
    return jobs


def vqdist(*arguments: str, **options):
    """`vqdist arguments` in one process; `options` are those of `run`."""
    return run(["vqdist", *arguments], **options)
