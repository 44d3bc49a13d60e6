"""One side of the comparison with DALLE-pytorch, see `benchmarks.worker`.

Options: {"side": "dalle" | "vqdist", "images": FOLDER, "runs": FOLDER, "model": {...}, "trainer": {...}, "threads": N}
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import torch
import torchvision.transforms as T
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.worker import Step, count_parameters, serve


def import_dalle_pytorch() -> ModuleType:
    """Return the package, in its own environment."""
    # taming-transformers, which it imports, asks pytorch-lightning for a module that newer versions have no more
    module = ModuleType("pytorch_lightning.utilities.distributed")
    module.rank_zero_only = lambda function: function
    sys.modules[module.__name__] = module
    import dalle_pytorch

    return dalle_pytorch


def dalle_side(options: dict) -> tuple[Step, dict[str, int]]:
    """Run the loop of DALLE-pytorch's train_vae, whose script is not in its package, without its logs and pictures."""
    settings = options["trainer"]
    vae = import_dalle_pytorch().DiscreteVAE(**options["model"])
    batches = _batches(options["images"], options["model"]["image_size"], settings["batch_size"])
    optimizer = Adam(vae.parameters(), lr=settings["lr"])

    def step() -> None:
        loss, _ = vae(next(batches), return_loss=True, return_recons=True, temp=settings["starting_temp"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, {"vae": count_parameters([vae])}


def _batches(folder: str, image_size: int, batch_size: int) -> Iterator[Tensor]:
    """Its loader: no workers, another order in each epoch."""
    to_rgb = T.Lambda(lambda image: image if image.mode == "RGB" else image.convert("RGB"))
    transform = T.Compose([to_rgb, T.Resize(image_size), T.CenterCrop(image_size), T.ToTensor()])
    loader = DataLoader(ImageFolder(folder, transform), batch_size, shuffle=True)
    while True:
        for images, _ in loader:
            yield images


def vqdist_side(options: dict) -> tuple[Step, dict[str, int]]:
    """vqdist's trainer, with every option that costs time at its default."""
    from benchmarks.common import ONLY_STEPS
    from vqdist import DiscreteVAE, DiscreteVAETrainer

    vae = DiscreteVAE(**options["model"])
    trainer = DiscreteVAETrainer(
        vae,
        folder=options["images"],
        results_folder=options["runs"],
        num_train_steps=10**6,
        **ONLY_STEPS,
        **options["trainer"],
    )
    return trainer.train_step, {"vae": count_parameters([vae])}


if __name__ == "__main__":
    torch.manual_seed(0)
    serve({"dalle": dalle_side, "vqdist": vqdist_side})
