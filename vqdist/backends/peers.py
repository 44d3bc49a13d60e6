"""The other ranks: meeting them, and naming those that are gone when an exchange fails, by `heartbeat`.

A survivor leaves by `leave`: torch's own way to end a process may wait for those who are gone.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vqdist.backends.environment import (
    export_launch,
    local_rank_of_launcher,
    origin_of_size,
    resolves,
    world_size_of_launcher,
)
from vqdist.backends.heartbeat import INTERVAL, LOOK, Peers, Progress, is_lost_peer, leave, one_line, within
from vqdist.errors import PeerLost, RanksDiverged, UserError
from vqdist.leaving import hold_if_leaving
from vqdist.stopping import Stopped

__all__ = [
    "Peers",
    "account_for",
    "first_exchange",
    "in_company",
    "is_lost_peer",
    "leave",
    "meet",
    "named",
    "naming_lost_peers",
    "part",
    "say_leaving",
]

FIRST_EXCHANGE = timedelta(seconds=60)
AWAITED = 20.0  # seconds after which a process that waits for others says so
# seconds in which a rank that leaves before it has met the others tells them: Slurm kills 30 seconds after its SIGTERM
FAREWELL = 25.0
_meetings = 0  # of this process until now: each has names of its own in the store
_current: Peers | None = None
_fresh_store: dist.Store | None = None  # of `_renew_meeting_place`: it lasts as long as somebody holds it


# --------------------------------------------------------------------------------------- the start


def meet(timeout: timedelta) -> Peers | None:
    """Wait for all ranks and exchange a number with them; every rank calls this before the process group starts.

    Args:
        timeout: how long to wait for ranks that have not started yet, and for a peer later on. The exchange itself
            has a limit of its own: who has come and does not answer cannot be reached.

    Returns:
        None with one process.

    Raises:
        UserError: some did not come or cannot be reached.
    """
    global _current, _meetings
    hold_if_leaving()
    if _current is None and world_size_of_launcher() > 1:
        try:
            with _saying_who_is_awaited(f"{world_size_of_launcher()} processes", by=os.environ["RANK"] == "0"):
                store, rank, hosts = _gather_hosts(timeout)
        finally:
            _meetings += 1
        _current = Peers(store, rank, hosts, timeout)
        atexit.register(part)
        _exchange(_current, min(FIRST_EXCHANGE, timeout))
    return _current


@contextmanager
def _saying_who_is_awaited(awaited: str, *, by: bool) -> Iterator[None]:
    """Say after a while who is awaited, and who says that there are others.

    Args:
        awaited: for the line.
        by: whether this rank is to say it.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    words = f"vqdist: rank {os.environ['RANK']} waits for {awaited} at {place} ({origin_of_size()})"
    timer = threading.Timer(AWAITED, print, (words,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if by:
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
        says = rank == 1 or (rank > 0 and local_rank_of_launcher() == 0)  # one, and one of each other host
        with _saying_who_is_awaited("rank 0", by=says):
            store, *_ = next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=timeout))
        hold_if_leaving()  # or the others would take this rank for one that has come
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
            store.wait(keys, timedelta(seconds=max(0.01, min(INTERVAL, left))))
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

    Rank 0, with which the store may end, waits until they have heard it, and every rank for a store that is yet to
    come; at most `FAREWELL` seconds. One line says who was not told.
    """
    if _current is not None:
        _current.say_why(reason, code)
        return
    untold: set[int] = set()
    if within(FAREWELL, lambda: _say_before_meeting(reason, code, untold)) is None and untold:
        print(f"vqdist: {_who_waits(untold)}", file=sys.stderr, flush=True)


def _who_waits(untold: set[int]) -> str:
    one = len(untold) == 1
    return (
        f"{named(untold)} did not come within {FAREWELL:g} seconds and {'was' if one else 'were'} not told; stop "
        f"{'it' if one else 'them'} too, or {'it waits' if one else 'they wait'} for this rank until dist_timeout"
    )


def _say_before_meeting(reason: str, code: int, untold: set[int]) -> bool:
    """Say it where the ranks are to meet; keep in `untold` who has not heard it."""
    export_launch()
    rank, size, limit = int(os.environ["RANK"]), world_size_of_launcher(), timedelta(seconds=FAREWELL)
    of_ranks = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else it is torchrun's
    hosts_store = of_ranks and rank == 0
    if hosts_store:  # the same server, if this process has one already
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        options = {"is_master": True, "wait_for_workers": False, "multi_tenant": True}
        place: dist.Store = dist.TCPStore(address, port, size, timeout=limit, **options)
        untold |= {*range(size)} - {rank}
    else:
        if of_ranks:
            untold.add(0)
            _wait_for_store(limit.total_seconds())
        place, *_ = next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=limit))
    store = _with_names(place)
    store.set("code", str(code))
    store.set(f"gone/{rank}", f"it ended with: {reason}")
    store.set(f"heard/{rank}", "yes")
    store.set("news", json.dumps({rank: f"it ended with: {reason}"}))
    while hosts_store and untold:
        time.sleep(0.1)
        untold -= {other for other in untold if store.check([f"heard/{other}"])}
    return True


def _wait_for_store(seconds: float) -> None:
    """Return once rank 0 can be connected to, or after some time; torch itself tries ever more rarely."""
    place, deadline = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(place, timeout=1.0):
            return
        time.sleep(0.3)


def _renew_meeting_place(store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
    """Give the group a store of its own after a restart by torchrun.

    The old one may still say where the ended processes listened, under the names by which the new group asks.
    """
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
    total, error = within(limit.total_seconds(), lambda: _sum_of_ones(peers, limit)) or (None, None)
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
    """Make the group's first exchange between devices; raise `PeerLost` if it does not end within its own limit."""
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
    """Return what is wrong with the network between ranks that all were at the store."""
    silent = within(2 * LOOK + 2 * INTERVAL, lambda: peers._look("no answer"))
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


@contextmanager
def naming_lost_peers(progress: Progress = lambda: ("", "")) -> Iterator[None]:
    """Raise `PeerLost` within this context for an exchange that fails.

    Any other error that ends this rank is told to the others, and a rank that is silent for the time-out ends this
    process.

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
    """Return the ranks with their hosts, as far as they were met: "rank 0 (host a), rank 1 (host b)"."""
    return _current.name(ranks) if _current is not None else ", ".join(f"rank {rank}" for rank in sorted(ranks))


def in_company() -> bool:
    """Return whether there are other ranks that this process has met and not parted from."""
    return _current is not None
