"""An own optimizer: Lion (Chen et al. 2023), with a count of its updates in the state and in the groups."""

from __future__ import annotations

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """The sign of a mixture of momentum and gradient is the step.

    Args:
        groups: of weights.
        lr: learning rate.
        betas: of the mixture, and of the momentum.
        cautious_after: updates after which coordinates whose gradient disagrees stay where they are.
    """

    elementwise = True  # each number of a weight by itself: it may be used where weights are cut into parts

    def __init__(self, groups, lr: float = 1e-4, betas=(0.9, 0.99), cautious_after: int = 2):
        defaults = {"lr": lr, "betas": betas, "weight_decay": 0.0, "cautious_after": cautious_after}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group, self.state[weight])

    def _update(self, weight, group, state) -> None:
        if not state:
            state["momentum"], state["updates"] = torch.zeros_like(weight), 0
        mix, keep = group["betas"]
        direction = (state["momentum"] * mix + weight.grad * (1 - mix)).sign()
        if state["updates"] >= group["cautious_after"]:
            direction = direction * (direction * weight.grad > 0)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction * group["lr"])
        state["momentum"].mul_(keep).add_(weight.grad, alpha=1 - keep)
        state["updates"] += 1


class Counting(Lion):
    """The same with its count in the group of weights, where ZeRO 3 would count several times a step."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["updates"] = group.get("updates", 0) + 1
