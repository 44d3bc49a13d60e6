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
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from vqdist.backends.optimizer import averages_itself
from vqdist.errors import UserError
from vqdist.options import is_number
from vqdist.parts import PartSpec, Spec, called
from vqdist.registries import OPTIMIZERS

Group = dict[str, Any]
OptimizerFactory = Callable[..., Optimizer]

DEFAULT_BETAS = (0.9, 0.999)
NOT_HIDDEN = (
    "*embed*",
    "*position*",
    "*codebook*",
    "*last_layer*",
    "*head.*",
    "*to_logits*",
    "*to_pixels*",
    "*to_code*",
)
"""Names of matrices that `muon` leaves to AdamW: what goes into a network and what comes out of it."""


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
    groups = _scaled(parameter_groups(module, decay), options.scales)
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


def parameter_groups(module: nn.Module, weight_decay: float) -> list[Group]:
    """Return the groups of a network's trainable weights; matrices and kernels decay, biases and gains do not."""
    names = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups: list[Group] = []
    taken: set[int] = set()
    for owner, part in module.named_modules():
        hook = getattr(part, "parameter_groups", None)
        if not callable(hook) or any(id(parameter) in taken for parameter in part.parameters()):
            continue
        for group in hook():
            given = {**group, "params": [p for p in group["params"] if p.requires_grad]}
            _check_own(given["params"], names, taken, owner)
            taken |= {id(parameter) for parameter in given["params"]}
            groups.append(given)
    rest = [parameter for parameter in module.parameters() if id(parameter) in names and id(parameter) not in taken]
    return [part for group in ({"params": rest}, *groups) for part in _by_decay(group, weight_decay, names)]


def _scaled(groups: list[Group], scales: Mapping[str, float]) -> list[Group]:
    """Split groups by the parts that have a factor of the rate, times what the group says itself."""
    if not scales:
        return groups
    found = []
    for group in groups:
        parts: dict[float, dict[str, list[Any]]] = {}
        for parameter, name in zip(group["params"], group["names"], strict=True):
            scale = group["lr_scale"] * scales.get(name.partition(".")[0], 1.0)
            part = parts.setdefault(scale, {"params": [], "names": []})
            part["params"].append(parameter)
            part["names"].append(name)
        found += [{**group, **part, "lr_scale": scale} for scale, part in parts.items()]
    return found


def _check_own(parameters: Iterable[Tensor], names: Mapping[int, str], taken: set[int], owner: str) -> None:
    for parameter in parameters:
        if id(parameter) not in names:
            raise UserError(f"parameter_groups of {owner or 'the network'} names a weight that is not the network's")
        if id(parameter) in taken:
            raise UserError(f"parameter_groups name {names[id(parameter)]} twice; a weight is in one group")
        taken.add(id(parameter))


def _by_decay(group: Group, weight_decay: float, names: Mapping[int, str]) -> list[Group]:
    """Split a group into the weights that decay and those that do not, where it does not say that itself."""
    decay = group.get("weight_decay", weight_decay)
    parts = [(group["params"], decay)]
    if decay and "weight_decay" not in group:
        matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
        parts = [(matrices, decay), ([parameter for parameter in group["params"] if parameter.ndim <= 1], 0.0)]
    scale = group.get("lr_scale", 1.0)
    if not is_number(scale) or not 0 <= scale < float("inf"):
        raise UserError(f"lr_scale {scale!r} of parameter_groups is not possible; give a factor of at least 0")
    return [
        {
            **group,
            "params": params,
            "names": [names[id(p)] for p in params],
            "weight_decay": own_decay,
            "lr_scale": scale,
        }
        for params, own_decay in parts
        if params
    ]


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


# ------------------------------------------------------------------------------------------------- shipped by name


class MuonWithAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for every other weight: one optimizer with one state.

    A kernel counts as the matrix (output channels, the rest).

    Args:
        hidden: groups of matrices and kernels.
        rest: groups of all else.
        muon: arguments of `torch.optim.Muon`.
        adamw: arguments of `torch.optim.AdamW`.
    """

    elementwise = False

    def __init__(self, hidden: list[Group], rest: list[Group], *, muon: dict[str, Any], adamw: dict[str, Any]):
        self.muon = torch.optim.Muon([torch.zeros(1, 1)], **muon)  # of one matrix at first: it takes no empty list
        self.adamw = AdamW(rest or [torch.zeros(1)], **adamw)
        hidden = [{**self.muon.defaults, **group} for group in hidden]
        super().__init__([*hidden, *rest], {"lr": adamw["lr"], "weight_decay": 0.0})
        self.hidden = self.param_groups[: len(hidden)]
        self.adamw.param_groups = [{**self.adamw.defaults, **group} for group in self.param_groups[len(hidden) :]]
        self.param_groups = [*self.hidden, *self.adamw.param_groups]
        self.state = self.adamw.state = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._step_hidden()
        if self.adamw.param_groups:
            self.adamw.step()

    def _step_hidden(self) -> None:
        """Let Muon update flat views of the kernels; the momentum stays in this optimizer's state."""
        pairs: list[tuple[Tensor, Tensor]] = []
        self.muon.param_groups = []
        for group in self.hidden:
            pairs_of_group = [
                (weight, self._as_matrix(weight)) for weight in group["params"] if weight.grad is not None
            ]
            self.muon.param_groups.append({**group, "params": [matrix for _, matrix in pairs_of_group]})
            pairs += pairs_of_group
        self.muon.step()
        for weight, matrix in pairs:
            self.state[weight] = self.muon.state[matrix]
            if matrix.data_ptr() != weight.data_ptr():  # of a kernel in channels-last order it is a copy
                weight.copy_(matrix.view(weight.shape))
        self.muon.state.clear()

    def _as_matrix(self, weight: Tensor) -> Tensor:
        matrix = weight.detach().flatten(1)
        matrix.grad = cast(Tensor, weight.grad).flatten(1)
        if self.state[weight]:
            self.muon.state[matrix] = self.state[weight]
        return matrix


