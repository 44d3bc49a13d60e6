"""Run by torchrun from test_checkpointing.py: two steps of networks whose activations are computed anew.

usage: networks_worker.py BACKEND FOLDER   (BACKEND is accelerate, fsdp2 or zero2, zero3)

Rank 0 writes FOLDER/results.pt: the weights of each network.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from scenarios import build_trainer, weights_of
from torch import Tensor

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "heads": 2, "num_latent_tokens": 5}
MAGVIT = {"ch": 8, "ch_mult": [1, 2, 1], "num_res_blocks": 1, "groups": 8}
TAMING = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "groups": 4, "z_channels": 8, "attn_resolutions": [8]}
TAMING |= {"resolution": 16}
MASKGIT = {"hidden_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "groups": 4}
CONV = {"width": 8, "layers": 2, "num_resnet_blocks": [1, 2], "groups": 4}
NETWORKS = {
    "conv": (CONV, CONV, {"quantizer": "fsq", "codebook_size": 256}),
    "taming": (TAMING, TAMING, {"quantizer": "gradient_vq", "codebook_size": 32}),
    "maskgit": ({**MASKGIT, "z_channels": 8}, MASKGIT, {"quantizer": "gradient_vq", "codebook_size": 32}),
    "magvit2": ({**MAGVIT, "z_channels": 4}, MAGVIT, {"quantizer": "magvit2_lfq", "codebook_size": 16}),
    "titok": ({**SIZES, "token_size": 8}, SIZES, {"quantizer": "gradient_vq", "codebook_size": 32}),
}


def model_of(kind: str, *, checkpointing: bool) -> dict[str, Any]:
    """Return the arguments of a network's model."""
    encoder, decoder, model = NETWORKS[kind]
    both = {"checkpointing": True} if checkpointing else {}
    parts = {
        "encoder": {"class_path": kind, "init_args": {**encoder, **both}},
        "decoder": {"class_path": kind, "init_args": {**decoder, **both}},
    }
    return {"dim": 16, "layers": 4, "encdec_resnet_groups": 4, **parts, **model}


def trained(kind: str, folder: Path, *, checkpointing: bool, **options) -> dict[str, Tensor]:
    """Return the weights of a network after two steps with all of its losses."""
    # plain gradient descent: Adam makes full steps of gradients that are rounding noise
    settings = {"optimizer": "sgd", "lr": 1e-2, "discriminator_start": 1, "apply_grad_penalty_every": 0}
    trainer = build_trainer(folder, model=model_of(kind, checkpointing=checkpointing), **settings, **options)
    for _ in range(2):
        trainer.train_step()
    return weights_of(trainer)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    backend: dict = {"backend": "accelerate"}
    if name == "fsdp2":  # as `accelerate launch` says it
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "500"}
    if name.startswith("zero"):
        shipped = Path(__file__).parents[2] / "deepspeed_configs" / f"{name}.json"
        backend = {"backend": "deepspeed", "deepspeed_config": str(shipped)}
    results = {kind: trained(kind, folder / kind, checkpointing=True, **backend) for kind in NETWORKS}
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
