"""`mpirun` by itself starts one training, equal to torchrun's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import run, torchrun
from safetensors.torch import load_file

TRAIN = [
    *"train dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --trainer.num_train_steps 4".split(),
    *"--trainer.save_results_every 0 --trainer.validate_every 0 --data.num_workers 0".split(),
]
# mpirun refuses root unless told, and more processes than cores
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "step_00000004" / "vae" / "weights.safetensors")


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("torchrun") / "run"
    torchrun(["-m", "vqdist", *TRAIN, "--out", str(out)])
    return weights(out)


@pytest.mark.parametrize("backend", ["auto", "deepspeed"])
def test_mpirun_trains_one_model_on_two_ranks(backend, by_torchrun, tmp_path):
    run([*MPIRUN, "python", "-m", "vqdist", *TRAIN, "--out", str(tmp_path / "run"), "--backend", backend])
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["backend"] == ("accelerate" if backend == "auto" else backend)
    ours = weights(tmp_path / "run")
    assert ours.keys() == by_torchrun.keys()
    tolerance = 0.0 if backend == "auto" else 1e-6
    assert max(float((ours[name] - by_torchrun[name]).abs().max()) for name in ours) <= tolerance


def test_mpirun_without_a_backend_of_several_processes_is_refused(tmp_path):
    ended = run(
        [*MPIRUN, "python", "-m", "vqdist", *TRAIN, "--out", str(tmp_path / "run"), "--backend", "local"], check=False
    )
    assert ended.returncode != 0 and "would train 2 separate models" in ended.stderr
    assert not (tmp_path / "run").exists()
