"""The Makefile's targets of daily work, called as a person calls them: what they start, and what they refuse."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml
from launching import ROOT, run
from warm import programs

from vqdist.data.codes import CodeDataset

SMALL = " ".join(
    [
        "--data.num_workers 0 --trainer.batch_size 4 --trainer.num_train_steps 2",
        "--trainer.save_results_every 0 --trainer.validate_every 0",
    ]
)


# what `make test ARGS=-x` hands down to a make in a test
FROM_OUTSIDE = (
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "ARGS",
    "TESTS",
    "NPROC",
    "BACKEND",
    "ZERO",
    "CONFIG",
    "DATA",
    "OUT",
)


def make(*arguments: str, check: bool = True, **extra: str):
    """Run make with programs that are taken as installed, and nothing of a surrounding make."""
    handed_down = {name: "" for name in FROM_OUTSIDE if name in os.environ}
    command = ["make", f"VENV={programs().parent}", "--old-file=install", *arguments]
    return run(command, timeout=300, check=check, CUDA_VISIBLE_DEVICES="", **handed_down, **extra)


def manifest(run_folder: Path) -> dict:
    return json.loads((run_folder / "checkpoints" / "step_00000002" / "manifest.json").read_text())


@pytest.mark.distributed
@pytest.mark.timeout(1200)  # for a busy machine
def test_from_images_to_samples(tmp_path):
    """Five targets, each over what the one before left: on one process and two, by DDP and by ZeRO 2."""
    images, codes, sheet = tmp_path / "two words" / "dvae", tmp_path / "codes", tmp_path / "samples.png"
    recipe = tmp_path / "recipe.yaml"
    model = {"num_tokens": 16, "num_layers": 2, "hidden_dim": 8, "codebook_dim": 8, "num_resnet_blocks": 0}
    recipe.write_text(yaml.safe_dump({"data": {"folder": "synthetic:64", "image_size": 16}, "model": model}))
    make("train-dvae", f"CONFIG={recipe}", f"OUT={images}", "NPROC=2", "BACKEND=deepspeed", "ZERO=2", f"ARGS={SMALL}")
    assert (manifest(images)["world_size"], manifest(images)["backend"]) == (2, "deepspeed")
    configured = json.loads((images / "config.json").read_text())["trainer"]
    assert configured["deepspeed_config"] == "deepspeed_configs/zero2.json"
    make("encode", f"RUN={images}", "DATA=synthetic:64", f"OUT={codes}", "ARGS=--num_workers 0")
    assert len(CodeDataset(codes)) == 64
    prior = "--model.dim 32 --model.depth 1 --model.heads 1 --model.dim_head 32"
    make(
        *("train-ar", "MODEL=prior", f"TOKENIZER={images}", f"DATA=codes:{codes}", f"OUT={tmp_path / 'prior'}"),
        f"ARGS={SMALL} {prior}",
    )
    assert (manifest(tmp_path / "prior")["world_size"], manifest(tmp_path / "prior")["backend"]) == (1, "local")
    make("sample", f"RUN={tmp_path / 'prior'}", f"OUT={sheet}", "NUM=4", "NPROC=2", "BACKEND=accelerate")
    assert sheet.read_bytes().startswith(b"\x89PNG")
    vqgan = "--image_size 16 --model.dim 16 --model.layers 1 --model.use_vgg_and_gan false --model.codebook_size 16"
    make("train-vqgan", "DATA=synthetic:64", f"OUT={tmp_path / 'vqgan'}", "BACKEND=local", f"ARGS={SMALL} {vqgan}")
    assert manifest(tmp_path / "vqgan")["backend"] == "local"


def started(*arguments: str) -> list[str]:
    """Return the words of the one command that a target would run."""
    (line,) = make("--dry-run", *arguments).stdout.splitlines()
    return shlex.split(line)


TRAIN = ["--config", "r.yaml", "--out", "a"]
OF_TARGETS = [
    (["train-vqgan"], ["vqdist", "train", "vqgan", *TRAIN]),
    (["train-dvae", "NPROC=1", "ARGS=--seed 3"], ["vqdist", "train", "dvae", *TRAIN, "--seed", "3"]),
    (
        ["train-ar", "MODEL=vq_ar", "NPROC=8"],
        ["torchrun", "--standalone", "--nproc_per_node", "8", "-m", "vqdist", "train", "vq_ar", *TRAIN],
    ),
    (
        ["train-ar", "MODEL=prior", "BACKEND=fsdp2", "NPROC=8"],
        [
            *("accelerate", "launch", "--config_file", "accelerate_configs/fsdp2.yaml", "--num_processes", "8"),
            *("-m", "vqdist", "train", "prior", *TRAIN, "--backend", "accelerate"),
        ],
    ),
]


@pytest.mark.parametrize("arguments, command", OF_TARGETS, ids=[" ".join(arguments) for arguments, _ in OF_TARGETS])
def test_the_launcher_follows_from_processes_and_backend(arguments, command):
    program, *words = started(*arguments, "CONFIG=r.yaml", "OUT=a")
    assert [Path(program).name, *words] == command


@pytest.mark.parametrize("stage", ["1", "2", "2_offload", "3"])
def test_zero_names_a_file(stage):
    words = started("train-dvae", "CONFIG=r.yaml", "OUT=a", "BACKEND=deepspeed", f"ZERO={stage}")
    assert words[-4:-2] == ["--backend", "deepspeed"]
    assert words[-2] == "--deepspeed_config" and (ROOT / words[-1]).is_file()


REFUSED = [
    ("train-vqgan DATA=b", "OUT is missing: make train-vqgan DATA=images OUT=runs/a"),
    ("train-vqgan OUT=a", "DATA or CONFIG is missing: make train-vqgan DATA=images OUT=runs/a"),
    ("train-dvae CONFIG=c", "OUT is missing: make train-dvae"),
    ("train-ar DATA=b OUT=a", "MODEL is missing: make train-ar MODEL=prior TOKENIZER=runs/a"),
    ("train-ar DATA=b OUT=a MODEL=var", "TOKENIZER or CONFIG is missing: make train-ar"),
    ("train-ar DATA=b OUT=a MODEL=vqgan", "MODEL=vqgan is not known to train-ar; it is one of: prior var vq_ar"),
    ("train-vqgan DATA=b OUT=a ZERO=2", "ZERO=2 belongs to BACKEND=deepspeed"),
    ("train-vqgan DATA=b OUT=a BACKEND=deepspeed ZERO=9", "ZERO=9 is not known to train-vqgan; it is one of: 1 2"),
    ("train-vqgan DATA=b OUT=a BACKEND=horovod", "BACKEND=horovod is not known to train-vqgan; it is one of: auto"),
    ("train-vqgan DATA=b OUT=a TOKENIZER=t", "train-vqgan takes no TOKENIZER"),
    ("encode DATA=b OUT=a", "RUN is missing: make encode RUN=runs/a DATA=images OUT=codes"),
    ("train-dvae OUT=a DATA=b NPROC=0", "NPROC=0 is no whole number from 1 on"),
    ("train-dvae OUT=a DATA=b NPROC=two", "NPROC=two is no whole number from 1 on"),
    ("train-dvae OUT=a DATA=b NPROCS=2", "NPROCS is no variable of this Makefile; there are: "),
    ("encode RUN=r OUT=a", "DATA is missing"),
    ("encode RUN=r DATA=b OUT=a ZERO=2", "encode takes no ZERO"),
    ("encode RUN=r DATA=b OUT=a BACKEND=fsdp2", "BACKEND=fsdp2 is for the targets train-*"),
    ("sample RUN=r", "OUT is missing: make sample RUN=runs/c OUT=samples.png"),
    ("sample RUN=r OUT=a DATA=b", "sample takes no DATA"),
    ("slurm-submit MODEL=vqgan CONFIG=c OUT=a", "NODES is missing: make slurm-submit NODES=2 MODEL=vqgan"),
    ("slurm-submit NODES=2 CONFIG=c OUT=a", "MODEL is missing"),
    ("slurm-submit NODES=2 MODEL=prior DATA=b OUT=a", "TOKENIZER or CONFIG is missing"),
    (
        "slurm-submit NODES=2 MODEL=vqgan CONFIG=c OUT=a BACKEND=local",
        "BACKEND=local is not known to slurm-submit; it is one of",
    ),
    ("slurm-submit NODES=2 SCRIPT=s", "ARGS is missing"),
    ("slurm-submit NODES=2 SCRIPT=s ARGS=x OUT=a", "slurm-submit takes no OUT"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_what_is_missing_or_not_taken_is_one_line(arguments, message):
    done = make(*arguments.split(), check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Makefile:") and f"*** {message}" in line


@pytest.fixture
def sbatch(tmp_path) -> Path:
    """Return a folder with an `sbatch` that says what it was given: the real one submits in tests/cluster/."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "processes=$VQDIST_PROCESSES zero=$ZERO"\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return program.parent


