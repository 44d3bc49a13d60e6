"""MaskGIT-VQGAN, in the form of the 1d-tokenizer project."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.networks.maskgit import MaskGITDecoder, MaskGITEncoder
from vqdist.models.published.base import NetworkFamily
from vqdist.models.published.files import options_in
from vqdist.models.published.levels import blocks_of, multiples
from vqdist.models.published.names import Names
from vqdist.models.quantizers.gradient_vq import GradientVQ
from vqdist.models.vqgan import VQGanVAE

NAMES = Names([("decoder.last_layer.", "decoder.conv_out."), ("quantizer.", "quantize.")])
CODEBOOK = "quantize.embedding.weight"
BETA, SIDE = 0.25, 256  # of the published model


class MaskGITFiles(NetworkFamily):
    """The published tokenizer of MaskGIT, which RAR and the first stage of TiTok use: a bare dictionary."""

    aliases = ("maskgit",)
    title = "MaskGIT-VQGAN"
    prefixes = ("tokenizer.", "vqgan.")
    ignored = r"loss\."

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        return {"encoder.down.0.block.0.conv1.weight", "decoder.mid.0.conv1.weight", CODEBOOK} <= tensors.keys()

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        width, channels = tensors["encoder.conv_in.weight"].shape[:2]
        widths, blocks = blocks_of(tensors, "encoder.down")
        size, dim = tensors[CODEBOOK].shape
        both = {"hidden_channels": width, "channel_mult": multiples(widths, width, "channel_mult")}
        both |= {"num_res_blocks": blocks}
        both |= {"dropout": options_in(config, ("hidden_channels", "dropout")).get("dropout", 0.0)}
        cost = options_in(config, ("commitment_cost",)).get("commitment_cost", BETA)
        codebook = {"codebook_size": size, "codebook_loss": "legacy", "beta": cost}
        return {
            "encoder": {"class_path": "maskgit", "init_args": {**both, "z_channels": dim}},
            "decoder": {"class_path": "maskgit", "init_args": both},
            "quantizer": {"class_path": "gradient_vq", "init_args": codebook},
            "channels": channels,
        }

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {NAMES.ours(name, 0): one for name, one in tensors.items()}

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {NAMES.theirs(name, 0): one for name, one in tensors.items()}

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        return options_in(config, ("resolution",)).get("resolution", SIDE)

    def check_writable(self, model: VQGanVAE) -> None:
        parts = (model.network.encoder, model.network.decoder, model.quantizer)
        known = all(map(isinstance, parts, (MaskGITEncoder, MaskGITDecoder, GradientVQ)))
        if not known or type(model.quantizer) is not GradientVQ or model.quantizer.traits:
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise UserError(f"a model of {kinds} has no form in {self.title}; expected maskgit and gradient_vq")

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        quantizer: Any = model.quantizer  # a `GradientVQ`, see `check_writable`
        network: dict[str, Any] = self.arguments(tensors, {})["encoder"]["init_args"]
        config = {**network, "num_resolutions": len(network["channel_mult"]), "num_channels": model.channels}
        config["dropout"] = model.network.encoder.mid[0].dropout.p
        config |= {"resolution": model.image_size} if isinstance(model.image_size, int) else {}
        return {"config": config, "num_embeddings": model.codebook_size, "commitment_cost": quantizer.beta}

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        save_tensors(tensors, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors bare: with safetensors where the name of the file says so, else with torch."""
    if path.suffix == ".safetensors":
        save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)


def decoder_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `MaskGITDecoder` by the shapes of its tensors, under the names of the project.

    Raises:
        KeyError: a tensor is missing that says a width.
    """
    widths, blocks = blocks_of(tensors, "up")
    width = gcd(*widths)
    mults = multiples(widths, width, "channel_mult")
    dim = tensors["conv_in.weight"].shape[1]
    return {"dim": dim, "hidden_channels": width, "channel_mult": mults, "num_res_blocks": blocks}
