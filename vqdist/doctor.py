"""`vqdist doctor`: what works on this machine, and for what does not, the likely cause and the command that mends it.

Each check yields findings, one line each; a check that breaks is itself a finding. Whatever could disturb this process
(importing DeepSpeed, starting a process group) happens in processes of its own, with a time limit.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

OK, WARN, FAIL = "ok", "warn", "FAIL"

EXTRAS = ("deepspeed", "tracking", "data")
BACKENDS = {"local": "torch", "accelerate": "accelerate", "deepspeed": "deepspeed"}

IMPORT_SECONDS = 120  # at least; a slow machine gets more, see `allowed`
GROUP_SECONDS = 60
TIMES_AS_LONG = 8  # as this process took to import torch: a backend imports about three times as much
MOST_SECONDS = 1800
IMPORTED = "imported"  # what a probe prints when the exchange begins
EXIT_WRONG_SUM = 3  # of a probe's process: the exchange works and its numbers are wrong


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: str  # OK, WARN: an option is missing, FAIL: something needed does not work
    text: str
    remedy: str | None = None  # a command or a setting that mends it

    def __str__(self) -> str:
        mend = f"; to mend: {self.remedy}" if self.remedy else ""
        return f"{self.status:<5} {' '.join(self.text.split())}{mend}"


def run() -> int:
    """Print the report line by line; 0 if everything needed works, 1 otherwise."""
    failed = warned = 0
    for check in CHECKS:
        for finding in guarded(check):
            print(finding, flush=True)
            failed += finding.status == FAIL
            warned += finding.status == WARN
    status = FAIL if failed else OK
    print(Finding(status, f"{failed} failed, {warned} warnings" if failed or warned else "everything works"))
    return 1 if failed else 0


def guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; one that raises does not hide those after it."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(FAIL, f"{check.__name__} stopped with {type(error).__name__}: {error}")


# Packages


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(extra: str = "") -> list:
    """Return what vqdist's metadata asks for, in its core or in one extra; empty if vqdist is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("vqdist") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(line) for line in lines]
    if not extra:
        return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    chosen = [one for one in parsed if one.marker is not None and one.marker.evaluate({"extra": extra})]
    return [one for one in chosen if one.marker is not None and not one.marker.evaluate({"extra": ""})]


def check_vqdist() -> Iterator[Finding]:
    """Check that vqdist is installed here, as the version that runs."""
    from vqdist.version import __version__

    yield Finding(OK, f"vqdist {__version__}, Python {platform.python_version()} at {sys.prefix}")
    known = installed_version("vqdist")
    if known is None:
        yield Finding(FAIL, "vqdist runs from its folder and is not installed here", "pip install -e .")
    elif known != __version__:
        yield Finding(WARN, f"vqdist was installed as {known}", "pip install -e .")


def check_core_packages() -> Iterator[Finding]:
    """Check the packages that vqdist cannot do without."""
    for requirement in requirements():
        yield judge_package(requirement, missing=FAIL, mend=f"pip install '{requirement.name}{requirement.specifier}'")


def check_optional_packages() -> Iterator[Finding]:
    """Check the packages of the extras; a missing one is a warning."""
    for extra in EXTRAS:
        for requirement in requirements(extra):
            yield judge_package(requirement, missing=WARN, mend=f"pip install 'vqdist[{extra}]'")


def judge_package(requirement, *, missing: str, mend: str) -> Finding:
    """Return whether a package is there in a version that vqdist asks for."""
    version = installed_version(requirement.name)
    if version is None:
        return Finding(missing, f"{requirement.name} is not installed", mend)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(FAIL, f"{requirement.name} {version} is outside {requirement.specifier}", mend)
    return Finding(OK, f"{requirement.name} {version}")


# Devices


