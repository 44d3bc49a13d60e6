"""Every shipped configuration, started by its real launcher: two processes train what one process trains.

The files for GPUs run here on the CPU with fewer processes, which is all that a machine without GPUs can show of them:
that Accelerate reads them, starts as many processes as it is told, and that these train one model.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launching import ROOT, free_port, run
from safetensors.torch import load_file

from vqdist.backends import create_backend, resolve_backend
from vqdist.cli import main
from vqdist.errors import UserError

ACCELERATE = ROOT / "accelerate_configs"
DEEPSPEED = ROOT / "deepspeed_configs"
# Of two nodes there is one here; all of it runs in tests/cluster/.
ONE_NODE = ["--num_machines", "1", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
# file of accelerate_configs/ -> flags that make it fit this machine, and the processes then
STARTED = {
    "cpu_1": ([], 1),
    "cpu_2": ([], 2),
    "gpu_1": ([], 1),
    "gpu_8": (["--num_processes", "2"], 2),
    "multi_node": (ONE_NODE, 2),
    "fsdp2": (["--num_processes", "2"], 2),
}
# where the others are run on two processes against one
STARTED_ELSEWHERE = {"zero1", "zero2", "zero3"}  # tests/contract/test_distributed.py

QUIET = [
    *"--data synthetic:64 --image_size 16 --data.num_workers 0 --trainer.num_train_steps 4".split(),
    *"--trainer.grad_accum_every 2 --trainer.save_model_every 2 --trainer.save_results_every 0".split(),
    *"--trainer.validate_every 0 --trainer.max_grad_norm 0.1 --trainer.log_every 1".split(),
]
DVAE = [
    *"dvae --num_tokens 16 --num_layers 2 --hidden_dim 8 --emb_dim 8 --num_resnet_blocks 0".split(),
    *QUIET,
]
# two networks, the discriminator's from the first step; no rounding noise that Adam would make into steps
VQGAN = [
    *"vqgan --model.dim 16 --model.layers 2 --model.discr_layers 2 --model.encdec_resnet_groups 4".split(),
    *"--model.use_hinge_loss false --model.quantizer lfq --model.codebook_size 32 --model.perceptual none".split(),
    *"--trainer.lr 1e-4 --trainer.discr_lr 5e-5 --trainer.discr_max_grad_norm 0.1".split(),
    *QUIET,
]


def batch_of(processes: int) -> list[str]:
    """Return the options of the same 16 images a step, in two micro-batches."""
    return ["--trainer.batch_size", str(8 // processes)]


def states(out: Path, step: int = 4) -> dict[str, torch.Tensor]:
    """Weights, optimizers and average of a checkpoint."""
    folder = out / "checkpoints" / f"step_{step:08d}"
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) >= 3
    return {
        f"{file.relative_to(folder)}:{name}": value for file in files for name, value in load_file(str(file)).items()
    }


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = float((ours[name].double() - value.double()).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def manifest(out: Path) -> dict:
    return json.loads((out / "checkpoints" / "step_00000004" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return the states that a training in this process ends with, by the training's arguments."""
    known = {}

    def train(arguments: list[str]) -> dict[str, torch.Tensor]:
        key = tuple(arguments)
        if key not in known:
            out = tmp_path_factory.mktemp("one_process")
            assert main(["train", *arguments, *batch_of(1), "--out", str(out), "--backend", "local"]) == 0
            known[key] = states(out)
        return known[key]

    return train


# --------------------------------------------------------------------------------------------- accelerate_configs


@pytest.mark.distributed
@pytest.mark.parametrize("name", STARTED)
def test_accelerate_launch_trains_one_model(name, tmp_path, one_process):
    flags, processes = STARTED[name]
    port = ["--main_process_port", str(free_port())] if name == "multi_node" else []
    command = ["accelerate", "launch", "--config_file", str(ACCELERATE / f"{name}.yaml"), *flags, *port]
    script = [str(ROOT / "launch" / "train.py"), *DVAE, *batch_of(processes), "--out", str(tmp_path)]
    run([*command, *script], CUDA_VISIBLE_DEVICES="")
    assert (manifest(tmp_path)["world_size"], manifest(tmp_path)["backend"]) == (processes, "accelerate")
    assert_close(states(tmp_path), one_process(DVAE))