def muon(
    groups: list[Group],
    *,
    lr: float,
    module: nn.Module | None = None,
    betas: tuple[float, float] = DEFAULT_BETAS,
    eps: float = 1e-8,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr_fn: str = "match_rms_adamw",
    exclude: Sequence[str] = NOT_HIDDEN,
) -> MuonWithAdamW:
    """Return Muon for hidden matrices and kernels with AdamW for the rest.

    Embeddings, heads, biases and gains are AdamW's.

    Args:
        groups: of weights.
        lr: peak learning rate of both: `match_rms_adamw` scales Muon's updates to the size of AdamW's.
        module: the network, whose embeddings are found by their class.
        betas: decays of AdamW's moments.
        eps: of AdamW.
        momentum: of Muon.
        nesterov: whether Muon looks ahead.
        ns_steps: iterations of Newton and Schulz.
        adjust_lr_fn: see `torch.optim.Muon`.
        exclude: patterns of names of further matrices that are AdamW's.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer muon needs torch 2.9 and this is {torch.__version__}; install it, or use adamw")
    modules = () if module is None else module.modules()
    embeddings = {
        id(p) for part in modules if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) for p in part.parameters()
    }

    def is_hidden(name: str, parameter: Tensor) -> bool:
        named = any(fnmatchcase(name, pattern) for pattern in exclude)
        return parameter.ndim > 1 and id(parameter) not in embeddings and not named

    hidden: list[Group] = []
    rest: list[Group] = []
    for group in groups:
        for chosen, wanted in ((hidden, True), (rest, False)):
            pairs = [pair for pair in zip(group["names"], group["params"], strict=True) if is_hidden(*pair) is wanted]
            if pairs:
                names, params = map(list, zip(*pairs, strict=True))
                chosen.append({**group, "names": names, "params": params})
    return MuonWithAdamW(
        hidden,
        rest,
        muon={
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        },
        adamw={"lr": lr, "betas": betas, "eps": eps},
    )


def schedule_free(
    groups: list[Group],
    *,
    lr: float,
    betas: tuple[float, float] = DEFAULT_BETAS,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    foreach: bool = True,
) -> Optimizer:
    """Return AdamW without a schedule (Defazio et al. 2024): it averages the weights itself, and that is evaluated.

    Args:
        groups: of weights.
        lr: learning rate after the warm-up, larger than AdamW's by a few times.
        betas: the weight of the average in what is trained, above 0, and the decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of weights whose group does not say it; decoupled, at the weights that are trained.
        warmup_steps: updates over which the rate rises, where the run's `warmup_steps` are 0.
        r: power of the step, by which an update counts in the average.
        weight_lr_power: power of the highest rate so far, likewise.
        foreach: update all weights together, which takes more memory.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise UserError(
            f"optimizer schedule_free needs schedulefree ({' '.join(str(error).split())[:160]}); install it with pip "
            "install 'vqdist[optimizers]'"
        ) from error
    return AdamWScheduleFree(
        groups,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        foreach=foreach,
    )


def adamw_8bit(
    groups: list[Group],
    *,
    lr: float,
    betas: tuple[float, float] = DEFAULT_BETAS,
    eps: float = 1e-8,
    min_8bit_size: int = 4096,
) -> Optimizer:
    """Return AdamW of bitsandbytes with moments of 8 bits a number (Dettmers et al. 2022).

    Args:
        groups: of weights.
        lr: peak learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        min_8bit_size: weights with fewer numbers keep moments of 32 bits.
    """
    # at import it warns of 4-bit products on a CPU, which nothing here uses
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer adamw_8bit needs bitsandbytes ({' '.join(str(error).split())[:160]}); install it with pip "
            "install 'vqdist[optimizers]'"
        ) from error
    _try_8bit_update(AdamW8bit, groups[0]["params"][0].device)
    optimizer: Any = AdamW8bit(groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, min_8bit_size=min_8bit_size)
    optimizer.elementwise = False  # 256 neighbours share a scale
    return optimizer


def _try_8bit_update(factory: Callable[..., Optimizer], device: torch.device) -> None:
    """Raise `UserError` if bitsandbytes cannot update weights on this device: it says so at the first update only."""
    weight = nn.Parameter(torch.zeros(256, device=device))
    weight.grad = torch.zeros_like(weight)
    try:
        factory([weight], min_8bit_size=1).step()
    except Exception as error:  # a kernel that lacks, or a library of another CUDA version, in whatever words
        raise UserError(
            f"optimizer adamw_8bit cannot be used on {device.type}: bitsandbytes has no update for it "
            f"({' '.join(f'{type(error).__name__}: {error}'.split())[:160]}); install a newer one, or use adamw"
        ) from error
