"""Builds, once per environment, the C++ op that DeepSpeed compiles when it starts on a CPU.

Left to itself DeepSpeed compiles it at the first start on every machine (half a minute to three minutes), in a folder
that all environments share. With an older torch a build that was killed leaves a `lock` file on which every later
start waits for ever, silently; a newer one (seen in 2.15) locks by `flock`: its file stays and blocks nobody.
`make install` calls this module instead; `vqdist doctor` reports what it finds.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

OP_NAME = "deepspeed_shm_comm"

# Where the system does not tell who holds a lock open: a build that has written nothing for so long is over.
QUIET_SECONDS = 15 * 60


class BuildError(RuntimeError):
    """The op cannot be built here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Lock:
    """A `lock` file under the extensions folder."""

    path: Path
    age: float  # seconds since it was made
    quiet: float  # seconds since anything in its folder was written
    holders: tuple[int, ...] | None  # processes that hold it open; None where the system does not tell
    blocks: bool  # torch waits for as long as the file exists, whoever made it

    @property
    def running(self) -> bool:
        """A build is behind it: as seen from this machine, so not across nodes that share the folder."""
        return self.quiet <= QUIET_SECONDS if self.holders is None else bool(self.holders)

    @property
    def stale(self) -> bool:
        """Left by a build that was killed; a torch that locks by `flock` leaves one beside finished builds too."""
        finished = any(self.path.parent.glob("*.so"))
        return not self.running and (self.blocks or not finished)

    @property
    def remedy(self) -> str:
        """The command that removes it."""
        return f"rm {self.path}"


def default_extensions_dir() -> str | None:
    """`torch_extensions` inside the running virtual environment; None outside of one, or if it cannot be written."""
    if sys.prefix == sys.base_prefix or not os.access(sys.prefix, os.W_OK):
        return None
    return os.path.join(sys.prefix, "torch_extensions")


def extensions_dir() -> Path:
    """Return where torch puts what it compiles here: the variable, the environment's folder, or torch's own."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR") or default_extensions_dir()
    if named:
        return Path(named)
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(OP_NAME, verbose=False)).parent


def prepare_environment() -> None:
    """Let DeepSpeed find its build, and ninja when the environment was not activated; what the user set stays."""
    folder = default_extensions_dir()
    if folder:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", folder)
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def is_built(folder: Path | None = None) -> bool:
    """Return whether the op lies under `folder` (the extensions folder by default)."""
    folder = folder or extensions_dir()
    return (folder / OP_NAME / f"{OP_NAME}.so").exists()


def find_locks(folder: Path | None = None) -> list[Lock]:
    """Every lock under `folder` (the extensions folder by default), oldest first."""
    folder = folder or extensions_dir()
    locks = [lock for path in folder.glob("*/lock") if (lock := read_lock(path)) is not None]
    return sorted(locks, key=lambda lock: -lock.age)


def find_stale_lock() -> Path | None:
    """Return the lock on which a start in this environment would wait for ever, None when it would not."""
    suspects = [lock.path for lock in find_locks() if lock.blocks and lock.stale]
    if suspects:
        time.sleep(0.5)  # torch closes its lock a moment before it removes it
    return next((path for path in suspects if (lock := read_lock(path)) is not None and lock.stale), None)


def read_lock(path: Path) -> Lock | None:
    """None when the lock was released in the meantime."""
    now = time.time()
    try:
        made = path.stat().st_mtime
        written = max([made, *(entry.stat().st_mtime for entry in path.parent.iterdir())])
    except FileNotFoundError:
        return None
    return Lock(path, age=now - made, quiet=now - written, holders=lock_holders(path), blocks=locks_block())


def locks_block() -> bool:
    """Return whether torch waits on a lock's mere existence; read from its source, since an import takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    source = Path(spec.origin).parent / "utils" / "cpp_extension.py"
    return "FileBaton(" in source.read_text(encoding="utf-8")


