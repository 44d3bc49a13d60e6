"""The other ranks: meeting them, and saying which of them is gone when an exchange fails.

A collective that fails says that something is gone, seldom what. So each rank keeps a pulse, a number in the store
where the ranks met that grows every second; when an exchange fails the survivors look whose pulse has stopped. The
store is a few bytes on rank 0 (or on its node's torchrun), apart from the network of the collectives.

A survivor leaves by `leave`: what torch does at the end of a process may wait for those who are gone.
"""

from __future__ import annotations

import atexit
import itertools
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from vqdist.backends.environment import export_launch, origin_of_size, resolves, world_size_of_launcher
from vqdist.errors import EXIT_PEER_LOST, PeerLost, RanksDiverged, UserError
from vqdist.stopping import Stopped, hold_if_leaving

PULSE = 1.0  # seconds
LEFT = "left"  # the pulse of a rank that is done
LOOK = 6.0  # seconds after which a pulse that has not moved has stopped
PROGRESS = 60.0  # seconds in which to say how far this process came: the disk may be gone too
FIRST_EXCHANGE = timedelta(seconds=60)
AWAITED = 20.0  # seconds after which a process that waits for others says so
FAREWELL = 12.0  # seconds in which a rank that leaves before it has met the others tells them
Progress = Callable[[], tuple[str, str]]

# what gloo, NCCL and the store say when a peer is gone, beside the exceptions of torch.distributed
SIGNS = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection refused|connectfullmesh|no route to host"
    r"|timed out waiting \d+ ?ms|application timeout caused pair closure|network is unreachable"
    r"|nccl (error|communicator was aborted)|watchdog caught collective|remote process exited",
    re.IGNORECASE,
)
TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)

