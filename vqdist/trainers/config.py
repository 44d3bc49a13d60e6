"""The options that every trainer has, and how keywords become a checked configuration."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from vqdist.data.config import DataConfig
from vqdist.data.sources.base import Source
from vqdist.errors import UserError
from vqdist.parts import Spec, arguments_of, recorded, unknown
from vqdist.schedules import SCHEDULES, factor_of
from vqdist.trainers.optimizers import OptimizerOptions

PRECISIONS = ("fp32", "bf16")
# options that are arguments of the schedules that vqdist has
SCHEDULE_OPTIONS = {"lr_min_ratio": "min_ratio", "lr_decay_share": "decay_share", "lr_decay_rate": "decay_rate"}
C = TypeVar("C", bound="TrainerConfig")


@dataclass(kw_only=True)
class TrainerConfig(DataConfig):
    """How to train: length, batch, optimizer, EMA, and what is saved when."""

    num_train_steps: int | None = None
    """Optimizer steps of the whole run; or give epochs."""
    epochs: float | None = None
    """Passes over the training images, in place of num_train_steps."""
    batch_size: int
    """Images of one micro-batch of one process."""
    lr: float = 3e-4
    """Peak learning rate."""
    optimizer: str | dict[str, Any] | None = field(
        default=None, metadata={"part": "vqdist.trainers.optimizers.OPTIMIZERS"}
    )
    """Optimizer: a name, or class_path and init_args; null is `adam`, or `adamw` with weight_decay."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decays of the two moments of Adam and its kin."""
    weight_decay: float = 0.0
    """Weight decay (decoupled, of AdamW) of matrices and kernels, not of biases and gains; 0 for none."""
    grad_accum_every: int = 1
    """Micro-batches per optimizer step; gradients are exchanged once, after the last."""
    max_grad_norm: float | None = None
    """Gradients with a larger 2-norm are scaled down to it; null does not clip."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak; 0 starts at the peak."""
    lr_schedule: str | dict[str, Any] = field(default="constant", metadata={"part": "vqdist.schedules.SCHEDULES"})
    """Rate after the warm-up: a name (`exponential` falls by epochs, `wsd` stays and falls at the end), or class_path
    and init_args of a function of the step."""
    lr_min_ratio: float = 0.0
    """Rate at the end of `cosine`, `linear` and `wsd`, as a share of the peak."""
    lr_decay_share: float = 0.2
    """Share of the steps after the warm-up in which `wsd` falls."""
    lr_decay_rate: float = 0.98
    """Factor of `exponential` from one epoch (pass over the training images) to the next."""
    precision: str = "fp32"
    """`fp32`, or `bf16`: weights and losses in float32, matrix products in bfloat16."""
    tf32: bool = True
    """TensorFloat-32 matrix products and convolutions on a CUDA device; no effect elsewhere."""
    channels_last: bool | None = None
    """Channels-last memory layout; by default on a CUDA device only."""
    fused_adam: bool | None = None
    """Adam as one kernel per step; by default on a CUDA device only."""
    compile: bool = False
    """Compile encoder and decoder with torch.compile: minutes at the start, faster steps on a GPU."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights; validation and export use it."""
    ema_beta: float = 0.995
    """Decay of the moving average after its warm-up."""
    ema_update_after_step: int = 0
    """Steps in which the average only copies the weights."""
    ema_update_every: int = 1
    """Steps from one update of the average to the next."""
    log_every: int = 10
    """Steps from one line of numbers to the next."""
    validate_every: int = 1000
    """Steps from one validation to the next, over the whole validation split; 0 validates at the end only."""
    save_results_every: int = 100
    """Steps from one picture to the next; 0 saves none but the last."""
    num_images_save: int = 16
    """Images in a picture."""
    save_model_every: int = 1000
    """Steps from one checkpoint to the next; 0 saves at the end only."""
    keep_checkpoints: int | None = 3
    """Newest checkpoints to keep; null keeps all."""
    on_nonfinite: str = "raise"
    """When losses or gradients are not finite: `raise` ends the run before its next checkpoint; `skip` drops the
    update and goes on, and waits for the device in every step to do so."""
    max_skipped_steps: int = 10
    """End the run after so many skipped updates of one network in a row; for on_nonfinite skip."""
    check_ranks_every: int = 1000
    """Steps from one comparison of weights and codebooks over ranks to the next; 0 compares at the start only."""
    results_folder: str = "./results"
    """The run folder: checkpoints, export, pictures, metrics.jsonl. A run that is in it is resumed."""
    allow_config_change: bool = False
    """Resume a run although options that shape the result differ from those it began with."""
    trackers: list[Any] = field(default_factory=list)
    """Also log to `tensorboard`, `wandb` or own sinks (class_path, init_args); metrics.jsonl is always written."""
    backend: str = "auto"
    """`local`, `accelerate` or `deepspeed`; `auto` is accelerate under a launcher and local without one."""
    accelerate_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of accelerate.Accelerator, for the accelerate backend."""
    deepspeed_config: Any = None
    """DeepSpeed JSON file, for the deepspeed backend: what only DeepSpeed decides, as ZeRO stages."""
    dist_timeout: float = 10.0
    """Minutes that a process waits for another before it gives up; longer than rank 0 takes to draw or save."""
    seed: int = 0
    """Seed of data order, augmentation and training noise; on the command line of the initial weights too."""

    def check(self) -> None:
        """Raise `UserError` for values that cannot work, whatever the machine."""
        self.check_length()
        for name in ("num_train_steps", "batch_size", "image_size", "grad_accum_every", "log_every"):
            self.at_least(name, 1)
        for name in ("num_images_save", "ema_update_every", "prefetch_factor", "keep_checkpoints"):
            self.at_least(name, 1)
        for name in ("warmup_steps", "validate_every", "save_results_every", "save_model_every", "check_ranks_every"):
            self.at_least(name, 0)
        for name in ("lr", "weight_decay", "ema_update_after_step", "num_workers"):
            self.at_least(name, 0)
        self.above_zero("max_grad_norm")
        self.above_zero("dist_timeout", at_most=525_600)  # a year
        self.above_zero("epochs", at_most=1e9)
        self.above_zero("lr_decay_rate", at_most=1)
        self.above_zero("lr_decay_share", at_most=1)
        if not 0 <= self.lr_min_ratio <= 1:
            raise UserError(f"lr_min_ratio {self.lr_min_ratio} is not possible; give a share in [0, 1]")
        factor_of(self.schedule, 0, 1000)
        self.one_of("on_bad_image", ("raise", "skip"))
        self.one_of("on_nonfinite", ("raise", "skip"))
        self.at_least("max_skipped_steps", 1)
        if self.on_nonfinite == "raise":
            self.refuse_set("max_skipped_steps", because="on_nonfinite is raise")
        self.two_decays("adam_betas")
        if not 0 <= self.ema_beta <= 1:
            raise UserError(f"ema_beta {self.ema_beta} is not possible; give a decay in [0, 1]")
        if self.precision == "fp16":
            raise UserError(
                "precision 'fp16' is not supported: its gradients vanish unless losses are scaled, which no trainer "
                "does; use bf16 (same speed, no scaling) or fp32"
            )
        self.one_of("precision", PRECISIONS)
        if not self.use_ema:
            self.refuse_set("ema_beta", "ema_update_after_step", "ema_update_every", because="use_ema is false")

        self.optimizer_options.resolved()

    @property
    def optimizer_options(self) -> OptimizerOptions:
        """What was said of the optimizer of the network, or of the generator."""
        said = {"betas": "adam_betas", "weight_decay": "weight_decay", "fused": "fused_adam"}
        return OptimizerOptions(
            self.optimizer,
            self.lr,
            self.adam_betas,
            self.weight_decay,
            self.fused_adam,
            said=frozenset(what for what, name in said.items() if self.is_set(name)),
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
        for option, argument in SCHEDULE_OPTIONS.items():
            if argument not in taken or spec.target not in SCHEDULES:
                self.refuse_set(option, because=f"lr_schedule is {spec.target}")
            elif argument not in spec.init_args:
                arguments[argument] = getattr(self, option)
            elif self.is_set(option):
                raise UserError(f"{option} and init_args of lr_schedule both set {argument!r}; leave one of them out")
        return {"class_path": spec.target, "init_args": arguments}

    def recorded(self) -> dict[str, Any]:
        """Return the options as config.json holds them; of a part that was given as an object the import path."""
        return {f.name: _recorded(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def is_set(self, name: str) -> bool:
        """Return whether an option was changed from its default."""
        value = getattr(self, name)
        return (list(value) if isinstance(value, tuple) else value) != default_options(type(self)).get(name)

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
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"{name} {getattr(self, name)} does nothing, because {because}; leave it out")

    def at_least(self, name: str, lowest: float) -> None:
        """Raise `UserError` if this option is below `lowest` or infinite; null passes."""
        value = getattr(self, name)
        if value is not None and not lowest <= value < math.inf:
            raise UserError(f"{name} {value} is not possible; it must be at least {lowest:g}{_and_finite(value)}")

    def above_zero(self, name: str, at_most: float = math.inf) -> None:
        """Raise `UserError` if this option is 0 or below, infinite, or above `at_most`; null passes."""
        value = getattr(self, name)
        if value is not None and not (0 < value <= at_most and value < math.inf):
            limit = f" and at most {at_most:g}" if at_most < math.inf else _and_finite(value)
            raise UserError(f"{name} {value} is not possible; it must be above 0{limit}")

    def two_decays(self, name: str) -> None:
        """Raise `UserError` unless this option is the decays of two moments; null passes."""
        value = getattr(self, name)
        if value is not None and (len(value) != 2 or not all(0 <= beta < 1 for beta in value)):
            raise UserError(f"{name} {value} is not possible; give two decays in [0, 1), as [0.9, 0.95]")

    def one_of(self, name: str, choices: tuple[str, ...]) -> None:
        """Raise `UserError` if this option is none of the choices."""
        if getattr(self, name) not in choices:
            raise UserError(f"{name} {getattr(self, name)!r} is not known; choose one of {', '.join(choices)}")


def _recorded(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: _recorded(item) for key, item in value.items()}
    return [_recorded(item) for item in value] if isinstance(value, list | tuple) else recorded(value)


def _and_finite(value: float) -> str:
    return " and finite" if value == math.inf else ""


# What may differ between the first start of a run and its resume without changing what is learnt from here on.
FREE_TO_CHANGE = frozenset(
    [
        *("num_train_steps", "epochs", "results_folder", "allow_config_change", "trackers", "log_every"),
        *("validate_every", "save_results_every", "num_images_save", "save_model_every", "keep_checkpoints"),
        *("check_ranks_every", "folder", "exts", "num_workers", "prefetch_factor", "pin_memory", "on_bad_image"),
        *("backend", "accelerate_kwargs", "deepspeed_config", "dist_timeout"),
        *("tf32", "channels_last", "fused_adam", "compile", "on_nonfinite", "max_skipped_steps"),
    ]
)


def build_config(config_class: type[C], options: dict[str, Any]) -> C:
    """Make and check a configuration; an option that is unknown, missing or of another type is an error that helps.

    A path may stand where a string is expected.
    """
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    for name in options:
        if name not in fields:
            raise unknown("option", name, fields)
    required = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        raise UserError(f"these options have no default and were not given: {', '.join(missing)}")
    options = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    kinds = get_type_hints(config_class)
    for name, value in options.items():
        as_object = (
            isinstance(value, Source) if name == "folder" else callable(value) and "part" in fields[name].metadata
        )
        if not _is_of(value, kinds[name]) and not as_object:
            raise UserError(f"{name} {value!r} is not possible; give {_in_words(kinds[name])}")
    config = config_class(**options)
    config.check()
    return config


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; whole numbers are numbers, but true and false are none."""
    if kind is Any:
        return True
    parts = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_is_of(item, parts[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _in_words(kind: Any) -> str:
    """An annotation as people say it: `int | None` is "a whole number or null"."""
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(kind)))
    if kind is Any:
        return "a name, an import path, or class_path and init_args"
    if get_origin(kind) is list:
        return f"a list, each item {_in_words(get_args(kind)[0])}"
    return words.get(kind, "a dictionary")


def signature_of(config_class: type[TrainerConfig], first: str) -> inspect.Signature:
    """What `help(Trainer)` shows: the model, the dataset and every option of the configuration."""
    positional = inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    dataset = inspect.Parameter("dataset", inspect.Parameter.KEYWORD_ONLY, default=None)
    options = list(inspect.signature(config_class).parameters.values())
    return inspect.Signature([positional, dataset, *options])


def default_options(config_class: type[TrainerConfig]) -> dict[str, Any]:
    """The options that have a default, with it."""
    fields = dataclasses.fields(config_class)
    plain = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return {**plain, **made}


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for everything that differs and is not free to change; nested dictionaries by dotted key."""
    lines = []
    for key in sorted({*old, *new}):
        if key in FREE_TO_CHANGE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
