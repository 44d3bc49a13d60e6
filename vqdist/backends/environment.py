"""The launcher's words about this process, read from the environment without importing torch.

torchrun, `accelerate launch` and the DeepSpeed launcher set RANK, WORLD_SIZE and LOCAL_RANK. `mpirun` and Slurm's
`srun` have names of their own: there `export_launch` says the same in torch's names. No launch may end as several
separate trainings: `check_launch` finds those that would.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import zlib
from dataclasses import dataclass

from vqdist.errors import UserError

# Slurm numbers its special steps (batch script, interactive, extern) from here on; they run one process
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# below what Linux gives to outgoing connections by itself (32768 and more)
PORTS = range(15_000, 30_000)

TORCHRUN = "torchrun --nnodes NODES --nproc_per_node N -m vqdist ..."


@dataclass(frozen=True)
class Launch:
    """The words of one launcher about this process.

    Attributes:
        by: the launcher, for messages.
        size: processes in all.
        rank: index of this process, 0 .. size - 1.
        local_rank: index on its node.
        one_host: whether all processes are on this host, as far as the launcher says it.
    """

    by: str
    size: int
    rank: int
    local_rank: int
    one_host: bool


def read_launch() -> Launch | None:
    """Return what was started, or None without a launcher.

    Torch's own names win: a launcher within `srun` or `mpirun` sets them."""
    outer = _read_tasks()
    if _is_set("WORLD_SIZE"):
        rank = _integer("RANK", outer.rank if outer else 0)
        local_rank = _integer("LOCAL_RANK", outer.local_rank if outer else 0)
        size, here = _integer("WORLD_SIZE", 1), _integer("LOCAL_WORLD_SIZE", 0)
        _check_places(size, rank, here)
        return Launch("torchrun", size, rank, local_rank, one_host=here == size)
    return outer


def _check_places(size: int, rank: int, here: int) -> None:
    """Raise `UserError` for numbers that no launcher gives: a process that is none of those there are."""
    if size < 1:
        raise UserError(f"the environment says WORLD_SIZE={size}; it is at least 1: unset it for one process")
    if here > size:
        raise UserError(f"the environment says LOCAL_WORLD_SIZE={here} of WORLD_SIZE={size}; there are fewer in all")
    _check_place("RANK", rank, size)


def _check_place(name: str, place: int, count: int) -> None:
    if place >= count:
        raise UserError(
            f"the environment says {name}={place}, of {count} processes; they are numbered from 0 to {count - 1}"
        )


def _read_tasks() -> Launch | None:
    """Return what `mpirun` or `srun` started: the readers know one family of names each.

    Within a Slurm job `mpirun` may itself be a step of one task a node, so MPI comes first."""
    return next((launch for read in (_read_open_mpi, _read_pmi, _read_slurm) if (launch := read())), None)


def _read_open_mpi() -> Launch | None:
    if not _is_set("OMPI_COMM_WORLD_SIZE"):
        return None
    size, local_size = _integer("OMPI_COMM_WORLD_SIZE", 1), _integer("OMPI_COMM_WORLD_LOCAL_SIZE", 0)
    rank, local_rank = _integer("OMPI_COMM_WORLD_RANK", 0), _integer("OMPI_COMM_WORLD_LOCAL_RANK", 0)
    return Launch("mpirun", size, rank, local_rank, one_host=local_size == size)


def _read_pmi() -> Launch | None:
    """MPICH, Intel MPI and MVAPICH; Slurm sets the same names for them."""
    if not _is_set("PMI_SIZE"):
        return None
    size = _integer("PMI_SIZE", 1)
    local_rank = _integer("MPI_LOCALRANKID", _integer("SLURM_LOCALID", 0))
    one_host = _integer("MPI_LOCALNRANKS", 0) == size or _slurm_nodes() == 1
    return Launch("mpirun", size, _integer("PMI_RANK", 0), local_rank, one_host)


def _read_slurm() -> Launch | None:
    """Return the tasks of an `srun`. The batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process."""
    step, size = os.environ.get("SLURM_STEP_ID", ""), _integer("SLURM_STEP_NUM_TASKS", 1)
    if not step.isdecimal() or int(step) >= FIRST_SPECIAL_STEP or size < 2:
        return None
    return Launch("srun", size, _integer("SLURM_PROCID", 0), _integer("SLURM_LOCALID", 0), _slurm_nodes() == 1)


def _slurm_nodes() -> int:
    """Nodes of this `srun`; 0 if it is none."""
    return _integer("SLURM_STEP_NUM_NODES", 0)


def _is_set(name: str) -> bool:
    return bool(os.environ.get(name))


def _integer(name: str, default: int) -> int:
    if not _is_set(name):
        return default
    if not os.environ[name].isdecimal():
        raise UserError(f"the environment says {name}={os.environ[name]}, which is no number; unset it")
    return int(os.environ[name])


def started_by_launcher() -> bool:
    """Return whether a launcher's environment is there, be it for one process, of which Accelerate says no size."""
    return read_launch() is not None or _is_set("ACCELERATE_MIXED_PRECISION")


def world_size_of_launcher() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    launch = read_launch()
    return 1 if launch is None else launch.size


