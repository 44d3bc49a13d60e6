"""Completion of a checkpoint: its written files are flushed, listed with checksums, and the folder is renamed.

It takes as long as the writing or longer, and nobody has to wait for it: threads of rank 0 do it while the next steps
are made. A search for checkpoints in the same process waits for them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import WRITE_ERRORS, reason_of, sha256_of
from vqdist.manifest import MANIFEST, sealed

PARTIAL = ".partial"

# by the checkpoint that they are completing
_under_way: weakref.WeakValueDictionary[Path, Future] = weakref.WeakValueDictionary()


def start_completion(
    target: Path, info: dict[str, Any], afterwards: Callable[[Path], None] = lambda folder: None
) -> Future[None]:
    """Begin to complete the checkpoint whose files lie in `partial_of(target)`.

    Args:
        target: the folder that is to be.
        info: goes into the manifest.
        afterwards: called by a thread, when the checkpoint is there, with the folder that holds it.

    Returns:
        A future that fails if anything does: then nothing of the checkpoint is left, unless only `afterwards` failed.
    """
    target = target.parent.resolve() / target.name  # the process may go to another folder meanwhile
    try:
        future = _hand_out(target, info, afterwards)
    except WRITE_ERRORS as error:
        shutil.rmtree(partial_of(target), ignore_errors=True)
        future = Future()
        future.set_exception(error)
    _under_way[target] = future
    return future


def _hand_out(target: Path, info: dict[str, Any], afterwards: Callable[[Path], None]) -> Future[None]:
    """All work is given to the threads at once: a process that ends lets them do what they have, and adds nothing."""
    partial = partial_of(target)
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    working, waiting = min(8, 2 * len(paths)), 1
    threads = ThreadPoolExecutor(working + waiting, thread_name_prefix="checkpoint")
    try:
        # a checksum takes about as long as the disk: both at once, and several files at once
        flushed = [threads.submit(_flush, path) for path in paths]
        sums = {path: threads.submit(sha256_of, path) for path in paths}
        return threads.submit(_complete, target, info, flushed, sums, afterwards)
    except BaseException:  # of a thread that cannot be started; there may be others
        threads.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        threads.shutdown(wait=False)


def _complete(
    target: Path,
    info: dict[str, Any],
    flushed: list[Future[None]],
    sums: dict[Path, Future[str]],
    afterwards: Callable[[Path], None],
) -> None:
    partial = partial_of(target)
    try:
        futures: list[Future[Any]] = [*flushed, *sums.values()]
        wait(futures)  # also those after one that fails: they have files open
        for flush in flushed:
            flush.result()
        write_manifest(partial, info, {path: checksum.result() for path, checksum in sums.items()})
        if target.exists():
            remove_atomically(target)
        partial.rename(target)
        _flush(target.parent)
        afterwards(target.parent)
    except WRITE_ERRORS as error:
        said = str(error) if isinstance(error, UserError) else f"{target} cannot be completed: {reason_of(error)}"
        print(f"vqdist: warning: {said}", file=sys.stderr, flush=True)
        shutil.rmtree(partial, ignore_errors=True)
        raise


def wait_for_completion(folder: Path, patience: float | None = None) -> None:
    """Let threads of this process finish the checkpoints of this folder, well or not.

    Args:
        folder: holds the checkpoints.
        patience: seconds to wait at most.
    """
    folder = folder.resolve()
    wait([future for target, future in _under_way.items() if target.parent == folder], timeout=patience)


def is_completing() -> bool:
    """Return whether threads of this process are completing a checkpoint; its usual end waits for them."""
    return any(not future.done() for future in _under_way.values())


def partial_of(target: Path) -> Path:
    """Return where a checkpoint is written that is to be `target`."""
    return target.with_name(target.name + PARTIAL)


def remove_atomically(folder: Path) -> None:
    """Remove a checkpoint so that no moment shows half of it as a whole one.

    A network file system may keep a file that another process reads; `CheckpointStore.clean` removes it at the next
    start.
    """
    doomed = folder.with_name(folder.name + ".removed" + PARTIAL)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def write_manifest(folder: Path, info: dict[str, Any], checksums: Mapping[Path, str]) -> None:
    """List the files of a checkpoint, which are on the disk by now, with size and SHA-256; flush that too."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in checksums.items()
    }
    (folder / MANIFEST).write_text(json.dumps(sealed({**info, "files": files}), indent=2))
    _flush(folder / MANIFEST)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
