"""Reading and writing the small files of a run, so that a broken one is said in one line; one writer per folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from vqdist.errors import UserError, an

LARGEST_SMALL = 2**26
"""Bytes of a file that is read as a whole: a manifest, a record, a configuration in JSON."""

LARGEST_YAML = 2**20
"""Bytes of a configuration in YAML, which takes a thousand times longer to read."""

# what a full disk raises: of the system, of torch, of safetensors, and of those here that say it in words
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, UserError)


def reason_of(error: BaseException) -> str:
    """Return in a line why something could not be written or read."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


class CannotWrite(UserError):
    """A file cannot be written: the message names it and says why."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this context a failure to write raises `CannotWrite`, which names the file: the system does not."""
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CannotWrite(f"{path} cannot be written: {reason_of(error)}") from error


def read_small(path: Path, most: int = LARGEST_SMALL) -> bytes:
    """Return the content of a small file; of no other is more than the size looked at.

    Raises:
        UserError: it is a pipe or a device, which may keep a reader waiting for ever, or has more bytes than `most`.
        OSError: of the system.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is a pipe, socket or device, and a regular file is expected")
        if status.st_size > most:
            raise UserError(
                f"{path} has {status.st_size:,} bytes, and {most:,} are the most of a file of its kind; it is damaged "
                "or not of vqdist"
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; `UserError` naming the file if there is none."""
    try:
        content = json.loads(read_small(path).decode("utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not text, or nested without end
        raise UserError(f"{path} is not valid JSON ({error}); it is damaged or not of vqdist") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {an(type(content).__name__)}; a JSON object is expected")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object so that the file is whole or absent at every moment."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
        partial.replace(path)


METRICS = "metrics.jsonl"
"""Name of the file of a run folder that holds its log lines."""

EVENTS = "events.jsonl"
"""Name of the file beside it that holds the history of the run by the clock."""

CHART_NUMBERS = "vqdist:counts"
"""Name of the text within a bar chart's PNG file that holds the counts themselves, as JSON."""


def holds_steps(run: Path) -> bool:
    """Return whether a run folder holds anything of a run; one without a finished step leaves its configuration."""
    lines = run / METRICS
    return any(run.glob("checkpoints/step_*")) or (lines.is_file() and lines.stat().st_size > 0)


LONGEST_METRICS = 2**20
"""Bytes of a line there; a longer one is passed over."""


def lines_of_metrics(file: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines that a run wrote into metrics.jsonl: as they stand there, and as a dictionary with its `step`.

    Anything else is passed over: a line torn by a kill, bytes that are no UTF-8, brackets nested too deeply, numbers
    of too many digits, a line without an end. No more than one line is held at a time.
    """
    for raw in _short_lines(file):
        try:
            line = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            yield raw, line


def _short_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of at most `LONGEST_METRICS` bytes, without their ends."""
    beginning = True
    while line := file.readline(LONGEST_METRICS + 1):
        whole = line.endswith(b"\n") or len(line) <= LONGEST_METRICS
        if beginning and whole:
            yield line.removesuffix(b"\n")
        beginning = whole


def follow_umask(path: Path) -> None:
    """Give a file the permissions that the user's umask says: safetensors writes 0600, for the owner's eyes only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- one writer per folder

LOCK = ".lock"
# A server of files takes this long to notice that a client has died (NFS 4: 90 seconds by default).
LEASE_SECONDS = 100.0


class FolderLock:
    """Keeps other processes from writing into a folder while anyone refers to it; `lock_folder` makes it.

    It is a POSIX record lock: the system gives it up when the process ends, however it ends, and a forked process,
    as a loader's worker that outlives its parent for a moment, does not have it.
    """

    def __init__(self, path: Path, descriptor: int):
        self.pid = os.getpid()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": self.pid}).encode(), 0)
        weakref.finalize(self, _release, path, descriptor, self.pid)


# by path; a process has a record lock or not, and loses it when it closes any descriptor of the file
_held: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()


def lock_folder(folder: Path, *, patience: float = 0.0) -> FolderLock | None:
    """Be the only process that writes into a folder; a process that is it already gets its own lock once more.

    Args:
        folder: exists.
        patience: seconds to wait for a process of another machine: one whose machine has died holds the lock until
            the file server notices.

    Returns:
        The lock, or None where the file system has no locks.

    Raises:
        UserError: another process has it; names its machine and process id.
    """
    path = folder.resolve() / LOCK
    lock = _held.get(path)
    if lock is not None and lock.pid != os.getpid():  # of the process that this one was forked from
        lock = None
    deadline = time.monotonic() + patience
    while lock is None:
        try:
            lock = _try_lock(path)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return None
            raise
        if lock is None:
            _wait_for_holder(path, deadline)
    _held[path] = lock
    return lock


def _try_lock(path: Path) -> FolderLock | None:
    """Return the lock, or None if it is another process's or its file went away in between."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # who had it may have removed the file between the two lines above: then others make and lock a new one
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return FolderLock(path, descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def _wait_for_holder(path: Path, deadline: float) -> None:
    """Sleep a moment before the next attempt; `UserError` where waiting does not help, or no longer."""
    try:
        holder = json.loads(read_small(path))
        host, pid = holder["host"], holder["pid"]
    except (OSError, ValueError, KeyError, TypeError):  # it is about to write it, or has just gone
        host, pid, deadline = "an unknown machine", "unknown", deadline + 2.0
    if host == socket.gethostname() or time.monotonic() >= deadline:
        raise UserError(
            f"another process writes {path.parent} (process {pid} on {host}); wait for its end, stop it, or give "
            "another folder"
        )
    time.sleep(0.2)


def _release(path: Path, descriptor: int, pid: int) -> None:
    if os.getpid() != pid:  # a forked process lets its parent keep it
        return
    with suppress(OSError):  # a folder that is gone or read-only: nobody could act on it in a finalizer
        path.unlink(missing_ok=True)  # before others can have it: they look whether the file is still there
    with suppress(OSError):
        os.close(descriptor)
