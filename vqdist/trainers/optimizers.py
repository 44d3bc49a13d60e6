"""Optimizers: factories over groups of weights, by name, by import path or as a function.

A factory gets the groups first, and by name those of `lr`, `betas`, `fused` and `module` that it has a parameter for.
A group is a dictionary: `params`, their `names`, `weight_decay` (0 for biases and gains) and `lr_scale`, by which
`Engine.step` multiplies the rate. A network that wants other rates for parts of itself has a method
`parameter_groups()`, which returns dictionaries with `params` and any of `lr_scale` and `weight_decay`; a submodule
may have one for its own weights. Weights that it leaves out are in the common group.

An optimizer that treats every number of a weight by itself says `elementwise = True`; only such are possible where
each process updates a part of every weight (FSDP2, ZeRO 1, 2, 3).

A schedule-free optimizer, which has methods `train` and `eval`, is its own moving average: a run by it has no other,
and a constant rate after the warm-up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from vqdist.backends.optimizer import averages_itself
from vqdist.errors import UserError
from vqdist.parts import PartSpec, Spec, called
from vqdist.registries import OPTIMIZERS
from vqdist.trainers.library_optimizers import adamw_8bit, schedule_free
from vqdist.trainers.muon import MuonWithAdamW, muon
from vqdist.trainers.parameter_groups import Group, parameter_groups, scaled

__all__ = [  # the shipped ones by the import paths that configurations may say
    "OPTIMIZERS",
    "MuonWithAdamW",
    "OptimizerOptions",
    "adamw_8bit",
    "make_optimizer",
    "muon",
    "schedule_free",
]

OptimizerFactory = Callable[..., Optimizer]

DEFAULT_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class OptimizerOptions:
    """The options of a run that are about the optimizer of one network.

    Attributes:
        given: a name, an import path, both keys of a part, or a factory; None for Adam, or AdamW with weight decay.
        lr: peak learning rate.
        betas: decays of the two moments of Adam and its kin.
        weight_decay: of matrices and kernels.
        fused: one kernel a step; None for "on a CUDA device, where Adam is torch's".
        said: the options among `betas`, `weight_decay`, `fused` that were set for this network: not to read one of
            them is an error. Those that come from another network's are dropped where they are not taken.
        prefix: of the options' names, in messages.
        schedule: the option that says the learning-rate schedule, and its value.
        warmup_steps: of the run.
        averaged: whether the run keeps a moving average of the network.
        scales: factors of the learning rate, by the first part of a weight's name.
    """

    given: PartSpec | OptimizerFactory | None
    lr: float
    betas: Sequence[float] = DEFAULT_BETAS
    weight_decay: float = 0.0
    fused: bool | None = None
    said: frozenset[str] = frozenset()
    prefix: str = ""
    schedule: tuple[str, Any] = ("lr_schedule", "constant")
    warmup_steps: int = 0
    averaged: bool = False
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def option(self) -> str:
        """The option that says which optimizer."""
        return f"{self.prefix}optimizer"

    def name_of(self, what: str) -> str:
        """Return the option that says this argument of an optimizer."""
        return {"betas": f"{self.prefix}adam_betas", "fused": "fused_adam"}.get(what, f"{self.prefix}{what}")

    def resolved(self) -> tuple[OptimizerFactory, dict[str, Any]]:
        """Return the factory and its own arguments; raise `UserError` for what cannot work, whatever the network."""
        factory, arguments = self._factory()
        for name in ("lr", "params"):
            if name in arguments:
                owner = self.name_of("lr") if name == "lr" else "the network"
                raise UserError(f"init_args of {self.option} set {name!r}, which {owner} says; remove it there")
        for name in sorted(self.said):
            if name in arguments:
                raise UserError(
                    f"{self.name_of(name)} and init_args of {self.option} both set {name!r}; leave one of them out"
                )
            if name != "weight_decay" and not _takes(factory, name):  # decay is in the groups: see `make_optimizer`
                self._refuse(name, factory)
        if "weight_decay" in self.said and self.weight_decay and factory is Adam:
            raise UserError(
                f"{self.name_of('weight_decay')} {self.weight_decay:g} is decoupled from the gradient, and that of "
                f"adam is not; give {self.option} adamw, or weight_decay in init_args for a penalty on the loss"
            )
        if factory is schedule_free or averages_itself(factory):
            self.check_own_average(_name(factory), arguments)
        return factory, arguments

    def check_own_average(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Raise `UserError` for what a run has beside an optimizer that averages the weights itself.

        Args:
            name: of the optimizer.
            arguments: of its own.
        """
        if self.averaged:
            raise UserError(
                f"{self.option} {name} averages the weights itself, so a moving average beside it would not be "
                "evaluated; give --trainer.use_ema false"
            )
        option, schedule = self.schedule
        if callable(schedule) or Spec.of(schedule, option).target != "constant":
            raise UserError(
                f"{option} {called(schedule)} is not possible with {self.option} {name}, whose average stands in for "
                f"a schedule; give {option} constant, and warmup_steps for a warm-up"
            )
        if self.warmup_steps and arguments.get("warmup_steps"):
            raise UserError(
                f"warmup_steps and init_args of {self.option} both set a warm-up, and the rate would rise with the "
                "square of the step; leave one of them out"
            )

    def overridden_by(self, said: Set[str]) -> PartSpec | OptimizerFactory | None:
        """Return the optimizer for another network that says these arguments itself."""
        if not isinstance(self.given, Mapping) or not self.given.get("init_args"):
            return self.given
        kept = {name: value for name, value in self.given["init_args"].items() if name not in said}
        return {**self.given, "init_args": kept}

    def _factory(self) -> tuple[OptimizerFactory, dict[str, Any]]:
        if self.given is None:
            return (AdamW if self.weight_decay else Adam), {}
        if isinstance(self.given, Optimizer):
            raise UserError(
                f"{self.option} is a built {type(self.given).__name__}; give its class or a function of the groups of "
                "weights, as lambda groups: MyOptimizer(groups)"
            )
        if callable(self.given):
            return self.given, {}
        spec = Spec.of(self.given, self.option)
        return OPTIMIZERS.factory(spec.target), spec.init_args

    def _refuse(self, name: str, factory: OptimizerFactory) -> None:
        value = getattr(self, name)
        raise UserError(
            f"{self.name_of(name)} {value} does nothing, because {self.option} {_name(factory)} does not take {name}; "
            "leave it out"
        )


