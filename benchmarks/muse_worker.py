"""One side of the comparison with muse-maskgit-pytorch, see `benchmarks.worker`.

Options: {"side": "muse" | "vqdist", "images": FOLDER, "runs": FOLDER, "vgg": "none" | "vgg16", "model": {...},
"trainer": {...}, "threads": N}
"""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from benchmarks.worker import Step, count_parameters, serve

VGG16 = torchvision.models.vgg16


def random_vgg16(**_options) -> nn.Module:
    """torchvision's VGG16 with random weights: the same arithmetic, and nothing to download."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return VGG16(weights=None)


def muse_side(options: dict) -> tuple[Step, dict[str, int]]:
    """muse-maskgit-pytorch's trainer, with every option that costs time at its default."""
    from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer

    # It makes its VGG16 in the first forward, after optimizer and EMA, unless it is given one. Given one, it would
    # also train it and average it: that is not its default, so the constructor is what is replaced.
    torchvision.models.vgg16 = random_vgg16
    vgg = None if options["vgg"] == "vgg16" else nn.Identity()
    vae = VQGanVAE(**options["model"], vgg=vgg)
    never = 10**9  # it saves at step 0 whatever it is told; the warm-up takes that step
    saving = {"save_results_every": never, "save_model_every": never}
    trainer = VQGanVAETrainer(
        vae, folder=options["images"], results_folder=options["runs"], **saving, **options["trainer"]
    )
    return trainer.train_step, _sizes([vae.enc_dec, vae.quantizer], vae.discr)


def vqdist_side(options: dict) -> tuple[Step, dict[str, int]]:
    """vqdist's trainer, with every option that costs time at its default."""
    from benchmarks.common import ONLY_STEPS
    from vqdist import VQGanVAE, VQGanVAETrainer

    vgg = nn.Identity()
    if options["vgg"] == "vgg16":
        vgg = random_vgg16()
        vgg.classifier = nn.Sequential(*vgg.classifier[:-2])  # as the ancestor cuts it
    vae = VQGanVAE(**options["model"], vgg=vgg)
    trainer = VQGanVAETrainer(
        vae, folder=options["images"], results_folder=options["runs"], **ONLY_STEPS, **options["trainer"]
    )
    return trainer.train_step, _sizes([vae.autoencoder], vae.discriminator)


def _sizes(generator: list[nn.Module], discriminator: nn.Module) -> dict[str, int]:
    return {"generator": count_parameters(generator), "discriminator": count_parameters([discriminator])}


if __name__ == "__main__":
    serve({"muse": muse_side, "vqdist": vqdist_side})
