"""Signals: every rank finishes its step, saves and leaves with the documented code; the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT, end_of, environment, free_port, kill_all, last_step, torchrun
from safetensors.torch import load_file
from workers.stopping_worker import SCENARIOS

from vqdist import DiscreteVAE
from vqdist.stopping import REQUEUE

TRAIN = [
    *"train dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --trainer.log_every 1 --trainer.save_model_every 0".split(),
    *"--trainer.save_results_every 0 --trainer.validate_every 0".split(),
]


def launch(out: Path, *options: str, ranks: int = 1, **variables: str) -> subprocess.Popen:
    """Start a training in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "vqdist", *TRAIN, "--out", str(out), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(**variables), start_new_session=True, **pipes)


def start(out: Path, *options: str, ranks: int = 1, **variables: str) -> subprocess.Popen:
    """Start a training in a process group of its own, and return after its first steps."""
    process = launch(out, *options, ranks=ranks, **variables)
    wait_until(lambda: last_step(out) >= 3, process)
    return process


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, every: float = 0.05) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_all(process)
            raise AssertionError(process.communicate(timeout=60)[1][-3000:])
        time.sleep(every)


def lines_of(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    """Wait for the end of a process, and return what it wrote to standard error."""
    return end_of(process, timeout)[1]


def saved_steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((out / "checkpoints").iterdir())]


@pytest.mark.distributed
@pytest.mark.parametrize("number", [*REQUEUE, signal.SIGINT])
def test_a_signal_saves_the_step_and_ends_with_its_code(tmp_path, number):
    """To the whole process group, as schedulers and Ctrl-C do: loader workers must not die of it first."""
    code = 130 if number == signal.SIGINT else 75
    (tmp_path / "tmp").mkdir()
    options = ["--trainer.num_train_steps", "100000", "--data.num_workers", "2"]
    process = start(tmp_path, *options, TMPDIR=str(tmp_path / "tmp"))
    os.killpg(process.pid, number)
    errors = finish(process)
    assert process.returncode == code and "Exception ignored" not in errors, errors[-3000:]
    assert not list((tmp_path / "tmp").glob("pymp-*"))
    (step,) = saved_steps(tmp_path)
    assert f"stopped by {number.name} after step {step}, which is saved" in errors and "Traceback" not in errors
    assert lines_of(tmp_path)[-1]["step"] == step
    assert (tmp_path / "export" / "model.safetensors").is_file()