_meetings = 0  # of this process until now: each has names of its own in the store
_current: Peers | None = None
_fresh_store: dist.Store | None = None  # of `_renew_meeting_place`: it lasts as long as somebody holds it


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
        self._neighbour = ""  # the pulse of the next rank
        self._closed = threading.Event()
        self._looking = threading.Event()
        self._pulse = threading.Thread(target=self._keep_pulse, name="pulse", daemon=True)
        self._pulse.start()
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def _keep_pulse(self) -> None:
        following = (self.rank + 1) % len(self.hosts)
        with suppress(Exception):  # a store that is gone ends it, in whatever words
            for beat in itertools.count():
                self.store.set(f"pulse/{self.rank}", str(beat))
                self._neighbour = self._read(f"pulse/{following}")
                self._listen()
                if self._closed.wait(PULSE):
                    if not self.ended_with_error:
                        self.store.set(f"pulse/{self.rank}", LEFT)
                    return

    def _guard(self) -> None:
        """End this process, while it is guarded, if the next rank or the store is silent for too long, or if it has
        been known for so long that a rank is gone.

        An exchange that knows of its own time-out ends before: not all do, nor what waits for a device. But NCCL ends
        the whole process at its time-out, without a word of who is lost: there this is to come first. Seconds are
        counted while this process runs: a scheduler may halt all of them.
        """
        seconds = self.timeout.total_seconds()
        limit = 0.9 * seconds if torch.cuda.is_available() else seconds + 3 * LOOK
        before, silent = "", 0.0
        while not self._closed.wait(PULSE):
            still = self._neighbour == before != LEFT
            on_purpose = self.code != EXIT_PEER_LOST
            silent = silent + PULSE if on_purpose or self.progress and (still or self.heard) else 0.0
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
        """Stop the pulse; the others are told that this is no accident."""
        self._closed.set()
        self._pulse.join(PULSE)

    def say_why(self, reason: str, code: int = EXIT_PEER_LOST) -> None:
        """Tell the others why this rank is about to end by itself, and the code that they leave with."""
        _within(LOOK, lambda: self._say_why(f"it ended with: {reason}", code))
        if self.rank == 0:  # the store may end with this process
            _within(LOOK, self._wait_until_heard)

    def _say_why(self, reason: str, code: int) -> None:
        self.ended_with_error = True
        self.store.set("code", str(code))
        self._tell({self.rank: reason})
        self.store.set(f"heard/{self.rank}", "yes")  # who ends by itself listens no more

    def _wait_until_heard(self) -> None:
        for rank in range(1, len(self.hosts)):
            while not self._read(f"heard/{rank}") and self._read(f"pulse/{rank}") != LEFT:
                time.sleep(PULSE / 4)

    def _tell(self, gone: dict[int, str]) -> None:
        for rank, reason in gone.items():
            self.store.set(f"gone/{rank}", reason)
        self.store.set("news", json.dumps(gone))

    def lost(self, error: BaseException) -> PeerLost:
        """What to raise for an exchange that failed: it names who is gone. Takes some seconds, and those of
        `progress`."""
        self._looking.set()
        reason = self._reason(error)
        # one question first: without an answer to it a look has no end
        answers = _within(LOOK, lambda: self.store.check(["pulse/0"]))
        gone = answers and _within(2 * LOOK + PULSE, lambda: self._look(reason))
        # only now: the others look at the same time, and then they leave
        when, remedy = self.progress and _within(PROGRESS, self.progress) or ("", "")
        remedy = remedy or "start the same command again"
        if gone is None and not self.heard and self._store_is_of_torchrun_here():
            where = f"the launcher (torchrun) of host {self.hosts[0]}, where the ranks met{when}"
            return PeerLost((), f"lost {where}: {reason}; {remedy}")
        if gone is None:
            gone = self.heard or dict.fromkeys(self._beside_the_store(), f"{reason}, and the ranks met there")
        if not gone:
            what = f"an exchange between the ranks failed{when}, though all of them are alive: {reason}"
            return PeerLost((), f"{what}; {remedy}")
        _within(LOOK, self._hear_code)  # what was heard before stays where the store is gone
        reasons = " and ".join(dict.fromkeys(gone.values()))
        return PeerLost(tuple(sorted(gone)), f"lost {self.name(gone)}{when}: {reasons}; {remedy}", self.code)

    def _look(self, reason: str) -> dict[int, str]:
        """The ranks that said that they end, and those whose pulse stands still, for which this reason is given."""
        others = [rank for rank in range(len(self.hosts)) if rank != self.rank]
        first = {rank: self._read(f"pulse/{rank}") for rank in others}
        still, deadline = set(others), time.monotonic() + LOOK
        said: dict[int, str] = {}
        while still - said.keys() and time.monotonic() < deadline:
            time.sleep(PULSE / 4)
            still = {rank for rank in still if self._read(f"pulse/{rank}") == first[rank]}
            said = {rank: words for rank in others if (words := self._read(f"gone/{rank}"))}
        gone = {**dict.fromkeys(sorted(still), reason), **said}
        if gone:
            self._tell(gone)
        self._wait_for_others(set(others) - gone.keys())
        return gone

    def _wait_for_others(self, alive: set[int]) -> None:
        """Let the others look too: the store may end with this process."""
        self.store.set(f"looked/{self.rank}", "yes")
        deadline = time.monotonic() + (PULSE if self.rank else LOOK)
        while any(not self._read(f"looked/{rank}") for rank in alive) and time.monotonic() < deadline:
            time.sleep(PULSE / 4)

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _store_is_of_torchrun_here(self) -> bool:
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return of_torchrun and self.hosts[self.rank] == self.hosts[0]

    def _beside_the_store(self) -> list[int]:
        """Who is gone if the store is: rank 0, and if it is on another host all that are there."""
        if self.hosts[self.rank] == self.hosts[0]:
            return [0]
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[0]]

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError) or TIMED_OUT.search(str(error)):
            return f"no answer within {self.timeout.total_seconds() / 60:g} minutes (dist_timeout)"
        words = SIGNS.search(str(error))
        return words[0].lower() if words else one_line(error)

    def name(self, ranks: Iterable[int]) -> str:
        """The ranks with their hosts, as "rank 1 (host b)"."""
        return ", ".join(f"rank {rank} (host {self.hosts[rank]})" for rank in sorted(ranks))


