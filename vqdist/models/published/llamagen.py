"""Tokenizers of LlamaGen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.published.base import NetworkFamily
from vqdist.models.published.files import options_in, unsaid
from vqdist.models.published.names import Names, levels_of
from vqdist.models.published.network import (
    ENDS,
    check_attention_at_the_lowest,
    check_taming,
    codebook_shape,
    ddconfig_of,
    multiples_of,
    parts_of,
    resolution_of,
    widths_in,
)
from vqdist.models.quantizers import GradientVQ
from vqdist.models.vqgan import VQGanVAE

NAMES = Names(
    [
        ("encoder.down.{level}.block.", "encoder.conv_blocks.{level}.res."),
        ("encoder.down.{level}.", "encoder.conv_blocks.{level}."),
        ("decoder.up.{level}.block.", "decoder.conv_blocks.{reversed}.res."),
        ("decoder.up.{level}.", "decoder.conv_blocks.{reversed}."),
        ("{half}.mid.block_1.", "{half}.mid.0."),
        ("{half}.mid.attn_1.", "{half}.mid.1."),
        ("{half}.mid.block_2.", "{half}.mid.2."),
        *ENDS,
        ("quantizer.", "quantize."),
    ]
)
USED = "quantize.codebook_used"
"""A buffer of the latest indices: every public file has it, and nothing of it reaches an image."""
RECENT = 65536
CODEBOOK = "quantize.embedding.weight"
KNOWN = (
    *("codebook_embed_dim", "codebook_size", "encoder_ch_mult", "decoder_ch_mult", "ch_mult"),
    *("codebook_l2_norm", "commit_loss_beta", "entropy_loss_ratio", "dropout_p"),
)


class LlamaGen(NetworkFamily):
    """VQGAN of LlamaGen: taming's network, vectors of length 1."""

    aliases = ("llamagen",)
    title = "LlamaGen"
    prefixes = ("gen_vision_model.",)
    ignored = rf"loss\.|{USED}$"

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        return "encoder.conv_blocks.0.res.0.conv1.weight" in tensors and CODEBOOK in tensors

    def assumed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return unsaid(config, KNOWN, codebook_l2_norm=True)

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        options = options_in(config, KNOWN)
        init_args = {
            "codebook_size": options.get("codebook_size") or codebook_shape(tensors, CODEBOOK)[0],
            "beta": options.get("commit_loss_beta", 0.25),
            "l2_norm": options.get("codebook_l2_norm", True),
            "entropy_weight": options.get("entropy_loss_ratio", 0.0),
        }
        renamed = {"dropout_p": "dropout", "encoder_ch_mult": "ch_mult"}
        ddconfig = {renamed.get(name, name): value for name, value in options.items()}
        arguments = parts_of(self.ours(tensors), ddconfig, {"class_path": "gradient_vq", "init_args": init_args})
        if options.get("decoder_ch_mult"):
            arguments["decoder"]["init_args"]["ch_mult"] = options["decoder_ch_mult"]
        return arguments

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        levels = levels_of(tensors, r"encoder\.conv_blocks\.(\d+)\.")
        return {NAMES.ours(name, levels): one for name, one in tensors.items()}

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        levels = levels_of(tensors, r"encoder\.down\.(\d+)\.")
        return {NAMES.theirs(name, levels): one for name, one in tensors.items()}

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        return resolution_of(arguments)

    def check_writable(self, model: VQGanVAE) -> None:
        check_taming(model, self.title)
        check_attention_at_the_lowest(model, self.title)
        quantizer = model.quantizer
        if type(quantizer) is not GradientVQ or quantizer.l2_norm_output:  # codes of a subclass are more than a tensor
            kind = f"{type(quantizer).__name__} {getattr(quantizer, 'traits', '')}".strip()
            raise UserError(f"quantizer {kind} has no form in {self.title}; expected gradient_vq")

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `ModelArgs`, and two sizes that its code fixes where they are others."""
        quantizer: Any = model.quantizer  # a `GradientVQ`, see `check_writable`
        network, widths = ddconfig_of(model), widths_in(model.network.decoder.up)
        literals = {"ch": 128, "num_res_blocks": 2}
        return {
            "codebook_size": quantizer.codebook_size,
            "codebook_embed_dim": model.network.encoder.dim,
            "codebook_l2_norm": quantizer.l2_norm,
            "commit_loss_beta": quantizer.beta,
            "entropy_loss_ratio": quantizer.entropy_weight,
            "encoder_ch_mult": network["ch_mult"],
            "decoder_ch_mult": multiples_of(widths, network["ch"]),
            "z_channels": network["z_channels"],
            "dropout_p": network["dropout"],
            **{name: network[name] for name, only in literals.items() if network[name] != only},
        }

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        torch.save({"model": {**tensors, USED: torch.zeros(RECENT)}}, path)
