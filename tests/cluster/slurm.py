"""A real Slurm with two nodes on this machine: own configuration, key, ports and folders, no systemd; as root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launching import ROOT, environment, free_port, run

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

# linuxproc and task/none do without cgroups; config_overrides lets a node claim more cores than the machine has.
CONFIGURATION = """\
ClusterName=vqdist
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5
JobRequeue=1
KillWait=30
MinJobAge=86400
MessageTimeout=60
BatchStartTimeout=120
{nodes}
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def until(condition: Callable[[], object], what: str, *, timeout: float = 200, every: float = 0.1):
    """Return what `condition` gives as soon as it is true; an AssertionError with `what` past the time limit."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(every)
    return found


class Slurm:
    """The cluster.

    Args:
        folder: for everything that it writes; its path must be short enough for a socket.
    """

    def __init__(self, folder: Path):
        missing = [name for name in NEEDED if shutil.which(name, path=_path()) is None]
        assert not missing, f"{', '.join(missing)} not found; run `bash tests/cluster/install.sh` as root"
        assert os.getuid() == 0, "Slurm's daemons are started by root here; run `make test-cluster` as root"
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8 RealMemory=8000"
            for node in NODES
        )
        text = CONFIGURATION.format(folder=self.folder, host=_host(), port=free_port(), nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        self._start_munge()
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        until(self._is_idle, f"both nodes to be idle, see {self.folder}/slurmctld.log", timeout=60)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        # --force: it would rather not be root's
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        until((self.folder / "munge.socket").exists, f"munged, see {self.folder}/munged.out", timeout=30)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            self.daemons.append(
                subprocess.Popen(
                    command,
                    env=environment(**self.variables),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _is_idle(self) -> bool:
        said = run(["sinfo", "--noheader", "--Node", "--format", "%t"], check=False, timeout=30, **self.variables)
        return said.stdout.split() == ["idle"] * len(NODES)

    def __exit__(self, *_exception) -> None:
        """End all jobs, then the daemons, each by its number."""
        if len(self.daemons) > 1:
            for options in (("--signal=KILL", "--full"), ()):
                run(["scancel", *options, "--user=root"], check=False, timeout=30, **self.variables)
            jobs = ["squeue", "--noheader"]
            deadline = time.monotonic() + 40
            while time.monotonic() < deadline and run(jobs, check=False, timeout=30, **self.variables).stdout.strip():
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    # ------------------------------------------------------------------------------------- jobs

    def do(self, *command: str, check: bool = True, **variables: str) -> str:
        """Return what a command of Slurm prints."""
        return run(list(command), check=check, timeout=60, **{**self.variables, **variables}).stdout.strip()

    def sbatch(self, script: str, *arguments: str | Path, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit `launch/slurm/SCRIPT.sbatch ARGUMENTS` from the repository's folder; returns the job's number."""
        own = ("--parsable", "--output", str(self.folder / "%A_%a.log"), *options)
        variables = {"VQDIST_LOGS": str(self.folder / "logs"), **variables}
        return self.do("sbatch", *own, f"launch/slurm/{script}.sbatch", *map(str, arguments), **variables)

    def show(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says, by key; of a task of an array, name it JOB_TASK."""
        said = self.do("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait(self, job: str, *, timeout: float = 400) -> dict[str, str]:
        """`show` of a job that has ended, be it well or not."""

        def ended():
            shown = self.show(job)
            return shown if shown["JobState"] in ENDED else None

        try:
            return until(ended, f"job {job} to end", timeout=timeout, every=0.5)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.show(job)}\n{self.log(job)[-4000:]}") from None

    def requeued(self, job: str, *, restarts: int = 1, timeout: float = 240) -> None:
        """Wait until a job is in the queue again, and make Slurm start it now instead of two minutes later."""

        def pending():
            shown = self.show(job)
            assert shown["JobState"] not in ENDED, f"{shown}\n{self.log(job)[-4000:]}"
            return shown["JobState"] == "PENDING" and shown["Restarts"] == str(restarts)

        until(pending, f"job {job} to be requeued", timeout=timeout, every=0.2)
        time.sleep(8)  # at once, Slurm would start it with the credentials of before, and fail it for that
        self.do("scontrol", "update", f"JobId={job}", "StartTime=now")

    def log(self, job: str) -> str:
        """Return the job's output; of a task of an array, name it JOB_TASK."""
        path = self.folder / f"{job if '_' in job else job + '_4294967294'}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def ranks(self, job: str) -> dict[int, int]:
        """Process ids of a job's ranks on this machine, by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                values = path.read_bytes().split(b"\0")
            except OSError:
                continue
            rank = [int(value[5:]) for value in values if value.startswith(b"RANK=")]
            if rank and f"SLURM_JOB_ID={job}".encode() in values:
                pid = int(path.parent.name)
                # the processes that load images are children of a rank and have its variables
                found[rank[0]] = min(pid, found.get(rank[0], pid))
        return found


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _path() -> str:
    return os.pathsep.join([environment()["PATH"], "/usr/sbin", "/sbin"])


SCRIPTS = sorted([ROOT / "launch" / "env.sh", *(ROOT / "launch" / "slurm").iterdir()])
