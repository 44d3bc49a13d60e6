"""A rank that is gone: the others name it in one line and end in time, and the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import BROKEN, ROOT, environment, free_port, kill_all, last_step, torchrun
from PIL import Image
from safetensors.torch import load_file

from vqdist import DiscreteVAE
from vqdist.checkpoint import complete_steps

TRAIN = [
    *"train dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --trainer.log_every 1 --trainer.save_results_every 0".split(),
    *"--trainer.validate_every 0 --trainer.save_model_every 10 --data.num_workers 0".split(),
]


class Run:
    """Start two ranks without a launcher, which by default train.

    So each rank's exit code and words are seen as they are."""

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
        """Return the last line of a rank that ends without a traceback, and the seconds that it took from now on."""
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
    assert codes == [2, 2], ends  # nothing mends a broken image, so no launcher is to start again
    guilty = next(rank for rank in range(2) if ends[rank].startswith("vqdist: error: cannot decode the image "))
    assert f": rank {guilty} has no images to train on: cannot decode the image " in ends[1 - guilty]
    assert all(".png" in end and "is saved in " in end for end in ends)


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