@pytest.mark.distributed
def test_a_signal_ends_encode_without_a_trace(tmp_path):
    """To the whole group, with loader processes: of what they made nothing stays, and nothing is said at the end."""
    DiscreteVAE(image_size=16, num_tokens=16, num_layers=2, hidden_dim=8).save_pretrained(tmp_path / "dvae")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "vqdist", "encode", str(tmp_path / "dvae"), "--data", "synthetic:400000"]
    command += [*"--batch_size 1 --shard_size 4 --num_workers 2 --out".split(), str(tmp_path / "codes")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, env=environment(TMPDIR=str(tmp_path / "tmp")), start_new_session=True, cwd=ROOT, **pipes
    )
    wait_until(lambda: len(list(tmp_path.glob("codes/codes_*.npy"))) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    errors = finish(process)
    assert process.returncode == 130 and not re.search("Traceback|Exception ignored", errors), errors[-3000:]
    assert not list((tmp_path / "tmp").glob("pymp-*"))


@pytest.mark.distributed
def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    command = [sys.executable, "-m", "vqdist", *TRAIN, "--out", str(tmp_path), "--trainer.num_train_steps", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["nohup", *command], env=environment(), start_new_session=True, **pipes)
    wait_until(lambda: last_step(tmp_path) >= 3, process)
    os.killpg(process.pid, signal.SIGHUP)
    reached = last_step(tmp_path)
    wait_until(lambda: last_step(tmp_path) > reached + 10, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert "stopped by SIGTERM" in finish(process) and process.returncode == 75


@pytest.mark.distributed
def test_a_limit_of_processor_time_saves_the_run(tmp_path):
    """The system sends SIGXCPU at the soft limit, and again every second until the hard one."""
    process = start(tmp_path, "--trainer.num_train_steps", "10000000")
    used = sum(os.sysconf("SC_CLK_TCK") ** -1 * int(part) for part in times_of(process.pid))
    resource.prlimit(process.pid, resource.RLIMIT_CPU, (int(used) + 3, int(used) + 60))
    errors = finish(process)
    assert process.returncode == 75, errors
    assert "stopped by SIGXCPU after step" in errors and "Traceback" not in errors


def times_of(pid: int) -> list[str]:
    """Return the processor time of a process, of itself and of the system for it, in ticks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]


@pytest.mark.distributed
def test_a_stopped_run_ends_where_an_undisturbed_one_ends(tmp_path):
    process = start(tmp_path / "stopped", "--trainer.num_train_steps", "400")
    os.kill(process.pid, signal.SIGTERM)
    assert "SIGTERM" in finish(process) and process.returncode == 75
    (step,) = saved_steps(tmp_path / "stopped")
    assert 3 <= step < 400
    again = start(tmp_path / "stopped", "--trainer.num_train_steps", "400")
    assert f"step {step} of 400" in finish(again, timeout=240) and again.returncode == 0
    whole = start(tmp_path / "whole", "--trainer.num_train_steps", "400")
    finish(whole, timeout=240)
    for file in ("vae/weights", "vae/optimizer", "ema"):
        ours, theirs = (
            load_file(tmp_path / name / "checkpoints" / "step_00000400" / f"{file}.safetensors")
            for name in ("stopped", "whole")
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def pid_of_rank(torchrun: subprocess.Popen, rank: int) -> int:
    """Return the process of a rank that torchrun has started."""
    for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        if b"RANK=%d" % rank in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGXCPU])
def test_a_signal_at_the_very_end_changes_nothing(tmp_path, number):
    """All is saved, exported and said when it comes, again and again until the process has ended."""
    process = launch(tmp_path, "--trainer.num_train_steps", "9")
    wait_until(lambda: (tmp_path / "export" / "model.safetensors").is_file(), process, every=0.002)
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.01)
    out, errors = process.communicate()
    done = process.returncode == 0 and "9 steps on local" in out
    asked = process.returncode == 75 and f"stopped by {number.name} after step 9, which is saved" in errors
    assert done or asked, (process.returncode, out, errors)
    assert saved_steps(tmp_path) == [9] and "Traceback" not in errors


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all(tmp_path):
    records = tmp_path / "records"
    (tmp_path / "tmp").mkdir()
    variables = {"VQDIST_STOP_DIR": str(records), "TMPDIR": str(tmp_path / "tmp")}
    options = ["--trainer.num_train_steps", "100000", "--data.num_workers", "1"]
    process = start(tmp_path, *options, ranks=2, **variables)
    os.kill(pid_of_rank(process, 1), signal.SIGUSR1)
    errors = finish(process)
    assert process.returncode != 0  # torchrun's own code, whatever its workers' is
    (step,) = saved_steps(tmp_path)
    assert f"stopped by SIGUSR1 after step {step}, which is saved" in errors
    assert "exitcode  : 75" in errors and "Exception ignored" not in errors
    assert not list((tmp_path / "tmp").glob("pymp-*"))
    manifest = json.loads((tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["position"] == step * 8
    stop = {"signal": "SIGUSR1", "exit_code": 75, "saved": True, "step": step, "run": str(tmp_path)}
    assert {path.name: json.loads(path.read_text()) for path in records.iterdir()} == {
        f"stopped_rank_0000{rank}.json": {**stop, "rank": rank} for rank in (0, 1)
    }


@pytest.mark.distributed
def test_a_long_validation_is_broken_off_on_all_ranks(tmp_path):
    """To one of two ranks, whose loaders have workers."""
    options = "--data synthetic:60001 --data.valid_frac 0.99 --trainer.validate_every 3 --trainer.num_train_steps 9"
    process = start(tmp_path, *options.split(), "--data.num_workers", "1", ranks=2)
    time.sleep(2)  # into the validation of 29,700 images on each rank
    began = time.monotonic()
    os.killpg(process.pid, 0)  # they all live
    os.kill(pid_of_rank(process, 1), signal.SIGTERM)
    errors = finish(process)
    assert time.monotonic() - began < 100
    assert "stopped by SIGTERM after step 3, which is saved" in errors and "exitcode  : 75" in errors
    assert saved_steps(tmp_path) == [3] and not any("valid/l1" in line for line in lines_of(tmp_path))


@pytest.mark.distributed
def test_signals_during_validations_saves_and_pictures_on_two_ranks(tmp_path):
    done = torchrun([str(ROOT / "tests" / "workers" / "stopping_worker.py"), str(tmp_path)])
    assert done.stdout.count("as expected") == 2 * len(SCENARIOS)


# --------------------------------------------------------------------------------------------- before training


@pytest.mark.distributed
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_during_the_start_ends_it_with_its_code(tmp_path, number, code):
    """While it imports: as soon as it listens."""
    process = launch(tmp_path / "run", "--trainer.num_train_steps", "9")
    status = Path(f"/proc/{process.pid}/status")

    def listens() -> bool:
        found = dict(line.split(":", 1) for line in status.read_text().splitlines())
        # the thread comes last
        return bool(int(found["SigCgt"], 16) >> (signal.SIGUSR1 - 1) & 1) and int(found["Threads"]) > 1

    wait_until(listens, process, every=0.005)
    os.kill(process.pid, number)
    errors = finish(process)
    said = f"vqdist: stopped by {number.name} before training began; the same command starts again\n"
    assert (process.returncode, errors.count(said)) == (code, 1) and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_signal_ends_a_rank_that_waits_for_another(tmp_path):
    """In the library that waits Python's handlers do not run."""
    port = free_port()
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = launch(tmp_path, "--trainer.num_train_steps", "9", **ranks)

    def waits() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    wait_until(waits, process)
    time.sleep(1)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGUSR1)
    errors = finish(process)
    assert process.returncode == 75 and time.monotonic() - began < 30  # then Slurm kills
    assert errors.count("vqdist: stopped by SIGUSR1 (rank 0) before training began") == 1 and "Traceback" not in errors


def start_rank(out: Path, rank: int, port: int) -> subprocess.Popen:
    """Start one of two ranks without a launcher, so that its own code and words are seen."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return launch(out, "--trainer.num_train_steps", "9", **place, MASTER_PORT=str(port))


def loaded(process: subprocess.Popen, library: str) -> bool:
    """Return whether a process has loaded this library, of those that are loaded one after the other."""
    return library in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.distributed
@pytest.mark.parametrize("leaver", [0, 1])
@pytest.mark.parametrize("moment", ["importing", "waiting", "late"])
def test_a_signal_to_one_rank_of_a_start_gives_its_code_to_the_others(tmp_path, leaver, moment):
    """While both import torch; while the other waits already; and before the other has come at all."""
    port = free_port()
    ranks: dict[int, subprocess.Popen] = {leaver: start_rank(tmp_path, leaver, port)}
    if moment != "late":
        ranks[1 - leaver] = start_rank(tmp_path, 1 - leaver, port)
    if moment == "waiting":  # the leaver is late
        ranks[leaver].send_signal(signal.SIGSTOP)
        wait_until(lambda: loaded(ranks[1 - leaver], "libtorch_cpu"), ranks[1 - leaver])
        time.sleep(20)
        ranks[leaver].send_signal(signal.SIGCONT)
    wait_until(lambda: loaded(ranks[leaver], "libtorch_cpu" if moment != "late" else "libtorch_python"), ranks[leaver])
    ranks[leaver].send_signal(signal.SIGTERM)
    if moment == "late":
        time.sleep(1)
        ranks[1 - leaver] = start_rank(tmp_path, 1 - leaver, port)
    errors = {rank: finish(process) for rank, process in ranks.items()}
    assert {rank: process.returncode for rank, process in ranks.items()} == {0: 75, 1: 75}, errors
    assert f"stopped by SIGTERM (rank {leaver}) before training began" in errors[leaver]
    assert f"rank {leaver}" in errors[1 - leaver] and "stopped by SIGTERM before training began" in errors[1 - leaver]
    assert not any("Traceback" in text for text in errors.values()) and not (tmp_path / "checkpoints").exists()


def lives(pid: int) -> bool:
    """Return whether a process is there and has not ended: nobody may wait for an orphan."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["start", "training"])
def test_the_ranks_of_a_killed_launcher_end_soon(tmp_path, moment):
    process = launch(tmp_path / "run", "--trainer.num_train_steps", "10000000", ranks=2)
    wait_until(lambda: moment == "start" or last_step(tmp_path / "run") >= 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) >= 2, process)
    ranks = [int(pid) for pid in children.read_text().split()]
    wait_until(lambda: all(b"vqdist" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ranks), process)
    if moment == "start":
        wait_until(lambda: all("libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text() for pid in ranks), process)
    began = time.monotonic()
    process.kill()
    errors = process.communicate(timeout=120)[1]  # its pipes are open until the ranks have ended
    while any(map(lives, ranks)):  # their pipes are closed a moment before
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    assert f"vqdist: the launcher (process {process.pid}) is gone" in errors and "Traceback" not in errors
    if moment == "training":
        (step,) = saved_steps(tmp_path / "run")
        assert f"stopped by SIGTERM after step {step}, which is saved" in errors