def shipped(folder: Path, suffix: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"*.{suffix}"))


def test_no_configuration_is_left_out():
    assert {*STARTED, *STARTED_ELSEWHERE, "zero2_offload"} == {
        *shipped(ACCELERATE, "yaml"),
        *shipped(DEEPSPEED, "json"),
    }


LAYOUT = {
    *(
        "compute_environment",
        "distributed_type",
        "num_machines",
        "num_processes",
        "machine_rank",
        "use_cpu",
        "gpu_ids",
    ),
    *("main_process_ip", "main_process_port", "same_network", "rdzv_backend", "mixed_precision", "fsdp_config"),
}


@pytest.mark.parametrize("name", shipped(ACCELERATE, "yaml"))
def test_every_key_says_why_and_is_of_the_layout(name):
    text = (ACCELERATE / f"{name}.yaml").read_text()
    keys = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line in keys if not re.fullmatch(r" *\w+:( \S+)? +# \S.{4,}", line)] == []
    content = yaml.safe_load(text)
    assert content.keys() <= LAYOUT
    assert content["mixed_precision"] == "no"
    assert f"--config_file accelerate_configs/{name}.yaml" in text


def environment_by_accelerate(config: Path, *flags: str) -> dict[str, str]:
    """Return what `accelerate launch` with these flags sets for its processes, by its own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    arguments = launch_command_parser().parse_args(["--config_file", str(config), *flags, "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    if arguments.multi_gpu or arguments.use_fsdp or arguments.use_megatron_lm:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


def refusal(environment: dict[str, str], monkeypatch) -> str:
    """Return the one line that the accelerate backend ends with in this environment."""
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "XLA_")):
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        create_backend("accelerate")
    assert not torch.distributed.is_initialized() and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["cpu_1", "cpu_2"])
def test_configurations_of_the_cpu_hide_gpus(name):
    visible = environment_by_accelerate(ACCELERATE / f"{name}.yaml")["CUDA_VISIBLE_DEVICES"]
    assert set(visible.split(",")) == {"-1"}


def test_what_accelerate_says_to_one_process_is_heard(monkeypatch):
    """`auto` must not be the local backend there: that one reads none of Accelerate's variables."""
    assert resolve_backend("auto") == "local"
    environment = environment_by_accelerate(ACCELERATE / "gpu_1.yaml")
    assert "WORLD_SIZE" not in environment
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment["ACCELERATE_MIXED_PRECISION"])
    assert resolve_backend("auto") == "accelerate"


def test_fsdp2_says_what_is_read():
    environment = environment_by_accelerate(ACCELERATE / "fsdp2.yaml", "--num_processes", "2")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    said = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())["fsdp_config"]
    assert {key: environment[key.upper()].lower() for key in said} == {key: str(said[key]).lower() for key in said}


OWNED = [
    ("dynamo_config: {dynamo_backend: INDUCTOR}", "dynamo_backend 'INDUCTOR'", "--trainer.compile"),
    ("dynamo_config: {dynamo_mode: reduce-overhead}", "dynamo_mode 'reduce-overhead'", "--trainer.compile"),
    ("dynamo_config: {dynamo_use_fullgraph: true}", "dynamo_use_fullgraph 'True'", "--trainer.compile"),
    ("dynamo_config: {dynamo_use_dynamic: true}", "dynamo_use_dynamic 'True'", "--trainer.compile"),
    (
        "dynamo_config: {dynamo_use_regional_compilation: true}",
        "dynamo_use_regional_compilation 'True'",
        "--trainer.compile",
    ),
    ("mixed_precision: bf16", "mixed_precision 'bf16'", "--trainer.precision"),
    ("distributed_type: MEGATRON_LM", "megatron_lm_config 'true'", "--backend deepspeed"),
]


