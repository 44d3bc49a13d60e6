"""Training a VQGAN: one generator update and, once it has joined, one discriminator update per step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqdist import losses
from vqdist.backends import Engine
from vqdist.errors import UserError
from vqdist.metrics import RunningMeans
from vqdist.models.autoencoder import ForwardPass, VQAutoencoder
from vqdist.models.networks.base import halves, logits_of
from vqdist.models.vqgan import VQGanVAE
from vqdist.options import option
from vqdist.parts import Spec
from vqdist.schedules import factor_of, linear_ramp
from vqdist.trainers.base import mark_last
from vqdist.trainers.config import TrainerConfig
from vqdist.trainers.optimizers import OptimizerOptions
from vqdist.trainers.tokenizer import TokenizerTrainer


@dataclass(kw_only=True, frozen=True)
class VQGanTrainerConfig(TrainerConfig):
    """How to train a VQGAN: the options of every trainer, and the two players'."""

    discr_lr: float | None = option(None, at_least=0)
    """Peak learning rate of the discriminator; by default the generator's."""
    discr_optimizer: str | dict[str, Any] | None = option(None, part="vqdist.registries.OPTIMIZERS")
    """As optimizer, for the discriminator; by default the generator's."""
    discr_adam_betas: list[float] | None = option(None)
    """As adam_betas, for the discriminator; by default the generator's."""
    discr_weight_decay: float | None = option(None, at_least=0)
    """As weight_decay, for the discriminator; by default the generator's."""
    discr_lr_schedule: str | dict[str, Any] | None = option(None, part="vqdist.schedules.SCHEDULES")
    """As lr_schedule, with the rest in init_args, for the discriminator; counts from discriminator_start."""
    discr_lr_warmup_steps: int | None = option(None, at_least=0)
    """Steps from discriminator_start over which the rate of the discriminator rises; by default warmup_steps."""
    discr_max_grad_norm: float | None = option(None, above=0)
    """As max_grad_norm, for the discriminator."""
    apply_grad_penalty_every: int = option(4, at_least=0)
    """Steps from one gradient penalty of the discriminator to the next; 0 applies none."""
    grad_penalty_weight: float = option(10.0, at_least=0)
    """Weight of the gradient penalty."""
    discriminator_start: int = option(0, at_least=0)
    """Step at which the discriminator begins to train."""
    discriminator_warmup_steps: int = option(0, at_least=0)
    """Steps that the discriminator trains alone before its loss reaches the generator."""
    adversarial_ramp_steps: int = option(0, at_least=0)
    """Steps over which the adversarial weight then rises linearly to its full value."""
    adversarial_weight: float = option(1.0, at_least=0)
    """Weight of the adversarial loss, times the adaptive weight."""
    adaptive_weight: bool = True
    """Make the adversarial loss move the last layer as much as the perceptual (or else reconstruction) loss does."""
    max_adaptive_weight: float = option(1e4, at_least=0)
    """Upper bound of the adaptive weight."""

    def check(self) -> None:
        super().check()
        self.two_decays("discr_adam_betas")
        self.discr_optimizer_options.resolved()
        if self.discr_lr_schedule is not None:
            factor_of(self.discr_schedule, 0, 1000)

    @property
    def discr_schedule(self) -> Any:
        """The discriminator's own schedule for `learning_rate`, which takes a bare name for one without arguments."""
        given = self.discr_lr_schedule
        if given is None or callable(given):
            return given
        spec = Spec.of(given, "discr_lr_schedule")
        return {"class_path": spec.target, "init_args": spec.init_args}

    @property
    def discr_optimizer_options(self) -> OptimizerOptions:
        """What was said of the discriminator's optimizer; the generator's where nothing was."""
        generator = self.optimizer_options
        given = {"betas": self.discr_adam_betas, "weight_decay": self.discr_weight_decay}
        said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        optimizer = generator.overridden_by(said.keys()) if self.discr_optimizer is None else self.discr_optimizer
        lr = self.lr if self.discr_lr is None else self.discr_lr
        own: dict[str, Any] = {"averaged": False}  # it is not evaluated
        if self.discr_lr_schedule is not None:
            own["schedule"] = "discr_lr_schedule", self.discr_lr_schedule
        if self.discr_lr_warmup_steps is not None:
            own["warmup_steps"] = self.discr_lr_warmup_steps
        return replace(generator, **said, **own, given=optimizer, lr=lr, said=frozenset(said), prefix="discr_")


# all that the configuration adds to every trainer's is about the discriminator
DISCRIMINATOR_OPTIONS = [f.name for f in fields(VQGanTrainerConfig)[len(fields(TrainerConfig)) :]]


