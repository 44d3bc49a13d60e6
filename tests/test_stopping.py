"""Signals: every rank finishes its step, saves and leaves with the documented code; the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import environment, free_port
from safetensors.torch import load_file

from vqdist.stopping import Stopped, StopSignals

TRAIN = [
    *"train dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --trainer.log_every 1 --trainer.save_model_every 0".split(),
    *"--trainer.save_results_every 0 --trainer.validate_every 0".split(),
]


def start(out: Path, *options: str, ranks: int = 1) -> subprocess.Popen:
    """A training in a process group of its own, which has made its first steps when this returns."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "vqdist", *TRAIN, "--out", str(out), *options]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while len(lines_of(out)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.05)
    return process


def lines_of(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    """What it wrote to standard error."""
    try:
        return process.communicate(timeout=timeout)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def saved_steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((out / "checkpoints").iterdir())]


@pytest.mark.distributed
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_ends_with_its_code(tmp_path, number, code):
    """To the whole process group, as schedulers and Ctrl-C do: loader workers must not die of it first."""
    process = start(tmp_path, "--trainer.num_train_steps", "100000", "--data.num_workers", "1")
    os.killpg(process.pid, number)
    errors = finish(process)
    assert process.returncode == code, errors[-3000:]
    (step,) = saved_steps(tmp_path)
    assert f"stopped by {number.name} after step {step}, which is saved" in errors and "Traceback" not in errors
    assert lines_of(tmp_path)[-1]["step"] == step
    assert (tmp_path / "export" / "model.safetensors").is_file()


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


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all(tmp_path):
    process = start(tmp_path, "--trainer.num_train_steps", "100000", ranks=2)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for pid in map(int, workers):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(value[5:]): pid for value in variables if value.startswith(b"RANK=")}
    os.kill(ranks[1], signal.SIGUSR1)
    errors = finish(process)
    assert process.returncode != 0  # torchrun's own code, whatever its workers' is
    (step,) = saved_steps(tmp_path)
    assert f"stopped by SIGUSR1 after step {step}, which is saved" in errors
    assert "exitcode  : 75" in errors
    manifest = json.loads((tmp_path / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["position"] == step * 8


# --------------------------------------------------------------------------------------------- in this process


def test_signals_are_noted_and_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with StopSignals() as signals:
        assert signals.received == 0
        for number in before:
            os.kill(os.getpid(), number)
            assert signals.received == number
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_interrupt_is_immediate_and_a_doubled_one_is_one(monkeypatch):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # passed on by a launcher
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(StopSignals, "SAME_INTERRUPT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_script_that_lets_it_pass_ends_with_the_code(number, code):
    stopped = Stopped(number, 7, "runs/a")
    assert stopped.code == code and isinstance(stopped, SystemExit)
    assert stopped.message.startswith(f"stopped by {number.name} after step 7, which is saved")
