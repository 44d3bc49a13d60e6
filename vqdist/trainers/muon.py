"""Muon for the hidden matrices of a network, with AdamW for its other weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vqdist.errors import UserError
from vqdist.trainers.parameter_groups import Group

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
"""Names of matrices that `muon` leaves to AdamW: those at its input and at its output."""


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
    betas: tuple[float, float] = (0.9, 0.999),
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
