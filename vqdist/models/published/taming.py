"""Tokenizers of taming-transformers and of latent diffusion (LDM), with a codebook or with Gumbel-softmax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.published.base import NetworkFamily
from vqdist.models.published.files import AVERAGES, options_in
from vqdist.models.published.names import Names
from vqdist.models.published.network import (
    ENDS,
    check_middle_attention,
    check_taming,
    codebook_shape,
    ddconfig_of,
    parts_of,
    resolution_of,
)
from vqdist.models.quantizers import GradientVQ, Gumbel
from vqdist.models.vqgan import VQGanVAE

NAMES = Names([*ENDS, ("quantizer.", "quantize.")])
KNOWN = ("ddconfig", "n_embed", "embed_dim")
BETA = 0.25
"""Of every published VQGAN: a literal in the project's source."""


NO_LOSS = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
SCHEDULE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {"warm_up_steps": 0, "max_decay_steps": 1000001, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 1.0e-6},
}
"""Of the temperature in training: the published one, as no model of vqdist has a schedule."""
OTHERS = ("taming.", "ldm.")
"""Modules of the projects with these names of tensors, as their configurations say them."""
OF_IBQ = frozenset(
    ["use_entropy_loss", "entropy_temperature", "sample_minimization_weight", "batch_maximization_weight"]
    + ["quant_loss_weight", "entropy_loss_weight", "lecam_loss_weight"]
)
"""Options that of these projects SEED-Voken's IBQ alone has."""


def says_ibq(config: Mapping[str, Any]) -> bool | None:
    """Return whether a configuration is of IBQ, whose tensors have the names of taming's; None if it does not say."""
    said = str(config)
    if "IBQ" in said or any(project in said for project in OTHERS):
        return "IBQ" in said
    return True if any(f"'{option}'" in said for option in OF_IBQ) else None


class TamingFiles(NetworkFamily):
    """The common part of files in this form."""

    prefixes = ("first_stage_model.",)
    ignored = r"(loss|cond_stage_model|model|transformer)\.|colorize$|quantize\.used$"
    codebook = "quantize.embedding.weight"
    known: ClassVar[tuple[str, ...]] = KNOWN
    """Options of which one at least is where the others are."""

    def weights(self, content: Any, path: Path) -> dict[str, Tensor]:
        """Return the tokenizer's tensors, and none of their averages: taming and LDM encode and decode without."""
        found = super().weights(content, path)
        return {name: one for name, one in found.items() if not name.startswith(AVERAGES)}

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        return self.codebook in tensors and "encoder.down.0.block.0.conv1.weight" in tensors

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {NAMES.ours(name, 0): one for name, one in tensors.items()}

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {NAMES.theirs(name, 0): one for name, one in tensors.items()}

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        options = options_in(config, self.known)
        quantizer = self.quantizer(tensors, options)
        return parts_of(self.ours(tensors), options.get("ddconfig") or {}, quantizer)

    def quantizer(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the specification of the quantizer, by the codebook's shape and the project's options."""
        raise NotImplementedError

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        return resolution_of(arguments)

    def options_of(self, model: VQGanVAE) -> dict[str, Any]:
        """Return the options that the projects with these networks share."""
        sizes = {"embed_dim": model.network.encoder.dim, "n_embed": model.codebook_size}
        return {**sizes, "ddconfig": ddconfig_of(model)}

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        torch.save({"state_dict": tensors}, path)


class Taming(TamingFiles):
    """VQGAN of taming-transformers and of LDM: a codebook by gradient, with the loss as it was published."""

    aliases = ("taming", "ldm", "ldm_vq")
    title = "taming-transformers or LDM"

    def quantizer(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
        size = options.get("n_embed") or codebook_shape(tensors, self.codebook)[0]
        init_args = {"codebook_size": size, "beta": BETA, "codebook_loss": "legacy"}
        return {"class_path": "gradient_vq", "init_args": init_args}

    def doubt(self, config: Mapping[str, Any]) -> dict[str, str]:
        return {"family": "taming_vqgan (not ibq)"} if says_ibq(config) is None else {}

    def check_writable(self, model: VQGanVAE) -> None:
        check_taming(model, self.title)
        check_plain_codebook(model, self.title)

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return taming's configuration, or LDM's where that is asked for, or where there is no attention."""
        options = self.options_of(model)
        if self.called.startswith("ldm") or "attn_type" in options["ddconfig"]:
            loss = {"lossconfig": {"target": "torch.nn.Identity"}}
            return {"model": {"target": "ldm.models.autoencoder.VQModel", "params": {**options, **loss}}}
        return {"model": {"target": "taming.models.vqgan.VQModel", "params": {**options, "lossconfig": NO_LOSS}}}


class TamingGumbel(TamingFiles):
    """VQGAN of taming-transformers with Gumbel-softmax."""

    aliases = ("gumbel",)
    title = "taming-transformers (GumbelVQ)"
    codebook = "quantize.embed.weight"
    known = (*KNOWN, "kl_weight")

    def quantizer(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
        size = options.get("n_embed") or codebook_shape(tensors, self.codebook)[0]
        init_args = {"codebook_size": size, "kl_weight": options.get("kl_weight", 1e-8)}
        return {"class_path": "gumbel", "init_args": init_args}

    def check_writable(self, model: VQGanVAE) -> None:
        check_taming(model, self.title)
        if not isinstance(model.quantizer, Gumbel):
            raise UserError(f"quantizer {type(model.quantizer).__name__} has no form in {self.title}; expected gumbel")
        check_middle_attention(model, self.title)

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        options = {**self.options_of(model), "kl_weight": getattr(model.quantizer, "kl_weight", 0.0)}
        options |= {"temperature_scheduler_config": SCHEDULE, "lossconfig": NO_LOSS}
        return {"model": {"target": "taming.models.vqgan.GumbelVQ", "params": options}}


def check_plain_codebook(model: VQGanVAE, title: str) -> None:
    """Raise `UserError` unless the quantizer is a codebook whose vectors keep their lengths."""
    quantizer = model.quantizer
    if type(quantizer) is not GradientVQ or quantizer.traits:  # codes of a subclass are more than its embedding
        kind = f"{type(quantizer).__name__} {getattr(quantizer, 'traits', '')}".strip()
        raise UserError(f"quantizer {kind} has no form in {title}; expected gradient_vq without l2_norm")