def make_optimizer(module: nn.Module, options: OptimizerOptions, device: torch.device) -> Optimizer:
    """Build the optimizer of a network's trainable weights.

    Raises:
        UserError: see `OptimizerOptions.resolved`; or the factory refuses its arguments, or the network's
            `parameter_groups` are not its weights.
    """
    factory, arguments = options.resolved()
    decay = arguments.get("weight_decay", options.weight_decay)
    groups = scaled(parameter_groups(module, decay), options.scales)
    context = {"lr": options.lr, "module": module}
    if options.given is None or "betas" in options.said or tuple(options.betas) != DEFAULT_BETAS:
        context["betas"] = tuple(options.betas)
    fused = _fused(factory, arguments, options.fused, device)
    if fused is not None:
        context["fused"] = fused
    optimizer = _build(factory, groups, arguments, context, options)
    if options.weight_decay and "weight_decay" not in optimizer.defaults and "weight_decay" in options.said:
        options._refuse("weight_decay", factory)
    _check_all_there(groups, optimizer, options)
    if averages_itself(optimizer):
        _begin_training(optimizer, options)
    return optimizer


def _begin_training(optimizer: Any, options: OptimizerOptions) -> None:
    """Let an optimizer that averages the weights itself begin at the weights that are trained."""
    name = type(optimizer).__name__
    options.check_own_average(name, {})  # of a function nothing was known before
    if any(group.get("betas", (1.0,))[0] == 0 for group in optimizer.param_groups):
        raise UserError(
            f"the first of the betas of {options.option} {name} is 0, and the evaluated weights are found by a "
            "division by it; give one above 0, as 0.9"
        )
    if not callable(getattr(optimizer, "train", None)):
        raise UserError(
            f"{options.option} {name} has a method eval and none called train, which takes its weights back"
        )
    optimizer.train()


def _build(
    factory: OptimizerFactory,
    groups: list[Group],
    arguments: dict[str, Any],
    context: dict[str, Any],
    options: OptimizerOptions,
) -> Optimizer:
    if isinstance(arguments.get("betas"), list):
        arguments = {**arguments, "betas": tuple(arguments["betas"])}
    try:
        if options.given is None or callable(options.given):
            known = {name: value for name, value in context.items() if _takes(factory, name)}
            optimizer = OPTIMIZERS.check(factory(groups, **known), _name(factory))
        else:
            spec = Spec.of(options.given, options.option)
            optimizer = OPTIMIZERS.build({"class_path": spec.target, "init_args": arguments}, groups, **context)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # an optimizer's own words for arguments it does not take
        raise UserError(f"{options.option} {_name(factory)}: {' '.join(str(error).split())[:300]}") from error
    if hasattr(factory, "elementwise") and not hasattr(optimizer, "elementwise"):
        cast(Any, optimizer).elementwise = factory.elementwise
    return optimizer


def _fused(factory: Any, arguments: Mapping[str, Any], said: bool | None, device: torch.device) -> bool | None:
    """Return what to say of one kernel a step; None to leave it to the optimizer."""
    if said is not None:
        return said
    exclusive = {"fused", "foreach", "capturable", "differentiable"} & arguments.keys()
    return device.type == "cuda" if factory in (Adam, AdamW) and not exclusive else None


def _check_all_there(groups: list[Group], optimizer: Optimizer, options: OptimizerOptions) -> None:
    """Raise `UserError` if a factory has left weights out: they would never be trained, and nobody would see it."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [
        name
        for group in groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if id(parameter) not in held
    ]
    if left:
        raise UserError(
            f"{options.option} {type(optimizer).__name__} leaves out {len(left)} weights, {left[0]} is the first; an "
            "optimizer takes every weight of the groups that it gets"
        )


def _takes(factory: OptimizerFactory, name: str) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters


def _name(factory: Any) -> str:
    for name, known in OPTIMIZERS.items():
        if known is factory:
            return name
    return getattr(factory, "__name__", type(factory).__name__)
