"""The scripts of launch/slurm on a real Slurm of two nodes: two ranks train one model, and no signal loses a step."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, run
from PIL import Image
from safetensors.torch import load_file
from scenarios import build_vq_ar

from cluster.slurm import ENDED, SCRIPTS, Slurm, until
from vqdist.checkpoint import verify
from vqdist.cli import main

STEPS = 1500
TRAIN = [
    *"dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --trainer.log_every 10 --trainer.save_model_every 0".split(),
    *"--trainer.save_results_every 0 --trainer.validate_every 0 --data.num_workers 0".split(),
]
TWO_NODES = ("--nodes", "2")


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, tmp_path_factory) -> tuple[str, Path]:
    """Return a training that is left alone: its job, which has been submitted, and its run folder."""
    out = tmp_path_factory.mktemp("undisturbed")
    return submit(slurm, "train_accelerate", out), out


@pytest.fixture(scope="module")
def beside_it(slurm: Slurm, undisturbed, tmp_path_factory) -> tuple[str, Path]:
    """Return the same with DeepSpeed, on the same nodes at the same time, in fewer steps."""
    out = tmp_path_factory.mktemp("deepspeed")
    return submit(slurm, "train_deepspeed", out, "--trainer.num_train_steps", "20"), out


def submit(slurm: Slurm, script: str, out: Path, *arguments: str) -> str:
    steps = ("--trainer.num_train_steps", str(STEPS))
    return slurm.sbatch(script, *TRAIN, *steps, *arguments, "--out", out, options=TWO_NODES)


def newest(out: Path) -> tuple[Path, dict]:
    """Return the newest checkpoint of a run, and its manifest; all that are there are whole."""
    paths = sorted((out / "checkpoints").iterdir())
    return paths[-1], [verify(path) for path in paths][-1]


def trained(out: Path) -> int:
    """Return the number of log lines of a run so far."""
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def stops(slurm: Slurm, job: str, start: int) -> list[dict]:
    """Return the records that the ranks of a job's start left when they were stopped, by rank."""
    folder = slurm.folder / "logs" / job / f"start_{start}"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("stopped_rank_*.json"))]


