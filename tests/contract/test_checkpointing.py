"""Networks whose activations are computed anew, on two real processes against one that keeps them, on weights."""

from __future__ import annotations

import sys

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import largest_difference

WORKER = ROOT / "tests" / "workers" / "networks_worker.py"
sys.path.insert(0, str(WORKER.parent))
from networks_worker import NETWORKS, trained  # noqa: E402

BACKENDS = ["accelerate", "zero2", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("fsdp2", "zero3"))]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    """One process with the same global batches."""
    folder = tmp_path_factory.mktemp("one")
    return {kind: trained(kind, folder / kind, checkpointing=False, batch_size=8) for kind in NETWORKS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_come_to_the_weights_of_one_process(backend, reference, tmp_path):
    torchrun([str(WORKER), backend, str(tmp_path)], timeout=500)
    found = torch.load(tmp_path / "results.pt")
    for kind, expected in reference.items():
        difference, name = largest_difference(expected, found[kind])
        assert difference < 1e-5, f"{kind} {name}"
