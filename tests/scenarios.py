"""Small trainings whose outcome tests compare: the same in the test's own process and in spawned ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vqdist import VQGanVAE, VQGanVAETrainer

IMAGE_SIZE = 16

# What tells one backend from another if anything is wrong: everything on, nothing random after the first weights.
EVERYTHING = {
    "max_grad_norm": 0.5,
    "discr_max_grad_norm": 0.5,
    "apply_grad_penalty_every": 2,
    "discriminator_start": 1,
    "lr": 1e-4,
    "discr_lr": 5e-5,
    "warmup_steps": 2,
    "lr_schedule": "cosine",
    "augment": True,
}
# Losses that are linear in the batch: the same for any split of the same images.
LINEAR = {"adaptive_weight": False, "apply_grad_penalty_every": 1, "adversarial_weight": 0.3}

QUANTIZERS = {
    "lfq": {"quantizer": "lfq", "codebook_size": 32},
    "vq": {"quantizer": "vq", "codebook_size": 32, "vq_kwargs": {"codebook_dim": 8, "kmeans_init": False}},
    "fsq": {"quantizer": "fsq", "codebook_size": 256},
    # draws at random: the k-means start and the replacement of dead codes
    "random_vq": {
        "quantizer": "vq",
        "codebook_size": 32,
        "vq_kwargs": {"codebook_dim": 8, "kmeans_init": True, "threshold_ema_dead_code": 2},
    },
}


class SmallFeatures(nn.Module):
    """Stands for VGG16: two fixed random convolutions."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("first", torch.randn(8, 3, 3, 3, generator=generator) * 0.2)
        self.register_buffer("second", torch.randn(8, 8, 3, 3, generator=generator) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.conv2d(x, self.first, stride=2).relu()
        return torch.nn.functional.conv2d(x, self.second, stride=2)


def build_vae(quantizer: str = "lfq", **options) -> VQGanVAE:
    """A small model, equal on every call; `quantizer` is a key of QUANTIZERS or a name that the model knows."""
    torch.manual_seed(11)
    settings = {
        "dim": 16,
        "layers": 2,
        "discr_layers": 2,
        # Gradients that are rounding noise become steps of full length in Adam, so there must be none: groups of one
        # channel cancel the bias before them, and the hinge loss that of the last layer.
        "encdec_resnet_groups": 4,
        "use_hinge_loss": False,
        "vgg": SmallFeatures(),
        **QUANTIZERS.get(quantizer, {"quantizer": quantizer}),
        **options,
    }
    return VQGanVAE(**settings)


def build_trainer(folder: Path, /, *, quantizer: str = "lfq", model: dict | None = None, **options) -> VQGanVAETrainer:
    """A trainer on 64 synthetic images that writes nothing before it is told to."""
    settings = {
        "folder": "synthetic:64",
        "image_size": IMAGE_SIZE,
        "num_train_steps": 4,
        "batch_size": 4,
        "valid_frac": 0.25,
        "num_workers": 0,
        "save_results_every": 0,
        "save_model_every": 0,
        "validate_every": 0,
        "log_every": 1,
        "check_ranks_every": 1,
        "results_folder": str(folder),
        **options,
    }
    return VQGanVAETrainer(build_vae(**{"quantizer": quantizer, **(model or {})}), **settings)


def weights_of(trainer: VQGanVAETrainer) -> dict[str, Tensor]:
    """Every weight and buffer of both networks and of the average, copied."""
    return {name: tensor.detach().clone() for name, tensor in trainer.named_tensors()}


def train_steps(trainer: VQGanVAETrainer, steps: int) -> dict[str, Tensor]:
    """So many optimizer steps, and the weights after them."""
    for _ in range(steps):
        trainer.train_step()
    return weights_of(trainer)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference over all tensors, relative to values above 1, and where it is."""
    assert first.keys() == second.keys()
    pairs = ((name, first[name].double(), second[name].double()) for name in first)
    return max((float(((a - b).abs() / a.abs().clamp(min=1)).max()), name) for name, a, b in pairs)
