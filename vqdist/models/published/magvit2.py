"""Tokenizers of Open-MAGVIT2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.networks.magvit2 import MagvitDecoder, MagvitEncoder
from vqdist.models.published.base import NetworkFamily
from vqdist.models.published.files import options_in, with_averages
from vqdist.models.published.levels import blocks_of, multiples
from vqdist.models.published.names import Names
from vqdist.models.quantizers.magvit2_lfq import MagvitLFQ
from vqdist.models.vqgan import VQGanVAE

NAMES = Names([("decoder.last_layer.", "decoder.conv_out.")])
KNOWN = ("ddconfig", "n_embed", "embed_dim", "token_factorization")
FACTORIZED_BITS = (9, 9)  # by default, of 18
ENTROPY_WEIGHT, COMMIT_WEIGHT = 0.1, 0.25  # of the published models
OF_LOSS = {"codebook_weight": "entropy_weight", "commit_weight": "commitment_weight"}
OF_QUANTIZER = ("sample_minimization_weight", "batch_maximization_weight")
SIDES = {4: 128, 5: 256}
"""Side of the images of the published models in pixels, by their number of resolutions."""


class OpenMagvit2(NetworkFamily):
    """VQModel of Open-MAGVIT2, as Lightning saves it; of a file with averages the averages, as published."""

    aliases = ("magvit2",)
    title = "Open-MAGVIT2"
    blur: ClassVar[Mapping[str, Any]] = {"pool": None, "zero_mean": True}
    prefixes = ("first_stage_model.",)
    ignored = r"loss\."

    def weights(self, content: Any, path: Path) -> dict[str, Tensor]:
        """Return the tokenizer's tensors; of those that the file has an average of, the average."""
        return with_averages(super().weights(content, path))

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        return "decoder.adaptive.0.gamma.weight" in tensors

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        options = options_in(config, KNOWN)
        ch, channels = tensors["encoder.conv_in.weight"].shape[:2]
        widths, blocks = blocks_of(tensors, "encoder.down")
        bits = tensors["encoder.conv_out.weight"].shape[0]
        both = {"ch": ch, "ch_mult": multiples(widths, ch, "ch_mult"), "num_res_blocks": blocks}
        return {
            "encoder": {"class_path": "magvit2", "init_args": {**both, "z_channels": bits}},
            "decoder": {"class_path": "magvit2", "init_args": both},
            "quantizer": {"class_path": "magvit2_lfq", "init_args": _quantizer(bits, options)},
            "channels": channels,
        }

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {NAMES.ours(name, 0): one for name, one in tensors.items()}

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {NAMES.theirs(name, 0): one for name, one in tensors.items()}

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        said = (options_in(config, KNOWN).get("ddconfig") or {}).get("resolution")
        return said or SIDES.get(len(arguments["encoder"]["init_args"]["ch_mult"]))

    def check_writable(self, model: VQGanVAE) -> None:
        parts = (model.network.encoder, model.network.decoder, model.quantizer)
        if not all(map(isinstance, parts, (MagvitEncoder, MagvitDecoder, MagvitLFQ))):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise UserError(f"a model of {kinds} has no form in {self.title}; expected magvit2 and magvit2_lfq")

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        quantizer: Any = model.quantizer  # a `MagvitLFQ`, see `check_writable`
        network: dict[str, Any] = self.arguments(tensors, {})["encoder"]["init_args"]
        fixed = {"double_z": False, "in_channels": model.channels, "out_ch": model.channels}
        square = {"resolution": model.image_size} if isinstance(model.image_size, int) else {}
        losses = {theirs: getattr(quantizer, ours) for theirs, ours in OF_LOSS.items()}
        of_loss = {"class_path": "src.Open_MAGVIT2.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
        options: dict[str, Any] = {"ddconfig": {**fixed, **square, **network}, "n_embed": 2**quantizer.dim}
        options |= {"embed_dim": quantizer.dim, **{name: getattr(quantizer, name) for name in OF_QUANTIZER}}
        options["lossconfig"] = {**of_loss, "init_args": {"disc_start": 0, **losses}}
        if quantizer.num_levels > 1:
            options |= {"token_factorization": True, "factorized_bits": quantizer.owners.sum(dim=1).int().tolist()}
        return {"model": {"class_path": "src.Open_MAGVIT2.models.lfqgan.VQModel", "init_args": options}}

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        torch.save({"state_dict": tensors}, path)


def _quantizer(bits: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantizer's arguments by the project's configuration."""
    losses = options.get("lossconfig") or options.get("loss") or {}
    losses = losses.get("init_args") or losses.get("params") or losses
    said: dict[str, Any] = {"codebook_size": 2**bits}
    said |= {"entropy_weight": ENTROPY_WEIGHT, "commitment_weight": COMMIT_WEIGHT}
    said |= {ours: losses[theirs] for theirs, ours in OF_LOSS.items() if theirs in losses}
    said |= {name: options[name] for name in OF_QUANTIZER if name in options}
    if options.get("token_factorization"):
        said["factorized_bits"] = list(options.get("factorized_bits") or FACTORIZED_BITS)
    return said
