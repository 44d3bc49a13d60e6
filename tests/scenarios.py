"""Small trainings whose outcome tests compare: the same in the test's own process and in spawned ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vqdist import (
    VAR,
    ARTrainer,
    DiscreteVAE,
    DiscreteVAETrainer,
    Prior,
    Tokenizer,
    VQGanVAE,
    VQGanVAETrainer,
    VQImageAutoregressiveAutoencoder,
)
from vqdist.models.pretrained import load_model_of_any_type
from vqdist.trainers.base import Trainer

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
# Backends that keep no weight whole. There is no gradient penalty on them.
SHARDED = ("fsdp2", "zero3")
# Losses that are linear in the batch: the same for any split of the same images.
LINEAR = {"adaptive_weight": False, "apply_grad_penalty_every": 1, "adversarial_weight": 0.3}

# The same for the discrete VAE: all of its losses are linear in the batch, and its noise belongs to the image.
DVAE_EVERYTHING = {
    "max_grad_norm": 0.1,
    "lr": 1e-4,
    "warmup_steps": 2,
    "lr_decay_rate": 0.5,  # 48 images to train on: an epoch is three steps of 16
    "anneal_rate": 0.1,
    "augment": True,
}

# how codes are drawn: options of the model
DVAE_DRAWS = {
    "soft": {"kl_div_loss_weight": 0.1},
    "straight_through": {"straight_through": True},
    "reinmax": {"straight_through": True, "reinmax": True, "smooth_l1_loss": True},
}

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


QUALITY = ("l1", "psnr", "psnr_per_image", "ssim", "ssim_luma")
"""Keys of the quality of reconstructions."""
OF_THE_GAN = ("discr_layers", "use_hinge_loss")


def build_vae(quantizer: str = "lfq", **options) -> VQGanVAE:
    """Return a small model, equal on every call; `quantizer` is a key of QUANTIZERS or a name that the model knows."""
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
        **(
            QUANTIZERS.get(quantizer, {"quantizer": quantizer})
            if isinstance(quantizer, str)
            else {"quantizer": quantizer}
        ),
        **options,
    }
    if not (settings.get("use_gan", True) and settings.get("use_vgg_and_gan", True)):  # then nothing reads these
        settings = {name: value for name, value in settings.items() if name in options or name not in OF_THE_GAN}
    return VQGanVAE(**settings)


# one codebook over the maps of a feature map of 4 x 4
MULTISCALE = {"v_patch_nums": [1, 2, 4], "kmeans_init": False}


def build_dvae(**options) -> DiscreteVAE:
    """Return a small discrete VAE, equal on every call."""
    torch.manual_seed(12)
    settings = {
        "image_size": IMAGE_SIZE,
        "num_tokens": 32,
        "codebook_dim": 16,
        "num_layers": 2,
        "num_resnet_blocks": 1,
        "hidden_dim": 16,
        **options,
    }
    return DiscreteVAE(**settings)


def build_tokenizer(**options) -> Tokenizer:
    """Return a small tokenizer with 16 codes an image, equal on every call; `options` are those of `build_vae`."""
    model = {"vq_kwargs": {"codebook_dim": 8}, **options}
    if model["vq_kwargs"] is not None:
        model["vq_kwargs"] = {"kmeans_init": False, **model["vq_kwargs"]}
    return Tokenizer(build_vae(**{"quantizer": "vq", **model}, use_vgg_and_gan=False), IMAGE_SIZE)


def build_prior(tokenizer: Tokenizer | None = None, **options) -> Prior:
    """Return a small prior with three classes, equal on every call."""
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    torch.manual_seed(13)
    settings = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 32, "num_classes": 3, **options}
    return Prior(tokenizer, **settings)


def build_var(**options) -> VAR:
    """Return a small next-scale transformer of three classes over a tokenizer of three scales, equal on every call."""
    tokenizer = build_tokenizer(
        quantizer="multiscale_vq", codebook_size=32, vq_kwargs=None, quantizer_kwargs=MULTISCALE
    )
    torch.manual_seed(14)
    return VAR(tokenizer, **{"depth": 1, "dim": 32, "heads": 2, "num_classes": 3, **options})


def build_vq_ar(**options) -> VQImageAutoregressiveAutoencoder:
    """Return a small end-to-end model with 16 codes an image, equal on every call."""
    torch.manual_seed(15)
    settings = {"image_size": IMAGE_SIZE, "patch_size": 4, "dim": 32, "codebook_size": 32, "depth": 1, "dim_head": 32}
    return VQImageAutoregressiveAutoencoder(**{**settings, "heads": 2, "channels": 3, **options})


AR_MODELS = {"vq_ar": build_vq_ar, "prior": build_prior, "var": build_var}
# Everything on; the losses are linear in the batch, but for the codebook that vq_ar's own quantizer learns
AR_EVERYTHING = {
    "adam_betas": [0.9, 0.95],
    "weight_decay": 0.05,
    "max_grad_norm": 0.5,
    "lr": 1e-4,
    "warmup_steps": 2,
    "lr_schedule": "cosine",
    "augment": True,
}
AR_PARITY = {
    "vq_ar": AR_EVERYTHING,
    "prior": {**AR_EVERYTHING, "label_dropout": 0.4},
    "var": {**AR_EVERYTHING, "label_dropout": 0.4},
}

# By what a prior is trained on every backend. The last columns are of tests/foreign: an own optimizer.
OPTIMIZERS = {
    "adam": {"optimizer": "adam", "weight_decay": 0.0},
    "adamw": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95], "amsgrad": True}}},
    "sgd": {"optimizer": {"class_path": "sgd", "init_args": {"momentum": 0.9}}, "lr": 1e-2},
    "nadam": {"optimizer": "torch.optim.NAdam"},
    "muon": {"optimizer": "muon"},
    "schedule_free": {"optimizer": "schedule_free", "lr_schedule": "constant", "use_ema": False},
    # most of the small network's weights have moments of 8 bits
    "adamw_8bit": {"optimizer": {"class_path": "adamw_8bit", "init_args": {"min_8bit_size": 512}}},
    "own": {"optimizer": {"class_path": "foreign.my_optimizer.Lion", "init_args": {"cautious_after": 3}}, "lr": 1e-5},
    "counting": {"optimizer": "foreign.my_optimizer.Counting", "lr": 1e-5},
}


def optimizer_options(name: str) -> dict:
    """Everything on, and this optimizer; two micro-batches."""
    return {
        **AR_EVERYTHING,
        "adam_betas": [0.9, 0.999],
        "label_dropout": 0.4,
        "grad_accum_every": 2,
        **OPTIMIZERS[name],
    }


# 64 synthetic images, and nothing is written before it is told to
QUIET = {
    "folder": "synthetic:64",
    "image_size": IMAGE_SIZE,
    "batch_size": 4,
    "valid_frac": 0.25,
    "num_workers": 0,
    "save_results_every": 0,
    "save_model_every": 0,
    "validate_every": 0,
    "log_every": 1,
    "check_ranks_every": 1,
}


def build_trainer(folder: Path, /, *, quantizer: str = "lfq", model: dict | None = None, **options) -> VQGanVAETrainer:
    """Return a trainer of a small VQGAN."""
    vae = build_vae(**{"quantizer": quantizer, **(model or {})})
    return VQGanVAETrainer(vae, **{**QUIET, "num_train_steps": 4, "results_folder": str(folder), **options})


def build_dvae_trainer(folder: Path, /, *, model: dict | None = None, **options) -> DiscreteVAETrainer:
    """Return a trainer of a small discrete VAE; for 4 steps unless `options` say how long."""
    length = {} if options.keys() & {"num_train_steps", "epochs"} else {"num_train_steps": 4}
    return DiscreteVAETrainer(
        build_dvae(**(model or {})), **{**QUIET, **length, "results_folder": str(folder), **options}
    )


def build_ar_trainer(folder: Path, /, kind: str = "prior", *, model: dict | None = None, **options) -> ARTrainer:
    """Return a trainer of a small model that predicts codes; the synthetic images have ten classes."""
    classes = {} if kind == "vq_ar" else {"num_classes": 10}
    settings = {**QUIET, "image_size": None, "num_train_steps": 4, "num_images_save": 4, "results_folder": str(folder)}
    return ARTrainer(AR_MODELS[kind](**{**classes, **(model or {})}), **{**settings, **options})


# what runs to its end on every backend, with an average and without: a model of two players, and one over a tokenizer
WHOLE_RUNS = {
    "vqgan": partial(build_trainer, quantizer="vq", **{**EVERYTHING, "apply_grad_penalty_every": 0}),
    "prior": partial(build_ar_trainer, kind="prior", **AR_PARITY["prior"]),
}


def whole_run(folder: Path, kind: str, *, average: bool, **options) -> Trainer:
    """Run two steps, and all that belongs to the end of a run, by `train()`."""
    length = {"num_train_steps": 2, "use_ema": average}
    trainer = WHOLE_RUNS[kind](folder / f"end_{kind}_{average}", **length, **options)
    assert trainer.train()["images"] == 16
    return trainer


def exported_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Return the tensors of the exported network, and of the tokenizer beside it, as `from_pretrained` loads them."""
    model = load_model_of_any_type(trainer.run_folder / "export")
    tensors = dict(model.saved_part().state_dict())
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        tensors |= {f"tokenizer.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    return tensors


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every weight and buffer of the networks and of the average, copied."""
    return {name: tensor.detach().clone() for name, tensor in trainer.named_tensors()}


def evaluated_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Every weight and buffer of the network that is validated and exported, copied; every rank calls this."""
    with trainer.averaged_network() as network:
        return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def train_steps(trainer: Trainer, steps: int) -> dict[str, Tensor]:
    """So many optimizer steps, and the weights after them."""
    for _ in range(steps):
        trainer.train_step()
    return weights_of(trainer)


def trained_and_evaluated(trainer: Trainer, steps: int) -> dict[str, Tensor]:
    """So many optimizer steps, and the weights after them; those of the evaluated network as `evaluated.NAME`."""
    weights = train_steps(trainer, steps)
    return {**weights, **{f"evaluated.{name}": tensor for name, tensor in evaluated_weights(trainer).items()}}


def unfollowed_buffers(trainer: Trainer) -> list[str]:
    """Return the buffers of the trained network that the average does not hold as they are; every rank calls this.

    Those that the quantizer has averaged are left out, as the moves of `cvq`, which are a part of learnt vectors.
    """
    whole = weights_of(trainer)
    (main, engine), *_ = trainer.engines.items()
    module = getattr(engine, "empty", engine.module)
    quantizer, averaged = getattr(module, "quantizer", None), set()
    if quantizer is not None:
        buffers = quantizer.named_buffers()
        averaged = {f"quantizer.{name}" for name, one in buffers if quantizer.is_averaged(name, one)}
    names = [name for name, _ in module.named_buffers() if name not in averaged]
    return [name for name in names if f"ema.{name}" in whole and not _equal(whole, f"ema.{name}", f"{main}.{name}")]


def _equal(tensors: dict[str, Tensor], one: str, other: str) -> bool:
    return torch.equal(tensors[one], tensors[other])


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference over all tensors, relative to values above 1, and where it is."""
    assert first.keys() == second.keys()
    pairs = ((name, first[name].double(), second[name].double()) for name in first)
    return max((float(((a - b).abs() / a.abs().clamp(min=1)).max()), name) for name, a, b in pairs)


# the discriminators and losses of the field, all of their options on; each is a model's options and a trainer's
ADVERSARIES = {
    # taming's order of updates and weights, but for GroupNorm
    "taming": (
        {"discr_loss": "hinge", "gen_loss": "hinge"},
        {
            "adaptive_weight_form": "taming",
            "fresh_reconstruction": True,
            "discriminator_start": 1,
            "discriminator_before_start": "zero_loss",
            "grad_penalty": "r1",
            "apply_grad_penalty_every": 2,
            "lecam_weight": 0.1,
            "quantizer_weight": {"value": 1.0, "initial": 3.0, "ramp_steps": 3},
        },
    ),
    # SEED-Voken's
    "seed": (
        {"discr_loss": "non_saturating", "gen_loss": "non_saturating"},
        {"update_order": "discriminator_first", "lecam_weight": 1.0, "discr_loss_weight": 0.5, "lecam_decay": 0.5},
    ),
    # 1d-tokenizer's
    "titok": (
        {"discriminator": {"class_path": "blur", "init_args": {"width": 32, "stages": 2, "pool": 3}}},
        {
            "adaptive_weight": False,
            "adversarial_weight": {"value": 0.3, "ramp_steps": 2, "decay_start": 2, "decay_steps": 4},
            "lecam": "of_means",
            "lecam_weight": 1.0,
            "lecam_decay": 0.5,
        },
    ),
    "actnorm": (
        {"discriminator": {"class_path": "patchgan", "init_args": {"width": 8, "layers": 1, "norm": "actnorm"}}},
        {"grad_penalty": "r1", "grad_penalty_weight": 0.01, "apply_grad_penalty_every": 1},
    ),
    # its batch statistics are each rank's own
    "patchgan": (
        {"discriminator": {"class_path": "patchgan", "init_args": {"width": 8, "layers": 1}}, "discr_loss": "hinge"},
        {"lecam_weight": 0.1, "apply_grad_penalty_every": 0},
    ),
}


def build_adversary(folder: Path, /, name: str, **options) -> VQGanVAETrainer:
    """Return a trainer of a small VQGAN with the discriminator and the losses of `ADVERSARIES`."""
    model, training = ADVERSARIES[name]
    width = {"discr_layers": 4} if "discriminator" in model else {}
    shared = {"lr": 1e-2, "max_grad_norm": 0.5, "discr_max_grad_norm": 0.5, "augment": True, "optimizer": "sgd"}
    if "discriminator" not in model:
        model = {**model, "discr_layers": 2}
    return build_trainer(
        folder, quantizer="vq", model={**width, **model, "use_hinge_loss": True}, **{**shared, **training, **options}
    )