class VQGanVAETrainer(TokenizerTrainer):
    """Trains a `VQGanVAE`; the generator's engine is its autoencoder, the discriminator's its discriminator.

    Args:
        vae: the model.
        dataset: see `Trainer`.
        **options: the fields of `VQGanTrainerConfig`.
    """

    config_class = VQGanTrainerConfig
    config: VQGanTrainerConfig
    model: VQGanVAE
    discriminator: Engine | None

    def __init__(self, vae: VQGanVAE, **options):
        super().__init__(vae, **options)

    def check_model(self) -> None:
        if not isinstance(self.model, VQGanVAE):
            raise UserError(f"the model is a {type(self.model).__name__}; VQGanVAETrainer trains a VQGanVAE")
        self.model.check_training_size(self.config.image_size)  # missing weights are found out here
        if self.model.discriminator is not None and self.config.adaptive_weight:
            self._require_last_layer()
        if self.model.discriminator is None:
            self.config.refuse_set(*DISCRIMINATOR_OPTIONS, because="the model has no discriminator (use_gan)")

    def build_engines(self) -> dict[str, Engine]:
        vae, config = self.model, self.config
        vae.image_size = config.image_size  # what it is trained on, also for who goes on with the model itself
        self.last_layer = _ConvShape.of(vae.autoencoder.last_layer)
        if config.compile:
            vae.autoencoder.encoder.compile()
            vae.autoencoder.decoder.compile()
        optimizer = self.make_optimizer(vae.autoencoder)
        self.generator = self.backend.prepare(vae.autoencoder, optimizer, max_grad_norm=config.max_grad_norm)
        self.discriminator = None
        engines = {"generator": self.generator}
        if vae.discriminator is not None:
            optimizer = self.make_optimizer(vae.discriminator, config.discr_optimizer_options)
            self.discriminator = engines["discriminator"] = self.backend.prepare(
                vae.discriminator, optimizer, max_grad_norm=config.discr_max_grad_norm
            )
            self._refuse_impossible_penalty(self.discriminator)
        self.objective = vae.objective()
        return engines

    def _require_last_layer(self) -> None:
        if self.model.autoencoder.last_layer is None:
            raise UserError(
                f"decoder {type(self.model.autoencoder.decoder).__name__} has no last_layer, from whose gradients the "
                "adaptive weight of the adversarial loss is computed; give --trainer.adaptive_weight false, and an "
                "adversarial_weight"
            )

    def _refuse_impossible_penalty(self, discriminator: Engine) -> None:
        every = self.config.apply_grad_penalty_every
        if every and not discriminator.capabilities.trains_bare:
            raise UserError(
                f"apply_grad_penalty_every {every} is not possible where the discriminator's weights are sharded "
                "(FSDP2, ZeRO 3): the penalty needs gradients of gradients, which do not reach a shard; give "
                "--trainer.apply_grad_penalty_every 0, or use DDP or ZeRO 0, 1, 2"
            )

    def update(self, micro_batches: list[Tensor]) -> dict[str, Tensor]:
        """One generator update and, once it has joined, one discriminator update."""
        generator = self.generator
        discriminator = self.discriminator if self.step >= self.config.discriminator_start else None
        of_generator, of_discriminator = RunningMeans(), RunningMeans()
        for image, last in mark_last(micro_batches):
            with generator.micro_step(last=last):
                out = generator(image)
                loss, numbers = self.generator_loss(image, out)
                generator.backward(loss)
                of_generator.add(numbers)
                self.codes.add(out.indices)
            if discriminator is not None:
                with discriminator.micro_step(last=last):
                    loss, numbers = self.discriminator_loss(image, out.recon.detach())
                    discriminator.backward(loss)
                    of_discriminator.add(numbers)
        lr = self.learning_rate(self.config.lr)
        numbers = self.step_engine("generator", of_generator.means(), lr=lr, norm="generator_grad_norm")
        if discriminator is not None:
            discr_lr = self.discr_learning_rate()
            norm = "discriminator_grad_norm"
            numbers |= self.step_engine("discriminator", of_discriminator.means(), lr=discr_lr, norm=norm)
            if self.has_own_schedule:
                numbers["discr_lr"] = torch.tensor(discr_lr)
        return {**numbers, "lr": torch.tensor(lr)}

    def generator_loss(self, image: Tensor, out: ForwardPass) -> tuple[Tensor, dict[str, Tensor]]:
        """What to call `backward` on, and the numbers to log.

        The graph is cut at the reconstruction: each term gives its gradient there, the adaptive weight is made of
        these, and the returned surrogate has the combined gradient. So the loss networks run backward once, the
        autoencoder once, and no gradient passes an engine's output twice, which DeepSpeed forbids.
        """
        recon = out.recon.detach().to(torch.float32).requires_grad_()
        gradient, reference, feature_loss, parts = self.objective.at_the_cut(recon, image, out)
        parts["aux_loss"] = out.aux_loss
        weight: float | Tensor = self.scheduled_adversarial_weight()
        if weight > 0:
            parts["adversarial_loss"] = self.model.adversarial_loss(self.critic.frozen(recon))
            adversarial = torch.autograd.grad(parts["adversarial_loss"], recon)[0]
            if self.config.adaptive_weight:
                hidden = cast(Tensor, out.hidden)  # there is one, see `_require_last_layer`
                parts["adaptive_weight"] = self.adaptive_weight(hidden, reference, adversarial)
                weight = weight * parts["adaptive_weight"]
            gradient = gradient + weight * adversarial
            parts["adversarial_weight"] = torch.as_tensor(weight)
        return losses.surrogate(out.recon, gradient, out.aux_loss, feature_loss), parts

    def scheduled_adversarial_weight(self) -> float:
        """What the schedule says of the adversarial loss at this step; 0 where it does not reach the generator."""
        config = self.config
        if self.discriminator is None:
            return 0.0
        start = config.discriminator_start + config.discriminator_warmup_steps
        return config.adversarial_weight * linear_ramp(self.step, start=start, length=config.adversarial_ramp_steps)

    def adaptive_weight(self, hidden: Tensor, reference: Tensor, adversarial: Tensor) -> Tensor:
        """|gradient of the reference loss| / |gradient of the adversarial loss| at the last layer's weight (0-d).

        Both gradients are averaged over ranks before their norms are taken: a weight of each rank's own would be a
        different loss from the one that one process computes.
        """
        layer = cast(_ConvShape, self.last_layer)
        gradients = losses.last_layer_grads(hidden, layer.weight_shape, reference, adversarial, **layer.options)
        of_reference, of_adversarial = self.backend.average(gradients)
        return losses.adaptive_weight(of_reference, of_adversarial, max_weight=self.config.max_adaptive_weight)

    def discriminator_loss(self, image: Tensor, recon: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on real and reconstructed images (b, c, h, w), and the numbers to log."""
        every = self.config.apply_grad_penalty_every
        penalised = bool(every) and self.step % every == 0
        if penalised and self.critic.capabilities.double_backward:
            image = image.detach().requires_grad_()  # its logits serve the loss and the penalty
            real, fake = logits_of(self.critic(image)), logits_of(self.critic(recon.to(image.dtype)))
        else:
            real, fake = halves(self.critic(torch.cat([image, recon.to(image.dtype)])))
        loss = self.model.discriminator_loss(real, fake)
        numbers = {"discr_loss": loss, "real_logits": _mean(real), "fake_logits": _mean(fake)}
        if penalised:
            numbers["gradient_penalty"] = self.gradient_penalty(real, image)
            loss = loss + numbers["gradient_penalty"]
        return loss, numbers

    def gradient_penalty(self, logits: list[Tensor], image: Tensor) -> Tensor:
        """The penalty at real images (b, c, h, w), 0-d; added to the loss, as DDP allows one backward only."""
        weight = self.config.grad_penalty_weight
        if self.critic.capabilities.double_backward:
            return losses.gradient_penalty_of_logits(logits, image, weight)
        return losses.gradient_penalty(self.critic.module, image, weight)

    @property
    def critic(self) -> Engine:
        """The discriminator's engine, where there is one."""
        return cast(Engine, self.discriminator)

    @property
    def discr_lr(self) -> float:
        """The discriminator's peak learning rate."""
        return self.config.lr if self.config.discr_lr is None else self.config.discr_lr

    @property
    def has_own_schedule(self) -> bool:
        """Whether the discriminator's rate has a schedule or a warm-up of its own."""
        return self.config.discr_lr_schedule is not None or self.config.discr_lr_warmup_steps is not None

    def discr_learning_rate(self) -> float:
        """The discriminator's rate in the coming update: on its own schedule from its first update, or the run's."""
        config = self.config
        return self.learning_rate(
            self.discr_lr,
            schedule=config.discr_schedule,
            warmup_steps=config.discr_lr_warmup_steps,
            start=config.discriminator_start if self.has_own_schedule else 0,
        )

    @contextmanager
    def averaged_model(self) -> Iterator[VQGanVAE]:
        with self.averaged_network() as network:
            yield self.model.with_network(cast(VQAutoencoder, network))


@dataclass(frozen=True)
class _ConvShape:
    """What must be known of the last layer to take gradients at its weight without the weight."""

    weight_shape: tuple[int, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, layer: nn.Conv2d | None) -> _ConvShape | None:
        if layer is None:
            return None
        padding = layer.padding
        if isinstance(padding, str):
            sizes = zip(layer.dilation, layer.kernel_size, strict=True)
            padding = tuple(0 if padding == "valid" else spread * (size - 1) // 2 for spread, size in sizes)
        options = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}
        return cls(tuple(layer.weight.shape), options)


def _mean(logits: list[Tensor]) -> Tensor:
    """The mean over outputs, patches and images, in float32, without a gradient: what is logged of a discriminator."""
    return torch.stack([output.detach().to(torch.float32).mean() for output in logits]).mean()
