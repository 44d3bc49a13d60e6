"""Models that `vqdist train` can train: one entry per model. Options are those of its classes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vqdist.cli.names import Alias
from vqdist.declared import declared
from vqdist.errors import UserError
from vqdist.parts import PATH, import_path, unknown

if TYPE_CHECKING:
    from vqdist.trainers.base import Trainer
    from vqdist.trainers.config import TrainerConfig


@dataclass(frozen=True)
class TrainedModel:
    """A model, its trainer, and how the command line differs from them.

    Attributes:
        title: what it is, in a few words.
        model: `module:class`; imported when it is needed, since torch is.
        trainer: `module:class`.
        config: `module:class` of its configuration, which has the options of `--trainer`.
        no_options: the model's arguments that are for Python only.
        defaults: by option, where the command line has others than the classes.
        aliases: other names of options.
        aliases_title: where these names come from.
        aliases_note: what else people who know these names should know.
        is_measured: whether the command has the defaults of `vqdist.cli.defaults`.
        was_measured: whether runs may have begun with them, which go on with them.
        over_tokenizer: whether it is trained over the codes of a frozen tokenizer, which `--tokenizer` names.
    """

    title: str
    model: str
    trainer: str
    config: str
    no_options: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    aliases_title: str = ""
    aliases_note: str = ""
    is_measured: bool = False
    was_measured: bool = False
    over_tokenizer: bool = False

    def load(self) -> tuple[type, type[Trainer]]:
        """Return the class of the model and the class of its trainer."""
        return load_class(self.model), load_class(self.trainer)

    def options(self) -> tuple[type, type[TrainerConfig]]:
        """Return a class whose constructor has the options, and the configuration. Without torch for vqdist's own."""
        module, name = self.model.split(":")
        model = declared(module, name) if module.startswith("vqdist.") else load_class(self.model)
        return model, load_class(self.config)


