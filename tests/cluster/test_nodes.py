"""Two nodes joined by a cable: each launcher trains one model on both, and a fault ends the run in time, by name."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import BROKEN, ROOT, last_step, run, vqdist
from PIL import Image
from safetensors.torch import load_file

from cluster.nodes import Nodes, finish

BATCH, STEPS = 4, 4
TRAIN = [
    *"dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8 --emb_dim 8".split(),
    *"--num_resnet_blocks 0 --trainer.log_every 1 --trainer.save_results_every 0 --trainer.validate_every 0".split(),
    *"--data.num_workers 0".split(),
]
PORT = 29_517  # of namespaces that nobody else is in


def options(out: Path, *more: str, batch: int = BATCH, steps: int = STEPS) -> list[str]:
    sizes = ["--batch_size", str(batch), "--trainer.num_train_steps", str(steps)]
    return [*TRAIN, "--out", str(out), *sizes, *more]


def weights(out: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{steps:08d}" / "vae" / "weights.safetensors")


def manifest(out: Path, steps: int = STEPS) -> dict:
    return json.loads((out / "checkpoints" / f"step_{steps:08d}" / "manifest.json").read_text())


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= tolerance


@pytest.fixture
def nodes(tmp_path):
    with Nodes(tmp_path) as up:
        yield up


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Return the weights that one process trains of the same images."""
    out = tmp_path_factory.mktemp("reference") / "run"
    vqdist("train", *options(out, batch=2 * BATCH))
    return weights(out)


def command_of(launcher: str, rank: int, out: Path) -> list[str]:
    if launcher == "accelerate":
        layout = "--num_machines 2 --num_processes 2 --main_process_ip a --num_cpu_threads_per_process 1".split()
        place = ["--machine_rank", str(rank), "--main_process_port", str(PORT)]
        file = ["--config_file", "accelerate_configs/multi_node.yaml"]
        return ["accelerate", "launch", *file, *layout, *place, "-m", "vqdist", "train", *options(out)]
    if launcher == "torchrun":
        layout = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"a:{PORT}"]
        return ["torchrun", *layout, "-m", "vqdist", "train", *options(out)]
    hosts = out.with_name("hostfile")
    hosts.write_text("a slots=1\nb slots=1\n")
    place = ["--no_ssh", "--node_rank", str(rank), "--master_addr", "a", "--master_port", str(PORT)]
    return ["deepspeed", "--hostfile", str(hosts), *place, "launch/train.py", *options(out, "--backend", "deepspeed")]


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun", "deepspeed"])
def test_a_launcher_trains_one_model_on_two_nodes(launcher, nodes, reference, tmp_path):
    out = tmp_path / "run"
    started = [nodes.start(node, command_of(launcher, rank, out)) for rank, node in enumerate("ab")]
    for process in started:
        printed, _ = finish(process)
        assert process.returncode == 0, printed[-4000:]
    assert manifest(out)["world_size"] == 2
    assert_equal(weights(out), reference, 1e-6)


def fault(nodes: Nodes, out: Path, *more: str) -> dict:
    """Return a training on two nodes that has made its first checkpoint."""
    more = (*more, "--trainer.save_model_every", "5")
    ranks = nodes.ranks(["train", *options(out, *more, steps=100_000)], PORT)
    deadline = time.monotonic() + 200
    while last_step(out) < 12:
        printed = "\n".join(process.log.read_text() for process in ranks.values())
        assert all(process.poll() is None for process in ranks.values()) and time.monotonic() < deadline, printed
        time.sleep(0.05)
    return ranks


def assert_left(process, gone: str, *reasons: str, limit: float) -> None:
    printed, seconds = finish(process, timeout=120)
    *_, line = printed.strip().splitlines()
    assert line.startswith(f"vqdist: error: lost {gone} after step "), printed[-4000:]
    assert any(reason in line for reason in reasons), line
    assert "the last complete checkpoint is " in line and "Traceback" not in printed
    assert process.returncode == 69
    assert seconds < limit
    print(f"left after {seconds:.1f} s: {line}")


