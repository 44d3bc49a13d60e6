"""The heartbeats of the ranks, and from them which rank is gone when an exchange between them fails.

A collective that fails says that something is gone, seldom which rank. So each rank has a heartbeat, a number in the
store where the ranks met that grows every second; when an exchange fails the survivors look whose heartbeat has
stopped. The store is a few bytes on rank 0 (or on its node's torchrun), apart from the network of the collectives.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from vqdist.errors import EXIT_PEER_LOST, PeerLost

T = TypeVar("T")

INTERVAL = 1.0  # seconds between two beats
LEFT = "left"  # the heartbeat of a rank that is done
LOOK = 6.0  # seconds after which a heartbeat that has not moved has stopped
PROGRESS = 60.0  # seconds in which to say how far this process came: the disk may be gone too
Progress = Callable[[], tuple[str, str]]

# what gloo, NCCL and the store say when a peer is gone, beside the exceptions of torch.distributed
SIGNS = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection refused|connectfullmesh|no route to host"
    r"|timed out waiting \d+ ?ms|application timeout caused pair closure|network is unreachable"
    r"|nccl (error|communicator was aborted)|watchdog caught collective|remote process exited",
    re.IGNORECASE,
)
TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an exception says that an exchange with other ranks failed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(SIGNS.search(str(error))))


class Peers:
    """The ranks of one process group, from `meet` until `part`.

    Args:
        store: where the ranks have met.
        rank: of this process.
        hosts: the host of each rank.
        timeout: how long a peer may be silent.

    Attributes:
        heard: what others have said of ranks that are gone; it is remembered, since the store may go with them.
        code: the exit code of a rank that left on purpose, which the others leave with, too.
        progress: gives how far this process came, as " after step 7", and what to do, for what is said of lost ranks;
            None where nobody guards this process.
        ended_with_error: whether the others were told of an error that ends this rank.
    """

    def __init__(self, store: dist.Store, rank: int, hosts: list[str], timeout: timedelta):
        self.store = store
        self.rank = rank
        self.hosts = hosts
        self.timeout = timeout
        self.heard: dict[int, str] = {}
        self.code = EXIT_PEER_LOST
        self.progress: Progress | None = None
        self.ended_with_error = False
        self._neighbour = ""  # the heartbeat of the next rank
        self._closed = threading.Event()
        self._looking = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heartbeat.start()
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def _beat(self) -> None:
        following = (self.rank + 1) % len(self.hosts)
        with suppress(Exception):  # a store that is gone ends it, in whatever words
            for beat in itertools.count():
                self.store.set(f"heartbeat/{self.rank}", str(beat))
                self._neighbour = self._read(f"heartbeat/{following}")
                self._listen()
                if self._closed.wait(INTERVAL):
                    if not self.ended_with_error:
                        self.store.set(f"heartbeat/{self.rank}", LEFT)
                    return

    def _guard(self) -> None:
        """End this process, while it is guarded, if the next rank or the store is silent for too long.

        So it does if it has been known for so long that a rank is gone. An exchange that knows of its own time-out
        ends before: not all do, nor does a wait for a device. But NCCL ends the whole process at its time-out,
        without a word of who is lost: there this is to come first. Seconds are counted while this process runs: a
        scheduler may halt all of them.
        """
        seconds = self.timeout.total_seconds()
        limit = 0.9 * seconds if torch.cuda.is_available() else seconds + 3 * LOOK
        before, silent = "", 0.0
        while not self._closed.wait(INTERVAL):
            still = self._neighbour == before != LEFT
            on_purpose = self.code != EXIT_PEER_LOST
            silent = silent + INTERVAL if on_purpose or self.progress and (still or self.heard) else 0.0
            before = self._neighbour
            if silent > (LOOK if on_purpose else limit) and not self._looking.is_set():
                lost = self.lost(TimeoutError())
                print(f"vqdist: error: {lost}", file=sys.stderr)
                leave(lost.code)

    def _listen(self) -> None:
        news = self._read("news")
        if news:
            self.heard |= {int(rank): reason for rank, reason in json.loads(news).items()}
            self._hear_code()
            self.store.set(f"heard/{self.rank}", "yes")

    def _hear_code(self) -> None:
        self.code = int(self._read("code") or EXIT_PEER_LOST)

    def close(self) -> None:
        """Stop the heartbeat; the others are told that this is no accident."""
        self._closed.set()
        self._heartbeat.join(INTERVAL)

    def say_why(self, reason: str, code: int = EXIT_PEER_LOST) -> None:
        """Tell the others why this rank is about to end by itself, and the code that they leave with."""
        within(LOOK, lambda: self._say_why(f"it ended with: {reason}", code))
        if self.rank == 0:  # the store may end with this process
            within(LOOK, self._wait_until_heard)

    def _say_why(self, reason: str, code: int) -> None:
        self.ended_with_error = True
        self.store.set("code", str(code))
        self._tell({self.rank: reason})
        self.store.set(f"heard/{self.rank}", "yes")  # who ends by itself listens no more

    def _wait_until_heard(self) -> None:
        for rank in range(1, len(self.hosts)):
            while not self._read(f"heard/{rank}") and self._read(f"heartbeat/{rank}") != LEFT:
                time.sleep(INTERVAL / 4)

    def _tell(self, gone: dict[int, str]) -> None:
        for rank, reason in gone.items():
            self.store.set(f"gone/{rank}", reason)
        self.store.set("news", json.dumps(gone))

    def lost(self, error: BaseException) -> PeerLost:
        """Return the error of an exchange that failed: it names who is gone.

        That takes some seconds, and those of `progress`.
        """
        self._looking.set()
        reason = self._reason(error)
        # one question first: without an answer to it a look has no end
        answers = within(LOOK, lambda: self.store.check(["heartbeat/0"]))
        gone = answers and within(2 * LOOK + INTERVAL, lambda: self._look(reason))
        # only now: the others look at the same time, and then they leave
        when, remedy = self.progress and within(PROGRESS, self.progress) or ("", "")
        remedy = remedy or "start the same command again"
        if gone is None and not self.heard and self._store_is_of_torchrun_here():
            where = f"the launcher (torchrun) of host {self.hosts[0]}, where the ranks met{when}"
            return PeerLost((), f"lost {where}: {reason}; {remedy}")
        if gone is None:
            gone = self.heard or dict.fromkeys(self._beside_the_store(), f"{reason}, and the ranks met there")
        if not gone:
            what = f"an exchange between the ranks failed{when}, though all of them are alive: {reason}"
            return PeerLost((), f"{what}; {remedy}")
        within(LOOK, self._hear_code)  # what was heard before stays where the store is gone
        reasons = " and ".join(dict.fromkeys(gone.values()))
        return PeerLost(tuple(sorted(gone)), f"lost {self.name(gone)}{when}: {reasons}; {remedy}", self.code)

    def _look(self, reason: str) -> dict[int, str]:
        """Return the ranks that said that they end, and those whose heartbeat stands still, with this reason."""
        others = [rank for rank in range(len(self.hosts)) if rank != self.rank]
        first = {rank: self._read(f"heartbeat/{rank}") for rank in others}
        still, deadline = set(others), time.monotonic() + LOOK
        said: dict[int, str] = {}
        while still - said.keys() and time.monotonic() < deadline:
            time.sleep(INTERVAL / 4)
            still = {rank for rank in still if self._read(f"heartbeat/{rank}") == first[rank]}
            said = {rank: words for rank in others if (words := self._read(f"gone/{rank}"))}
        gone = {**dict.fromkeys(sorted(still), reason), **said}
        if gone:
            self._tell(gone)
        self._wait_for_others(set(others) - gone.keys())
        return gone

    def _wait_for_others(self, alive: set[int]) -> None:
        """Let the others look too: the store may end with this process."""
        self.store.set(f"looked/{self.rank}", "yes")
        deadline = time.monotonic() + (INTERVAL if self.rank else LOOK)
        while any(not self._read(f"looked/{rank}") for rank in alive) and time.monotonic() < deadline:
            time.sleep(INTERVAL / 4)

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _store_is_of_torchrun_here(self) -> bool:
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return of_torchrun and self.hosts[self.rank] == self.hosts[0]

    def _beside_the_store(self) -> list[int]:
        """Return who is gone if the store is: rank 0, and if it is on another host all that are there."""
        if self.hosts[self.rank] == self.hosts[0]:
            return [0]
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[0]]

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError) or TIMED_OUT.search(str(error)):
            return f"no answer within {self.timeout.total_seconds() / 60:g} minutes (dist_timeout)"
        words = SIGNS.search(str(error))
        return words[0].lower() if words else one_line(error)

    def name(self, ranks: Iterable[int]) -> str:
        """Return the ranks with their hosts, as "rank 1 (host b)"."""
        return ", ".join(f"rank {rank} (host {self.hosts[rank]})" for rank in sorted(ranks))


def one_line(error: BaseException, most: int = 200) -> str:
    """Return the first words of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " ..."


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """Return the answer of `ask`, or None if it fails or takes longer; then a thread still waits for the network."""
    answers: list[T] = []

    def collect() -> None:
        with suppress(Exception):
            answers.append(ask())

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def leave(code: int) -> NoReturn:
    """End this process now: at its usual end torch may wait for ranks that are gone."""
    for child in multiprocessing.active_children():  # loader workers, which may ignore SIGTERM
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
