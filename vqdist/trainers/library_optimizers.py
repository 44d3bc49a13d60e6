"""Optimizers of libraries that are installed apart: AdamW without a schedule, and AdamW with moments of 8 bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from vqdist.errors import UserError
from vqdist.trainers.parameter_groups import Group


def schedule_free(
    groups: list[Group],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
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
    betas: tuple[float, float] = (0.9, 0.999),
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