SIZES = {
    "torchrun": ("WORLD_SIZE",),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "srun": ("SLURM_STEP_NUM_TASKS",),
}


def origin_of_size() -> str:
    """Return who says how many processes there are, as "WORLD_SIZE=2"; of `srun --pty` also how to have one."""
    outer = _read_tasks()
    launch = read_launch() if outer is None else outer
    names = () if launch is None else SIZES[launch.by]
    said = next((f"{name}={os.environ[name]}" for name in names if _is_set(name)), "nobody")
    if launch is None or launch.by != "srun":
        return said
    shell = ", and a shell of `srun --pty` is one of them" if _is_set("SLURM_PTY_PORT") else ""
    return f"{said} of srun{shell}: for one process start `srun -n 1`, or unset SLURM_STEP_NUM_TASKS"


def rank_of_launcher() -> int:
    """Return this process's index among all of them; 0 without a launcher."""
    launch = read_launch()
    return 0 if launch is None else launch.rank


def local_rank_of_launcher() -> int:
    """Return this process's index on its node; 0 without a launcher."""
    launch = read_launch()
    return 0 if launch is None else launch.local_rank


# --------------------------------------------------------------------------------------- launches that went wrong


def check_launch() -> None:
    """Raise `UserError` for a launch of several processes, or one asked for, that would train separate models."""
    launch, outer = read_launch(), _read_tasks()
    if launch is not None and launch.by == "torchrun":  # not later: Accelerate sets LOCAL_WORLD_SIZE
        _check_place("LOCAL_RANK", launch.local_rank, _integer("LOCAL_WORLD_SIZE", 0) or launch.size)
    if launch is None:
        _refuse_one_of_several()
    elif outer is not None and launch.size < outer.size:
        raise UserError(
            f"{outer.by} started {outer.size} tasks but the environment says WORLD_SIZE={launch.size}: this would "
            f"train separate models; with a launcher in each task give it all nodes, as in `{TORCHRUN}`, else unset "
            "WORLD_SIZE; or start one task"
        )


def _refuse_one_of_several() -> None:
    # Accelerate says where several processes are to meet, and then starts one by itself without saying how many
    if _is_set("ACCELERATE_MIXED_PRECISION") and _is_set("MASTER_ADDR"):
        raise UserError(
            "`accelerate launch` was asked for several processes and started one, as it does with --cpu and with "
            "distributed_type MULTI_CPU; use `accelerate launch --config_file accelerate_configs/cpu_2.yaml "
            "--num_processes N -m vqdist ...` or `torchrun --nproc_per_node N -m vqdist ...`; for one process unset "
            "MASTER_ADDR"
        )
    if _is_set("PMIX_RANK") and not _is_set("SLURM_STEP_ID"):
        raise UserError(
            f"the environment says PMIX_RANK={os.environ['PMIX_RANK']} but not how many processes there are, and each "
            f"would train a model of its own; start with mpirun or `{TORCHRUN}`, or set WORLD_SIZE=1 for one process"
        )


# --------------------------------------------------------------------------------------- in torch's names


def export_launch() -> None:
    """Say in torch's names what `mpirun` or `srun` said in its own; what is set already stays."""
    launch = read_launch()
    if launch is None or launch.size == 1 or launch.by == "torchrun":
        return
    os.environ.setdefault("MASTER_ADDR", _address(launch))
    os.environ.setdefault("MASTER_PORT", str(_port()))
    os.environ.update(RANK=str(launch.rank), LOCAL_RANK=str(launch.local_rank), WORLD_SIZE=str(launch.size))


def _address(launch: Launch) -> str:
    """Return where rank 0 is; the same on every rank."""
    if _is_set("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    if launch.one_host:
        return "127.0.0.1"
    first = _first_slurm_host() if _is_set("SLURM_STEP_NODELIST") else None
    if first is None:
        raise UserError(
            f"{launch.by} started {launch.size} processes on several hosts and nobody says where rank 0 is; give "
            f"{_how_to_export(launch)}"
        )
    return first


def _how_to_export(launch: Launch) -> str:
    if launch.by == "srun":
        return "its host: export MASTER_ADDR=HOST before srun"
    option = "-x MASTER_ADDR=HOST" if _is_set("OMPI_COMM_WORLD_SIZE") else "-genv MASTER_ADDR HOST"
    return f"its host: mpirun {option} ..."


def _first_slurm_host() -> str | None:
    """Return the first node of this step by name, or, if its name does not resolve, by the address that Slurm uses."""
    hosts = _scontrol("show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()
    if not hosts or resolves(hosts[0]):
        return hosts[0] if hosts else None
    fields = _scontrol("--oneliner", "show", "node", hosts[0]).split()
    return next((field.removeprefix("NodeAddr=") for field in fields if field.startswith("NodeAddr=")), None)


def _scontrol(*arguments: str) -> str:
    if shutil.which("scontrol") is None:
        return ""
    done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def resolves(host: str) -> bool:
    """Return whether the name of a host has an address here."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _port() -> int:
    """Return a port that ranks derive alike and other jobs hardly share: of the job's number, user and command."""
    jobs = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    key = repr([*(os.environ.get(name) for name in jobs), os.getuid(), sys.argv[1:]])
    return PORTS[zlib.crc32(key.encode()) % len(PORTS)]
