"""Both stages of TiTok on two real processes, against one process with the same batch.

Run by torchrun, this file is the worker.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun
from scenarios import QUIET, largest_difference, weights_of
from test_field_networks import backend_of
from torch import Tensor

from vqdist import VQGanVAE, VQGanVAETrainer
from vqdist.models.published import write_published

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
BACKENDS = ["accelerate", "zero2", "zero3", "fsdp2"]
STEPS = 3
SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "heads": 2, "num_latent_tokens": 5}
TARGET = {"hidden_channels": 32, "channel_mult": [1, 1, 1], "num_res_blocks": 1}
CRITIC = {"class_path": "patch", "init_args": {"dim": 16, "layers": 2, "groups": 4}}
# plain gradient descent: Adam makes full steps of gradients that are rounding noise
TRAINING: dict[str, Any] = {**QUIET, "num_train_steps": STEPS, "optimizer": "sgd", "lr": 0.02, "batch_size": 4}


def begin(folder: Path) -> Path:
    """Write a small MaskGIT-VQGAN and a first stage for the second to begin with, and return the folder."""
    torch.manual_seed(3)
    model = VQGanVAE(
        encoder={"class_path": "maskgit", "init_args": {**TARGET, "z_channels": 8}},
        decoder={"class_path": "maskgit", "init_args": TARGET},
        quantizer={"class_path": "gradient_vq", "init_args": {"codebook_size": 12, "codebook_loss": "legacy"}},
        use_vgg_and_gan=False,
    )
    with torch.no_grad():  # else the mean of nearly equal vectors goes into group norms, which magnify rounding
        model.quantizer.embedding.weight.mul_(20)
    write_published(model, "maskgit", folder / "target.bin")
    first = first_model(folder)
    with torch.no_grad():
        first.autoencoder.decoder.ffn[2].weight.mul_(50)
    first.image_size = SIZES["image_size"]
    first.save_pretrained(folder / "begun")
    return folder


def first_model(folder: Path) -> VQGanVAE:
    torch.manual_seed(4)
    return VQGanVAE(
        encoder={"class_path": "titok", "init_args": {**SIZES, "token_size": 6, "legacy": True}},
        decoder={"class_path": "titok_proxy", "init_args": {**SIZES, "proxy_codebook_size": 12}},
        quantizer={"class_path": "gradient_vq", "init_args": {"codebook_size": 24, "l2_norm": True}},
        terms=[{"class_path": "proxy_codes", "init_args": {"tokenizer": str(folder / "target.bin")}}],
        use_gan=False,
    )


def first_stage(folder: Path, **options: Any) -> VQGanVAETrainer:
    return VQGanVAETrainer(first_model(folder), **{**TRAINING, "results_folder": str(folder / "first"), **options})


def second_stage(folder: Path, **options: Any) -> VQGanVAETrainer:
    start = {"init_from": str(folder / "begun"), "init_pixel_from": str(folder / "target.bin")}
    start |= {"freeze": ["encoder", "quantizer"], "apply_grad_penalty_every": 0, "adversarial_weight": 0.3}
    start |= {"adaptive_weight": False, "results_folder": str(folder / "second")}
    return VQGanVAETrainer({"perceptual": "none", "discriminator": CRITIC}, **{**TRAINING, **start, **options})


def trained(folder: Path, **options: Any) -> dict[str, dict[str, Tensor]]:
    """Return the weights of both stages after their steps; the second begins with weights that all runs have alike."""
    found, numbers = {}, {}
    for stage, build in (("first", first_stage), ("second", second_stage)):
        trainer = build(folder, **options)
        trainer.train()
        found[stage] = weights_of(trainer)
        numbers[stage] = {name: torch.tensor(float(value)) for name, value in trainer.evaluate().items()}
        trainer.report.close()
    return {**found, "numbers": numbers["first"]}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    return trained(begin(tmp_path_factory.mktemp("one")), batch_size=8)


@pytest.mark.parametrize(
    "backend",
    [name if name == "accelerate" else pytest.param(name, marks=pytest.mark.nightly) for name in BACKENDS],
)
def test_two_ranks_are_one_process(backend, tmp_path, reference):
    torchrun([__file__, str(begin(tmp_path)), backend], timeout=600)
    found = torch.load(tmp_path / "results.pt")
    for stage in ("first", "second"):
        difference, tensor = largest_difference(reference[stage], found[stage])
        assert difference <= 1e-6, f"{stage}: {tensor} differs by {difference}"
    assert {"proxy_loss", "proxy_accuracy", "psnr"} <= found["numbers"].keys()
    for name, value in reference["numbers"].items():
        assert found["numbers"][name] == pytest.approx(float(value), rel=1e-4), name


def main() -> None:
    folder = Path(sys.argv[1])
    weights = trained(folder, **backend_of(sys.argv[2]))
    if os.environ["RANK"] == "0":
        torch.save(weights, folder / "results.pt")


if __name__ == "__main__":
    main()
