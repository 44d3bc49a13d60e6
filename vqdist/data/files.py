"""Whole image files as bytes: regular files alone, and a failure of the storage is told from a broken image."""

from __future__ import annotations

import errno
import os
import stat

from vqdist.errors import UserError

LARGEST_FILE = 2**31  # bytes; a decoded image of the most pixels takes less

MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENAMETOOLONG, errno.ENXIO}
"""Errors of the system that are about one path: there is no such image, and its neighbours may be good."""

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class StorageError(UserError):
    """A file that could not be read for a reason that says nothing of the file: no image is bad because of it."""


class NotAnImage(OSError):
    """A path that cannot hold an image: a named pipe, a socket, a device, or too large a file."""


def read_file(path: str | os.PathLike) -> bytes:
    """Return the content of a regular file.

    Raises:
        NotAnImage: it is something else, which could keep a reader waiting for ever.
        OSError: of the system.
    """
    # a pipe is opened at once, and what it is can then no longer change
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _check_regular(os.fstat(descriptor))
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    finally:
        os.close(descriptor)


def _check_regular(status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if kind in KINDS:
        raise NotAnImage(f"it is {KINDS[kind]}, and a regular file is expected")
    if status.st_size > LARGEST_FILE:
        raise NotAnImage(f"it has {status.st_size:,} bytes, and {LARGEST_FILE:,} are the most that are read")


def is_storage_failure(error: BaseException) -> bool:
    """Return whether an error is of the system (storage, rights, descriptors, memory) and not of the file."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in MISSING


def storage_error(name: str, error: BaseException) -> StorageError:
    """Return the one message for an image that could not be read, whatever it holds."""
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return StorageError(
        f"cannot read the image {name} ({' '.join(reason.split())}): a failure of the storage or of the system, so "
        "no image is passed over for it; mend it, and start the same command again"
    )
