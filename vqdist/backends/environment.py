"""What the launcher said, read from the environment without importing torch.

torchrun, `accelerate launch` and the DeepSpeed launcher set RANK, WORLD_SIZE and LOCAL_RANK; Open MPI sets
OMPI_COMM_WORLD_*. A variable that is absent means one process.
"""

from __future__ import annotations

import os

from vqdist.errors import UserError

WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK")
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")


def _first_integer(names: tuple[str, ...], default: int) -> int:
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return default
    if not os.environ[name].isdecimal():
        raise UserError(f"the environment says {name}={os.environ[name]}, which is no number; unset it")
    return int(os.environ[name])


def started_by_launcher() -> bool:
    """Whether a launcher's environment is there, be it for one process."""
    return any(os.environ.get(name) for name in WORLD_SIZE_VARIABLES)


def world_size_of_launcher() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return _first_integer(WORLD_SIZE_VARIABLES, 1)


def rank_of_launcher() -> int:
    """This process's index among all of them; 0 without a launcher."""
    return _first_integer(RANK_VARIABLES, 0)


def local_rank_of_launcher() -> int:
    """This process's index on its node; 0 without a launcher."""
    return _first_integer(LOCAL_RANK_VARIABLES, 0)