def load_class(place: str) -> type:
    """Import a class, `module:class`."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


# where DALLE-pytorch's train_vae has other defaults than its DiscreteVAE
TRAIN_VAE_DEFAULTS = {
    "data.image_size": 128,
    "model.num_tokens": 8192,
    "model.num_layers": 3,
    "model.num_resnet_blocks": 2,
    "model.codebook_dim": 512,
    "model.hidden_dim": 256,
}
TRAIN_VAE_FLAGS = {
    "image_folder": Alias("data.folder"),
    "image_size": Alias("data.image_size"),
    "epochs": Alias("trainer.epochs"),
    "batch_size": Alias("trainer.batch_size", note="of one process and one micro-batch."),
    "learning_rate": Alias("trainer.lr"),
    "lr_decay_rate": Alias(
        "trainer.lr_decay_rate", note="per epoch; train_vae's ticked every 100 iterations of an epoch, however long."
    ),
    "starting_temp": Alias("trainer.starting_temp"),
    "temp_min": Alias("trainer.temp_min"),
    "anneal_rate": Alias(
        "trainer.anneal_rate",
        note="the temperature is exactly max(starting_temp * exp(-anneal_rate * step), temp_min); train_vae "
        "multiplied the temperature that it had already annealed, so it fell far sooner.",
    ),
    "num_images_save": Alias("trainer.num_images_save"),
    "num_tokens": Alias("model.num_tokens"),
    "num_layers": Alias("model.num_layers"),
    "num_resnet_blocks": Alias("model.num_resnet_blocks"),
    "smooth_l1_loss": Alias("model.smooth_l1_loss", value="true"),
    "emb_dim": Alias("model.codebook_dim"),
    "hidden_dim": Alias("model.hidden_dim"),
    "kl_loss_weight": Alias(
        "model.kl_div_loss_weight",
        note="weighs the mean per position, whatever batch and image size; --model.kl_reduction dalle gives "
        "train_vae's sum over batch and positions.",
    ),
    "transparent": Alias("model.channels", value="4"),
    "distributed_backend": Alias(
        "backend",
        words={"dummy": "local", "deepspeed": "deepspeed", "horovod": "horovod"},
        note="dummy is --backend local; horovod is refused, since --backend accelerate does its job.",
    ),
    "deepspeed": Alias("backend", value="deepspeed"),
    "deepspeed_config": Alias("deepspeed_config"),
}

MODELS = {
    "vqgan": TrainedModel(
        title="VQGAN image tokenizer",
        model="vqdist.models.vqgan:VQGanVAE",
        trainer="vqdist.trainers.vqgan:VQGanVAETrainer",
        config="vqdist.trainers.vqgan_config:VQGanTrainerConfig",
        no_options=frozenset(["vgg", "kwargs"]),
        is_measured=True,
    ),
    "dvae": TrainedModel(
        title="discrete VAE image tokenizer, as DALL-E's",
        model="vqdist.models.dvae:DiscreteVAE",
        trainer="vqdist.trainers.dvae:DiscreteVAETrainer",
        config="vqdist.trainers.dvae_config:DiscreteVAETrainerConfig",
        no_options=frozenset(["temperature"]),  # the trainer anneals its own
        defaults=TRAIN_VAE_DEFAULTS,
        aliases=TRAIN_VAE_FLAGS,
        aliases_title="flags of DALL-E's train_vae, under their own names",
        aliases_note="train_vae neither flips images nor holds some back to validate on nor averages the weights; "
        "for the same give --data.augment false --data.valid_frac 0 --trainer.use_ema false.",
    ),
    "vq_ar": TrainedModel(
        title="image tokenizer and autoregressive model, learnt end to end",
        model="vqdist.models.vq_ar:VQImageAutoregressiveAutoencoder",
        trainer="vqdist.trainers.ar:ARTrainer",
        config="vqdist.trainers.ar_config:ARTrainerConfig",
    ),
    "prior": TrainedModel(
        title="transformer over the codes of a trained tokenizer",
        model="vqdist.models.prior:Prior",
        trainer="vqdist.trainers.ar:ARTrainer",
        config="vqdist.trainers.ar_config:ARTrainerConfig",
        no_options=frozenset(["tokenizer"]),
        over_tokenizer=True,
    ),
    "var": TrainedModel(
        title="next-scale transformer (VAR) over a multi-scale tokenizer",
        model="vqdist.models.var:VAR",
        trainer="vqdist.trainers.ar:ARTrainer",
        config="vqdist.trainers.ar_config:ARTrainerConfig",
        no_options=frozenset(["tokenizer"]),
        over_tokenizer=True,
    ),
}


def model_entry(name: str) -> TrainedModel:
    """Return the entry of a model by its name, or of a class of somebody else by its import path.

    Raises:
        UserError: there is no such model, or its class is none that a trainer of vqdist trains.
    """
    if name in MODELS:
        return MODELS[name]
    if not PATH.fullmatch(name):
        raise unknown("model", name, MODELS, "; or give the import path of your own class, my_module.MyModel")
    from vqdist.models.autoregressive import AutoregressiveModel

    found = import_path(name, "model")
    for entry in MODELS.values():
        if inspect.isclass(found) and issubclass(found, load_class(entry.model)):
            place = _place_of(found)
            own = place == entry.model  # of another class nobody knows what it has, and nothing was measured
            is_measured, was_measured = entry.is_measured and own, entry.is_measured and not own
            entry = replace(entry, title=f"{entry.title} ({name})", model=place)
            return replace(entry, is_measured=is_measured, was_measured=was_measured)
    if not inspect.isclass(found) or not issubclass(found, AutoregressiveModel):
        bases = "VQGanVAE, DiscreteVAE or SecondStage"
        raise UserError(f"model {name} is none that vqdist trains; derive it from {bases}")
    over_tokenizer = "tokenizer" in inspect.signature(found).parameters
    return TrainedModel(
        title=f"model of codes ({name})",
        model=_place_of(found),
        trainer="vqdist.trainers.ar:ARTrainer",
        config="vqdist.trainers.ar_config:ARTrainerConfig",
        no_options=frozenset(["tokenizer"]),
        over_tokenizer=over_tokenizer,
    )


def _place_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
