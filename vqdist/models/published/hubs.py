"""Tokenizers in the layouts of Hugging Face: diffusers' VQModel, transformers' Chameleon and Janus."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.published.base import NetworkFamily, network_tensors
from vqdist.models.published.files import options_in, write_json_beside
from vqdist.models.published.names import Names, levels_of
from vqdist.models.published.network import (
    ENDS,
    check_attention_at_the_lowest,
    check_middle_attention,
    check_taming,
    codebook_shape,
    ddconfig_of,
    parts_of,
    widths_in,
)
from vqdist.models.published.taming import BETA, check_plain_codebook
from vqdist.models.quantizers import GradientVQ
from vqdist.models.vqgan import VQGanVAE

CODEBOOK = "quantize.embedding.weight"
DIFFUSERS_NAMES = Names(
    [
        ("encoder.down.{level}.block.", "encoder.down_blocks.{level}.resnets."),
        ("encoder.down.{level}.attn.", "encoder.down_blocks.{level}.attentions."),
        ("encoder.down.{level}.downsample.", "encoder.down_blocks.{level}.downsamplers.0."),
        ("decoder.up.{level}.block.", "decoder.up_blocks.{reversed}.resnets."),
        ("decoder.up.{level}.attn.", "decoder.up_blocks.{reversed}.attentions."),
        ("decoder.up.{level}.upsample.", "decoder.up_blocks.{reversed}.upsamplers.0."),
        ("{half}.mid.block_1.", "{half}.mid_block.resnets.0."),
        ("{half}.mid.attn_1.", "{half}.mid_block.attentions.0."),
        ("{half}.mid.block_2.", "{half}.mid_block.resnets.1."),
        ("{half}.norm_out.", "{half}.conv_norm_out."),
        *ENDS,
        ("quantizer.", "quantize."),
    ],
    parts=[("nin_shortcut", "conv_shortcut")],
)
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OUR_ATTENTION = re.compile(rf"(.*\.attn(?:_1|\.\d+))\.({'|'.join(ATTENTION)})\.(weight|bias)")
THEIR_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(group_norm|to_q|to_k|to_v|to_out\.0)\.(weight|bias)")
KNOWN = ("base_channels", "num_embeddings", "channel_multiplier", "num_patches", "resolution")
"""Options of transformers' tokenizers, of which one at least is where the others are."""
FILE, OWN_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"  # of diffusers and of transformers


