"""The options of training a discrete VAE. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vqdist.errors import UserError
from vqdist.options import option
from vqdist.trainers.config import TrainerConfig

DEFAULT_EPOCHS = 20.0


@dataclass(kw_only=True, frozen=True)
class DiscreteVAETrainerConfig(TrainerConfig):
    """Options of training a discrete VAE: those of every trainer, with DALLE-pytorch's defaults, and the draw's."""

    image_size: int | None = option(None, at_least=1)  # type: ignore[assignment]  # until `check_model` takes the model's
    """Side of the square training images in pixels; by default the model's."""
    epochs: float | None = option(None, above=0, at_most=1e9, free=True)
    """Passes over the training images; 20 where num_train_steps is not given either."""
    batch_size: int = option(8, at_least=1)
    """Images of one micro-batch of one process."""
    lr: float = option(1e-3, at_least=0)
    """Peak learning rate of Adam."""
    lr_schedule: str | dict[str, Any] = option("exponential", part="vqdist.schedules.SCHEDULES")
    """Rate after the warm-up: a name (`exponential` falls by epochs, `wsd` stays and falls at the end), or class_path
    and init_args of a function of the step."""
    num_images_save: int = option(4, at_least=1, free=True)
    """Images in a picture."""
    starting_temp: float = option(1.0, above=0)
    """Temperature of the draw at step 0."""
    temp_min: float = option(0.5, above=0)
    """Lowest temperature."""
    anneal_rate: float = option(1e-6, at_least=0)
    """The temperature at a step is max(starting_temp * exp(-anneal_rate * step), temp_min)."""
    kl_warmup_steps: int = option(0, at_least=0)
    """Steps over which the weight of the KL loss rises linearly to kl_div_loss_weight."""

    def __post_init__(self) -> None:
        if self.num_train_steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", DEFAULT_EPOCHS)  # frozen from here on

    def check_values(self) -> None:
        super().check_values()
        if self.temp_min > self.starting_temp:
            raise UserError(
                f"temp_min {self.temp_min:g} is above starting_temp {self.starting_temp:g}; the temperature falls"
            )
