"""Training a VQGAN: one generator update and, once it has joined, one discriminator update per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqdist import losses
from vqdist.backends import Engine
from vqdist.errors import UserError, an
from vqdist.evaluation import evaluate_proxy
from vqdist.metrics import RunningMeans
from vqdist.models.autoencoder import ForwardPass, VQAutoencoder
from vqdist.models.networks.base import logits_of, logits_of_both, running_statistics
from vqdist.models.proxy import ByTarget, ProxyCodes
from vqdist.models.vqgan import VQGanVAE
from vqdist.objectives.adversarial import LeCam
from vqdist.schedules import ever_positive, linear_ramp, weight_at
from vqdist.trainers.feed import mark_last
from vqdist.trainers.freezing import freeze, frozen_parts
from vqdist.trainers.initial import begin
from vqdist.trainers.initial_optimizer import shapes_of, take_optimizers
from vqdist.trainers.tokenizer import TokenizerTrainer
from vqdist.trainers.vqgan_config import DISCRIMINATOR_OPTIONS, VQGanTrainerConfig


class VQGanVAETrainer(TokenizerTrainer):
    """Trains a `VQGanVAE`; the generator's engine is its autoencoder, the discriminator's its discriminator.

    Args:
        vae: the model. With `init_from` it may be left out, or be arguments of `VQGanVAE` that say how to train, as
            `perceptual` or `discriminator`; a model takes the weights over.
        dataset: see `Trainer`.
        **options: the fields of `VQGanTrainerConfig`.
    """

    config_class = VQGanTrainerConfig
    config: VQGanTrainerConfig
    model: VQGanVAE
    discriminator: Engine | None

    def __init__(self, vae: VQGanVAE | Mapping[str, Any] | None = None, **options):
        self._note: str | None = None  # on the weights that the run begins with
        self._checkpoint: Path | None = None  # of the run that it begins from, as this rank sees it
        super().__init__(cast(VQGanVAE, vae), **options)

    def check_model(self) -> None:
        if self.config.init_from is not None:
            begun = begin(self.model, self.config)
            self.model, self._note, self._checkpoint = begun.model, begun.note, begun.checkpoint
            self.config = replace(self.config, **begun.record)
            record = begun.record["init_from"]
            self.model.begun_from = {**record, "path": Path(record["path"]).name}
        if not isinstance(self.model, VQGanVAE):
            raise UserError(f"the model is {an(type(self.model).__name__)}; VQGanVAETrainer trains a VQGanVAE")
        self.model.check_training_size(self.config.image_size)  # missing weights are found out here
        self.model.record_terms()
        if self.model.discriminator is not None and self.config.adaptive_weight:
            self._require_last_layer()
        if self.model.discriminator is None:
            self.config.refuse_set(*DISCRIMINATOR_OPTIONS, because="the model has no discriminator (use_gan)")
        self._check_temperature()
        self._resolve_frozen_parts()

    def _check_temperature(self) -> None:
        quantizer = self.model.quantizer
        if not hasattr(quantizer, "temperature"):
            name = type(quantizer).__name__
            self.config.refuse_set("quantizer_temperature", because=f"quantizer {name} has no temperature")

    def _resolve_frozen_parts(self) -> None:
        """Put into the configuration, and so into the run folder, which parts are frozen."""
        config = self.config
        frozen = frozen_parts(self.model.autoencoder, config.freeze, config.freeze_codebook)
        if "decoder" in frozen and self.model.discriminator is not None and config.adaptive_weight:
            raise UserError(
                "the decoder is frozen, and its last layer's gradients are what the adaptive weight is made of; give "
                "--trainer.adaptive_weight false, or leave the discriminator out (--model.use_gan false)"
            )
        self.config = replace(config, freeze=frozen)
        self.config.check_scales()  # another part may have frozen one
        for part in config.lr_scale:
            if not any(weight.requires_grad for weight in getattr(self.model.autoencoder, part).parameters()):
                raise UserError(f"lr_scale names {part}, which has no weights that learn by gradient; leave it out")

    def _go_on(self) -> None:
        super()._go_on()
        if self._note is not None:
            self.report.print(self._note)
        if self.config.init_from is not None and self.config.init_optimizer and self.resume.saved < 0:
            lines = take_optimizers(self._checkpoint, self.engines, self._shapes, self.backend, self.run.folder)
            for line in lines:
                self.report.print(line)

    def build_engines(self) -> dict[str, Engine]:
        vae, config = self.model, self.config
        vae.image_size = config.image_size  # what it is trained on, also for who goes on with the model itself
        freeze(vae.autoencoder, config.freeze)
        networks = {"generator": vae.autoencoder, "discriminator": vae.discriminator}
        self._shapes = {name: shapes_of(network) for name, network in networks.items() if network is not None}
        self.last_layer = _ConvShape.of(vae.autoencoder.last_layer)
        if config.compile:
            vae.autoencoder.encoder.compile()
            vae.autoencoder.decoder.compile()
        options = replace(config.optimizer_options, scales=config.lr_scale)
        optimizer = self.make_optimizer(vae.autoencoder, options)
        self.generator = self.backend.prepare(vae.autoencoder, optimizer, max_grad_norm=config.max_grad_norm)
        self.discriminator = None
        engines = {"generator": self.generator}
        if vae.discriminator is not None:
            optimizer = self.make_optimizer(vae.discriminator, config.discr_optimizer_options)
            self.discriminator = engines["discriminator"] = self.backend.prepare(
                vae.discriminator, optimizer, max_grad_norm=config.discr_max_grad_norm
            )
            self._refuse_impossible_penalty(self.discriminator)
            self._refuse_impossible_start(self.discriminator)
            vae.discriminator_is_trained = True
        self.objective = vae.objective()
        self.lecam = self._make_lecam()
        return engines

    def _make_lecam(self) -> LeCam | None:
        config = self.config
        if self.discriminator is None or not ever_positive(config.lecam_weight):
            return None
        return LeCam(cast(Any, config.lecam), config.lecam_decay, self.backend.average, self.device)

    def state_tensors(self) -> dict[str, Tensor]:
        return {} if self.lecam is None else {"lecam_averages": self.lecam.averages}

    def rank_tensors(self) -> dict[str, Tensor]:
        if self.discriminator is None:
            return {}
        statistics = running_statistics(self.discriminator.module)
        return {f"discriminator.{name}": statistic for name, statistic in statistics.items()}

    def _require_last_layer(self) -> None:
        if self.model.autoencoder.last_layer is None:
            raise UserError(
                f"decoder {type(self.model.autoencoder.decoder).__name__} has no last_layer, from whose gradients the "
                "adaptive weight of the adversarial loss is computed; give --trainer.adaptive_weight false, and an "
                "adversarial_weight"
            )
        last = self.model.autoencoder.last_layer
        if type(last).forward is not nn.Conv2d.forward and not hasattr(last, "image_gain"):
            raise UserError(
                f"the last_layer of decoder {type(self.model.autoencoder.decoder).__name__}, {type(last).__name__}, "
                "has a forward of its own, so the adaptive weight would not be that of the image; let it have an "
                "image_gain if it only scales what the convolution gives, or give --trainer.adaptive_weight false"
            )

    def _refuse_impossible_penalty(self, discriminator: Engine) -> None:
        every = self.config.apply_grad_penalty_every
        if every and not discriminator.capabilities.trains_bare:
            raise UserError(
                f"apply_grad_penalty_every {every} is not possible where the discriminator's weights are sharded "
                "(FSDP2, ZeRO 3): the penalty needs gradients of gradients, which do not reach a shard; give "
                "--trainer.apply_grad_penalty_every 0, or use DDP or ZeRO 0, 1, 2"
            )

    def _refuse_impossible_start(self, discriminator: Engine) -> None:
        network = discriminator.module
        if getattr(network, "initialises_itself", False) and not discriminator.capabilities.any_optimizer:
            raise UserError(
                f"discriminator {type(network).__name__} sets weights from its first batch, and {self.backend.title} "
                "keeps the weights elsewhere, so they would be lost; give it norm batch, or use DDP or ZeRO 0"
            )

    def update(self, micro_batches: list[Tensor]) -> dict[str, Tensor]:
        """One generator update and, once it has joined, one discriminator update, in the order of the options."""
        averages = None if self.lecam is None or not self.guard.skip else self.lecam.averages.clone()
        temperature = self._set_temperature()
        if self.trained_discriminator is None:
            numbers = self._generator_alone(micro_batches)
        elif self.config.update_order == "discriminator_first":
            numbers = self._discriminator_first(*micro_batches)
        elif self.config.fresh_reconstruction:
            numbers = self._generator_alone(micro_batches) | self._discriminator_alone(micro_batches)
        else:
            numbers = self._generator_first(micro_batches)
        if self.lecam is not None and averages is not None and self.guard.dropped("discriminator"):
            self.lecam.averages.copy_(averages)
        numbers["lr"] = torch.tensor(self.learning_rate(self.config.lr))
        return numbers | temperature

    def _set_temperature(self) -> dict[str, Tensor]:
        """Give the quantizer the temperature of the coming update, and return it to log."""
        given = self.config.quantizer_temperature
        if given is None:
            return {}
        quantizer: Any = self.model.quantizer
        quantizer.temperature = weight_at(given, self.step)
        return {"temperature": torch.tensor(quantizer.temperature)}

    def _generator_first(self, micro_batches: list[Tensor]) -> dict[str, Tensor]:
        """Update both on the same reconstructions; the generator's loss is of the discriminator before its update."""
        of_generator, of_discriminator = RunningMeans(), RunningMeans()
        for image, last in mark_last(micro_batches):
            recon = cast(Tensor, self._generator_pass(image, of_generator, last=last))
            self._discriminator_pass(image, recon, of_discriminator, last=last)
        return self._step_generator(of_generator) | self._step_discriminator(of_discriminator)

    def _generator_alone(self, micro_batches: list[Tensor]) -> dict[str, Tensor]:
        of_generator = RunningMeans()
        for image, last in mark_last(micro_batches):
            self._generator_pass(image, of_generator, last=last)
        return self._step_generator(of_generator)

    def _discriminator_alone(self, micro_batches: list[Tensor]) -> dict[str, Tensor]:
        """Update the discriminator on reconstructions that the generator makes now."""
        of_discriminator = RunningMeans()
        for image, last in mark_last(micro_batches):
            with torch.no_grad():
                recon = self.generator(image).recon
            self._discriminator_pass(image, recon, of_discriminator, last=last)
        return self._step_discriminator(of_discriminator)

    def _discriminator_first(self, image: Tensor) -> dict[str, Tensor]:
        """Update both on the same reconstructions; the generator's loss is of the discriminator after its update."""
        of_generator, of_discriminator = RunningMeans(), RunningMeans()
        with self.generator.micro_step(last=True):
            out = self.generator(image)
            self._discriminator_pass(image, out.recon.detach(), of_discriminator, last=True)
            numbers = self._step_discriminator(of_discriminator)
            self._generator_backward(image, out, of_generator)
        return self._step_generator(of_generator) | numbers

    def _generator_pass(self, image: Tensor, means: RunningMeans, *, last: bool) -> Tensor | None:
        """Add the generator's gradient of one micro-batch; return the reconstruction, if any, without its graph."""
        with self.generator.micro_step(last=last):
            out = self.generator(image)
            self._generator_backward(image, out, means)
        return None if out.recon is None else out.recon.detach()

    def _generator_backward(self, image: Tensor, out: ForwardPass, means: RunningMeans) -> None:
        loss, numbers = self.generator_loss(image, out)
        self.generator.backward(loss)
        means.add(numbers)
        self.codes.add(out.indices)

    def _discriminator_pass(self, image: Tensor, recon: Tensor, means: RunningMeans, *, last: bool) -> None:
        """Add the discriminator's gradient of one micro-batch."""
        with self.critic.micro_step(last=last):
            loss, numbers = self.discriminator_loss(image, recon)
            self.critic.backward(loss)
            means.add(numbers)

    def _step_generator(self, means: RunningMeans) -> dict[str, Tensor]:
        lr = self.learning_rate(self.config.lr)
        return self.step_engine("generator", means.means(), lr=lr, norm="generator_grad_norm")

    def _step_discriminator(self, means: RunningMeans) -> dict[str, Tensor]:
        lr = self.discr_learning_rate()
        numbers = self.step_engine("discriminator", means.means(), lr=lr, norm="discriminator_grad_norm")
        if self.has_own_schedule:
            numbers["discr_lr"] = torch.tensor(lr)
        return numbers

    def generator_loss(self, image: Tensor, out: ForwardPass) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a scalar to call `backward` on, and the numbers to log.

        The graph is cut at the reconstruction: each term gives its gradient there, the adaptive weight is made of
        these, and the returned surrogate has the combined gradient. So the loss networks run backward once, the
        autoencoder once, and no gradient passes an engine's output twice, which DeepSpeed forbids.
        """
        if out.recon is None:
            return self._loss_without_images(image, out)
        recon = out.recon.detach().to(torch.float32).requires_grad_()
        cut = self.objective.at_the_cut(recon, image, out, self.step)
        gradient, reference, parts = cast(Tensor, cut.gradient), cast(Tensor, cut.reference), cut.parts
        parts["aux_loss"] = out.aux_loss
        weight: float | Tensor = self.scheduled_adversarial_weight()
        if weight > 0 or self.runs_before_its_start:
            parts["adversarial_loss"] = self.model.adversarial_loss(self.critic.frozen(recon))
            adversarial = torch.autograd.grad(parts["adversarial_loss"], recon)[0]
            if self.config.adaptive_weight:
                hidden = cast(Tensor, out.hidden)  # there is one, see `_require_last_layer`
                parts["adaptive_weight"] = self.adaptive_weight(hidden, reference, adversarial)
                weight = weight * parts["adaptive_weight"]
            gradient = gradient + weight * adversarial
            parts["adversarial_weight"] = torch.as_tensor(weight)
        return losses.surrogate(out.recon, gradient, self.weighted_aux_loss(out, parts), cut.feature_loss), parts

    def _loss_without_images(self, image: Tensor, out: ForwardPass) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the same of a network that predicts another tokenizer's codes only: the first stage of TiTok."""
        cut = self.objective.at_the_cut(None, image, out, self.step)
        cut.parts["aux_loss"] = out.aux_loss
        loss = self.weighted_aux_loss(out, cut.parts)
        return loss if cut.feature_loss is None else loss + cut.feature_loss, cut.parts

    def weighted_aux_loss(self, out: ForwardPass, parts: dict[str, Tensor]) -> Tensor:
        """Return the quantizer's loss times its weight, which is logged where it has a schedule."""
        given = self.config.quantizer_weight
        weight = weight_at(given, self.step)
        if isinstance(given, Mapping):
            parts["quantizer_weight"] = torch.tensor(weight)
        return out.aux_loss if weight == 1 else weight * out.aux_loss

    def scheduled_adversarial_weight(self) -> float:
        """Return the scheduled weight of the adversarial loss; 0 where it does not reach the generator."""
        config = self.config
        if self.discriminator is None:
            return 0.0
        start = config.discriminator_start + config.discriminator_warmup_steps
        ramp = linear_ramp(self.step, start=start, length=config.adversarial_ramp_steps)
        return weight_at(config.adversarial_weight, self.step) * ramp

    @property
    def trained_discriminator(self) -> Engine | None:
        """The discriminator's engine, where it is updated in the coming step."""
        return self.discriminator if self.runs_before_its_start or self._has_started else None

    @property
    def runs_before_its_start(self) -> bool:
        """Return whether the discriminator is trained on zero times its loss in the coming step."""
        early = self.config.discriminator_before_start == "zero_loss"
        return self.discriminator is not None and early and not self._has_started

    @property
    def _has_started(self) -> bool:
        return self.step >= self.config.discriminator_start

    def adaptive_weight(self, hidden: Tensor, reference: Tensor, adversarial: Tensor) -> Tensor:
        """|gradient of the reference loss| / |gradient of the adversarial loss| at the last layer's weight (0-d).

        Both gradients are averaged over ranks before their norms are taken: a weight of each rank's own would be a
        different loss from the one that one process computes.
        """
        layer = cast(_ConvShape, self.last_layer)
        gradients = losses.last_layer_grads(hidden, layer.weight_shape, reference, adversarial, **layer.options)
        of_reference, of_adversarial = self.backend.average(layer.gain * gradients)
        form = cast(Any, self.config.adaptive_weight_form)
        return losses.adaptive_weight(
            of_reference, of_adversarial, max_weight=self.config.max_adaptive_weight, form=form
        )

    def discriminator_loss(self, image: Tensor, recon: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss on real and reconstructed images (b, c, h, w), and the numbers to log."""
        penalised = self.is_penalised
        if penalised and self.critic.capabilities.double_backward:
            image = image.detach().requires_grad_()  # its logits serve the loss and the penalty
            real, fake = logits_of(self.critic(image)), logits_of(self.critic(recon.to(image.dtype)))
        else:
            real, fake = logits_of_both(self.critic, self.critic.module, image, recon.to(image.dtype))
        loss = self.model.discriminator_loss(real, fake)
        numbers = {"discr_loss": loss, "real_logits": _mean(real), "fake_logits": _mean(fake)}
        factor = weight_at(self.config.discr_loss_weight, self.step) if self._has_started else 0.0
        loss = loss if factor == 1 else factor * loss
        if self.lecam is not None:
            numbers["lecam_loss"] = self.lecam.loss(real, fake)
            if self.config.lecam == "of_means":  # as in 1d-tokenizer, beside the weighted loss
                factor = 1.0 if self._has_started else 0.0
            loss = loss + factor * weight_at(self.config.lecam_weight, self.step) * numbers["lecam_loss"]
        if penalised:
            numbers["gradient_penalty"] = self.gradient_penalty(real, image)
            loss = loss + numbers["gradient_penalty"]
        return loss, numbers

    @property
    def is_penalised(self) -> bool:
        """Return whether the discriminator's loss of the coming step has a gradient penalty."""
        every = self.config.apply_grad_penalty_every
        last = every - 1 if self.config.grad_penalty == "r1" else 0
        return bool(every) and self._has_started and self.step % every == last

    def gradient_penalty(self, logits: list[Tensor], image: Tensor) -> Tensor:
        """Return the penalty at real images (b, c, h, w), 0-d; it joins the loss, as DDP allows one backward only."""
        config = self.config
        weight = weight_at(config.grad_penalty_weight, self.step)
        weight = weight * config.apply_grad_penalty_every if config.grad_penalty == "r1" else weight
        kind = cast(Any, config.grad_penalty)
        if self.critic.capabilities.double_backward:
            return losses.gradient_penalty_of_logits(logits, image, weight, kind)
        return losses.gradient_penalty(self.critic.module, image, weight, kind)

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
        """True if the discriminator's rate has a schedule or a warm-up of its own."""
        return self.config.discr_lr_schedule is not None or self.config.discr_lr_warmup_steps is not None

    def discr_learning_rate(self) -> float:
        """Return the discriminator's rate: on its own schedule from its first update, or the run's."""
        config = self.config
        return self.learning_rate(
            self.discr_lr,
            schedule=config.discr_schedule,
            warmup_steps=config.discr_lr_warmup_steps,
            start=config.discriminator_start if self.has_own_schedule else 0,
        )

    @property
    def stage_one(self) -> ProxyCodes | None:
        """The term whose tokenizer makes the images of a network that makes none itself; None of any other."""
        if self.model.autoencoder.makes_images:
            return None
        return next((term for term in self.objective if isinstance(term, ProxyCodes)), None)

    def evaluate(self) -> dict[str, float]:
        if self.stage_one is None:
            return super().evaluate()
        with self.averaged_network() as network:
            by_target = ByTarget(cast(VQAutoencoder, network), self.stage_one)
            size = self.config.image_size
            return self.further.of_reconstructions(
                partial(evaluate_proxy, by_target, self.valid_batches(), self.backend, image_size=size)
            )

    def validation_names(self) -> set[str]:
        of_stage_one = set() if self.model.autoencoder.makes_images else {"proxy_loss", "proxy_accuracy"}
        return super().validation_names() | of_stage_one

    def views(self, images: Tensor, networks: list[nn.Module]) -> list[Tensor]:
        if self.stage_one is None:
            return super().views(images, networks)
        return super().views(images, [ByTarget(cast(VQAutoencoder, one), self.stage_one) for one in networks])

    @contextmanager
    def averaged_model(self) -> Iterator[VQGanVAE]:
        with self.averaged_network() as network, self._whole_discriminator() as critic:
            yield self.model.with_network(cast(VQAutoencoder, network), critic)

    def _whole_discriminator(self) -> AbstractContextManager[nn.Module | None]:
        return nullcontext() if self.discriminator is None else self.discriminator.whole()


@dataclass(frozen=True)
class _ConvShape:
    """The shape and options of the last layer: enough to take gradients at its weight without the weight."""

    weight_shape: tuple[int, ...]
    options: dict[str, Any]
    gain: float

    @classmethod
    def of(cls, layer: nn.Conv2d | None) -> _ConvShape | None:
        if layer is None:
            return None
        padding = layer.padding
        if isinstance(padding, str):
            sizes = zip(layer.dilation, layer.kernel_size, strict=True)
            padding = tuple(0 if padding == "valid" else spread * (size - 1) // 2 for spread, size in sizes)
        options = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}
        return cls(tuple(layer.weight.shape), options, getattr(layer, "image_gain", 1.0))


def _mean(logits: list[Tensor]) -> Tensor:
    """Return the mean of a discriminator's logits over outputs, patches and images, in float32, without a gradient."""
    return torch.stack([output.detach().to(torch.float32).mean() for output in logits]).mean()