def one_line(error: BaseException, most: int = 200) -> str:
    """The first words of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + " ..."


def _within(seconds: float, ask: Callable):
    """What `ask` returns, or None if it fails or takes longer; then a thread is left that waits for the network."""
    answers: list = []

    def collect() -> None:
        with suppress(Exception):
            answers.append(ask())

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


# --------------------------------------------------------------------------------------- the start


def meet(timeout: timedelta) -> Peers | None:
    """Wait for all ranks and exchange a number with them; every rank calls this before the process group starts.

    Args:
        timeout: how long to wait for ranks that have not started yet, and for a peer later on. The exchange itself
            has a limit of its own: who has come and does not answer cannot be reached.

    Returns:
        None with one process.

    Raises:
        UserError: who did not come or cannot be reached, and what to look at.
    """
    global _current, _meetings
    hold_if_leaving()
    if _current is None and world_size_of_launcher() > 1:
        try:
            with _saying_who_is_awaited():
                store, rank, hosts = _gather_hosts(timeout)
        finally:
            _meetings += 1
        _current = Peers(store, rank, hosts, timeout)
        atexit.register(part)
        _exchange(_current, min(FIRST_EXCHANGE, timeout))
    return _current


@contextmanager
def _saying_who_is_awaited() -> Iterator[None]:
    """Say on rank 0, after a while, that others are awaited, and who says that there are others."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    words = f"vqdist: waiting for {world_size_of_launcher()} processes at {place} ({origin_of_size()})"
    timer = threading.Timer(AWAITED, print, (words,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if os.environ["RANK"] == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def part() -> None:
    """Forget the ranks that were met."""
    global _current
    if _current is not None:
        atexit.unregister(part)
        _current.close()
    _current = None


def _gather_hosts(timeout: timedelta) -> tuple[dist.Store, int, list[str]]:
    address = os.environ["MASTER_ADDR"]
    rank, size, host = int(os.environ["RANK"]), world_size_of_launcher(), socket.gethostname()
    if not resolves(address):
        raise UserError(
            f"MASTER_ADDR={address}, where rank 0 is to be met, is no name that host {host} knows; give an address, "
            "or add the name to /etc/hosts"
        )
    try:
        store, *_ = next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=timeout))
        store = _with_names(store)
        store.set(f"host/{rank}", host)
        keys = [f"host/{other}" for other in range(size)]
        _wait_for(keys, store, rank, timeout)
        _renew_meeting_place(store, rank, size, timeout)
        return store, rank, [store.get(key).decode() for key in keys]
    except PeerLost:
        raise
    except RuntimeError as error:
        raise UserError(_not_met(error, rank, host, size, timeout)) from error


def _with_names(store: dist.Store) -> dist.PrefixStore:
    """Return the store with the names of the coming meeting."""
    return dist.PrefixStore(f"vqdist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_meetings}", store)


def _wait_for(keys: list[str], store: dist.Store, rank: int, timeout: timedelta) -> None:
    """Wait for all ranks; raise `PeerLost` where one says instead that it leaves."""
    deadline = time.monotonic() + timeout.total_seconds()
    missing = True
    while missing:
        left = deadline - time.monotonic()
        try:
            store.wait(keys, timedelta(seconds=max(0.01, min(PULSE, left))))
            missing = False
        except dist.DistStoreError:
            if left <= 0:
                raise
        if store.check(["news"]):
            hold_if_leaving()
            gone = {int(other): reason for other, reason in json.loads(store.get("news")).items()}
            code = int(store.get("code"))
            store.set(f"heard/{rank}", "yes")
            words = " and ".join(gone.values())
            raise PeerLost(tuple(gone), f"lost {named(gone)}: {words}; start the same command again", code)


def say_leaving(reason: str, code: int) -> None:
    """Tell the others, also those that are yet to come, that this rank leaves, and the code that they leave with.

    Rank 0, with which the store may end, waits a moment until they have heard it.
    """
    if _current is not None:
        _current.say_why(reason, code)
    else:
        _within(FAREWELL, lambda: _say_before_meeting(reason, code))


def _say_before_meeting(reason: str, code: int) -> None:
    export_launch()
    rank, size, limit = int(os.environ["RANK"]), world_size_of_launcher(), timedelta(seconds=FAREWELL)
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if hosts_store:  # the same server, if this process has one already
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        options = {"is_master": True, "wait_for_workers": False, "multi_tenant": True}
        place: dist.Store = dist.TCPStore(address, port, size, timeout=limit, **options)
    else:
        place, *_ = next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=limit))
    store = _with_names(place)
    store.set("code", str(code))
    store.set(f"gone/{rank}", f"it ended with: {reason}")
    store.set(f"heard/{rank}", "yes")
    store.set("news", json.dumps({rank: f"it ended with: {reason}"}))
    if hosts_store:
        store.wait([f"heard/{other}" for other in range(size)], limit)


