"""A rank that is gone, within this process: who is named, and who ends; faults/test_lost_ranks.py kills real ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist
from launching import free_port

from vqdist import cli
from vqdist.backends import heartbeat, peers
from vqdist.backends.peers import Peers, is_lost_peer, naming_lost_peers
from vqdist.errors import PeerLost, UserError


@pytest.fixture
def company(monkeypatch):
    """Return a function that makes Peers of one store; heartbeats are quick, and all of them end with the test."""
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)
    monkeypatch.setattr(heartbeat, "LOOK", 1.0)
    shared, made = dist.HashStore(), []

    def make(rank: int, size: int = 3, timeout: float = 60.0, hosts: str = "abc", store=shared) -> Peers:
        made.append(Peers(store, rank, list(hosts)[:size], timedelta(seconds=timeout)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def left(monkeypatch) -> list[int]:
    """Return the codes with which this process would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr(heartbeat, "leave", codes.append)
    return codes


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until it holds, or for so long that it never will."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5514",
        "[../gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:2611: Connection reset by peer",
        "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:144] no error",
        "NCCL error in: ../ProcessGroupNCCL.cpp:1333, remote process exited or there was a network error",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_errors_of_lost_peers(text):
    assert is_lost_peer(RuntimeError(text))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("Connection reset by peer"), UserError("x")]
)
def test_other_errors(error):
    assert not is_lost_peer(error)


def test_exceptions_of_torch_distributed_are_of_lost_peers():
    assert is_lost_peer(dist.DistNetworkError("anything")) and is_lost_peer(dist.DistBackendError("anything"))


def test_who_has_no_heartbeat_is_lost(company):
    first, second, third = (company(rank) for rank in range(3))
    third.close()
    third._heartbeat.join()
    second.progress = lambda: (" after step 7", "go on")
    lost = second.lost(RuntimeError("Connection reset by peer"))
    assert lost.ranks == (2,)
    assert str(lost) == "lost rank 2 (host c) after step 7: connection reset by peer; go on"
    wait_for(lambda: first.heard)
    assert first.heard == {2: "connection reset by peer"}  # should the store go too


def test_who_said_why_is_named_with_it(company, monkeypatch):
    monkeypatch.setattr(heartbeat, "LOOK", 20.0)  # it is over when the word is there, however slow the machine
    first, second = company(0, size=2), company(1, size=2)
    second.say_why("a broken image")
    lost = first.lost(RuntimeError("Connection closed by peer"))
    assert str(lost) == "lost rank 1 (host b): it ended with: a broken image; start the same command again"


def test_if_all_live_nobody_is_named(company):
    first, _ = company(0, size=2), company(1, size=2)
    time.sleep(0.1)
    lost = first.lost(RuntimeError("Timed out waiting 60000ms for send operation to complete"))
    assert lost.ranks == ()
    assert "though all of them are alive: no answer within 1 minutes (dist_timeout)" in str(lost)


class NoStore(dist.HashStore):
    """A store whose host cannot be reached."""

    def check(self, _keys):
        raise dist.DistNetworkError("Connection was likely closed")


def test_if_the_store_is_gone_so_is_its_host(company):
    alone = company(2, hosts="aab", store=NoStore())
    lost = alone.lost(RuntimeError("Broken pipe"))
    assert str(lost).startswith("lost rank 0 (host a), rank 1 (host a): broken pipe, and the ranks met there; ")
    on_its_host = company(1, hosts="aab", store=NoStore())
    assert on_its_host.lost(RuntimeError("Broken pipe")).ranks == (0,)


def test_the_guard_ends_a_process_that_waits_without_end(company, left, capsys):
    """Of exchanges with no time-out of their own: DeepSpeed's through shared memory, what waits for a device."""
    waiting, other = company(0, size=2, timeout=0.2), company(1, size=2)
    time.sleep(0.1)
    assert not left
    other._read = None  # its heartbeat stops, and nobody is told
    waiting.progress = lambda: (" after step 3", "go on")
    wait_for(lambda: left)
    assert left[0] == 69
    assert "lost rank 1 (host b) after step 3: no answer within" in capsys.readouterr().err


def test_the_guard_lets_a_rank_go_that_is_done(company, left, monkeypatch):
    monkeypatch.setattr(heartbeat, "LOOK", 0.05)
    busy, done = company(0, size=2, timeout=0.1), company(1, size=2)
    busy.progress = lambda: ("", "")
    done.close()
    done._heartbeat.join()
    time.sleep(1)
    assert not left


def test_the_guard_ends_a_process_whose_peer_has_crashed(company, left, monkeypatch):
    """It waits in an exchange that has no time-out, or one of days; the peer's process ended in the usual way."""
    monkeypatch.setattr(heartbeat, "LOOK", 0.2)
    busy, crashed = company(0, size=2, timeout=0.1), company(1, size=2)
    busy.progress = lambda: ("", "")
    crashed.say_why("out of memory")
    crashed.close()
    wait_for(lambda: left)
    assert left[0] == 69


def test_train_raises_peer_lost_and_leaves_other_errors_alone(company, monkeypatch):
    monkeypatch.setattr(peers, "_current", company(0, size=2))
    with pytest.raises(PeerLost, match=r"lost rank 1 \(host b\) after step 4: .*; go on") as caught:
        with naming_lost_peers(lambda: (" after step 4", "go on")):
            raise RuntimeError("Connection reset by peer")
    assert isinstance(caught.value.__cause__, RuntimeError) and caught.value.ranks == (1,)
    with pytest.raises(UserError, match="mine"), naming_lost_peers(lambda: ("", "")):
        raise UserError("mine")
    assert peers._current.store.get("gone/0") == b"it ended with: mine"


def test_who_is_lost_is_found_before_progress_is_asked(company):
    """To say it may take rank 0 half a minute, in which the others have looked and left."""
    first, second, third = (company(rank) for rank in range(3))

    def progress() -> tuple[str, str]:
        second.close()
        time.sleep(0.5)
        return " after step 7", "go on"

    first.progress = progress
    third._read = None
    third._heartbeat.join()
    lost = first.lost(RuntimeError("Connection reset by peer"))
    assert str(lost) == "lost rank 2 (host c) after step 7: connection reset by peer; go on"


def test_alone_nothing_is_a_lost_peer():
    with pytest.raises(RuntimeError, match="Connection reset by peer"), naming_lost_peers(lambda: ("", "")):
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("command", ["evaluate", "encode", "sample"])
def test_every_command_ends_with_the_line_and_the_code(command, company, monkeypatch, capsys):
    def fail(_arguments):
        raise RuntimeError("[pair.cc:534] Read error: Connection reset by peer")

    monkeypatch.setattr(peers, "_current", company(0, size=2))
    monkeypatch.setitem(cli.COMMANDS, command, fail)
    monkeypatch.setattr(peers, "leave", sys.exit)
    with pytest.raises(SystemExit) as ended:
        cli.main([command])
    assert ended.value.code == 69
    line = "vqdist: error: lost rank 1 (host b): connection reset by peer; start the same command again"
    assert capsys.readouterr().err.splitlines() == [line]


def test_an_address_that_nobody_knows_is_said_before_any_wait(monkeypatch):
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_ADDR=no-such-host.invalid, where rank 0 is to be met, is no name"):
        peers.meet(timedelta(seconds=60))


def test_who_does_not_come_is_waited_for_no_longer_than_the_timeout(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"did not meet all 2 ranks at 127.0.0.1:\d+ within 0.05 minutes"):
        peers.meet(timedelta(seconds=3))
    assert time.monotonic() - began < 20 and not peers.in_company()
