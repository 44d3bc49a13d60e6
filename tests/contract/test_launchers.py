"""No launch ends as several separate trainings: the group that was asked for, or one line with what does it."""

from __future__ import annotations

import json
import os
import stat
import sys

import pytest
from launching import free_port, run

from vqdist.backends import create_backend, resolve_backend
from vqdist.backends.environment import (
    PORTS,
    check_launch,
    export_launch,
    local_rank_of_launcher,
    rank_of_launcher,
    read_launch,
    started_by_launcher,
    world_size_of_launcher,
)
from vqdist.errors import UserError

TRAIN = [
    *"train dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --trainer.num_train_steps 2".split(),
    *"--trainer.save_results_every 0 --trainer.validate_every 0 --data.num_workers 0".split(),
]

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "694157313",
    "PMIX_RANK": "3",
}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
# the batch script of a job of four tasks: one process, whatever it says of tasks
BATCH_SCRIPT = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
INTERACTIVE = {**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA)}
TORCHRUN = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets variables; none of any launcher is there before, and none stays afterwards."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI"))})
    return os.environ.update


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH, SRUN], ids=["Open MPI", "MPICH", "srun"])
def test_tasks_on_one_host_become_ranks_of_one_group(variables, environment):
    environment(variables)
    assert started_by_launcher() and resolve_backend("auto") == "accelerate"
    assert (world_size_of_launcher(), rank_of_launcher(), local_rank_of_launcher()) == (4, 3, 1)
    export_launch()
    said = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")}
    assert said == {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    assert int(os.environ["MASTER_PORT"]) in PORTS


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH, SRUN], ids=["Open MPI", "MPICH", "srun"])
def test_local_is_refused_under_each(variables, environment):
    environment(variables)
    with pytest.raises(UserError, match="would train 4 separate models"):
        create_backend("local")


def test_the_port_is_the_jobs(environment):
    """Equal on all ranks of a job, whatever differs between them; another in another job."""
    ports = []
    for change in ({}, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, {"SLURM_JOB_ID": "18"}, {"SLURM_STEP_ID": "1"}):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        environment({**SRUN, **change})
        export_launch()
        ports.append(os.environ["MASTER_PORT"])
    assert ports[0] == ports[1] and len(set(ports)) == 3


@pytest.mark.parametrize("variables", [{}, BATCH_SCRIPT, INTERACTIVE, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}])
def test_what_is_one_process(variables, environment):
    environment(variables)
    check_launch()
    export_launch()
    assert read_launch() is None and resolve_backend("auto") == "local" and "RANK" not in os.environ


@pytest.mark.parametrize("outer", [OPEN_MPI, MPICH, SRUN, BATCH_SCRIPT])
def test_a_launcher_within_another_wins(outer, environment):
    environment({**outer, **TORCHRUN})
    check_launch()
    export_launch()
    assert (world_size_of_launcher(), rank_of_launcher(), local_rank_of_launcher()) == (8, 5, 2)
    assert {name: os.environ[name] for name in TORCHRUN} == TORCHRUN


@pytest.mark.parametrize(("outer", "by"), [(OPEN_MPI, "mpirun"), (MPICH, "mpirun"), (SRUN, "srun")])
def test_a_group_smaller_than_the_tasks_is_refused(outer, by, environment):
    """`srun --ntasks 4 torchrun --nproc_per_node 1` forgets --nnodes, or WORLD_SIZE=1 is left in the shell."""
    environment({**outer, **TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    with pytest.raises(UserError, match=f"{by} started 4 tasks but the environment says WORLD_SIZE=1: this would"):
        resolve_backend("auto")


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x MASTER_ADDR=HOST"),
        ({**MPICH, "MPI_LOCALNRANKS": "2"}, "mpirun -genv MASTER_ADDR HOST"),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "2", "PATH": ""}, "export MASTER_ADDR=HOST before srun"),
    ],
    ids=["Open MPI", "MPICH", "srun without scontrol"],
)
def test_several_hosts_without_an_address_are_told_how_to_give_it(variables, remedy, environment):
    environment(variables)
    with pytest.raises(UserError, match="started 4 processes on several hosts") as error:
        export_launch()
    assert remedy in str(error.value)
    environment({"MASTER_ADDR": "n1"})
    export_launch()
    assert os.environ["MASTER_ADDR"] == "n1"


@pytest.mark.parametrize(("name", "address"), [("localhost", "localhost"), ("no-such-host.invalid", "10.1.2.3")])
def test_under_slurm_rank_0_is_on_the_first_node(name, address, environment, tmp_path):
    """By its name, or where that does not resolve by the address that Slurm itself uses."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\ncase "$*" in "show hostnames n[1-2]") printf "{name}\\nother\\n";; '
        f'"--oneliner show node {name}") echo "NodeName={name} NodeAddr=10.1.2.3 NodeHostName=x";; esac\n'
    )
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    environment({**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"})
    environment({"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    export_launch()
    assert os.environ["MASTER_ADDR"] == address


def test_processes_of_unknown_number_are_refused(environment):
    environment({"PMIX_RANK": "1"})
    with pytest.raises(UserError, match="PMIX_RANK=1 but not how many processes there are"):
        resolve_backend("auto")


def test_several_processes_must_know_where_to_meet(environment):
    environment({"WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="2 processes but not RANK and MASTER_ADDR and MASTER_PORT"):
        create_backend("accelerate")


def error_of(ended) -> str:
    """Return the one line of vqdist on standard error."""
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("vqdist: error: ")]
    return line


@pytest.mark.distributed
@pytest.mark.parametrize("by", ["flags", "file"])
def test_accelerate_that_starts_one_process_for_two_is_refused(by, tmp_path):
    (tmp_path / "two.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\n"
        "machine_rank: 0\nuse_cpu: true\nmixed_precision: 'no'\n"
    )
    asked = {"flags": ["--cpu", "--num_processes", "2"], "file": ["--config_file", str(tmp_path / "two.yaml")]}[by]
    command = ["accelerate", "launch", *asked, "-m", "vqdist", *TRAIN, "--out", str(tmp_path / "run")]
    line = error_of(run(command, check=False))
    assert "asked for several processes and started one" in line
    assert "accelerate launch --config_file accelerate_configs/cpu_2.yaml" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_accelerate_that_is_asked_for_one_process_trains(tmp_path):
    command = ["accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "vqdist"]
    run([*command, *TRAIN, "--out", str(tmp_path / "run")])
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json").read_text())
    assert manifest["world_size"] == 1


@pytest.mark.distributed
def test_bare_tasks_of_srun_train_one_model(tmp_path):
    """Two processes as `srun --ntasks 2 python -m vqdist ...` starts them; tests/cluster has the real one."""
    import subprocess

    from launching import environment as child_environment
    from launching import warmed

    step = {**SRUN, "SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NUM_TASKS": "2"}
    command, warm = warmed([sys.executable, "-m", "vqdist", *TRAIN, "--out", str(tmp_path / "run")])
    tasks = [
        subprocess.Popen(
            command,
            env=child_environment(**{**warm, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [task.communicate(timeout=240)[1] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], errors
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