def check_devices() -> Iterator[Finding]:
    """List the GPUs that torch sees, and the cores of the CPU."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if device.major >= 8 else "no bf16: keep --trainer.precision fp32"
            yield Finding(OK, f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}")
    elif shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield Finding(
            WARN,
            f"nvidia-smi is here, but torch {torch.__version__}, built {built}, sees no GPU: training uses the CPU",
            "compare the CUDA version that nvidia-smi prints with torch's, and look at CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(OK, "no CUDA device: training uses the CPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding(OK, f"{cores} CPU cores" + (f", OMP_NUM_THREADS={threads}" if threads else ""))


# Backends


_import_seconds: float | None = None  # of torch, in this process


def measure_import() -> float:
    """Return how long `import torch` takes here in a fresh process, measured once."""
    global _import_seconds
    if _import_seconds is None:
        began = time.monotonic()
        start_python("import torch").finish(MOST_SECONDS)
        _import_seconds = time.monotonic() - began
    return _import_seconds


def allowed(least: float) -> float:
    """Return the seconds that a check may take on a machine of this speed."""
    return min(MOST_SECONDS, max(least, TIMES_AS_LONG * measure_import()))


def took_too_long(what: str, seconds: float) -> Finding:
    """Return what is said of a check that was broken off: it has not shown that anything is broken."""
    return Finding(
        WARN,
        f"{what}: not finished after {seconds:.0f} s, and so not known (`import torch` takes {measure_import():.0f} s "
        "here); the machine or its disk is slow or busy",
        "run vqdist doctor again when it is idle",
    )


def check_backends() -> Iterator[Finding]:
    """Import each backend in a process of its own, all at once."""
    limit = allowed(IMPORT_SECONDS)
    started = {name: start_python(f"import {library}, vqdist.backends.{name}") for name, library in BACKENDS.items()}
    for (name, probe), library in zip(started.items(), BACKENDS.values()):
        code, output = probe.finish(limit)
        optional = name in EXTRAS and installed_version(library) is None
        if code == 0:
            yield Finding(OK, f"backend {name}")
        elif optional:
            yield Finding(WARN, f"backend {name}: not installed", f"pip install 'vqdist[{name}]'")
        elif code is None:
            yield took_too_long(f"import of backend {name}", limit)
        else:
            yield Finding(FAIL, f"backend {name} cannot be imported: {last_line(output)}")


# The process group


def check_process_group() -> Iterator[Finding]:
    """Two processes add numbers over gloo, and over NCCL where there are two GPUs."""
    import torch

    backends = ["gloo"] + ["nccl"] * (torch.cuda.device_count() >= 2)
    for backend in backends:
        start = time.monotonic()
        code, output = start_group(backend)
        if code == 0:
            seconds = time.monotonic() - start
            yield Finding(OK, f"process group: 2 processes summed over {backend} in {seconds:.0f} s, imports included")
        elif code is None and IMPORTED not in output:
            yield took_too_long(f"process group over {backend}", allowed(GROUP_SECONDS))
        else:
            cause, remedy = likely_cause(backend, code, output)
            yield Finding(FAIL, f"process group over {backend}: {cause} ({last_line(output)})", remedy)


def start_group(backend: str, world_size: int = 2) -> tuple[int | None, str]:
    """Sum over real processes. An exit code that is not 0, None if time ran out, or 0; and what was printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deadline = time.monotonic() + allowed(GROUP_SECONDS)
    call = "from vqdist.doctor import sum_over_ranks; sum_over_ranks({!r}, {}, {}, {})"
    started = [start_python(call.format(backend, rank, world_size, port)) for rank in range(world_size)]
    ended = [probe.finish(deadline - time.monotonic()) for probe in started]
    # a reason says more than a time-out, and one who had not come so far more than one who waited
    return min(ended, key=lambda end: (end[0] == 0, end[0] is None, IMPORTED in end[1]))


