"""The place of a process, as its environment says it: numbers that no launcher gives are refused in a line."""

from __future__ import annotations

import pytest

from vqdist.backends.distributed import require_address
from vqdist.backends.environment import check_launch, read_launch
from vqdist.cli import main
from vqdist.errors import UserError

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "31999"}


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", *MEETING):
        monkeypatch.delenv(name, raising=False)

    def say(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return say


@pytest.mark.parametrize(
    "values, said",
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0; it is at least 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2, which is no number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, which is no number"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK=5, of 2 processes; they are numbered from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, of 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1, which is no number"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2"}, "LOCAL_RANK=2, of 2 processes"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "3"}, "LOCAL_RANK=3, of 2 processes"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 of WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5, which is no number"),
    ],
)
def test_places_that_there_are_not(values, said, environment, capsys, tmp_path):
    environment(**values)
    with pytest.raises(UserError, match=said):
        check_launch()
    assert main(["train", "dvae", "--data", "digits", "--image_size", "16", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("port", ["0", "-5", "65536", "http", "1e4", "31999 "])
def test_ports_that_there_are_not(port, environment):
    environment(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(UserError, match=f"MASTER_PORT={port}, which is no port; give a number from 1 to 65535"):
        require_address()


def test_the_places_of_a_launch_are_known_after_accelerate_has_set_its_own(environment):
    """It sets LOCAL_WORLD_SIZE to 1 where no launcher says it, as srun and a start by hand do not."""
    environment(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="1", **MEETING)
    assert read_launch().local_rank == 1


def test_places_that_there_are(environment):
    environment(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", **MEETING)
    launch = read_launch()
    assert launch is not None and (launch.size, launch.rank, launch.local_rank, launch.one_host) == (4, 3, 1, False)
    require_address()
