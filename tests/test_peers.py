"""A rank that is gone: the others name it in one line and end in time, and the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import BROKEN, ROOT, environment, free_port, kill_all, last_step, torchrun
from PIL import Image
from safetensors.torch import load_file

from vqdist import DiscreteVAE, cli
from vqdist.backends import peers
from vqdist.backends.peers import Peers, is_lost_peer, naming_lost_peers
from vqdist.checkpoint import complete_steps
from vqdist.errors import PeerLost, UserError

TRAIN = [
    *"train dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --trainer.log_every 1 --trainer.save_results_every 0".split(),
    *"--trainer.validate_every 0 --trainer.save_model_every 10 --data.num_workers 0".split(),
]


class Run:
    """Two ranks without a launcher, so that each rank's exit code and words are seen as they are; by default they
    train."""

    def __init__(
        self, folder: Path, *options: str, command: Sequence[str] | None = None, of_second: tuple[str, ...] = ()
    ):
        self.out = folder / "run"
        self.logs = [folder / f"rank_{rank}.log" for rank in range(2)]
        port = str(free_port())
        command = [*(command or TRAIN), "--out", str(self.out), *options]
        self.ranks = [self._start(rank, port, [*command, *(rank * of_second)]) for rank in range(2)]

    def _start(self, rank: int, port: str, command: list[str]) -> subprocess.Popen:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "vqdist", *command]
        with self.logs[rank].open("w") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment(**place), stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_exception) -> None:
        for process in self.ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait_for_step(self, step: int) -> None:
        """And for a complete checkpoint."""
        deadline = time.monotonic() + 200
        while last_step(self.out) < step or not complete_steps(self.out / "checkpoints"):
            assert all(process.poll() is None for process in self.ranks), [log.read_text() for log in self.logs]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end_of(self, rank: int, timeout: float = 120) -> tuple[str, float]:
        """The last line of a rank that ends without a traceback, and the seconds that it took from now on."""
        began = time.monotonic()
        self.ranks[rank].wait(timeout)
        printed = self.logs[rank].read_text()
        assert "Traceback" not in printed
        return printed.strip().splitlines()[-1], time.monotonic() - began


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("victim", "number", "reasons"),
    [
        (1, signal.SIGKILL, BROKEN),
        (0, signal.SIGKILL, [", and the ranks met there"]),
        # as if the network were gone: its connections are open and nothing comes
        (1, signal.SIGSTOP, ["no answer within 0.2 minutes (dist_timeout)"]),
    ],
)
def test_the_survivor_names_who_is_lost_and_leaves(victim, number, reasons, tmp_path):
    silent = ["--dist_timeout", "0.2"] if number == signal.SIGSTOP else []
    with Run(tmp_path, "--trainer.num_train_steps", "100000", "--data.num_workers", "1", *silent) as run:
        run.wait_for_step(12)
        os.killpg(run.ranks[victim].pid, number)  # its loader's process holds its connections, too
        line, seconds = run.end_of(1 - victim)
        print(f"left {seconds:.1f} s after {number.name}: {line}")
        assert run.ranks[1 - victim].returncode == 69
        assert line.startswith(f"vqdist: error: lost rank {victim} (host ")
        assert any(reason in line for reason in reasons), line
        step = int(line.partition("after step ")[2].partition(":")[0])
        assert 12 <= step <= last_step(run.out) + 1
        newest = sorted(path for path in (run.out / "checkpoints").iterdir() if path.suffix != ".partial")[-1]
        assert f"the last complete checkpoint is {newest}: the same command goes on" in line
        assert (newest / "manifest.json").is_file()
        assert seconds < 100


@pytest.mark.distributed
def test_a_rank_that_encodes_gives_a_silent_one_up(tmp_path):
    """It may wait for the last shard of another for days, and not for one that is frozen."""
    DiscreteVAE(image_size=16, num_tokens=16, num_layers=2, hidden_dim=8).save_pretrained(tmp_path / "dvae")
    command = ["encode", str(tmp_path / "dvae"), "--data", "synthetic:40000", "--dist_timeout", "0.2"]
    with Run(tmp_path, *"--batch_size 1 --shard_size 4 --num_workers 0".split(), command=command) as run:
        deadline = time.monotonic() + 200
        while len(list(run.out.glob("codes_*.npy"))) < 3:
            assert all(process.poll() is None for process in run.ranks), [log.read_text() for log in run.logs]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.ranks[1].send_signal(signal.SIGSTOP)
        line, seconds = run.end_of(0)
        print(f"left after {seconds:.1f} s: {line}")
        assert run.ranks[0].returncode == 69
        assert line.startswith("vqdist: error: lost rank 1 (host ")
        assert line.endswith(": no answer within 0.2 minutes (dist_timeout); start the same command again")


@pytest.mark.distributed
def test_a_rank_that_ends_of_its_own_mistake_is_named_with_it(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(200):
        path = tmp_path / "images" / f"{index:03d}.png"
        Image.fromarray(np.full((16, 16, 3), index, dtype=np.uint8)).save(path)
    for index in range(0, 200, 50):
        (tmp_path / "images" / f"{index:03d}.png").write_bytes(b"broken")
    options = ["--data", str(tmp_path / "images"), "--trainer.num_train_steps", "100"]
    with Run(tmp_path, *options, "--data.on_bad_image", "raise") as run:
        ends = [run.end_of(rank)[0] for rank in range(2)]
        codes = [process.returncode for process in run.ranks]
    assert sorted(codes) == [2, 69], ends
    guilty = codes.index(2)
    assert ".png" in ends[guilty] and ends[guilty].startswith("vqdist: error: ")
    assert ends[1 - guilty].startswith(f"vqdist: error: lost rank {guilty} (host ")
    assert "it ended with: " in ends[1 - guilty] and ".png" in ends[1 - guilty]


@pytest.mark.distributed
def test_ranks_that_were_told_different_things_do_not_train(tmp_path):
    """Two hosts, two commands typed by hand: each would train a model of its own until their weights are compared."""
    with Run(tmp_path, of_second=("--trainer.lr", "2e-3", "--batch_size", "8", "--data.num_workers", "1")) as run:
        for rank in (0, 1):
            line, _seconds = run.end_of(rank)
            assert run.ranks[rank].returncode == 2
            assert "rank 1 (host" in line and "got other options than rank 0 (host" in line
            assert "(batch_size, lr); start all of them with the same command" in line
        assert not (run.out / "config.json").exists()


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_torchrun_starts_a_killed_rank_again_and_the_end_is_the_same(tmp_path):
    def train(name: str, port: int) -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1"]
        options = ["--out", str(tmp_path / name), "--trainer.num_train_steps", "200"]
        return subprocess.Popen(
            [sys.executable, *launcher, "--master_port", str(port), "-m", "vqdist", *TRAIN, *options],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / f"{name}.log").open("w"),
            start_new_session=True,
        )

    killed = train("killed", free_port())
    try:
        deadline = time.monotonic() + 200
        while not complete_steps(tmp_path / "killed" / "checkpoints"):
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert killed.wait(400) == 0, (tmp_path / "killed.log").read_text()[-4000:]
    finally:
        kill_all(killed)
    assert "resumed " in (tmp_path / "killed.log").read_text()
    arguments = ["-m", "vqdist", *TRAIN, "--out", str(tmp_path / "whole"), "--trainer.num_train_steps", "200"]
    torchrun(arguments)
    for file in ("vae/weights", "vae/optimizer", "ema"):
        ours, theirs = (
            load_file(tmp_path / name / "checkpoints" / "step_00000200" / f"{file}.safetensors")
            for name in ("killed", "whole")
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not list((tmp_path / "killed").rglob("*.partial"))


# ------------------------------------------------------------------------------------------- in this process


@pytest.fixture
def company(monkeypatch):
    """A function that makes Peers of one store; pulses are quick, and all of them end with the test."""
    monkeypatch.setattr(peers, "PULSE", 0.02)
    monkeypatch.setattr(peers, "LOOK", 1.0)
    shared, made = dist.HashStore(), []

    def make(rank: int, size: int = 3, timeout: float = 60.0, hosts: str = "abc", store=shared) -> Peers:
        made.append(Peers(store, rank, list(hosts)[:size], timedelta(seconds=timeout)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def left(monkeypatch) -> list[int]:
    """The codes with which this process would have ended at once."""
    codes: list[int] = []
    monkeypatch.setattr(peers, "leave", codes.append)
    return codes


def wait_for(condition: Callable[[], object]) -> None:
    """Until it holds, or for so long that it never will."""
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


def test_who_has_no_pulse_is_lost(company):
    first, second, third = (company(rank) for rank in range(3))
    third.close()
    third._pulse.join()
    second.progress = lambda: (" after step 7", "go on")
    lost = second.lost(RuntimeError("Connection reset by peer"))
    assert lost.ranks == (2,)
    assert str(lost) == "lost rank 2 (host c) after step 7: connection reset by peer; go on"
    wait_for(lambda: first.heard)
    assert first.heard == {2: "connection reset by peer"}  # should the store go too


def test_who_said_why_is_named_with_it(company):
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
    other._read = None  # its pulse stops, and nobody is told
    waiting.progress = lambda: (" after step 3", "go on")
    wait_for(lambda: left)
    assert left[0] == 69
    assert "lost rank 1 (host b) after step 3: no answer within" in capsys.readouterr().err


def test_the_guard_lets_a_rank_go_that_is_done(company, left, monkeypatch):
    monkeypatch.setattr(peers, "LOOK", 0.05)
    busy, done = company(0, size=2, timeout=0.1), company(1, size=2)
    busy.progress = lambda: ("", "")
    done.close()
    done._pulse.join()
    time.sleep(1)
    assert not left


def test_the_guard_ends_a_process_whose_peer_has_crashed(company, left, monkeypatch):
    """It waits in an exchange that has no time-out, or one of days; the peer's process ended in the usual way."""
    monkeypatch.setattr(peers, "LOOK", 0.2)
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
    third._pulse.join()
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