def goes_on(nodes: Nodes, out: Path) -> None:
    """Nothing that is half a checkpoint counts, and the run ends as one process without any fault would end it."""
    newest = max(int(path.name.removeprefix("step_")) for path in out.glob("checkpoints/step_*[0-9]"))
    assert manifest(out, newest)["world_size"] == 2
    end = newest + 3
    ranks = nodes.ranks(["train", *options(out, "--trainer.save_model_every", "5", steps=end)], PORT + 1)
    printed = {node: finish(process)[0] for node, process in ranks.items()}
    assert [process.returncode for process in ranks.values()] == [0, 0], printed
    assert f"step_{newest:08d}: step {newest} of {end}" in printed["a"]
    assert not list(out.rglob("*.partial"))
    vqdist("train", *options(out.with_name("alone"), batch=2 * BATCH, steps=end))
    assert_equal(weights(out, end), weights(out.with_name("alone"), end), 1e-4)


def test_a_killed_node_is_named_and_the_run_goes_on(nodes, tmp_path):
    ranks = fault(nodes, tmp_path / "run")
    nodes.kill("b")
    assert_left(ranks["a"], "rank 1 (host b)", *BROKEN, limit=100)
    goes_on(nodes, tmp_path / "run")


def test_a_killed_first_node_is_named(nodes, tmp_path):
    ranks = fault(nodes, tmp_path / "run")
    nodes.kill("a")
    assert_left(ranks["b"], "rank 0 (host a)", "and the ranks met there", limit=100)


def test_a_cut_cable_is_named_on_both_sides_and_the_run_goes_on(nodes, tmp_path):
    ranks = fault(nodes, tmp_path / "run", "--dist_timeout", "0.2")
    nodes.cut()
    assert_left(ranks["a"], "rank 1 (host b)", "no answer within 0.2 minutes (dist_timeout)", limit=100)
    assert_left(ranks["b"], "rank 0 (host a)", "no answer within 0.2 minutes (dist_timeout)", limit=100)
    nodes.mend()
    goes_on(nodes, tmp_path / "run")


def refusal(nodes: Nodes, arguments: list[str], covered: dict[Path, Path]) -> str:
    """Return the line with which rank 0 ends if node b sees other folders."""
    variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": str(PORT)}
    command = ["vqdist", "train", *arguments]
    first = nodes.start("a", command, RANK="0", **variables)
    second = nodes.start("b", command, RANK="1", covered=covered, **variables)
    printed = finish(first)[0]
    finish(second)
    assert (first.returncode, second.returncode) == (2, 2) and "Traceback" not in printed
    return printed.strip().splitlines()[-1]


def test_a_run_folder_that_is_not_shared_is_refused(nodes, tmp_path):
    runs, own = tmp_path / "runs", tmp_path / "disk_of_b"
    runs.mkdir()
    own.mkdir()
    line = refusal(nodes, options(runs / "run"), {runs: own})
    assert f"the run folder {runs / 'run'} of rank 0 (host a) is not seen by rank 1 (host b)" in line
    assert "shared file system" in line


def test_images_that_differ_between_nodes_are_refused(nodes, tmp_path):
    for name, count in {"images": 40, "others": 41}.items():
        (tmp_path / name).mkdir()
        for index in range(count):
            pixels = np.full((16, 16, 3), index, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    images = tmp_path / "images"
    line = refusal(nodes, [*options(tmp_path / "run"), "--data", str(images)], {images: tmp_path / "others"})
    assert f"the images of {images} on rank 1 (host b) are others than on rank 0 (host a)" in line


def test_hosts_that_meet_but_cannot_exchange_are_told_in_seconds(nodes, tmp_path):
    """The ranks meet, but offer their loopback interfaces for the exchange, as where a host's name means 127.0.0.1."""
    variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": str(PORT)}
    variables["GLOO_SOCKET_IFNAME"] = "lo"
    command = ["vqdist", "train", *options(tmp_path / "run", "--dist_timeout", "0.5")]
    first = nodes.start("a", command, RANK="0", **variables)
    nodes.start("b", command, RANK="1", **variables)
    printed, seconds = finish(first, timeout=150)
    assert first.returncode == 2 and "Traceback" not in printed
    line = printed.strip().splitlines()[-1]
    assert "rank 0 (host a) met rank 1 (host b) but cannot exchange data: " in line
    assert "set GLOO_SOCKET_IFNAME" in line and "firewall" in line
    assert seconds < 90


def test_a_host_without_the_tools_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="two nodes need root and iproute2"):
        Nodes(tmp_path).__enter__()


def test_nothing_of_the_nodes_is_left(tmp_path):
    with Nodes(tmp_path) as up:
        name = up.namespace("a")
        assert name in run(["ip", "netns", "list"], cwd=ROOT).stdout
    assert name not in run(["ip", "netns", "list"], cwd=ROOT).stdout
    assert not (Path("/etc/netns") / name).exists()