def wait_for_steps(slurm: Slurm, job: str, out: Path, before: int) -> None:
    """Until a job has trained for some steps more than so many log lines tell."""

    def has_trained() -> bool:
        shown = slurm.show(job)
        assert shown["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), f"{shown}\n{slurm.log(job)[-4000:]}"
        return trained(out) > before + 2

    until(has_trained, f"steps of job {job}", timeout=300)


# --------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.stem)
def test_a_script_asks_for_time_to_save_and_names_no_site(script):
    lines = script.read_text().splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= asked
    assert not [line for line in asked if re.match("--(time|partition|account|qos|constraint|nodelist)", line)]
    assert lines[2].startswith("#") and any(f"launch/slurm/{script.name}" in line for line in lines[:6])


def test_the_environment_sets_only_what_is_not_set():
    def values(**given: str) -> dict[str, str]:
        said = run(["bash", "-uc", ". launch/env.sh; env"], **{"OMP_NUM_THREADS": "", **given}).stdout
        return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

    alone = values(SLURM_CPUS_ON_NODE="12", VQDIST_PROCESSES="4")
    assert alone["OMP_NUM_THREADS"] == "3" and alone["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "100"
    assert "GLOO_SOCKET_IFNAME" not in alone and "NCCL_SOCKET_IFNAME" not in alone
    with_peer = values(VQDIST_PEER="127.0.0.1")
    assert with_peer["GLOO_SOCKET_IFNAME"] == with_peer["NCCL_SOCKET_IFNAME"] == "lo"
    given = {
        "GLOO_SOCKET_IFNAME": "a",
        "NCCL_SOCKET_IFNAME": "b",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "2",
        "PYTHONUNBUFFERED": "x",
    }
    assert given.items() <= values(VQDIST_PEER="127.0.0.1", **given).items()


# --------------------------------------------------------------------------------------------- training


def test_two_nodes_train_one_model_and_two_jobs_do_not_meet(slurm, undisturbed, beside_it):
    ports = set()
    for (job, out), backend in ((undisturbed, "accelerate"), (beside_it, "deepspeed")):
        shown = slurm.wait(job)
        assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log(job)[-4000:]
        _, manifest = newest(out)
        assert (manifest["world_size"], manifest["backend"]) == (2, backend)
        assert shown["NodeList"] == "n[1-2]" and "2 nodes x 1 processes" in slurm.log(job)
        ports |= set(re.findall(r"rendezvous \S+:(\d+)", slurm.log(job)))
        logs = slurm.folder / "logs" / job / "start_0"
        assert all(list((logs / f"node_{node}").glob("*/attempt_0/0/stderr.log")) for node in (0, 1))
    assert len(ports) == 2
    settings = json.loads((beside_it[1] / "config.json").read_text())
    assert settings["trainer"]["deepspeed_config"].endswith("deepspeed_configs/zero2.json")


@pytest.mark.timeout(900)  # five starts one after the other
def test_a_job_that_is_preempted_requeued_and_killed_ends_where_an_undisturbed_one_ends(slurm, undisturbed, tmp_path):
    job = submit(slurm, "train_accelerate", tmp_path)
    wait_for_steps(slurm, job, tmp_path, 0)

    asked = time.time()
    slurm.do("scancel", "--batch", "--signal=USR1", job)
    slurm.requeued(job, restarts=1)
    path, manifest = newest(tmp_path)
    stop = {"signal": "SIGUSR1", "exit_code": 75, "saved": True, "step": manifest["step"], "run": str(tmp_path)}
    assert stops(slurm, job, start=0) == [{**stop, "rank": rank} for rank in (0, 1)]
    assert (path / "manifest.json").stat().st_mtime - asked < 100

    lines = trained(tmp_path)
    wait_for_steps(slurm, job, tmp_path, lines)
    slurm.do("scontrol", "requeue", job)
    slurm.requeued(job, restarts=2)
    assert f"resumed {path}: step {manifest['step']}" in slurm.log(job)
    path, manifest = newest(tmp_path)
    for record in stops(slurm, job, start=1):
        assert record.pop("signal") in ("SIGTERM", "SIGUSR1")
        assert (record["saved"], record["step"]) == (True, manifest["step"])

    lines = trained(tmp_path)
    wait_for_steps(slurm, job, tmp_path, lines)
    os.kill(slurm.ranks(job)[1], signal.SIGKILL)
    shown = slurm.wait(job, timeout=300)
    assert shown["JobState"] == "FAILED" and shown["ExitCode"] != "0:0"
    assert "lost rank 1 (host" in slurm.log(job)
    assert newest(tmp_path) == (path, manifest)

    slurm.do("scontrol", "requeue", job)  # by hand: what failed is not started again by itself
    slurm.requeued(job, restarts=3)
    assert slurm.wait(job)["JobState"] == "COMPLETED", slurm.log(job)[-4000:]
    slurm.wait(undisturbed[0])
    for file in ("vae/weights", "vae/optimizer", "ema"):
        ours, theirs = (
            load_file(out / "checkpoints" / f"step_{STEPS:08d}" / f"{file}.safetensors")
            for out in (tmp_path, undisturbed[1])
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_job_that_is_told_to_go_while_it_starts_goes_back_into_the_queue(slurm, tmp_path):
    job = submit(slurm, "train_accelerate", tmp_path)
    until(lambda: "start 0" in slurm.log(job), "the start")
    slurm.do("scancel", "--batch", "--signal=TERM", job)

    def restarted() -> bool:
        shown = slurm.show(job)
        assert shown["JobState"] not in ENDED, f"{shown}\n{slurm.log(job)[-4000:]}"
        return shown["Restarts"] == "1"

    until(restarted, "the job to be requeued")
    slurm.do("scancel", job)
    assert "back into the queue" in slurm.log(job)
    if (tmp_path / "checkpoints").exists():  # the signal is sent again and again, and met it training
        newest(tmp_path)


def test_make_submits_a_training(slurm, tmp_path):
    """`make slurm-submit`, on two nodes with ZeRO 2."""
    sizes = "--image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8 --batch_size 4 --trainer.num_train_steps 4"
    variables = {
        "MODEL": "dvae",
        "DATA": "synthetic:64",
        "OUT": tmp_path / "run",
        "NODES": 2,
        "NPROC": 1,
        "BACKEND": "deepspeed",
        "ZERO": 2,
        "SBATCH": f"--parsable --output {slurm.folder}/%A_%a.log",
        "ARGS": f"{sizes} --data.num_workers 0 --trainer.validate_every 0",
    }
    logs = {"VQDIST_LOGS": str(slurm.folder / "logs")}
    words = [f"{name}={value}" for name, value in variables.items()]
    nothing_of_a_surrounding_make = {"MAKEFLAGS": "", "MFLAGS": "", "MAKELEVEL": ""}
    job = slurm.do("make", "--silent", "slurm-submit", *words, **nothing_of_a_surrounding_make, **logs)
    assert slurm.wait(job)["JobState"] == "COMPLETED", slurm.log(job)[-4000:]
    _, manifest = newest(tmp_path / "run")
    assert (manifest["world_size"], manifest["backend"], manifest["step"]) == (2, "deepspeed", 4)


def test_a_wrong_option_fails_the_job_and_is_named_in_its_log(slurm, tmp_path):
    wrong = {
        slurm.sbatch(
            "train_accelerate", *TRAIN, "--out", tmp_path, "--trainer.num_train_stepz", "4"
        ): "num_train_step",
        slurm.sbatch("train_accelerate"): "no model",
        slurm.sbatch("train_deepspeed", *TRAIN, "--out", tmp_path, ZERO="7"): "zero7.json; ZERO is",
        slurm.sbatch("array_encode", "runs/a", "sets.txt"): "no array",
        slurm.sbatch("sample"): "no run",
        slurm.sbatch("sample", "runs/a", VQDIST_LOGS="/dev/null/logs"): "set VQDIST_LOGS",
        slurm.sbatch("sample", "runs/a", VQDIST_ROOT="/nowhere"): "export VQDIST_ROOT",
    }
    for job, words in wrong.items():
        shown = slurm.wait(job)
        assert shown["JobState"] == "FAILED" and shown["ExitCode"] != "0:0"
        assert words in slurm.log(job)


def test_srun_without_a_launcher_starts_one_group(slurm, tmp_path):
    """Its tasks are the ranks, of one model, not of two."""
    command = ["srun", "--nodes", "2", "--ntasks", "2", sys.executable, "-m", "vqdist", "train", *TRAIN]
    run([*command, "--trainer.num_train_steps", "4", "--out", str(tmp_path)], timeout=300, **slurm.variables)
    _, manifest = newest(tmp_path)
    assert (manifest["world_size"], manifest["step"], manifest["position"]) == (2, 4, 4 * 2 * 4)


# --------------------------------------------------------------------------------------------- codes and samples


def test_an_array_encodes_a_set_each_and_goes_on_after_preemption(slurm, tmp_path):
    build_vq_ar().save_pretrained(tmp_path / "model")
    lines = [f"synthetic:{count} {tmp_path}/codes_{count}" for count in (24, 40)]
    (tmp_path / "sets.txt").write_text("\n".join([*lines, "synthetic:8"]))
    arguments = (tmp_path / "model", tmp_path / "sets.txt", "--shard_size", 16)
    job = slurm.sbatch("array_encode", *arguments, options=("--array", "1-3"), VQDIST_PROCESSES="2")
    first, second, third = (f"{job}_{index}" for index in (1, 2, 3))
    until(lambda: "start 0" in slurm.log(first), "the start of the first task")
    slurm.do("scancel", "--batch", "--signal=USR1", first)
    slurm.requeued(first)
    assert slurm.wait(third)["JobState"] == "FAILED" and "line 3" in slurm.log(third)
    assert [slurm.wait(task)["JobState"] for task in (first, second)] == ["COMPLETED"] * 2, slurm.log(first)[-4000:]
    assert "1 nodes x 2 processes" in slurm.log(first) and "start 1" in slurm.log(first)
    for count in (24, 40):
        here = tmp_path / f"here_{count}"
        options = ("--data", f"synthetic:{count}", "--out", str(here), "--shard_size", "16")
        assert main(["encode", str(tmp_path / "model"), *options]) == 0
        ours, theirs = (
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (tmp_path / f"codes_{count}", here)
        )
        assert ours == theirs


def test_samples_are_those_of_one_process_and_too_little_time_is_said(slurm, tmp_path):
    build_vq_ar().save_pretrained(tmp_path / "model")
    options = ("--num_images", "6", "--batch_size", "2", "--seed", "3", "--out")
    sheets = [tmp_path / name for name in ("job.png", "ended.png", "here.png")]
    jobs = [slurm.sbatch("sample", tmp_path / "model", *options, sheet, options=TWO_NODES) for sheet in sheets[:2]]
    until(lambda: "start 0" in slurm.log(jobs[1]), "the start")
    slurm.do("scancel", "--batch", "--signal=USR1", jobs[1])
    assert main(["sample", str(tmp_path / "model"), *options, str(sheets[2])]) == 0
    states = [slurm.wait(job)["JobState"] for job in jobs]
    assert states == ["COMPLETED", "FAILED"], slurm.log(jobs[0])[-4000:]
    assert "more --time" in slurm.log(jobs[1]) and not sheets[1].exists()
    assert np.array_equal(*(np.asarray(Image.open(sheets[index])) for index in (0, 2)))


def test_the_installer_finds_all_there():
    assert run(["bash", str(ROOT / "tests" / "cluster" / "install.sh")]).stdout == ""
