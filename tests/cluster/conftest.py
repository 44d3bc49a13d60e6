"""Common fixtures of the tests of clusters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.slurm import Slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Yield a running Slurm with two nodes."""
    with tempfile.TemporaryDirectory(prefix="vqdist-slurm-") as folder, Slurm(Path(folder)) as cluster:
        yield cluster
