"""Networks of the field with all of their terms on two real processes, against one process with the same batch.

Run by torchrun, this file is the worker.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import build_trainer, largest_difference, weights_of

from vqdist.ranks import check_ranks_agree
from vqdist.trainers.vqgan import VQGanVAETrainer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
STEPS = 3
BACKENDS = ["accelerate", "zero2", "zero3", "fsdp2"]
SMALL: dict[str, Any] = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "groups": 4, "z_channels": 8}
SMALL |= {"resolution": 16, "attn_resolutions": [8]}
TOKENS = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "heads": 2, "num_latent_tokens": 5}
MAGVIT = {"ch": 8, "ch_mult": [1, 2, 1], "num_res_blocks": 1, "groups": 8}
BLUR = {"class_path": "blur", "init_args": {"width": 32, "stages": 2, "pool": 3}}
# a model is its network, its quantizer, and options of both players
MODELS: dict[str, dict[str, Any]] = {
    "taming": {
        "network": ("taming", SMALL),
        "quantizer": ("gradient_vq", {"codebook_loss": "legacy"}),
        "training": {
            "adaptive_weight_form": "taming",
            "fresh_reconstruction": True,
            "discriminator_start": 1,
            "discriminator_before_start": "zero_loss",
        },
    },
    "llamagen": {
        "network": ("taming", {**SMALL, "checkpointing": True}),
        "quantizer": ("gradient_vq", {"l2_norm": True, "entropy_weight": 0.1, "entropy_temperature": 1.0}),
        "model": {"l2_recon_loss": True},
        "training": {"adaptive_weight": False, "adversarial_weight": 0.5, "discr_loss_weight": 0.5},
    },
    "var": {
        "network": ("taming", {**SMALL, "quant_conv_kernel": 3}),
        "quantizer": ("multiscale_vq", {"v_patch_nums": [1, 2, 4, 8], "learnable_codebook": True}),
        "training": {"quantizer_weight": {"value": 1.0, "initial": 3.0, "ramp_steps": 3}},
    },
    "ibq": {
        "network": ("taming", {**SMALL, "checkpointing": True}),
        "quantizer": ("ibq", {"entropy_temperature": 1.0}),
        "model": {"discr_loss": "non_saturating", "gen_loss": "non_saturating"},
        "training": {"update_order": "discriminator_first", "lecam_weight": 1.0, "lecam_decay": 0.5},
    },
    "titok": {
        "network": ("titok", TOKENS),
        "encoder": {"token_size": 8},
        "quantizer": ("gradient_vq", {}),
        "model": {"discriminator": BLUR},
        "training": {
            "adaptive_weight": False,
            "adversarial_weight": {"value": 0.3, "ramp_steps": 2, "decay_start": 2, "decay_steps": 4},
            "lecam": "of_means",
            "lecam_weight": 1.0,
            "lecam_decay": 0.5,
        },
    },
    "magvit2": {
        "network": ("magvit2", MAGVIT),
        "encoder": {"z_channels": 4},
        "quantizer": ("magvit2_lfq", {"entropy_temperature": 1.0}),
        "model": {"discr_loss": "hinge", "gen_loss": "hinge"},
        "training": {"lecam_weight": 0.1, "lecam_decay": 0.5},
    },
}


def build(folder: Path, name: str, **options) -> VQGanVAETrainer:
    """Return a trainer of a small model; SGD, since Adam makes full steps of gradients that are rounding."""
    said = copy.deepcopy(MODELS[name])
    network, arguments = said["network"]
    quantizer, init_args = said["quantizer"]
    halves = {"encoder": {**arguments, **said.get("encoder", {})}, "decoder": arguments}
    parts = {half: {"class_path": network, "init_args": given} for half, given in halves.items()}
    # a discriminator that normalises no batch: two ranks of those that do are not one process
    own = {"class_path": "patch", "init_args": {"dim": 16, "layers": 2, "groups": 4}}
    losses = {"use_hinge_loss": True, "discriminator": own, **said.get("model", {})}
    none = {"dim": None, "layers": 4, "discr_layers": 4, "encdec_resnet_groups": 16}
    given = {"class_path": quantizer, "init_args": {"codebook_size": 16, **init_args}}
    training = {"optimizer": "sgd", "lr": 0.02, "max_grad_norm": 0.5, "discr_max_grad_norm": 0.5, "augment": True}
    training |= {"batch_size": 4, "apply_grad_penalty_every": 0, **said["training"]}
    return build_trainer(folder / name, quantizer=given, model={**none, **losses, **parts}, **{**training, **options})


def trained(folder: Path, **options) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of every model after some steps; what resumes before the last step comes to the same."""
    found = {}
    for name in MODELS:
        trainer = build(folder, name, save_model_every=STEPS - 1, **options)
        numbers = [trainer.train_step() for _ in range(STEPS)][-1]
        assert {"recon_loss", "aux_loss", "adversarial_loss", "discr_loss"} <= numbers.keys()
        found[name] = weights_of(trainer)
        check_ranks_agree(trainer.backend, trainer.named_tensors(), trainer.step)
        check_resumed(build(folder, name, **options, allow_config_change=True), found[name])
    return found  # the process group stays: DeepSpeed keeps groups of the first one


def check_resumed(trainer: VQGanVAETrainer, expected: dict[str, torch.Tensor]) -> None:
    """Assert that a new trainer of the same run gets to the same weights, to the bit."""
    assert trainer.step == STEPS - 1
    trainer.train_step()
    difference, tensor = largest_difference(expected, weights_of(trainer))
    assert difference == 0, f"{trainer.run_folder.name}: {tensor} differs by {difference} after resume"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    return trained(tmp_path_factory.mktemp("one"), batch_size=8)


def test_every_weight_moves(reference, tmp_path):
    for name in MODELS:
        trainer = build(tmp_path, name)
        before = weights_of(trainer)
        trainer.close()
        same = [key for key, tensor in before.items() if torch.equal(tensor, reference[name][key])]
        assert not [key for key in same if key.endswith(("conv1.weight", "qkv.weight")) or "embedding" in key], name


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
    if name == "zero0":  # has no file of its own
        return {"backend": "deepspeed"}
    return {"backend": "deepspeed", "deepspeed_config": str(ROOT / "deepspeed_configs" / f"{name}.json")}


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    weights = trained(folder, **backend_of(name))
    if os.environ["RANK"] == "0":
        torch.save(weights, folder / "results.pt")


if __name__ == "__main__":
    main()