def sum_over_ranks(backend: str, rank: int, world_size: int, port: int) -> None:
    """Run in each process of the probe."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    print(IMPORTED, flush=True)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    value = torch.full((4,), rank + 1.0, device=device)
    dist.all_reduce(value)
    expected = world_size * (world_size + 1) / 2
    if value.tolist() != [expected] * 4:
        print(f"wrong sum: {value.tolist()} where every element should be {expected}")
        raise SystemExit(EXIT_WRONG_SUM)
    dist.destroy_process_group()


def likely_cause(backend: str, code: int | None, output: str) -> tuple[str, str]:
    """Return what usually lies behind such a failure, and the setting that helps."""
    host, text = socket.gethostname(), output.lower()
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    interfaces = ", ".join(name for _, name in socket.if_nameindex())
    named = os.environ.get(variable)
    if code == EXIT_WRONG_SUM:
        return "the exchange gives wrong numbers", "try NCCL_P2P_DISABLE=1; compare driver, CUDA and NCCL versions"
    if named and ("unable to find address" in text or "no socket interface" in text):
        return f"{variable}={named} is no usable interface here, there are {interfaces}", f"unset {variable}"
    if any(sign in text for sign in ("not known", "name resolution", "resolve", "getaddrinfo", "gethostbyname")):
        return f"the host's name {host!r} does not resolve", f'echo "127.0.0.1 {host}" >> /etc/hosts'
    if "no space left" in text or "shared memory" in text:
        return "/dev/shm is too small", "start the container with --ipc=host or --shm-size=8g"
    if "address already in use" in text:
        return "the port was taken meanwhile", "run vqdist doctor again"
    local = f"export {variable}=lo (one machine) or the interface that joins the nodes, of {interfaces}"
    if code is None:
        return (
            f"no answer within {allowed(GROUP_SECONDS):.0f} s: a firewall, or an interface that does not reach itself",
            local,
        )
    if any(sign in text for sign in ("connectfullmesh", "refused", "reset by peer", "unreachable", "find address")):
        return f"processes cannot reach each other at the address that the name {host!r} gives", local
    debug = "NCCL_DEBUG=INFO" if backend == "nccl" else "TORCH_DISTRIBUTED_DEBUG=DETAIL"
    return f"a process ended with {code}", f"{debug} vqdist doctor"


# DeepSpeed's op


def check_deepspeed_op() -> Iterator[Finding]:
    """Check what DeepSpeed needs to compile; nothing to say without DeepSpeed."""
    if installed_version("deepspeed") is None:
        return
    import torch

    from vqdist.backends import build_ops

    build_ops.prepare_environment()
    folder = build_ops.extensions_dir()
    yield from judge_locks(build_ops.find_locks(folder))
    if torch.cuda.is_available():
        return
    built = build_ops.is_built(folder)
    if built:
        yield Finding(OK, f"DeepSpeed's CPU op is built in {folder}")
    else:
        text = f"DeepSpeed's CPU op is not built in {folder}: the first start takes a minute or so longer"
        yield Finding(WARN, text, "python -m vqdist.backends.build_ops")
    needed = WARN if built else FAIL  # checked with ninja at every start, compiled only when something changed
    compiler = build_ops.find_compiler()
    if compiler is None:
        yield Finding(needed, "no C++ compiler for DeepSpeed's op", "apt-get install g++, or name one with CXX")
    if shutil.which("ninja") is None:
        yield Finding(FAIL, "no ninja for DeepSpeed's op", "pip install 'vqdist[deepspeed]'")
    if compiler and shutil.which("ninja"):
        yield Finding(OK, f"compiler {compiler}, ninja {shutil.which('ninja')}")


def judge_locks(locks: list) -> Iterator[Finding]:
    """Say what each lock of a DeepSpeed build means for the next start."""
    for lock in locks:
        found = f"DeepSpeed build lock {lock.path}, {duration(lock.age)} old"
        if lock.stale and lock.blocks:
            yield Finding(FAIL, f"stale {found}: every start waits on it for ever", lock.remedy)
        elif lock.stale:
            yield Finding(WARN, f"stale {found}: a build was interrupted there", lock.remedy)
        elif lock.running:
            who = f"process {lock.holders[0]}" if lock.holders else "a process"
            yield Finding(WARN, f"{found}: {who} is building, starts wait for it")


def duration(seconds: float) -> str:
    """Seconds as a person says them: `90 s`, `5 min`, `3 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


# Processes


@dataclass(frozen=True)
class Probe:
    """A process and the file that takes what it prints (a full pipe would stop it while nobody reads)."""

    process: subprocess.Popen
    output: IO[bytes]

    def finish(self, seconds: float) -> tuple[int | None, str]:
        """Its exit code, None if it had to be killed; and what it printed."""
        try:
            code = self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        with self.output as output:
            output.seek(0)
            return code, output.read().decode(errors="replace")


def start_python(code: str) -> Probe:
    """Run `code` in a fresh interpreter that sees this vqdist, no launcher's variables, and no terminal."""
    import vqdist

    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    root = os.path.dirname(next(iter(vqdist.__path__)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    output = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    return Probe(process, output)


def last_line(output: str) -> str:
    """Return the line of a traceback that says what happened; C++ frames and warnings that follow it are left out."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if line != IMPORTED]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or ["it printed nothing"])[-1][:300]


CHECKS = (
    check_vqdist,
    check_core_packages,
    check_optional_packages,
    check_devices,
    check_backends,
    check_deepspeed_op,
    check_process_group,
)
