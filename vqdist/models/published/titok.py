"""Tokenizers of TiTok: both stages of its first models, and its later ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.networks.vit import TiTokDecoder, TiTokEncoder, TiTokProxyDecoder
from vqdist.models.published.base import NetworkFamily
from vqdist.models.published.files import options_in, unsaid, without_prefix
from vqdist.models.published.levels import number_of
from vqdist.models.published.maskgit import decoder_arguments, save_tensors
from vqdist.models.published.names import Names
from vqdist.models.quantizers.gradient_vq import GradientVQ
from vqdist.models.vqgan import VQGanVAE

NAMES = Names(
    [
        ("encoder.latent_tokens", "latent_tokens"),
        ("decoder.pixel_decoder.last_layer.", "pixel_decoder.conv_out."),
        ("decoder.pixel_decoder.", "pixel_decoder."),
        ("decoder.pixel_embedding.", "pixel_quantize.embedding."),
        ("decoder.last_layer.", "decoder.conv_out."),
        ("quantizer.", "quantize."),
    ]
)
KNOWN = (
    *("vq_model", "vit_enc_model_size", "vit_dec_model_size", "sizes", "num_latent_tokens"),
    *("is_legacy", "use_l2_norm", "commitment_cost"),
)
CODEBOOK, USES = "quantize.embedding.weight", "quantize.embed_prob"
MOVED = "quantizer.moved"
NAMED = {"small": (512, 8), "base": (768, 12), "large": (1024, 16)}
"""Width and heads of the sizes that the project knows."""
LAYERS = {"small": 8, "base": 12, "large": 24}
WIDTHS = {width: name for name, (width, _) in NAMED.items()}
COMMITMENT = 0.25


class TiTokFiles(NetworkFamily):
    """A bare dictionary of tensors, as .bin or safetensors, or a folder of the Hub with config.json."""

    aliases = ("titok_stage1", "titok_stage2", "titok_rgb", "1d_tokenizer")
    title = "TiTok"
    ignored = r"(loss|pixel_encoder)\."

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        return {"latent_tokens", "encoder.patch_embed.weight", CODEBOOK} <= tensors.keys()

    def assumed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = options_in(config, KNOWN)
        return unsaid({**found, **(found.get("vq_model") or {})}, KNOWN, use_l2_norm="as published")

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        found = options_in(config, KNOWN)
        options = {**found, **(found.get("vq_model") or {})}
        codes, width, patch = tensors["latent_tokens"].shape[0], *tensors["encoder.patch_embed.weight"].shape[::2]
        channels = tensors["encoder.patch_embed.weight"].shape[1]
        image_size = patch * _side(tensors, "encoder")
        legacy = bool(options.get("is_legacy", "decoder.ffn.2.weight" in tensors))
        both = {"image_size": image_size, "num_latent_tokens": codes}
        encoder = {**both, **_transformer(tensors, "encoder", width, options), "patch_size": patch, "legacy": legacy}
        encoder["token_size"] = tensors[CODEBOOK].shape[1]
        width = tensors["decoder.mask_token"].shape[-1]
        decoder = {**both, **_transformer(tensors, "decoder", width, options)}
        decoder["patch_size"] = image_size // _side(tensors, "decoder")
        return {
            "encoder": {"class_path": "titok", "init_args": encoder},
            "decoder": _decoder(decoder, tensors),
            "quantizer": _quantizer(tensors, options),
            "channels": channels,
        }

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {NAMES.ours(name, 0): one for name, one in tensors.items()}
        if USES in tensors:
            found[MOVED] = torch.zeros_like(tensors[CODEBOOK])
        return found

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {NAMES.theirs(name, 0): one for name, one in tensors.items() if name != MOVED}
        if MOVED in tensors:
            found[CODEBOOK] = found[CODEBOOK] + tensors[MOVED]
        return found

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        return arguments["encoder"]["init_args"]["image_size"]

    def check_writable(self, model: VQGanVAE) -> None:
        parts = (model.network.encoder, model.network.decoder, model.quantizer)
        kinds: tuple[Any, ...] = (TiTokEncoder, (TiTokDecoder, TiTokProxyDecoder), GradientVQ)
        if not all(isinstance(part, kind) for part, kind in zip(parts, kinds)):
            found = ", ".join(type(part).__name__ for part in parts)
            raise UserError(f"a model of {found} has no form in {self.title}; expected titok, gradient_vq or cvq")

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the project's `model` and `dataset`, with `sizes` where they have no name there."""
        encoder, decoder, quantizer = model.network.encoder, model.network.decoder, model.quantizer
        sizes = {half: _size_of(part) for half, part in (("enc", encoder), ("dec", decoder))}
        known = {(width, LAYERS[name], heads): name for name, (width, heads) in NAMED.items()}
        names = {half: known[size] for half, size in sizes.items() if size in known}
        proxy = isinstance(decoder, TiTokProxyDecoder)
        options: dict[str, Any] = {
            "codebook_size": quantizer.codebook_size,
            "token_size": encoder.dim,
            "use_l2_norm": getattr(quantizer, "l2_norm", False),
            "commitment_cost": getattr(quantizer, "beta", COMMITMENT),
            "clustering_vq": USES in tensors,
            **{f"vit_{half}_model_size": name for half, name in names.items()},
            "vit_enc_patch_size": encoder.patch_size,
            "vit_dec_patch_size": decoder.patch_size,
            "num_latent_tokens": encoder.num_latent_tokens,
            "finetune_decoder": proxy and decoder.pixel_decoder is not None,
            "is_legacy": encoder.legacy,
        }
        own = {} if len(names) == len(sizes) else {"sizes": {half: list(size) for half, size in sizes.items()}}
        dataset = {"preprocessing": {"crop_size": encoder.image_size}}
        return {"model": {"vq_model": options, **own}, "dataset": dataset}

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        save_tensors(tensors, path)