def submitted(sbatch: Path, *arguments: str) -> list[str]:
    path = os.pathsep.join([str(sbatch), os.environ["PATH"]])
    return make("--silent", "slurm-submit", *arguments, PATH=path).stdout.splitlines()


def test_a_training_is_submitted(sbatch):
    arguments = ["NODES=2", "MODEL=vqgan", "CONFIG=r.yaml", "OUT=runs/two words"]
    said, *words = submitted(sbatch, *arguments, "SBATCH=--partition gpu --time 1-0", "ARGS=--seed 3")
    assert said == "processes= zero="
    assert words == [
        *("--nodes", "2", "--partition", "gpu", "--time", "1-0", "launch/slurm/train_accelerate.sbatch"),
        *("vqgan", "--config", "r.yaml", "--out", "runs/two words", "--seed", "3"),
    ]
    said, *words = submitted(sbatch, *arguments, "NPROC=4", "BACKEND=deepspeed", "ZERO=1")
    assert said == "processes=4 zero=1"
    assert words[:4] == ["--nodes", "2", "launch/slurm/train_deepspeed.sbatch", "vqgan"]


def test_another_script_is_submitted_with_its_own_arguments(sbatch):
    said, *words = submitted(sbatch, "NODES=1", "SCRIPT=launch/slurm/sample.sbatch", "ARGS=runs/c --out s.png")
    assert words == ["--nodes", "1", "launch/slurm/sample.sbatch", "runs/c", "--out", "s.png"]


@pytest.mark.parametrize("name", ["train_accelerate", "train_deepspeed", "sample"])
def test_the_scripts_that_are_submitted_exist_and_read_the_variables(name):
    assert (ROOT / "launch" / "slurm" / f"{name}.sbatch").is_file()
    texts = "".join(path.read_text() for path in (ROOT / "launch" / "slurm").iterdir())
    assert "VQDIST_PROCESSES" in texts and "ZERO" in texts
