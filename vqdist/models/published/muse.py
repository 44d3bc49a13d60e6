"""Tokenizers of muse-maskgit-pytorch, whose network vqdist's own is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.networks.conv import ConvDecoder, ConvEncoder
from vqdist.models.networks.patch import PatchDiscriminator
from vqdist.models.published.base import NetworkFamily
from vqdist.models.published.files import options_in, unsaid
from vqdist.models.published.levels import multiples
from vqdist.models.quantizers.lfq import LFQQuantizer
from vqdist.models.vqgan import VQGanVAE

ENCODERS, DECODERS = "enc_dec.encoders.", "enc_dec.decoders."
OWN = {ENCODERS: "encoder.", DECODERS: "decoder.net."}
LAST = "decoder.last_layer."
MASK = "quantizer.mask"
STRIDED, BLOCK, PLAIN = "strided", "block", "plain"
SAID = ("lfq_kwargs", "encdec_resnet_groups", "l2_recon_loss", "use_hinge_loss")
KNOWN = ("dim", "layers", "codebook_size", *SAID)


class MuseFiles(NetworkFamily):
    """VQGanVAE's `save`, the trainer's `vae.N.pt` and `vae.N.ema.pt`, and the trainer's `save`; of averages these."""

    aliases = ("muse", "muse_maskgit")
    title = "muse-maskgit-pytorch"
    keys = ("model",)
    prefixes = ("ema_model.",)
    ignored = r"(discr|_?vgg\w*)\."

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        return f"{ENCODERS}0.weight" in tensors

    def assumed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return unsaid(config, KNOWN, encdec_resnet_groups=16)

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        if MASK not in tensors and any(name.startswith("vq.") for name in tensors):
            raise UserError("this file of muse-maskgit-pytorch is of 0.2 or before, with vq; only lfq can be read")
        first, bits = tensors[f"{ENCODERS}0.weight"], tensors[MASK].shape[0]
        stages = _kinds(tensors, ENCODERS)[1:]
        widths = [tensors[f"{ENCODERS}{i}.0.weight"].shape[0] for i, kind in enumerate(stages, 1) if kind == STRIDED]
        options = options_in(config, KNOWN)
        return {
            "dim": first.shape[0],
            "channels": first.shape[1],
            "layers": len(widths),
            "encdec_layer_mults": multiples(widths, first.shape[0], "encdec_layer_mults"),
            "encdec_num_resnet_blocks": _blocks(stages),
            "encdec_first_conv_kernel_size": first.shape[-1],
            "quantizer": "lfq",
            "codebook_size": 2**bits,
            **{name: options[name] for name in SAID if name in options},
        }

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        table = {theirs: ours for ours, theirs in _beginnings(_kinds_of_both(tensors)).items()}
        return {_renamed(name, table): one for name, one in tensors.items()}

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds = {place: _own_kinds(tensors, OWN[place]) for place in OWN}
        table = _beginnings({**kinds, DECODERS: [*kinds[DECODERS], PLAIN]})
        return {_renamed(name, table): one for name, one in tensors.items()}

    def check_writable(self, model: VQGanVAE) -> None:
        parts = (model.network.encoder, model.network.decoder, model.quantizer)
        if not all(map(isinstance, parts, (ConvEncoder, ConvDecoder, LFQQuantizer))):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise UserError(f"a model of {kinds} has no form in {self.title}; expected vqdist's own networks and lfq")

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of its `VQGanVAE`."""
        options = self.arguments(tensors, {})
        del options["quantizer"]
        norms = [module.num_groups for module in model.network.encoder.modules() if isinstance(module, nn.GroupNorm)]
        options["encdec_resnet_groups"] = norms[0] if norms else 16
        of_quantizer = model.configuration().get("lfq_kwargs")
        options |= {"lfq_kwargs": dict(of_quantizer)} if of_quantizer else {}
        return options | {"l2_recon_loss": model.l2_recon_loss, "use_hinge_loss": model.use_hinge_loss}

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        """Write the bare tensors, those of a discriminator of vqdist's own too."""
        critic = model.discriminator
        of_critic = critic.state_dict() if isinstance(critic, PatchDiscriminator) else {}
        torch.save({**tensors, **{_of_critic(name): one.cpu().clone() for name, one in of_critic.items()}}, path)


def _kinds(tensors: Iterable[str], place: str) -> list[str]:
    """Return what stands at each number of one of their lists: a strided stage, a block, or a convolution alone."""
    found: dict[int, str] = {}
    for name in tensors:
        match = re.match(rf"{re.escape(place)}(\d+)\.(net|0|weight)\b", name)
        if match:
            found[int(match[1])] = {"net": BLOCK, "0": STRIDED, "weight": PLAIN}[match[2]]
    return [found[number] for number in sorted(found)]


def _kinds_of_both(tensors: Iterable[str]) -> dict[str, list[str]]:
    names = list(tensors)
    return {place: _kinds(names, place) for place in OWN}


def _own_kinds(tensors: Iterable[str], place: str) -> list[str]:
    """Return the same of one of our lists, where a strided stage is a convolution, and an activation beside it."""
    found: dict[int, str] = {}
    for name in tensors:
        match = re.match(rf"{re.escape(place)}(\d+)\.(net|weight)\b", name)
        if match:
            found[int(match[1])] = BLOCK if match[2] == "net" else STRIDED
    kinds = [found[number] for number in sorted(found)]
    return [PLAIN, *kinds[1:]] if place == OWN[ENCODERS] else kinds


def _beginnings(kinds: Mapping[str, list[str]]) -> dict[str, str]:
    """Return our beginnings of names with theirs; a strided stage is one module there and two here."""
    table = {"quantizer.inner.": "quantizer."}
    for place, own in OWN.items():
        number = 0
        for index, kind in enumerate(kinds[place]):
            if place == DECODERS and kind == PLAIN:
                table[LAST] = f"{place}{index}."
                continue
            table[f"{own}{number}."] = f"{place}{index}.0." if kind == STRIDED else f"{place}{index}."
            number += 2 if kind == STRIDED else 1
    return table


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for before, after in table.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def _blocks(stages: list[str]) -> list[int]:
    """Return the number of residual blocks after each strided stage."""
    counts: list[int] = []
    for kind in stages:
        if kind == STRIDED:
            counts.append(0)
        else:
            counts[-1] += 1
    return counts


def _of_critic(name: str) -> str:
    """Return their name of a tensor of the discriminator."""
    match = re.fullmatch(r"body\.(\d+)\.(.*)", name)
    if match is None:
        return f"discr.to_logits.{name.removeprefix('head.')}"
    number = int(match[1])  # the first convolution and its activation, then three modules a layer
    layer, part = (0, 0) if number == 0 else divmod(number + 1, 3)
    return f"discr.layers.{layer}.{part}.{match[2]}"
