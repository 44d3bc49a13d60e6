"""The options that every trainer has, and how keywords become a checked configuration.

Configurations import no torch, so that a command line is read and checked at once; only optimizers are checked by it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import os
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from vqdist.data.config import DataConfig
from vqdist.errors import UserError
from vqdist.extractor_names import name_and_file
from vqdist.options import check_options, check_types, default_options, in_one_form, option
from vqdist.parts import Spec, arguments_of, is_same, recorded, unknown
from vqdist.schedules import SCHEDULES, factor_of
from vqdist.trainers.measure import Asked, asked_for, measure_of

PRECISIONS = ("fp32", "bf16")
# options that are arguments of the schedules that vqdist has
SCHEDULE_OPTIONS = {"lr_min_ratio": "min_ratio", "lr_decay_share": "decay_share", "lr_decay_rate": "decay_rate"}
C = TypeVar("C", bound="TrainerConfig")


def names_in(given: Sequence[str]) -> list[str]:
    """Return the names of a list, each of which may be several with commas between them."""
    return [name.strip() for item in given for name in item.split(",")]


@dataclass(kw_only=True, frozen=True)
class TrainerConfig(DataConfig):
    """Options of training: length, batch, optimizer, EMA, and what is saved when."""

    draws_samples: ClassVar[bool] = False  # whether a model of the trainer may draw images

    num_train_steps: int | None = option(None, at_least=1, free=True)
    """Optimizer steps of the whole run; or give epochs."""
    epochs: float | None = option(None, above=0, at_most=1e9, free=True)
    """Passes over the training images, in place of num_train_steps."""
    batch_size: int = option(at_least=1)
    """Images of one micro-batch of one process."""
    lr: float = option(3e-4, at_least=0)
    """Peak learning rate."""
    optimizer: str | dict[str, Any] | None = option(None, part="vqdist.registries.OPTIMIZERS")
    """Optimizer: a name, or class_path and init_args; null is `adam`, or `adamw` with weight_decay."""
    adam_betas: list[float] = option(default_factory=lambda: [0.9, 0.999])
    """Decays of the two moments of Adam and its kin."""
    weight_decay: float = option(0.0, at_least=0)
    """Weight decay (decoupled, of AdamW) of matrices and kernels, not of biases and gains; 0 for none."""
    grad_accum_every: int = option(1, at_least=1)
    """Micro-batches per optimizer step; gradients are exchanged once, after the last."""
    max_grad_norm: float | None = option(None, above=0)
    """Clip gradients to this 2-norm; null does not clip."""
    warmup_steps: int = option(0, at_least=0)
    """Steps over which the learning rate rises linearly to its peak; 0 starts at the peak."""
    lr_schedule: str | dict[str, Any] = option("constant", part="vqdist.schedules.SCHEDULES")
    """Rate after the warm-up: a name (`exponential` falls by epochs, `wsd` stays and falls at the end), or class_path
    and init_args of a function of the step."""
    lr_min_ratio: float = option(0.0, at_least=0, at_most=1)
    """Rate at the end of `cosine`, `linear` and `wsd`, as a share of the peak."""
    lr_decay_share: float = option(0.2, above=0, at_most=1)
    """Share of the steps after the warm-up over which `wsd` decays."""
    lr_decay_rate: float = option(0.98, above=0, at_most=1)
    """Factor per epoch of `exponential`."""
    precision: str = "fp32"
    """`fp32`, or `bf16`: weights and losses in float32, matrix products in bfloat16."""
    tf32: bool = option(True, free=True)
    """TensorFloat-32 matrix products and convolutions on a CUDA device; no effect elsewhere."""
    channels_last: bool | None = option(None, free=True)
    """Channels-last memory layout; by default on a CUDA device only."""
    fused_adam: bool | None = option(None, free=True)
    """Adam as one kernel per step; by default on a CUDA device only."""
    compile: bool = option(False, free=True)
    """Compile encoder and decoder with torch.compile: minutes at the start, faster steps on a GPU."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights; validation and export use it."""
    ema_beta: float = option(0.995, at_least=0, at_most=1)
    """Decay of the moving average after its warm-up."""
    ema_update_after_step: int = option(0, at_least=0)
    """Steps before averaging begins; until then the average equals the weights."""
    ema_update_every: int = option(1, at_least=1)
    """Update the average every so many steps."""
    log_every: int = option(10, at_least=1, free=True)
    """Steps from one log line to the next."""
    validate_every: int = option(1000, at_least=0, free=True)
    """Validate on the whole validation split every so many steps; 0 validates at the end only."""
    validate_with: list[str] | str = option(default_factory=list, free=True)
    """Further measures of validations, as `lpips,rfid`. Of reconstructions: `lpips` (`lpips-alex`, `lpips-squeeze`,
    each with `:FILE` for its weights), `rfid`, `rsfid`, `rkid`, `ris`, `rprecision`, `rrecall`; of a model that draws
    images also of its samples: `fid`, `sfid`, `kid`, `is`, `precision`, `recall`."""
    features: str = option("inception", free=True, own=True)
    """Extractor of rfid, fid and the like in validate_with, as `evaluate` has it: `inception`, `inception_clean`,
    `vgg16`, `dinov2:FILE`, a network of torchvision as `resnet50`, each also with its weights as in `vgg16:FILE`; a
    file with the weights of a known network; or, with trust_features, a TorchScript file."""
    trust_features: bool = option(False, free=True)
    """Let features be a TorchScript file. That is a program: it can read and write your files."""
    reference: str | None = option(None, free=True, own=True)
    """File of statistics to compare with in validate_with, as `evaluate` has it, in place of the images to validate
    on."""
    save_results_every: int = option(100, at_least=0, free=True)
    """Save a picture every so many steps; 0 saves the last one only."""
    num_images_save: int = option(16, at_least=1, free=True)
    """Images in a picture."""
    save_model_every: int = option(1000, at_least=0, free=True)
    """Save a checkpoint every so many steps; 0 saves at the end only."""
    keep_checkpoints: int | None = option(3, at_least=1, free=True)
    """Number of checkpoints to keep, the newest; null keeps all."""
    keep_best: bool | str = option(True, free=True)
    """Keep the weights of the best validation in export_best/, as long as that is not the last: `true` by PSNR, or by
    the likelihood of codes; the name of a number, as `valid/rfid`, by that, and its checkpoint, too."""
    patience: int | None = option(None, at_least=1, free=True)
    """End the run after so many validations without a better one, by the number of keep_best; by default never."""
    on_nonfinite: str = option("raise", one_of=("raise", "skip"), free=True)
    """When losses or gradients are not finite: `raise` ends the run before its next checkpoint; `skip` drops the
    update and goes on, and waits for the device in every step to do so."""
    max_skipped_steps: int = option(10, at_least=1, free=True)
    """Consecutive skipped updates of one network that end the run; for on_nonfinite skip."""
    check_ranks_every: int = option(1000, at_least=0, free=True)
    """Compare weights and codebooks over ranks every so many steps; 0 compares at the start only."""
    results_folder: str = option("./results", free=True, own=True)
    """The run folder: checkpoints, export, pictures, metrics.jsonl. A run that is in it is resumed."""
    allow_config_change: bool | list[str] | str = option(False, free=True)
    """Resume a run although options that shape the result differ from those it began with: true allows all, names
    allow these, as `lr,batch_size` or `model.dropout`."""
    resume: bool = option(True, free=True)
    """Go on with the run that is in the run folder; false refuses a folder with a run."""
    overwrite: bool = option(False, free=True)
    """Remove the run that is in the run folder and begin anew. A launcher's restart of the command goes on with the
    run that it began. A job that is started again as a whole removes that run, unless torchrun has `--rdzv-id` or
    Slurm requeued it."""
    trackers: list[Any] | str = option(default_factory=list, free=True, part="vqdist.registries.SINKS")
    """Also log to `tensorboard`, `wandb` or own sinks (class_path, init_args); metrics.jsonl is always written."""
    backend: str = option("auto", free=True)
    """`local`, `accelerate` or `deepspeed`; `auto` is accelerate under a launcher and local without one."""
    accelerate_kwargs: dict[str, Any] = option(default_factory=dict, free=True)
    """Further arguments of accelerate.Accelerator, for the accelerate backend."""
    deepspeed_config: Any = option(None, free=True, own=True)
    """DeepSpeed JSON file, for the deepspeed backend: what only DeepSpeed decides, as ZeRO stages."""
    dist_timeout: float = option(10.0, above=0, at_most=525_600, free=True, own=True)
    """Minutes that a process waits for another before it gives up; drawing, saving and the FID of validate_with on
    rank 0 must fit in."""
    seed: int = 0
    """Seed of data order, augmentation and training noise, and on the command line of the initial weights."""

    def check(self) -> None:
        """Raise `UserError` for values that cannot work, whatever the machine."""
        self.check_values()
        self.check_optimizers()

    def check_values(self) -> None:
        """Raise `UserError` for what can be said without torch."""
        self.check_length()
        check_options(self)
        factor_of(self.schedule, 0, 1000)
        self._check_view()
        self._check_changes()
        if self.on_nonfinite == "raise":
            self.refuse_set("max_skipped_steps", because="on_nonfinite is raise")
        self.two_decays("adam_betas")
        if self.precision == "fp16":
            raise UserError(
                "precision 'fp16' is not supported: its gradients vanish unless losses are scaled, which no trainer "
                "does; use bf16 (same speed, no scaling) or fp32"
            )
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
        self._check_measures()
        if not self.use_ema:
            self.refuse_set("ema_beta", "ema_update_after_step", "ema_update_every", because="use_ema is false")
        self._check_valid()
        if self.num_workers == 0:
            self.refuse_set("prefetch_factor", because="num_workers is 0")

    def _check_valid(self) -> None:
        if self.valid is not None:
            self.refuse_share()
        elif self.valid_frac == 0:
            self.refuse_set("random_split_seed", "valid_images", because="valid_frac is 0")

    def refuse_share(self) -> None:
        """Raise `UserError` for what is said of a share of the training images, where others are validated on."""
        self.refuse_set("valid_frac", because="images to validate on are given")
        if self.valid_images is None:
            self.refuse_set("random_split_seed", because="all images to validate on are given")

    def _check_measures(self) -> None:
        asked = self.measures
        if not asked.of_features:
            self.refuse_set("features", "trust_features", "reference", because="validate_with names nothing like rfid")
        else:
            name_and_file(self.features)
        if asked.weights is not None:
            _check_file("validate_with lpips", asked.weights)
        if self.reference is not None:
            _check_file("reference", self.reference)
        if self.keep_best is False:
            self.refuse_set("patience", because="keep_best is false")
        if not self.validate_every:
            self.refuse_set("patience", because="validate_every is 0")
        if isinstance(self.keep_best, str):
            measure_of(self.keep_best)

    @property
    def measures(self) -> Asked:
        """The measures that validate_with names."""
        return asked_for(names_in(self.validate_with), draws=self.draws_samples)

    def _check_view(self) -> None:
        crop, ranges = self.view.crop, {"random": ["shorter_side"], "resized": ["crop_area", "crop_aspect"]}
        if not self.augment:
            self.refuse_set("flip", "crop", because="augment is false")
        for name, options in ranges.items():
            if crop != name:
                self.refuse_set(*options, because=f"crop is {crop}")

    def _check_changes(self) -> None:
        names = {f.name for f in dataclasses.fields(self)}
        for name in self.changes_allowed:
            if name.partition(".")[0] not in ("model", "data") and name not in names:
                raise unknown("option", name, names, "; see allow_config_change")

    @property
    def changes_allowed(self) -> frozenset[str]:
        """The options that may differ from those of the run so far, by name; none where all may, or none."""
        given = self.allow_config_change
        words = [] if isinstance(given, bool) else [given] if isinstance(given, str) else given
        names = (name.strip().removeprefix("trainer.") for word in words for name in word.split(","))
        return frozenset(name for name in names if name)

    def may_change(self, *names: str) -> bool:
        """Return whether one of these options may differ from that of the run so far."""
        return self.allow_config_change is True or not self.changes_allowed.isdisjoint(names)

    def follow_before(self, before: dict[str, Any]) -> None:
        """Bring what a run so far recorded of its options into the form of now, where it means the same."""

    def check_optimizers(self) -> None:
        """Raise `UserError` for an optimizer that cannot be made of what is said of it; imports torch."""
        self.optimizer_options.resolved()

    @property
    def optimizer_options(self) -> Any:
        """The options that were given of the optimizer of the network, or of the generator: an `OptimizerOptions`.

        No annotation names the class, because jsonargparse would import it, and torch with it.
        """
        from vqdist.trainers.optimizers import OptimizerOptions

        said = {"betas": "adam_betas", "weight_decay": "weight_decay", "fused": "fused_adam"}
        return OptimizerOptions(
            self.optimizer,
            self.lr,
            self.adam_betas,
            self.weight_decay,
            self.fused_adam,
            said=frozenset(what for what, name in said.items() if self.is_set(name)),
            schedule=("lr_schedule", self.lr_schedule),
            warmup_steps=self.warmup_steps,
            averaged=self.use_ema,
        )

    @property
    def schedule(self) -> Any:
        """The schedule of the learning rate with what the options `lr_...` say of it, for `learning_rate`."""
        if callable(self.lr_schedule):
            self.refuse_set(*SCHEDULE_OPTIONS, because="lr_schedule is a function")
            return self.lr_schedule
        spec = Spec.of(self.lr_schedule, "lr_schedule")
        taken = {parameter.name for parameter in arguments_of(SCHEDULES.factory(spec.target))}
        arguments = dict(spec.init_args)
        for name, argument in SCHEDULE_OPTIONS.items():
            if argument not in taken or spec.target not in SCHEDULES:
                self.refuse_set(name, because=f"lr_schedule is {spec.target}")
            elif argument not in spec.init_args:
                arguments[argument] = getattr(self, name)
            elif self.is_set(name):
                raise UserError(f"{name} and init_args of lr_schedule both set {argument!r}; leave one of them out")
        return {"class_path": spec.target, "init_args": arguments}

    def recorded(self) -> dict[str, Any]:
        """Return the options as config.json holds them; of a part that was given as an object the import path."""
        return {f.name: _recorded(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def is_set(self, name: str) -> bool:
        """Return whether an option was changed from its default."""
        config_class: Any = type(self)
        value = getattr(self, name)
        return (list(value) if isinstance(value, tuple) else value) != _defaults_of(config_class).get(name)

    def check_length(self) -> None:
        """Raise `UserError` unless exactly one option says how long to train."""
        if self.num_train_steps is None and self.epochs is None:
            raise UserError("num_train_steps is not given; say how many optimizer steps to train, or give epochs")
        if self.num_train_steps is not None and self.epochs is not None:
            raise UserError(
                f"num_train_steps {self.num_train_steps} and epochs {self.epochs:g} are both given; leave one out, or "
                "set it to null where a file says it"
            )

    def refuse_set(self, *names: str, because: str) -> None:
        """Raise `UserError` if one of these options was changed from its default, where it would not be read."""
        for name in names:
            if self.is_set(name):
                raise UserError(f"{name} {getattr(self, name)} does nothing, because {because}; leave it out")

    def two_decays(self, name: str) -> None:
        """Raise `UserError` unless this option is the decays of two moments; null passes."""
        value = getattr(self, name)
        if value is not None and (len(value) != 2 or not all(0 <= beta < 1 for beta in value)):
            raise UserError(f"{name} {value} is not possible; give two decays in [0, 1), as [0.9, 0.95]")


def _check_file(option: str, given: str) -> None:
    if not Path(given).expanduser().is_file():
        raise UserError(f"no such file: {given}, which {option} names; check the path")


@functools.cache  # the schedule asks in every step
def _defaults_of(config_class: Any) -> dict[str, Any]:
    return default_options(config_class)


def _recorded(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: _recorded(item) for key, item in value.items()}
    return [_recorded(item) for item in value] if isinstance(value, list | tuple) else recorded(value)


def build_config(config_class: type[C], options: dict[str, Any]) -> C:
    """Make a configuration and check it."""
    config = make_config(config_class, options)
    config.check()
    return config


def make_config(config_class: type[C], options: dict[str, Any]) -> C:
    """Make a configuration; an option that is unknown, missing or of another type is an error that helps.

    A path may stand where a string is expected, a number of numpy for Python's, a bare word for a list of one.
    """
    known = {f.name: f for f in fields(config_class)}
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    required = [name for name, f in known.items() if f.default is f.default_factory is MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        raise UserError(f"these options have no default and were not given: {', '.join(missing)}")
    options = in_one_form(config_class, options)
    check_types(config_class, options)
    return config_class(**options)


def signature_of(
    config_class: type[TrainerConfig], first: str, default: Any = inspect.Parameter.empty
) -> inspect.Signature:
    """Return what `help(Trainer)` shows: the model, the datasets and every option of the configuration.

    Args:
        config_class: has the options.
        first: name of the model.
        default: of the model, where it may be left out.
    """
    positional = inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
    datasets = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("dataset", "valid_dataset")
    ]
    made = {f.name: f.default_factory() for f in fields(config_class) if f.default_factory is not MISSING}
    options = inspect.signature(config_class).parameters.values()
    shown = [one.replace(default=made[one.name]) if one.name in made else one for one in options]
    return inspect.Signature([positional, *datasets, *shown])


def described(config_class: type[TrainerConfig]) -> str:
    """Return the options with what stands below each in the class, as a section of a docstring."""
    words: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        words |= _words_of(base)
    lines = [f"    {f.name}: {words.get(f.name, '')}".rstrip() for f in fields(config_class)]
    return "\n".join(["Options:", *lines])


@functools.cache
def _words_of(config_class: type) -> dict[str, str]:
    """Return the string below each field in the source of a class; none where there is no source."""
    try:
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    except OSError:
        return {}
    words = {}
    for above, below in itertools.pairwise(cast(ast.ClassDef, found).body):
        if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            words[ast.unparse(above.target)] = str(below.value.value)
    return words


def differing_keys(old: dict[str, Any], new: dict[str, Any], free: frozenset[str], prefix: str = "") -> list[str]:
    """Return `key: old -> new` for each difference; nested dictionaries by dotted key.

    Args:
        old, new: configurations, as config.json holds them.
        free: names of the options of the trainer that may change.
        prefix: of the keys.
    """
    lines = []
    for key in sorted({*old, *new}):
        if prefix == "trainer." and key in free:  # an argument of a network may have the name of an option
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, free, f"{prefix}{key}.")
        elif not is_same(before, after):
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
