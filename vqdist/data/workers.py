"""Processes that load batches, in place of torch's loader.

Torch's loader waits for ever for a batch that a process could not hand over (a full /dev/shm, a long TMPDIR, no file
descriptors left), raises for a dead process from a signal handler in the midst of anything, and prints tracebacks.
Here a batch lies in memory that a process has shared with its child since it forked it. That needs no file, no socket
and no descriptor. Processes start as `multiprocessing` says, which `multiprocessing.set_start_method` changes. Where
they are not forked, a batch goes through the pipe, and what loads is pickled.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import mmap
import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqdist.errors import UserError

OR_WITHOUT = "or load without processes, with num_workers 0"
LOOK = 2.0  # seconds after which a process looks whether its parent is still there
SLOW = 60.0  # seconds of waiting for a batch after which it is said
GIVE_UP = 1800.0  # seconds of waiting after which the run ends
FAREWELL = 0.5  # seconds in which processes end when they are no longer needed
ENOUGH = 65_536  # file descriptors

Load = Callable[[Any], tuple[Tensor, Any]]
"""Loads a batch by what names it: its items (b, ...), and what else belongs to it."""


class LoaderLost(UserError):
    """A loader process that ended, or gives nothing any more."""


@dataclass
class _Batch:
    """A batch on its way: its place in shared memory, or itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    inline: bytearray | None  # None where the pixels lie in the slot of the request
    rest: Any


@dataclass
class _Failure:
    """An error that loading raised, with its traceback unless it is a user's mistake."""

    error: Exception
    text: str = ""


class RemoteError(Exception):
    """The traceback of an error in a loader process, as the cause of the error here."""


