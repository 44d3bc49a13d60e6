"""Networks whose activations are computed anew, on two real processes against one that keeps them, on weights."""

from __future__ import annotations

import sys

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import build_vae, largest_difference

WORKER = ROOT / "tests" / "workers" / "networks_worker.py"
sys.path.insert(0, str(WORKER.parent))
from networks_worker import NETWORKS, model_of, trained  # noqa: E402

BACKENDS = ["accelerate", "zero2", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("fsdp2", "zero3"))]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    """One process with the same global batches."""
    folder = tmp_path_factory.mktemp("one")
    return {kind: trained(kind, folder / kind, checkpointing=False, batch_size=8) for kind in NETWORKS}


def calls_of_a_step(kind: str, *, checkpointing: bool) -> int:
    """Return how often the convolutions and linear layers of encoder and decoder run, forward and backward."""
    network = build_vae(**model_of(kind, checkpointing=checkpointing)).autoencoder
    called = []
    for half in (network.encoder, network.decoder):
        for module in half.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_pre_hook(lambda *_: called.append(1))
    network(torch.rand(2, 3, 16, 16)).recon.mean().backward()
    return len(called)


@pytest.mark.parametrize("kind", NETWORKS)
def test_activations_are_computed_anew(kind):
    kept, anew = (calls_of_a_step(kind, checkpointing=checkpointing) for checkpointing in (False, True))
    assert kept < anew <= 2 * kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_come_to_the_weights_of_one_process(backend, reference, tmp_path):
    torchrun([str(WORKER), backend, str(tmp_path)], timeout=500)
    found = torch.load(tmp_path / "results.pt")
    for kind, expected in reference.items():
        difference, name = largest_difference(expected, found[kind])
        assert difference < 1e-5, f"{kind} {name}"