def _renew_meeting_place(store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
    """After a restart by torchrun its store may still say where the ended processes listened, under the names by which
    the new group asks: the group gets a store of its own."""
    global _fresh_store
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        options = {"is_master": True, "wait_for_workers": False, "multi_tenant": True}
        _fresh_store = dist.TCPStore(os.environ["MASTER_ADDR"], port, size, timeout=timeout, **options)
        store.set("port", str(port))
    os.environ["MASTER_PORT"] = store.get("port").decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _not_met(error: RuntimeError, rank: int, host: str, size: int, timeout: timedelta) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "address already in use" in str(error).lower() or "EADDRINUSE" in str(error):
        return f"port {port} of host {host} is taken, by another run perhaps; give another MASTER_PORT"
    minutes = timeout.total_seconds() / 60
    return (
        f"rank {rank} (host {host}) did not meet all {size} ranks at {address}:{port} within {minutes:g} minutes "
        f"(dist_timeout): {one_line(error, 120)}; were all of them started ({origin_of_size()}), with this address, "
        "and does a firewall let them through?"
    )


def _exchange(peers: Peers, limit: timedelta) -> None:
    """Add up one number over the hosts' network, as gloo will later."""
    size = len(peers.hosts)
    # in a thread, since gloo connects for longer than it is told
    total, error = _within(limit.total_seconds(), lambda: _sum_of_ones(peers, limit)) or (None, None)
    if total is None:
        raise UserError(_cut_off(peers, error or TimeoutError(f"no connection within {limit.total_seconds():g} s")))
    if total != size:
        raise UserError(f"{size} ranks added up ones and got {total}; two runs share the port, give another one")


def _sum_of_ones(peers: Peers, limit: timedelta) -> tuple[int | None, RuntimeError | None]:
    try:
        store = dist.PrefixStore("exchange", peers.store)
        group: Any = dist.ProcessGroupGloo(store, peers.rank, len(peers.hosts), limit)  # torch's stub has no allreduce
        ones = torch.ones(1)
        group.allreduce([ones]).wait()
        return int(ones), None
    except RuntimeError as error:
        return None, error


def first_exchange(device: torch.device, timeout: timedelta) -> None:
    """The group's first exchange between devices; raises `PeerLost` if it does not end within its own limit."""
    limit = min(FIRST_EXCHANGE, timeout)
    dist.all_reduce(torch.ones(1, device=device))
    done, deadline = torch.cuda.Event(), time.monotonic() + limit.total_seconds()
    done.record()
    while not done.query():  # no wait that could not be ended
        if time.monotonic() > deadline:
            raise PeerLost(
                (),
                f"the hosts reach each other but their devices ({device}) exchanged nothing within "
                f"{limit.total_seconds():g} s; set NCCL_SOCKET_IFNAME to the interface that joins the hosts, "
                "NCCL_IB_DISABLE=1 or NCCL_P2P_DISABLE=1 to find which way is closed, NCCL_DEBUG=INFO to read more",
            )
        time.sleep(0.01)


def _cut_off(peers: Peers, error: Exception) -> str:
    """All ranks were at the store: what is wrong with the network between them?"""
    silent = _within(2 * LOOK + 2 * PULSE, lambda: peers._look("no answer"))
    others = tuple(rank for rank in range(len(peers.hosts)) if rank != peers.rank)
    named = next((name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if os.environ.get(name)), None)
    interfaces = ", ".join(name for _, name in socket.if_nameindex())
    host = socket.gethostname()
    return (
        f"rank {peers.rank} (host {host}) met {peers.name(silent or others)} but cannot exchange data: "
        f"{one_line(error, 160)}; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that joins the hosts "
        f"(here {interfaces}{f'; {named}={os.environ[named]}' if named else ''}), see that the name {host!r} does not "
        "mean 127.0.0.1 in /etc/hosts, and that no firewall closes the ports between the hosts"
    )


# --------------------------------------------------------------------------------------- the end


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says that an exchange with other ranks failed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(SIGNS.search(str(error))))


@contextmanager
def naming_lost_peers(progress: Progress = lambda: ("", "")) -> Iterator[None]:
    """Within this context an exchange that fails raises `PeerLost`; what else ends this rank is told to the others;
    and a rank that is silent for the time-out ends this process.

    Args:
        progress: gives how far this process came, as " after step 7", and what to do about it. It is also asked, from
            another thread, where an exchange does not come to an end.
    """
    ranks = _current
    if ranks is None:
        yield
        return
    before, ranks.progress = ranks.progress, progress
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        account_for(error)
        raise
    finally:
        ranks.progress = before


def account_for(error: BaseException) -> None:
    """Raise `PeerLost` in place of an exchange's error; tell the others of any other error, which ends this rank.

    They are told once. A `Stopped` is every rank's, and nothing is told of it.
    """
    if _current is None or isinstance(error, PeerLost | Stopped):
        return
    if is_lost_peer(error):
        raise _current.lost(error) from error
    if not _current.ended_with_error:
        _current.say_why(one_line(error) if isinstance(error, UserError | RanksDiverged) else _with_type(error))


def _with_type(error: BaseException) -> str:
    words = str(error)
    return one_line(RuntimeError(f"{type(error).__name__}: {words}")) if words else type(error).__name__


def named(ranks: Iterable[int]) -> str:
    """The ranks with their hosts, as far as they were met: "rank 0 (host a), rank 1 (host b)"."""
    return _current.name(ranks) if _current is not None else ", ".join(f"rank {rank}" for rank in sorted(ranks))


def in_company() -> bool:
    """Whether there are other ranks that this process has met and not parted from."""
    return _current is not None


def leave(code: int) -> NoReturn:
    """End this process now: at its usual end torch may wait for ranks that are gone."""
    for child in multiprocessing.active_children():  # loader workers, which may ignore SIGTERM
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
