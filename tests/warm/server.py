"""Started by `warm.programs()`: imports everything, and forks a process for each client until standard input ends.

usage: server.py FOLDER   (with the programs; the socket is made there)
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

LAUNCHERS = ("torchrun", "accelerate", "deepspeed")
# what commands import late, and what their launchers are
ALSO = (
    *("accelerate.commands.accelerate_cli", "accelerate.commands.launch", "deepspeed", "deepspeed.launcher.launch"),
    *("deepspeed.launcher.runner", "torch.distributed.run", "torch._dynamo", "torch.utils.tensorboard", "scenarios"),
    *("torch.distributed.fsdp", "torchvision.models", "torch.profiler", "pytest"),
)


def import_everything() -> None:
    import vqdist

    modules = [module.name for module in pkgutil.walk_packages(vqdist.__path__, "vqdist.")]
    for name in (*modules, *ALSO):
        if name.endswith("__main__"):
            continue
        with suppress(ModuleNotFoundError):  # of an extra
            importlib.import_module(name)


def read(connection: socket.socket) -> tuple[dict, list[int]]:
    """Return the job that a client asks for, and its three files."""
    length, files, *_ = socket.recv_fds(connection, 8, 3)
    left, parts = int.from_bytes(length, "big"), []
    while left:
        parts.append(connection.recv(left))
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), files


def serve(folder: Path) -> tuple[dict, list[int]]:
    """Return in a child only, with its job."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who attend to a client
    print("ready", flush=True)
    while True:
        readable, *_ = select.select([listener, 0], [], [])
        if 0 in readable:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return attend(connection)
        connection.close()


def attend(connection: socket.socket) -> tuple[dict, list[int]]:
    """Return in a child with its job; the parent stays until it has ended, or ends it if the client goes."""
    os.setsid()
    job, files = read(connection)
    ready, started = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(ready)
        connection.close()
        os.close(started)
        return job, files
    os.close(started)
    select.select([ready], [], [])  # it leads its session
    for file in (0, 1, 2, ready, *files):
        os.close(file)
    connection.sendall(b"%d\n" % pid)
    child = os.pidfd_open(pid)
    readable, *_ = select.select([child, connection], [], [])
    if child not in readable:
        kill(pid)
    _, status, used = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if "WARM_TIMES" in os.environ:  # a file for those who look for slow tests
        words = " ".join(" ".join(job["arguments"]).split())  # code has lines
        line = f"{used.ru_utime + used.ru_stime:6.2f} {Path(job['program']).name} {words[:100]}\n"
        with open(os.environ["WARM_TIMES"], "a") as file:
            file.write(line)
    with suppress(OSError):
        connection.sendall(b"%d\n" % code)
    os._exit(0)


def kill(pid: int) -> None:
    """Kill a process and all that descend from it."""
    with suppress(OSError):
        children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        os.kill(pid, signal.SIGKILL)
        for child in sum(children, []):
            kill(int(child))


def become(job: dict, files: list[int], folder: Path) -> None:
    """Run the job in this process, whose files, folder and variables become the job's."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    searched = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in searched if path and path not in sys.path]
    program, arguments = Path(job["program"]), job["arguments"]
    if program.name in LAUNCHERS:
        sys.executable = str(folder / "python")  # whom it starts is warm, too
    if program.name != "python":
        sys.argv = [str(program), *arguments]
        sys.path[0] = str(program.parent)
        runpy.run_path(str(program), run_name="__main__")
        return
    while arguments[:1] == ["-u"]:
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    match arguments:
        case ["-m", module, *rest]:
            if module.startswith("deepspeed.launcher"):
                sys.executable = str(folder / "python")
            sys.argv = ["-m", *rest]
            sys.path[0] = job["cwd"]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path[0] = ""
            exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
        case [script, *rest] if not script.startswith("-"):
            sys.argv = [script, *rest]
            sys.path[0] = str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")
        case _:
            raise SystemExit(f"warm python does not take {arguments}: start a real one")


def end_after(job: Callable[[], None]) -> NoReturn:
    """End this process as an interpreter does after its script, but leave the modules: freeing them takes a second."""
    code = 0
    try:
        job()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as end:
            code = int(end.code)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main() -> None:
    folder = Path(sys.argv[1])
    import_everything()
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise SystemExit(f"an import has started {len(threads) - 1} threads, which a fork would lose")
    gc.collect()
    gc.freeze()  # the collector leaves shared pages alone
    job, files = serve(folder)
    end_after(lambda: become(job, files, folder))


if __name__ == "__main__":
    main()