class Workers:
    """Loads batches in several processes, and gives them in the order in which they are named.

    Args:
        load: runs in the processes.
        batches: names of batches; may be endless.
        count: of processes.
        prefetch: batches that each process keeps ready.
        nbytes: of the items of a batch.
        set_up: called in each process first.
        describe: what a batch's name stands for, in messages.
        pin_memory: whether items come in page-locked memory.
        patience: seconds of waiting for a batch after which a process counts as lost; by default `GIVE_UP`.
    """

    def __init__(
        self,
        load: Load,
        batches: Iterable[Any],
        *,
        count: int,
        prefetch: int,
        nbytes: int,
        set_up: Callable[[], None],
        describe: Callable[[Any], str],
        pin_memory: bool = False,
        patience: float | None = None,
    ):
        self.batches = iter(batches)
        self.describe = describe
        self.pin_memory = pin_memory
        self.patience = GIVE_UP if patience is None else patience
        self._workers: list[_Worker] = []
        raise_limit_of_descriptors()
        if not is_forked():
            refuse_names_of_prompt(load)
        try:
            for _ in range(count):
                ends = [worker.connection for worker in self._workers]
                self._workers.append(_Worker(load, prefetch, nbytes, set_up, ends))
        except UserError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise LoaderLost(
                f"loader process {len(self._workers) + 1} of {count} cannot be started ({error}); raise the limit "
                "(`ulimit -n` for files, `ulimit -u` for processes), or give fewer with --data.num_workers"
            ) from error

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield items and the rest of each batch; raises what `load` raised, and `LoaderLost`."""
        try:
            self._fill()
            for worker in itertools.cycle(self._workers):
                if not worker.asked:
                    return
                yield self._take(worker)
        finally:
            self.close()

    def _fill(self) -> None:
        """Ask each process for as many batches as it keeps ready, in the order in which they are taken."""
        for _ in range(self._workers[0].prefetch):
            for worker in self._workers:
                self._ask(worker)

    def _ask(self, worker: _Worker) -> None:
        for batch in itertools.islice(self.batches, 1):
            worker.ask(batch)

    def _take(self, worker: _Worker) -> tuple[Tensor, Any]:
        self._wait(worker)
        try:
            reply = worker.connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost(worker) from error
        worker.has_answered = True
        if isinstance(reply, _Failure):
            raise reply.error from (RemoteError(reply.text) if reply.text else None)
        items = worker.items_of(reply, self.pin_memory)
        self._ask(worker)
        return items, reply.rest

    def _wait(self, worker: _Worker) -> None:
        """Return when there is something to read; raise `LoaderLost` for a process that has ended or hangs."""
        began, said = time.monotonic(), False
        while not worker.connection.poll():
            ready = wait([worker.connection, worker.process.sentinel], timeout=LOOK)
            if worker.connection not in ready and worker.process.sentinel in ready and not worker.connection.poll():
                raise self._lost(worker)
            waited = time.monotonic() - began
            if waited > self.patience:
                raise LoaderLost(
                    f"loader process {worker.process.pid} gave nothing for {waited / 60:.0f} minutes while it read "
                    f"{self.describe(worker.asked[0])}; look at the storage, and start the same command again"
                )
            if waited > SLOW and not said:
                said = True
                print(
                    f"vqdist: warning: waiting for images since {waited:.0f} s: loader process {worker.process.pid} "
                    f"reads {self.describe(worker.asked[0])}",
                    file=sys.stderr,
                )

    def _lost(self, worker: _Worker) -> LoaderLost:
        worker.process.join(FAREWELL)
        code = worker.process.exitcode
        how = f"ended with code {code}" if code is None or code >= 0 else f"was killed by {_name_of(-code)}"
        memory = ", as the system does where memory is short" if code == -signal.SIGKILL else ""
        if code == 1 and not worker.has_answered and not is_forked():  # of the interpreter, after a traceback
            return LoaderLost(
                f"loader process {worker.process.pid} {how} before it read anything; with the start method "
                f"{multiprocessing.get_start_method()} it imports the script and the dataset anew: let the script "
                f'train below `if __name__ == "__main__":`, {OR_WITHOUT}'
            )
        return LoaderLost(
            f"loader process {worker.process.pid} {how}{memory}, while it read {self.describe(worker.asked[0])}; "
            "start the same command again, with fewer processes (--data.num_workers) if memory was short"
        )

    def close(self) -> None:
        """End the processes, those that hang too."""
        for worker in self._workers:
            worker.connection.close()  # which ends one that is idle
        deadline = time.monotonic() + FAREWELL
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(FAREWELL)
        self._workers = []


class _Worker:
    """A process, the connection to it, and the memory in which it leaves batches."""

    def __init__(
        self,
        load: Load,
        prefetch: int,
        nbytes: int,
        set_up: Callable[[], None],
        inherited: list[Connection],
    ):
        self.prefetch = prefetch
        self.asked: deque[Any] = deque()
        self.has_answered = False
        self.connection, theirs = multiprocessing.Pipe()
        forked = is_forked()
        self.slots = [mmap.mmap(-1, max(1, nbytes)) for _ in range(prefetch)] if forked else []
        self._next = 0
        arguments = (load, theirs, self.slots, set_up, [*inherited, self.connection] if forked else [])
        self.process = multiprocessing.Process(target=_serve, args=arguments, daemon=True)
        try:
            self.process.start()
        except Exception as error:
            self.connection.close()
            if forked or isinstance(error, OSError):
                raise
            raise _not_sendable(error) from error
        finally:
            theirs.close()

    def ask(self, batch: Any) -> None:
        self.asked.append(batch)
        with contextlib.suppress(OSError):  # of a process that has ended, which `_wait` says
            self.connection.send(batch)

    def items_of(self, reply: _Batch, pin_memory: bool) -> Tensor:
        """Return the items of the batch that was asked for first, in memory of their own."""
        self.asked.popleft()
        slot, self._next = self._next, self._next + 1
        source = reply.inline if reply.inline is not None else self.slots[slot % self.prefetch]
        items = torch.empty(reply.shape, dtype=reply.dtype, pin_memory=pin_memory)
        if items.numel():
            items.copy_(torch.frombuffer(source, dtype=reply.dtype, count=items.numel()).view(reply.shape))
        return items


def _serve(
    load: Load,
    connection: Connection,
    slots: list[mmap.mmap],
    set_up: Callable[[], None],
    inherited: list[Connection],
) -> None:
    """Answer requests until the parent closes the connection or is gone."""
    for other in inherited:
        other.close()
    set_up()
    parent = os.getppid()
    # read in a thread, at any time: a parent that waits to send a long request takes no reply, and a reply that waits
    # to be taken would keep this process from the request
    requests: queue.SimpleQueue[tuple[Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    with contextlib.suppress(OSError, KeyboardInterrupt):
        for turn in itertools.count():
            request = _next_of(requests, parent)
            if request is None:
                return
            connection.send(_answer(load, *request, slots[turn % len(slots)] if slots else None))


def _receive(connection: Connection, requests: queue.SimpleQueue[tuple[Any] | None]) -> None:
    """Queue requests until the parent closes the connection, and None then."""
    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                requests.put((connection.recv(),))
    finally:
        requests.put(None)


def _next_of(requests: queue.SimpleQueue[tuple[Any] | None], parent: int) -> tuple[Any] | None:
    """Return the next request; None where the parent has closed the connection or is gone."""
    while True:
        try:
            return requests.get(timeout=LOOK)
        except queue.Empty:
            if os.getppid() != parent:
                return None


def _answer(load: Load, batch: Any, slot: mmap.mmap | None) -> _Batch | _Failure:
    try:
        items, rest = load(batch)
        return _Batch(tuple(items.shape), items.dtype, _leave_in(slot, items.contiguous()), rest)
    except Exception as error:
        return _failure(error)


def _leave_in(slot: mmap.mmap | None, items: Tensor) -> bytearray | None:
    """Copy items into a slot; return them as bytes where it does not hold them."""
    if slot is None or items.nbytes > len(slot):
        return bytearray(items.numpy().tobytes())
    if items.numel():
        torch.frombuffer(slot, dtype=items.dtype, count=items.numel()).copy_(items.flatten())
    return None


def _failure(error: Exception) -> _Failure:
    """Return an error so that it can be sent, which not every exception can."""
    mistake = isinstance(error, UserError)
    text = "" if mistake else "in a loader process:\n" + "".join(traceback.format_exception(error))
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # as the connection does
    except Exception:  # an exception may hold anything
        error = UserError(str(error)) if mistake else RuntimeError(f"{type(error).__name__}: {error}")
    return _Failure(error, text)


def is_forked() -> bool:
    """Return whether loader processes are copies of this one: they need no pickle, and share its memory."""
    return multiprocessing.get_start_method() == "fork"


def refuse_names_of_prompt(load: Load) -> None:
    """Raise `UserError` for classes and functions of a notebook or a prompt, which no other process can import."""
    main = sys.modules.get("__main__")
    if getattr(getattr(main, "__spec__", None), "name", None) or getattr(main, "__file__", None):
        return
    names = _NamesOfMain(io.BytesIO())
    with contextlib.suppress(Exception):  # some things are pickled while a process starts only: then it says so
        names.dump(load)
    if names.found:
        raise UserError(
            f"{names.found[0]} is defined in a notebook or at a prompt, and loader processes (start method "
            f"{multiprocessing.get_start_method()}) cannot import it; put it into a module, as my_data.py, and import "
            f"it from there, {OR_WITHOUT}"
        )


class _NamesOfMain(ForkingPickler):
    """A pickler that notes the names of `__main__`; it passes over the content of arrays."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.found: list[str] = []

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type | FunctionType) and thing.__module__ == "__main__":
            self.found.append(thing.__qualname__)
        return (int, ()) if isinstance(thing, Tensor | np.ndarray) else NotImplemented


def _not_sendable(error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(
        f"the dataset cannot be handed to loader processes ({reason}); the start method "
        f"{multiprocessing.get_start_method()} pickles it: let it open files in __getitem__, and use functions of a "
        f"module in place of lambdas, {OR_WITHOUT}"
    )


def raise_limit_of_descriptors() -> None:
    """Raise the soft limit of open files to what this process may have: each loader process takes three of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