class Diffusers(NetworkFamily):
    """VQModel of diffusers: taming's network under other names, 1x1 convolutions of attention as linear layers."""

    aliases = ("diffusers",)
    title = "diffusers' VQModel"
    is_folder = True
    prefixes = ("vqvae.", "vae.")

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        return "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors and CODEBOOK in tensors

    def assumed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {} if config else {"norm_num_groups": 32}

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        options = options_in(config, ("block_out_channels", "norm_num_groups", "num_vq_embeddings"))
        for option, only in (("norm_type", "group"), ("act_fn", "silu")):
            if options.get(option, only) != only:
                raise UserError(f"{option} {options[option]!r} is not that of a VQGAN; only {only!r} can be read")
        quantizer = {"codebook_size": codebook_shape(tensors, CODEBOOK)[0], "beta": BETA, "codebook_loss": "legacy"}
        groups = {"groups": options["norm_num_groups"]} if "norm_num_groups" in options else {}
        return parts_of(self.ours(tensors), {}, {"class_path": "gradient_vq", "init_args": quantizer}, **groups)

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        size = options_in(config, ("sample_size",)).get("sample_size")
        return size if isinstance(size, int) else 256

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        levels = levels_of(tensors, r"encoder\.down_blocks\.(\d+)\.")
        back = {theirs: ours for ours, theirs in ATTENTION.items()}
        found: dict[str, Tensor] = {}
        for name, one in tensors.items():
            attention = THEIR_ATTENTION.fullmatch(name)
            if attention is not None:
                name = f"{attention[1]}.{back[attention[2]]}.{attention[3]}"
                one = one[:, :, None, None] if one.ndim == 2 else one
            found[DIFFUSERS_NAMES.ours(name, levels)] = one
        return found

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        levels = levels_of(tensors, r"encoder\.down\.(\d+)\.")
        found: dict[str, Tensor] = {}
        for name, one in tensors.items():
            attention = OUR_ATTENTION.fullmatch(name)
            if attention is not None:
                name = f"{attention[1]}.{ATTENTION[attention[2]]}.{attention[3]}"
                one = one[:, :, 0, 0] if one.ndim == 4 else one
            found[DIFFUSERS_NAMES.theirs(name, levels)] = one
        return found

    def check_writable(self, model: VQGanVAE) -> None:
        check_taming(model, self.title)
        check_plain_codebook(model, self.title)
        encoder = model.network.encoder
        first = widths_in(encoder.down)[0]
        if encoder.conv_in.out_channels != first:
            raise UserError(
                f"the first convolution has {encoder.conv_in.out_channels} channels and the first resolution {first}, "
                f"which {self.title} has no form for; only ch_mult that begins with 1 converts"
            )

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        """Write a folder with config.json and the weights."""
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: one.contiguous() for name, one in tensors.items()}, path / FILE, {"format": "pt"})
        write_json_beside(path / "config.json", self.peer_config(model, tensors))

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        encoder, decoder = model.network.encoder, model.network.decoder
        down = ["AttnDownEncoderBlock2D" if len(level.attn) else "DownEncoderBlock2D" for level in encoder.down]
        up = ["AttnUpDecoderBlock2D" if len(level.attn) else "UpDecoderBlock2D" for level in reversed(decoder.up)]
        square = {"sample_size": model.image_size} if isinstance(model.image_size, int) else {}
        return {
            "_class_name": "VQModel",
            "act_fn": "silu",
            "block_out_channels": widths_in(encoder.down),
            "down_block_types": down,
            "up_block_types": up,
            "in_channels": model.channels,
            "out_channels": model.channels,
            "latent_channels": encoder.conv_out.out_channels,
            "layers_per_block": len(encoder.down[0].block),
            "mid_block_add_attention": encoder.mid.attn_1 is not None,
            "norm_num_groups": encoder.norm_out.num_groups,
            "norm_type": "group",
            "num_vq_embeddings": model.codebook_size,
            "vq_embed_dim": encoder.dim,
            **square,
        }


class TransformersFiles(NetworkFamily):
    """The common part of the tokenizers within transformers' multimodal models."""

    prefixes = ("model.vqmodel.", "vqmodel.", "model.vision_model.vqmodel.")
    is_folder = True
    names: Names
    model_type: str
    class_name: str

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        levels = levels_of(tensors, r"encoder\.down\.(\d+)\.")
        return {self.names.ours(name, levels): one for name, one in tensors.items()}

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        levels = levels_of(tensors, r"encoder\.down\.(\d+)\.")
        return {self.names.theirs(name, levels): one for name, one in tensors.items()}

    def check_writable(self, model: VQGanVAE) -> None:
        check_taming(model, self.title, with_decoder=False)
        check_middle_attention(model, self.title)

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        network = ddconfig_of(model)
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "embed_dim": model.network.encoder.dim,
            "num_embeddings": model.codebook_size,
            "double_latent": network["double_z"],
            "latent_channels": network["z_channels"],
            "in_channels": network["in_channels"],
            "base_channels": network["ch"],
            "channel_multiplier": network["ch_mult"],
            "num_res_blocks": network["num_res_blocks"],
            "dropout": network["dropout"],
            **self.further_options(network),
        }

    def further_options(self, network: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that this class has besides, of a `ddconfig` of taming's."""
        raise NotImplementedError

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        """Write a folder with config.json and the weights."""
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: one.contiguous() for name, one in tensors.items()}, path / OWN_FILE, {"format": "pt"})
        write_json_beside(path / "config.json", self.peer_config(model, tensors))

    def quantizer(self, size: int, beta: float) -> dict[str, Any]:
        """Return the specification of the quantizer."""
        init_args = {"codebook_size": size, "beta": beta, "codebook_loss": "legacy"}
        return {"class_path": "gradient_vq", "init_args": init_args}

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        options = options_in(config, KNOWN)
        quantizer = self.quantizer(codebook_shape(tensors, CODEBOOK)[0], options.get("beta", BETA))
        said: dict[str, Any] = {name: options[name] for name in ("dropout", "resolution") if name in options}
        return parts_of(self.ours(tensors), said, quantizer)

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        """Return the published model's side unless the configuration says another."""
        options = options_in(config, KNOWN)
        levels = len(arguments["encoder"]["init_args"]["ch_mult"])
        return options.get("resolution") or options.get("num_patches", self.patches) << (levels - 1)

    patches: int
    """Codes along each side of the images of the published model."""