def _side(tensors: Mapping[str, Tensor], half: str) -> int:
    """Return the patches along a side of the images, which the project has square."""
    patches = tensors[f"{half}.positional_embedding"].shape[0] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise UserError(f"{half}.positional_embedding has {patches} patches, and a square is expected of {TITLE}")
    return side


TITLE = TiTokFiles.title


def _transformer(tensors: Mapping[str, Tensor], half: str, width: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return width, layers and heads; no shape says the heads, but configurations and published widths do."""
    return {"width": width, "layers": number_of(tensors, f"{half}.transformer"), "heads": _heads(half, width, options)}


def _heads(half: str, width: int, options: Mapping[str, Any]) -> int:
    short = half[:3]
    size = (options.get("sizes") or {}).get(short)
    if size:
        return size[2]
    key = f"vit_{short}_model_size"
    named = str(options.get(key) or WIDTHS.get(width))
    if NAMED.get(named, (width,))[0] != width:
        raise UserError(f"{key} {named} is {NAMED[named][0]} wide, and the tensors of the {half} are {width} wide")
    if named not in NAMED:
        raise UserError(
            f"the heads of a transformer of width {width} cannot be told from its tensors; give --peer_config with "
            f"{key} ({', '.join(NAMED)}), or with sizes: {{{short}: [width, layers, heads]}}"
        )
    return NAMED[named][1]


def _size_of(half: Any) -> tuple[int, int, int]:
    """Return width, layers and heads of a transformer."""
    return half.class_embedding.shape[-1], len(half.transformer), half.transformer[0].attn.heads


def _decoder(arguments: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the specification of a decoder of pixels, or of another tokenizer's codes."""
    if "decoder.ffn.2.weight" not in tensors:
        return {"class_path": "titok", "init_args": arguments}
    arguments["proxy_codebook_size"] = tensors["decoder.ffn.2.weight"].shape[0]
    if "pixel_quantize.embedding.weight" in tensors:
        arguments["pixel"] = decoder_arguments(without_prefix(tensors, "pixel_decoder."))
    return {"class_path": "titok_proxy", "init_args": arguments}


def _quantizer(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the specification of the codebook; the first models bring vectors to length 1, the later ones do not."""
    normed = bool(options.get("use_l2_norm", "decoder.ffn.2.weight" in tensors))
    init_args = {"codebook_size": tensors[CODEBOOK].shape[0], "l2_norm": normed}
    init_args["beta"] = options.get("commitment_cost", COMMITMENT)
    return {"class_path": "cvq" if USES in tensors else "gradient_vq", "init_args": init_args}
