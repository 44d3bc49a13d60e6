"""Starting real processes from tests: torchrun on the CPU, one thread each, always with a time limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def environment(**extra: str) -> dict[str, str]:
    """This environment without a launcher's variables, one thread a process, the repository importable."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "TORCHELASTIC_", "OMPI_", "SLURM_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    }
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    search = os.pathsep.join([str(BIN), inherited.get("PATH", "")])
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PATH": search, **extra}


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(command: list[str], *, timeout: float = 240, check: bool = True, cwd: Path = ROOT, **extra: str):
    """Run a command to its end; past the time limit it and all that it started are killed.

    Returns:
        The completed process, with `stdout` and `stderr` as text.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(
            f"{' '.join(command)} took over {timeout} s\n{stdout[-3000:]}\n{stderr[-6000:]}"
        ) from None
    if check and process.returncode:
        raise AssertionError(f"{' '.join(command)} exited {process.returncode}\n{stdout[-3000:]}\n{stderr[-6000:]}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def torchrun(arguments: list[str], *, processes: int = 2, timeout: float = 240, check: bool = True, **extra: str):
    """`torchrun --nproc_per_node processes arguments` on a free port."""
    command = ["torchrun", "--nproc_per_node", str(processes), "--master_port", str(free_port()), *arguments]
    return run(command, timeout=timeout, check=check, **extra)


def vqdist(*arguments: str, timeout: float = 240, check: bool = True, cwd: Path = ROOT, **extra: str):
    """`vqdist arguments` in one process."""
    return run(["vqdist", *arguments], timeout=timeout, check=check, cwd=cwd, **extra)
