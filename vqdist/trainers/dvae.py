"""Training a discrete VAE: relaxed codes at a falling temperature, one network, one optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from vqdist.backends import Engine
from vqdist.data.loader import Batch
from vqdist.errors import UserError, an
from vqdist.evaluation import in_eval_mode
from vqdist.metrics import RunningMeans
from vqdist.models.dvae import DiscreteVAE
from vqdist.sampling import gumbel_noise_per_image
from vqdist.schedules import linear_ramp, temperature
from vqdist.seeding import derive_seed
from vqdist.trainers.dvae_config import DiscreteVAETrainerConfig
from vqdist.trainers.feed import mark_last
from vqdist.trainers.tokenizer import TokenizerTrainer


class DiscreteVAETrainer(TokenizerTrainer):
    """Trains a `DiscreteVAE`, as train_vae of DALLE-pytorch does but for its defects.

    The Gumbel noise of an image depends on the seed and on the image's place in the data order only, so the weights do
    not depend on how images are spread over ranks and micro-batches.

    Args:
        vae: the model.
        dataset: see `Trainer`.
        **options: the fields of `DiscreteVAETrainerConfig`.
    """

    config_class = DiscreteVAETrainerConfig
    config: DiscreteVAETrainerConfig
    model: DiscreteVAE

    def __init__(self, vae: DiscreteVAE, **options):
        super().__init__(vae, **options)

    def check_model(self) -> None:
        if not isinstance(self.model, DiscreteVAE):
            raise UserError(f"the model is {an(type(self.model).__name__)}; DiscreteVAETrainer trains a DiscreteVAE")
        if self.config.image_size is None:
            self.config = replace(self.config, image_size=cast(int, self.model.image_size))
        if self.config.image_size != self.model.image_size:
            raise UserError(
                f"image_size {self.config.image_size} is given but the model was built for {self.model.image_size}; "
                "build it with the same, or leave the option out"
            )
        if self.model.kl_div_loss_weight == 0:
            self.config.refuse_set("kl_warmup_steps", because="the model's kl_div_loss_weight is 0")
            if self.model.kl_reduction != "mean":
                raise UserError(
                    f"kl_reduction {self.model.kl_reduction} does nothing, because the model's kl_div_loss_weight is "
                    "0; leave it out, or give a weight"
                )

    def build_engines(self) -> dict[str, Engine]:
        if self.config.compile:
            self.model.encoder.compile()
            self.model.decoder.compile()
        optimizer = self.make_optimizer(self.model)
        self.engine = self.backend.prepare(self.model, optimizer, max_grad_norm=self.config.max_grad_norm)
        return {"vae": self.engine}

    def take(self, batch: Batch) -> tuple[Tensor, range]:
        """Return images (b, c, h, w) on this rank's device, and their places in the data order."""
        return self.to_device(batch.item), batch.places

    def valid_batches(self) -> Iterator[Tensor]:
        return (image for image, _ in super().valid_batches())

    def update(self, micro_batches: list[tuple[Tensor, range]]) -> dict[str, Tensor]:
        """One update of the whole network."""
        means = RunningMeans()
        for (image, places), last in mark_last(micro_batches):
            with self.engine.micro_step(last=last):
                recon, logits = self.engine(
                    image,
                    return_recons=True,
                    return_logits=True,
                    temp=self.temperature,
                    noise=self.noise(places),
                )
                loss, numbers = self.loss(image, recon, logits)
                self.engine.backward(loss)
                means.add(numbers)
                self.codes.add(logits.detach().argmax(dim=1))
        numbers = self.step_engine("vae", means.means(), lr=self.learning_rate(self.config.lr))
        numbers["temperature"] = torch.tensor(self.temperature)
        numbers["lr"] = torch.tensor(self.learning_rate(self.config.lr))
        return numbers

    def loss(self, image: Tensor, recon: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction + weight * KL, and the numbers to log."""
        loss = self.model.reconstruction_loss(recon, image)
        numbers = {"recon_loss": loss}
        if self.kl_weight > 0:
            numbers["kl_loss"] = self.model.kl_loss(logits)
            numbers["kl_weight"] = torch.tensor(self.kl_weight)
            loss = loss + self.kl_weight * numbers["kl_loss"]
        return loss, {"loss": loss, **numbers}

    def noise(self, positions: range) -> Tensor:
        """Gumbel noise (b, h', w', v) of the images at these places of the data order."""
        seeds = (derive_seed("gumbel", self.config.seed, position) for position in positions)
        return gumbel_noise_per_image(self.model.noise_shape(self.model.image_size), seeds, self.device)

    @property
    def temperature(self) -> float:
        """The temperature of the coming update."""
        config = self.config
        return temperature(self.step, start=config.starting_temp, rate=config.anneal_rate, lowest=config.temp_min)

    @property
    def kl_weight(self) -> float:
        """The weight of the KL loss in the coming update."""
        return self.model.kl_div_loss_weight * linear_ramp(self.step, start=0, length=self.config.kl_warmup_steps)

    @torch.no_grad()
    def views(self, images: Tensor, networks: list[nn.Module]) -> list[Tensor]:
        """Original, reconstruction from a relaxed draw, and from the codes, and from the codes of the average."""
        original, *hard = super().views(images, networks)
        vae = cast(DiscreteVAE, networks[0])
        with in_eval_mode(vae):
            soft = vae(images, temp=self.temperature, noise=self.noise(range(-len(images), 0)))
        return [original, vae.denorm(soft).clamp(0, 1), *hard]

    @contextmanager
    def averaged_model(self) -> Iterator[DiscreteVAE]:
        with self.averaged_network() as vae:
            yield cast(DiscreteVAE, vae)
