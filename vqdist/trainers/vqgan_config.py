"""The options of training a VQGAN. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vqdist.errors import UserError
from vqdist.options import is_number, option
from vqdist.parts import Spec
from vqdist.schedules import check_temperature, check_weight, ever_positive, factor_of
from vqdist.trainers.config import TrainerConfig, names_in

PARTS = ("encoder", "quantizer", "decoder")


@dataclass(kw_only=True, frozen=True)
class VQGanTrainerConfig(TrainerConfig):
    """Options of training a VQGAN: those of every trainer, and the two players'."""

    init_from: str | dict[str, Any] | None = option(None)
    """Published file, export or run to begin from: it gives the network, its averaged weights and, where it has one,
    the discriminator. The run records its checksum; the same command resumes the run without it."""
    init_pixel_from: str | dict[str, Any] | None = option(None)
    """For the second stage of a TiTok whose first one init_from gives: the tokenizer whose codes that predicts, a
    MaskGIT-VQGAN, with the decoder that makes the images; a published file, export or run. Recorded likewise."""
    family: str | None = option(None, free=True)
    """Project that the file of init_from is of, by default recognised; see `vqdist convert --help`."""
    peer_config: str | dict[str, Any] | None = option(None, free=True)
    """That project's own configuration of the model, YAML or JSON, for init_from: it says what shapes of tensors do
    not."""
    init_optimizer: bool = option(True, free=True)
    """Take over the optimizers' states of weights of the same name and shape, if init_from is a run; `false` lets the
    optimizers begin anew."""
    trust_code: bool = option(False, free=True)
    """Let init_from name networks that do not come with vqdist; their code is run."""
    freeze: list[str] | str = option(default_factory=list)
    """Parts that stay as they are, as `encoder,quantizer`: of these and `decoder`; a frozen encoder freezes the
    codebook."""
    freeze_codebook: bool | None = option(None)
    """Freeze the codebook, by default where the encoder is frozen; `false` lets it follow a frozen encoder."""
    lr_scale: dict[str, Any] = option(default_factory=dict)
    """Factors of the learning rate of `encoder`, `quantizer` and `decoder`, as {decoder: 0.1}; 1 for the others."""
    discr_lr: float | None = option(None, at_least=0)
    """Peak learning rate of the discriminator; by default the generator's."""
    discr_optimizer: str | dict[str, Any] | None = option(None, part="vqdist.registries.OPTIMIZERS")
    """Optimizer of the discriminator; by default the generator's."""
    discr_adam_betas: list[float] | None = option(None)
    """The discriminator's adam_betas; by default the generator's."""
    discr_weight_decay: float | None = option(None, at_least=0)
    """The discriminator's weight_decay; by default the generator's."""
    discr_lr_schedule: str | dict[str, Any] | None = option(None, part="vqdist.schedules.SCHEDULES")
    """The discriminator's lr_schedule, with the rest in init_args; counts from discriminator_start."""
    discr_lr_warmup_steps: int | None = option(None, at_least=0)
    """Steps from discriminator_start over which the rate of the discriminator rises; by default warmup_steps."""
    discr_max_grad_norm: float | None = option(None, above=0)
    """The discriminator's max_grad_norm."""
    apply_grad_penalty_every: int = option(4, at_least=0)
    """Apply the gradient penalty of the discriminator every so many steps; 0 applies none."""
    grad_penalty_weight: float | dict[str, Any] = option(10.0, at_least=0)
    """Weight of the gradient penalty: a number, or a schedule as {value: 10, start: 1000}."""
    grad_penalty: str = option("unit_norm", one_of=("unit_norm", "r1"))
    """`unit_norm` draws the norm of the gradient at real images to 1, as muse; `r1` draws it to 0: half the weight
    times its square times apply_grad_penalty_every, in the last step of each such interval, as bsq-vit."""
    lecam_weight: float | dict[str, Any] = option(0.0, at_least=0)
    """Weight of LeCAM regularisation in the discriminator's loss, a number or a schedule; 0 for none."""
    lecam: str = option("per_logit", one_of=("per_logit", "of_means"))
    """`per_logit`: as SEED-Voken (IBQ, Open-MAGVIT2), times discr_loss_weight; `of_means`: as 1d-tokenizer (TiTok)."""
    lecam_decay: float = option(0.999, at_least=0, below=1)
    """Decay of LeCAM's moving averages of the mean logits."""
    discr_loss_weight: float | dict[str, Any] = option(1.0, at_least=0)
    """Weight of the discriminator's own loss (not of the gradient penalty), a number or a schedule."""
    discriminator_start: int = option(0, at_least=0)
    """Step at which the discriminator begins to train."""
    discriminator_before_start: str = option("skip", one_of=("skip", "zero_loss"))
    """Until then `skip` leaves it out, as 1d-tokenizer and IBQ; `zero_loss` trains it on zero times its loss, as
    taming, LlamaGen and Open-MAGVIT2: statistics of BatchNorm, averages of LeCAM and the steps of Adam move."""
    update_order: str = option("generator_first", one_of=("generator_first", "discriminator_first"))
    """`discriminator_first` computes the generator's loss with the updated discriminator, as IBQ does."""
    fresh_reconstruction: bool = False
    """Let the discriminator see reconstructions by the updated generator, as taming: a second forward a step."""
    discriminator_warmup_steps: int = option(0, at_least=0)
    """Steps that the discriminator trains before the adversarial loss is switched on."""
    adversarial_ramp_steps: int = option(0, at_least=0)
    """Steps over which the adversarial weight rises linearly to its full value after that."""
    adversarial_weight: float | dict[str, Any] = option(1.0, at_least=0)
    """Weight of the adversarial loss, times the adaptive weight: a number, or a schedule as {value: 0.1, start:
    1000}."""
    adaptive_weight: bool = True
    """Scale the adversarial loss by the ratio of gradient norms at the last layer, as taming does."""
    adaptive_weight_form: str = option("muse", one_of=("muse", "taming"))
    """Denominator of the adaptive weight: `muse` takes at least 1e-8, `taming` adds 1e-4."""
    max_adaptive_weight: float = option(1e4, at_least=0)
    """Upper bound of the adaptive weight."""
    quantizer_weight: float | dict[str, Any] = option(1.0, at_least=0)
    """Weight of the quantizer's losses, taming's codebook_weight: a number, or a schedule as {value: 1, initial: 3,
    ramp_steps: 2000}."""

    quantizer_temperature: float | dict[str, Any] | None = option(None, above=0)
    """Temperature of a quantizer that draws its codes, `gumbel`, in place of the model's: a number, or a schedule as
    {value: 0.9, decay_start: 0, decay_steps: 1000000, decay: cosine, final: 1.0e-6}."""

    def check_values(self) -> None:
        super().check_values()
        if self.quantizer_temperature is not None:
            check_temperature(self.quantizer_temperature, "quantizer_temperature")
        for name in WEIGHTS:
            check_weight(getattr(self, name), name)
        self.check_scales()
        self._check_dependants()
        self.two_decays("discr_adam_betas")
        if self.discr_lr_schedule is not None:
            factor_of(self.discr_schedule, 0, 1000)

    def check_optimizers(self) -> None:
        super().check_optimizers()
        self.discr_optimizer_options.resolved()

    def check_scales(self) -> None:
        """Raise `UserError` for a rate of a part that is unknown or frozen, or that cannot be."""
        for part, scale in self.lr_scale.items():
            if part not in PARTS:
                rest = "; that of the discriminator is discr_lr" if part == "discriminator" else ""
                raise UserError(f"lr_scale names {part!r}, which is no part; give some of {', '.join(PARTS)}{rest}")
            if not is_number(scale) or not 0 <= scale < float("inf"):
                raise UserError(f"lr_scale {scale!r} of {part} is not possible; give a factor of at least 0")
            if part in names_in(self.freeze):
                raise UserError(f"lr_scale names {part}, which is frozen; leave one of the two out")

    def _check_dependants(self) -> None:
        """Raise `UserError` for options that nothing would read, and for an order that cannot be."""
        if self.update_order == "discriminator_first":
            self.refuse_set("fresh_reconstruction", because="update_order is discriminator_first")
            if self.grad_accum_every > 1:
                raise UserError(
                    f"update_order discriminator_first is not possible with grad_accum_every {self.grad_accum_every}: "
                    "both losses are of one reconstruction, and its graph would be kept for all micro-batches; give "
                    "a larger batch_size, or generator_first"
                )
        if not ever_positive(self.lecam_weight):
            self.refuse_set("lecam", "lecam_decay", because="lecam_weight is 0")
        if not self.adaptive_weight:
            self.refuse_set("adaptive_weight_form", "max_adaptive_weight", because="adaptive_weight is false")
        if not ever_positive(self.adversarial_weight):
            of_weight = ("adaptive_weight", "adaptive_weight_form", "max_adaptive_weight")
            of_schedule = ("discriminator_warmup_steps", "adversarial_ramp_steps")
            self.refuse_set(*of_weight, *of_schedule, because="adversarial_weight is 0")
        if not self.apply_grad_penalty_every:
            self.refuse_set("grad_penalty", "grad_penalty_weight", because="apply_grad_penalty_every is 0")
        if self.grad_penalty_weight == 0:
            self.refuse_set("apply_grad_penalty_every", "grad_penalty", because="grad_penalty_weight is 0")
        if self.init_from is not None and self.overwrite:
            raise UserError("overwrite is not possible with init_from; remove the run folder, or give another one")
        if self.init_from is None:
            self.refuse_set(*OF_INIT_FROM, because="init_from is not given")
        if not self.discriminator_start:
            self.refuse_set("discriminator_before_start", because="discriminator_start is 0")

    def follow_before(self, before: dict[str, Any]) -> None:
        for name in STARTS:
            now, record = getattr(self, name), before.get(name)
            if isinstance(now, dict) and isinstance(record, dict) and now.get(OF_LIST) == record.get("sha256"):
                before[name] = {**record, "sha256": now["sha256"], OF_LIST: now[OF_LIST]}

    @property
    def discr_schedule(self) -> Any:
        """The discriminator's own schedule for `learning_rate`, which takes a bare name for one without arguments."""
        given = self.discr_lr_schedule
        if given is None or callable(given):
            return given
        spec = Spec.of(given, "discr_lr_schedule")
        return {"class_path": spec.target, "init_args": spec.init_args}

    @property
    def discr_optimizer_options(self) -> Any:
        """The same of the discriminator's optimizer; the generator's where nothing was said."""
        generator = self.optimizer_options
        given = {"betas": self.discr_adam_betas, "weight_decay": self.discr_weight_decay}
        said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        optimizer = generator.overridden_by(said.keys()) if self.discr_optimizer is None else self.discr_optimizer
        lr = self.lr if self.discr_lr is None else self.discr_lr
        own: dict[str, Any] = {"averaged": False, "scales": {}}  # it is not evaluated
        if self.discr_lr_schedule is not None:
            own["schedule"] = "discr_lr_schedule", self.discr_lr_schedule
        if self.discr_lr_warmup_steps is not None:
            own["warmup_steps"] = self.discr_lr_warmup_steps
        return replace(generator, **said, **own, given=optimizer, lr=lr, said=frozenset(said), prefix="discr_")


STARTS = ("init_from", "init_pixel_from")
OF_LIST = "sha256_of_list"  # in the record of weights in several files, of which it was the only checksum once
# options that are a number or a schedule of the step
WEIGHTS = ("grad_penalty_weight", "lecam_weight", "discr_loss_weight", "adversarial_weight", "quantizer_weight")
# all that the configuration adds to every trainer's is about the discriminator, but for this
OF_INIT_FROM = ("init_pixel_from", "family", "peer_config", "init_optimizer", "trust_code")
OF_THE_GENERATOR = (
    *("quantizer_weight", "quantizer_temperature", "freeze", "freeze_codebook", "lr_scale"),
    *("init_from", *OF_INIT_FROM),
)
_OWN = [field.name for field in fields(VQGanTrainerConfig)[len(fields(TrainerConfig)) :]]
DISCRIMINATOR_OPTIONS = [name for name in _OWN if name not in OF_THE_GENERATOR]
