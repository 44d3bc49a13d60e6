"""Two hosts on this machine: network namespaces with names of their own and a cable. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from launching import ROOT, environment

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}


class Nodes:
    """The hosts `a` and `b`, up within this context.

    Args:
        folder: for what the processes print.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[subprocess.Popen] = []

    def __enter__(self) -> Nodes:
        if os.geteuid() or not shutil.which("ip"):
            raise RuntimeError("two nodes need root and iproute2; `make test-cluster` as root installs it")
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self) -> None:
        for node in ADDRESSES:
            _ip("netns", "add", self.namespace(node))
            hosts = Path("/etc/netns") / self.namespace(node) / "hosts"  # becomes /etc/hosts there
            hosts.parent.mkdir(parents=True)
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in ADDRESSES.items()))
        _ip("link", "add", self.cable("a"), "type", "veth", "peer", "name", self.cable("b"))
        for node, address in ADDRESSES.items():
            _ip("link", "set", self.cable(node), "netns", self.namespace(node))
            self._inside(node, "link", "set", "lo", "up")
            self._inside(node, "addr", "add", f"{address}/24", "dev", self.cable(node))
            self._inside(node, "link", "set", self.cable(node), "up")

    def __exit__(self, *_exception) -> None:
        for node in ADDRESSES:
            self.kill(node)
            subprocess.run(["ip", "netns", "del", self.namespace(node)], capture_output=True, timeout=30)
            shutil.rmtree(Path("/etc/netns") / self.namespace(node), ignore_errors=True)
        for process in self.started:
            process.wait(timeout=30)

    def namespace(self, node: str) -> str:
        """Return the network namespace of a node; other tests may run beside this one."""
        return f"vqdist-{os.getpid()}-{node}"

    def cable(self, node: str) -> str:
        """Return a node's end of the cable."""
        return f"vq{os.getpid()}{node}"

    def _inside(self, node: str, *arguments: str) -> None:
        _ip("-n", self.namespace(node), *arguments)

    def start(self, node: str, command: list[str], *, covered: dict[Path, Path] | None = None, **variables: str):
        """Start a command on a node.

        Args:
            node: "a" or "b".
            command: found on this environment's PATH.
            covered: folder -> folder that this node sees in its place, as on a disk of its own.
            **variables: of its environment.

        Returns:
            The process; its `log` is the file of all that it prints.
        """
        mounts = "".join(f"mount --bind '{by}' '{at}'\n" for at, by in (covered or {}).items())
        shell = ["sh", "-ec", f'hostname {node}\n{mounts}exec "$@"', "sh"]
        log = self.folder / f"{len(self.started)}_{node}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(node), "unshare", "--uts", *shell, *command],
                cwd=ROOT,
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.log = log
        self.started.append(process)
        return process

    def ranks(self, arguments: list[str], port: int) -> dict[str, subprocess.Popen]:
        """`vqdist arguments` as one rank on each node, without a launcher: its exit code is seen as it is."""
        variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "vqdist", *arguments]
        return {node: self.start(node, command, RANK=str(rank), **variables) for rank, node in enumerate(ADDRESSES)}

    def kill(self, node: str) -> None:
        """End a node: kill -9 to all of its processes at once."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace(node)], capture_output=True, text=True, timeout=30
        )
        for pid in map(int, found.stdout.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def cut(self) -> None:
        """Cut the cable: nothing passes and nobody is told."""
        self._inside("a", "link", "set", self.cable("a"), "down")

    def mend(self) -> None:
        """Undo `cut`."""
        self._inside("a", "link", "set", self.cable("a"), "up")


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[str, float]:
    """Return what a process printed until its end, and the seconds that it took."""
    began = time.monotonic()
    try:
        process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{process.args} took over {timeout} s\n{process.log.read_text()[-6000:]}") from None
    return process.log.read_text(), time.monotonic() - began


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
