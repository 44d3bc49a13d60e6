"""Settings of all tests: one thread, so that the machine's cores are for the processes that tests start."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from launching import IMPORTED_FROM

sys.path.extend(map(str, IMPORTED_FROM))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# nohup has the first ignored and a shell's background the second, and tests send both
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# relative to tests/: killed and stopped processes, clusters
NIGHTLY = ("faults", "cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of whole folders as nightly."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in NIGHTLY:
            item.add_marker(pytest.mark.nightly)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    """No test believes that it was started by a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
