"""Parts of a network that a run leaves as they are: no gradient, no update, no statistics, no codebook that moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from vqdist.errors import UserError
from vqdist.models.autoencoder import VQAutoencoder
from vqdist.trainers.config import names_in
from vqdist.trainers.vqgan_config import PARTS


def frozen_parts(network: VQAutoencoder, asked: Sequence[str], freeze_codebook: bool | None) -> list[str]:
    """Return the parts of an autoencoder that a run is to leave as they are, in the order of `PARTS`.

    A frozen encoder freezes the codebook: one that follows the features by itself would give the same images other
    codes. A part whose weights were all frozen by `requires_grad_(False)` counts as asked for.

    Args:
        network: is not changed.
        asked: names of parts, also several in one with commas between them.
        freeze_codebook: whether the codebook is frozen, too; None for "if the encoder is".

    Raises:
        UserError: a part is unknown, nothing is left to train, or the codebook alone would be frozen.
    """
    asked = names_in(asked)
    for name in asked:
        if name not in PARTS:
            raise UserError(f"freeze names {name!r}, which is no part; give some of {', '.join(PARTS)}")
    chosen = {*asked, *(name for name in ("encoder", "decoder") if _has_no_gradient(getattr(network, name)))}
    if freeze_codebook or freeze_codebook is None and "encoder" in chosen:
        chosen.add("quantizer")
    if freeze_codebook is False and "quantizer" in asked:
        raise UserError("freeze names the quantizer and freeze_codebook is false; leave one of them out")
    if "quantizer" in chosen and "encoder" not in chosen:
        raise UserError(
            "the codebook is to be frozen and the encoder is not: a frozen quantizer has no commitment loss, so the "
            "features would drift away from the codes; freeze the encoder, too"
        )
    if chosen == set(PARTS):
        raise UserError(f"freeze names {', '.join(PARTS)}: nothing is left to train")
    return [name for name in PARTS if name in chosen]


def _has_no_gradient(part: nn.Module) -> bool:
    parameters = list(part.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def freeze(network: VQAutoencoder, parts: Sequence[str]) -> None:
    """Freeze parts in place: no weight of theirs has a gradient, and each runs in eval mode from now on."""
    for name in parts:
        part = getattr(network, name)
        part.requires_grad_(False)
        part.register_forward_pre_hook(_in_eval_mode)


def _in_eval_mode(part: nn.Module, _inputs: Any) -> None:
    """Before each forward: a validation puts the whole network back into train mode."""
    if part.training:
        part.eval()
