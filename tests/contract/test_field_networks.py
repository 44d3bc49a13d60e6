"""Networks and quantizers of the field on two real processes, against one process with the same batch.

Run by torchrun, this file is the worker.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import build_trainer, largest_difference, weights_of

from vqdist.trainers.vqgan import VQGanVAETrainer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
STEPS = 3
BACKENDS = ["accelerate", "zero2", "zero3", "fsdp2"]
SMALL: dict[str, Any] = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "groups": 4, "z_channels": 8}
SMALL |= {"resolution": 16, "attn_resolutions": [8]}
VAR = {"v_patch_nums": [1, 2, 4, 8], "learnable_codebook": True}
MODELS: dict[str, dict[str, Any]] = {
    "taming": {"quantizer": ("gradient_vq", {"codebook_loss": "legacy"})},
    "llamagen": {"quantizer": ("gradient_vq", {"l2_norm": True}), "checkpointing": True},
    "var": {"quantizer": ("multiscale_vq", VAR), "quant_conv_kernel": 3},
    "ibq": {"quantizer": ("ibq", {"entropy_weight": 0.0}), "checkpointing": True},
}


def build(folder: Path, name: str, **options) -> VQGanVAETrainer:
    """Return a trainer of a small model; SGD, since Adam makes full steps of gradients that are rounding."""
    arguments = {**SMALL, **MODELS[name]}
    quantizer, init_args = arguments.pop("quantizer")
    parts = {half: {"class_path": "taming", "init_args": arguments} for half in ("encoder", "decoder")}
    given = {"class_path": quantizer, "init_args": {"codebook_size": 16, **init_args}}
    none = {"dim": None, "layers": 4, "discr_layers": 4, "encdec_resnet_groups": 16, "use_vgg_and_gan": False}
    training = {"optimizer": "sgd", "lr": 0.05, "batch_size": 4, **options}
    return build_trainer(folder / name, quantizer=given, model={**none, **parts}, **training)


def trained(folder: Path, **options) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of every model after some steps."""
    found = {}
    for name in MODELS:
        trainer = build(folder, name, **options)
        for _ in range(STEPS):
            trainer.train_step()
        found[name] = weights_of(trainer)
    return found  # the process group stays: DeepSpeed keeps groups of the first one


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    return trained(tmp_path_factory.mktemp("one"), batch_size=8)


def test_every_weight_moves(reference, tmp_path):
    for name in MODELS:
        trainer = build(tmp_path, name)
        before = weights_of(trainer)
        trainer.close()
        same = [key for key, tensor in before.items() if torch.equal(tensor, reference[name][key])]
        assert not [key for key in same if key.endswith("conv1.weight") or "embedding" in key], name


@pytest.mark.parametrize(
    "backend",
    [name if name == "accelerate" else pytest.param(name, marks=pytest.mark.nightly) for name in BACKENDS],
)
def test_two_ranks_are_one_process(backend, tmp_path, reference):
    torchrun([__file__, str(tmp_path), backend], timeout=600)
    found = torch.load(tmp_path / "results.pt")
    for name in MODELS:
        difference, tensor = largest_difference(reference[name], found[name])
        assert difference <= 1e-6, f"{name}: {tensor} differs by {difference}"


def backend_of(name: str) -> dict[str, Any]:
    if name == "fsdp2":  # as `accelerate launch` says it
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        os.environ.update(FSDP_AUTO_WRAP_POLICY="SIZE_BASED_WRAP", FSDP_MIN_NUM_PARAMS="500")
    if not name.startswith("zero"):
        return {"backend": "accelerate"}
    return {"backend": "deepspeed", "deepspeed_config": str(ROOT / "deepspeed_configs" / f"{name}.json")}


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    weights = trained(folder, **backend_of(name))
    if os.environ["RANK"] == "0":
        torch.save(weights, folder / "results.pt")


if __name__ == "__main__":
    main()