@pytest.mark.parametrize("line, found, owner", OWNED, ids=[line for line, *_ in OWNED])
def test_what_the_run_owns_is_refused_in_accelerates_configuration(line, found, owner, tmp_path, monkeypatch):
    content = {**yaml.safe_load((ACCELERATE / "cpu_2.yaml").read_text()), **yaml.safe_load(line)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    message = refusal(environment_by_accelerate(tmp_path / "mine.yaml"), monkeypatch)
    assert f"the Accelerate configuration says {found}" in message and owner in message


# Accelerate's other launchers, for DeepSpeed and for TPUs, set these; so may a batch script.
VARIABLES = [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps", "--trainer.grad_accum_every"),
    ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "gradient_clipping", "--trainer.max_grad_norm"),
    ("ACCELERATE_DOWNCAST_BF16", "true", "downcast_bf16", "--trainer.precision"),
    ("XLA_DOWNCAST_BF16", "1", "downcast_bf16", "--trainer.precision"),
    ("XLA_USE_BF16", "1", "mixed_precision", "--trainer.precision"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config", "num_processes"),
]


@pytest.mark.parametrize("variable, value, key, owner", VARIABLES, ids=[variable for variable, *_ in VARIABLES])
def test_what_the_run_owns_is_refused_in_accelerates_variables(variable, value, key, owner, monkeypatch):
    message = refusal({variable: value}, monkeypatch)
    assert f"says {key} '{value}' ({variable}), which belongs to the run" in message and owner in message


def test_every_owned_variable_is_shown_to_be_refused():
    from vqdist.backends.launcher_settings import OWNED_VARIABLES

    shown = {variable for variable, *_ in VARIABLES}
    by_files = {f"ACCELERATE_{line.split('{')[-1].partition(':')[0].upper()}" for line, *_ in OWNED if "{" in line}
    assert OWNED_VARIABLES.keys() == shown | by_files | {"ACCELERATE_USE_MEGATRON_LM"}


# ---------------------------------------------------------------------------------------------- deepspeed_configs


def deepspeed(out: Path, *arguments: str) -> None:
    """Return the launcher without ssh, on the first two slots of the shipped hostfile's first machine."""
    hosts = ["--hostfile", str(ROOT / "launch" / "hostfile.example"), "--include", "worker-1:0,1"]
    here = ["--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    options = ["--backend", "deepspeed", "--deepspeed_config", str(DEEPSPEED / "zero2_offload.json")]
    script = [str(ROOT / "launch" / "train.py"), *arguments, *batch_of(2), *options, "--out", str(out)]
    run(["deepspeed", *hosts, *here, *script], timeout=400, CUDA_VISIBLE_DEVICES="")


@pytest.mark.distributed
@pytest.mark.timeout(1200)  # for a busy machine
def test_zero_2_with_the_optimizer_on_the_host_trains_and_resumes(tmp_path, one_process):
    """Two engines, clipped, two micro-batches, Adam fused as on a GPU; then again from the middle, to the bit."""
    arguments = [*VQGAN, "--trainer.fused_adam", "true"]
    deepspeed(tmp_path / "whole", *arguments)
    assert manifest(tmp_path / "whole")["world_size"] == 2
    assert_close(states(tmp_path / "whole"), one_process(VQGAN))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000004")
    deepspeed(tmp_path / "resumed", *arguments)
    assert_close(states(tmp_path / "resumed"), states(tmp_path / "whole"), tolerance=0)


@pytest.mark.parametrize("name", shipped(DEEPSPEED, "json"))
def test_deepspeed_takes_and_knows_every_key(name):
    from vqdist.backends.deepspeed_config import read_config

    content = json.loads((DEEPSPEED / f"{name}.json").read_text())
    assert read_config(str(DEEPSPEED / f"{name}.json")) == content
    assert content.keys() == {"zero_optimization"}
    assert str(content["zero_optimization"]["stage"]) == name.removeprefix("zero")[0]


def read(config: dict) -> str:
    """Return the one line that this content of a DeepSpeed file is refused with."""
    with pytest.raises(UserError) as error:
        create_backend("deepspeed", deepspeed_config=config)
    assert not torch.distributed.is_initialized() and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "key, owner",
    [
        ("managed_gradient_accumulation", "grad_accum_every"),
        ("bfloat16", "precision"),
        ("data_types", "precision"),
        ("communication_data_type", "precision"),
        ("autotuning", "batch_size"),
        ("tensorboard", "trackers"),
        ("csv_monitor", "trackers"),
        ("compile", "compile"),
    ],
)
def test_what_the_run_owns_is_refused_in_deepspeeds_configuration(key, owner):
    assert f"sets {key!r}, which belongs to the run; remove it there and use {owner}" in read({key: False})


def test_keys_that_cannot_be_honoured_are_refused_with_the_reason():
    from vqdist.backends.deepspeed_config import REFUSED_KEYS, REFUSED_ZERO_KEYS

    for key, reason in REFUSED_KEYS.items():
        assert f"sets {key!r}, which cannot be used here: {reason}; remove it" in read({key: True})
    for key, reason in REFUSED_ZERO_KEYS.items():
        message = read({"zero_optimization": {"stage": 2, key: True}})
        assert f"zero_optimization sets {key!r}, which cannot be used here: {reason}; remove it" in message


@pytest.mark.parametrize(
    "stage, offload, message",
    [
        (2, {"device": "nvme", "nvme_path": "/disk"}, '{"device": "cpu"} is the one that works, or remove it'),
        (2, True, 'offload_optimizer is True; {"device": "cpu"} is the one that works'),
        (0, {"device": "cpu"}, "offload_optimizer needs ZeRO stage 1 or 2 and the stage is 0"),
        (1, {"device": "cpu", "ratio": 0.5}, "sets 'ratio', which has no effect with device 'cpu'"),
    ],
)
def test_other_offload_is_refused(stage, offload, message):
    assert message in read({"zero_optimization": {"stage": stage, "offload_optimizer": offload}})


def test_the_hostfile_is_read_by_deepspeed_with_its_comments():
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    path = ROOT / "launch" / "hostfile.example"
    machines = fetch_hostfile(str(path))
    assert machines == {"worker-1": 8, "worker-2": 8}
    (fewer,) = re.findall(r"--include (\S+)`", path.read_text())
    taken = parse_inclusion_exclusion(machines, fewer, "")
    assert taken == {"worker-1": list(range(8)), "worker-2": [0, 1, 2, 3]}


# ------------------------------------------------------------------------------------------------ launch/train.py


@pytest.mark.parametrize("place", [0, 1, 99], ids=["first", "second", "last"])
def test_the_rank_that_deepspeeds_launcher_adds_has_no_effect(place, tmp_path, one_process):
    """It comes before the script's own arguments; LOCAL_RANK says the same."""
    arguments = [*DVAE, *batch_of(1), "--out", str(tmp_path)]
    arguments.insert(place, "--local_rank=1")
    if place:
        assert main(["train", *arguments]) == 0
    else:
        run(["python", str(ROOT / "launch" / "train.py"), *arguments], CUDA_VISIBLE_DEVICES="")
    assert_close(states(tmp_path), one_process(DVAE), tolerance=0)


def test_a_mistake_is_one_line():
    done = run(["python", str(ROOT / "launch" / "train.py"), "vqgn"], check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("vqdist: error: there is no model 'vqgn'; nearest: vqgan; there are ")
    assert done.stderr.count("\n") == 1