def lock_holders(path: Path, proc: Path = Path("/proc")) -> tuple[int, ...] | None:
    """Return processes of this machine that hold `path` open: torch keeps its lock open for as long as it builds."""
    if not (proc / "self" / "fd").is_dir():
        return None
    target = str(path.resolve())
    return tuple(int(entry.name) for entry in proc.iterdir() if entry.name.isdigit() and holds_open(entry, target))


def holds_open(process: Path, target: str) -> bool:
    """Return whether the process of this folder of /proc has the file `target` open."""
    try:
        return any(os.readlink(fd) == target for fd in (process / "fd").iterdir())
    except OSError:  # it ended meanwhile, or belongs to somebody else
        return False


def clear_locks(folder: Path, say=print) -> None:
    """Remove the locks of killed builds when the folder belongs to this environment; only name them elsewhere."""
    ours = Path(sys.prefix).resolve() in folder.resolve().parents
    for lock in find_locks(folder):
        if lock.running:
            who = f"process {lock.holders[0]}" if lock.holders else "another process"
            say(f"{who} is building {lock.path.parent.name} since {lock.age:.0f} s")
        elif not lock.stale:
            continue
        elif ours:
            lock.path.unlink(missing_ok=True)
            say(f"removed the lock of a build that was killed {lock.age:.0f} s ago: {lock.path}")
        elif lock.blocks:
            raise BuildError(
                f"{lock.path} is {lock.age:.0f} s old and no running build holds it: DeepSpeed would wait on it "
                f"for ever. Remove it with: {lock.remedy}"
            )


def find_compiler() -> str | None:
    """Return the C++ compiler that torch will call, None when there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def require_tools() -> None:
    """Raise `BuildError` if the compiler or ninja is missing."""
    prepare_environment()
    if find_compiler() is None:
        raise BuildError(
            f"DeepSpeed on a CPU compiles one C++ file, and no compiler {os.environ.get('CXX', 'c++')!r} was found. "
            "Install one (Debian and Ubuntu: apt-get install g++) or name one with CXX=..., and run `make install` "
            "again; to go without DeepSpeed: make install EXTRAS=tracking,data"
        )
    if shutil.which("ninja") is None:
        raise BuildError("DeepSpeed's build needs ninja: pip install 'vqdist[deepspeed]'")


def load_op() -> None:
    """Compile and load the op, or only load it if it is up to date. Waits for a build that is already running."""
    try:
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    except ImportError as error:
        raise BuildError(f"this DeepSpeed has no {OP_NAME} ({error}): vqdist needs deepspeed>=0.19") from error
    builder = ShareMemCommBuilder()
    if not builder.is_compatible():
        print(f"{OP_NAME} does not exist for this platform: DeepSpeed will use gloo alone")
        return
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise BuildError(f"compiling {OP_NAME} failed: {error}") from error


def build() -> None:
    """Build the op for this environment, saying what happens. Raises `BuildError` with the way out."""
    if find_spec("deepspeed") is None:
        print("DeepSpeed is not installed: no op to build")
        return
    import torch

    if torch.cuda.is_available():
        print("DeepSpeed needs no CPU op on a machine with CUDA: nothing to build")
        return
    require_tools()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = extensions_dir()
    folder.mkdir(parents=True, exist_ok=True)
    clear_locks(folder)
    print(f"{'checking' if is_built(folder) else 'building'} {OP_NAME} in {folder}, a minute or so", flush=True)
    start = time.monotonic()
    load_op()
    print(f"{OP_NAME} is ready after {time.monotonic() - start:.0f} s", flush=True)


def main(argv: list[str]) -> int:
    """Build; with --clear-locks only remove the locks of killed builds, which imports nothing and takes no time."""
    # A polite kill ends through the `finally` in which torch removes its lock.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if argv == ["--clear-locks"]:
            clear_locks(extensions_dir())
        elif argv:
            raise BuildError(f"unknown arguments {argv}: there is only --clear-locks")
        else:
            build()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
