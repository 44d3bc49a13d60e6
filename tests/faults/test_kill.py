"""kill -9 while training and while saving: the same command goes on, and ends where an undisturbed run ends."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, last_step, run, torchrun, vqdist
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

TRAIN = [
    *"train vqgan --data synthetic:64 --image_size 16 --data.num_workers 0 --model.dim 16 --model.layers 2".split(),
    *"--model.discr_layers 2 --model.perceptual none --model.quantizer vq --model.codebook_size 16".split(),
    *("--model.vq_kwargs", '{"codebook_dim": 8, "threshold_ema_dead_code": 2}'),
    *"--trainer.batch_size 4 --trainer.num_train_steps 12 --trainer.save_model_every 4 --trainer.log_every 1".split(),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Return a run that nobody killed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    vqdist(*TRAIN, "--out", str(out))
    return out


def assert_same_end(out: Path, undisturbed: Path) -> None:
    """Weights, optimizers and average equal to the bit, every step logged once, nothing partial left."""
    for file in (
        "generator/weights",
        "generator/optimizer",
        "discriminator/weights",
        "discriminator/optimizer",
        "ema",
    ):
        path = Path("checkpoints", "step_00000012", f"{file}.safetensors")
        ours, theirs = load_file(out / path), load_file(undisturbed / path)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "recon_loss" in line] == list(range(1, 13))
    assert [path.name for path in out.rglob("*.partial")] == []


def test_killed_while_saving(tmp_path, undisturbed):
    out = tmp_path / "run"
    worker = str(ROOT / "tests" / "workers" / "killed_while_saving.py")
    killed = run([sys.executable, worker, *TRAIN, "--out", str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008.partial"]
    again = vqdist(*TRAIN, "--out", str(out))
    assert "step_00000004: step 4 of 12" in again.stderr
    assert_same_end(out, undisturbed)


def test_killed_while_training(tmp_path, undisturbed):
    out = tmp_path / "run"
    worker = str(ROOT / "tests" / "workers" / "killed_while_training.py")
    killed = run([sys.executable, worker, *TRAIN, "--out", str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_00000004"]
    assert last_step(out) == 6
    again = vqdist(*TRAIN, "--out", str(out))
    assert "resumed" in again.stderr
    assert_same_end(out, undisturbed)


def test_two_ranks_killed_while_saving(tmp_path):
    worker = str(ROOT / "tests" / "workers" / "killed_while_saving.py")
    out = tmp_path / "run"
    killed = torchrun([worker, *TRAIN, "--out", str(out)], check=False)
    assert killed.returncode != 0
    assert (out / "checkpoints" / "step_00000004").is_dir()
    assert not (out / "checkpoints" / "step_00000008").exists()
    again = torchrun(["-m", "vqdist", *TRAIN, "--out", str(out)])
    assert "step_00000004: step 4 of 12" in again.stderr
    assert "12 steps on accelerate, 96 images" in again.stdout
    assert [path.name for path in out.rglob("*.partial")] == []


# --------------------------------------------------------------------------------------- the best checkpoint

KEEPING_BEST = str(ROOT / "tests" / "workers" / "killed_keeping_best.py")
MOMENTS = 18


def complete(out: Path) -> dict[int, dict]:
    """Return the manifests of complete checkpoints by step."""
    found = (path / "manifest.json" for path in (out / "checkpoints").glob("step_*") if not path.suffix)
    return {int(path.parent.name[5:]): json.loads(path.read_text()) for path in found if path.is_file()}


@pytest.fixture(scope="module")
def kept_undisturbed(tmp_path_factory) -> tuple[Path, int]:
    """Return a run that keeps its best checkpoint and that nobody killed, and how often it changed files."""
    out = tmp_path_factory.mktemp("kept") / "run"
    printed = run([sys.executable, KEEPING_BEST, "0", str(out)]).stdout
    assert sorted(complete(out)) == [4, 7]
    return out, int(printed.rpartition("changes: ")[2])


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_the_best_checkpoint_is_kept_through_a_kill(tmp_path, kept_undisturbed, moment):
    """Whenever it comes: the best step that the newest checkpoint knows has a checkpoint, and the end is the same."""
    whole, changes = kept_undisturbed
    out, victim = tmp_path / "run", 1 + moment * (changes - 1) // (MOMENTS - 1)
    killed = run([sys.executable, KEEPING_BEST, str(victim), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    found = complete(out)
    if found:
        assert found[max(found)]["best"]["step"] in found
    run([sys.executable, KEEPING_BEST, "0", str(out)])
    assert sorted(complete(out)) == [4, 7]
    for file in ("export_best/model", "export/model", "checkpoints/step_00000004/generator/weights"):
        ours, theirs = (load_file(folder / f"{file}.safetensors") for folder in (out, whole))
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert (out / "best.json").read_text() == (whole / "best.json").read_text()
    assert [path.name for path in out.rglob("*.partial")] == []