class Chameleon(TransformersFiles):
    """ChameleonVQVAE of transformers, whose public files have an encoder and a codebook, and mostly no decoder."""

    aliases = ("chameleon_vqvae",)
    title = "Chameleon"
    model_type, class_name = "chameleon_vqgan", "ChameleonVQVAE"
    names = Names([*ENDS, ("quantizer.", "quantize.")])
    patches = 32
    ignored = r"post_quant_conv\."

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        own = "encoder.down.0.block.0.conv1.weight" in tensors and CODEBOOK in tensors
        return own and not any(name.startswith("decoder.") for name in tensors)

    def weights(self, content: Any, path: Path) -> dict[str, Tensor]:
        """Return the tensors; what follows the codebook is left out where there is no decoder for it."""
        found = super().weights(content, path)
        if any(name.startswith("decoder.") for name in found):
            raise UserError(f"{path} has a decoder, as Chameleon's own file in taming's layout; give --family taming")
        return found

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().theirs({name: one for name, one in tensors.items() if not name.startswith("decoder.")})

    def check_writable(self, model: VQGanVAE) -> None:
        super().check_writable(model)
        check_plain_codebook(model, self.title)

    def further_options(self, network: Mapping[str, Any]) -> dict[str, Any]:
        return {name: network[name] for name in ("resolution", "attn_resolutions")} | {"attn_type": "vanilla"}

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        """Write also the convolution behind the codebook, which the class has though nothing of it is used."""
        held = network_tensors(model)
        unused = [name for name in held if name.startswith("decoder.post_quant_conv.")]
        behind = {name.removeprefix("decoder."): held[name].cpu().clone() for name in unused}
        super().save({**tensors, **behind}, model, path)


class Janus(TransformersFiles):
    """JanusVQVAE of transformers: LlamaGen's network; codes of length 1 are decoded."""

    aliases = ("janus_vqvae",)
    title = "Janus"
    model_type, class_name = "janus_vqgan", "JanusVQVAE"
    names = Names([("decoder.up.{level}.", "decoder.up.{reversed}."), *ENDS, ("quantizer.", "quantize.")])
    patches = 24

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """Return whether the first level of the decoder enlarges, where taming's is the last of all."""
        last = levels_of(tensors, r"decoder\.up\.(\d+)\.") - 1
        first = "decoder.up.0.upsample.conv.weight" in tensors
        return first and f"decoder.up.{last}.upsample.conv.weight" not in tensors and CODEBOOK in tensors

    def quantizer(self, size: int, beta: float) -> dict[str, Any]:
        specification = super().quantizer(size, beta)
        specification["init_args"]["l2_norm_output"] = True
        return specification

    def check_writable(self, model: VQGanVAE) -> None:
        super().check_writable(model)
        check_taming(model, self.title)
        check_attention_at_the_lowest(model, self.title)
        quantizer = model.quantizer
        if type(quantizer) is not GradientVQ or not quantizer.l2_norm_output:
            kind = f"{type(quantizer).__name__} {getattr(quantizer, 'traits', '')}".strip()
            raise UserError(f"quantizer {kind} has no form in {self.title}; expected gradient_vq with l2_norm_output")

    def further_options(self, network: Mapping[str, Any]) -> dict[str, Any]:
        side = network["resolution"] >> (len(network["ch_mult"]) - 1)
        return {"out_channels": network["out_ch"], "num_patches": side}
