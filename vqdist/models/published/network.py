"""The arguments of taming's encoder and decoder, from the shapes of their tensors and from configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.networks.taming import TamingDecoder, TamingEncoder
from vqdist.models.vqgan import VQGanVAE

NOMINAL = 256
"""Side of an image where nothing says another; it only names the resolutions that have attention."""
SHARED = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels", "dropout")
OF_CONFIG = (*SHARED, "double_z", "resamp_with_conv")

# names of tensors that all projects of the family have, ours and theirs
ENDS = (
    ("encoder.quant_conv.", "quant_conv."),
    ("decoder.post_quant_conv.", "post_quant_conv."),
    ("decoder.last_layer.", "decoder.conv_out."),
)


def guessed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of encoder and decoder whose tensors, under our names, these are.

    Raises:
        KeyError: a tensor is missing that says a width.
    """
    ch, channels = tensors["encoder.conv_in.weight"].shape[:2]
    encoder = _levels(tensors, "encoder.down", ch)
    before_quant = tensors["encoder.conv_out.weight"].shape[0]
    encoder |= {"channels": channels, "embed_dim": before_quant, "quant_conv_kernel": 0, "z_channels": before_quant}
    encoder["resamp_with_conv"] = len(encoder["ch_mult"]) == 1 or any(".downsample.conv." in name for name in tensors)
    encoder["mid_attention"] = any(name.startswith("encoder.mid.attn_1.") for name in tensors)
    if "encoder.quant_conv.weight" in tensors:
        weight = tensors["encoder.quant_conv.weight"]
        encoder |= {"embed_dim": weight.shape[0], "quant_conv_kernel": weight.shape[-1]}
    if not has_decoder(tensors):
        return encoder, {}
    z_channels = tensors["decoder.conv_in.weight"].shape[1]
    if before_quant == 2 * z_channels:
        encoder |= {"double_z": True, "z_channels": z_channels}
    decoder = {**_levels(tensors, "decoder.up", ch), "channels": channels, "z_channels": z_channels}
    decoder |= {"num_res_blocks": decoder["num_res_blocks"] - 1, "quant_conv_kernel": 0}
    decoder["resamp_with_conv"] = len(decoder["ch_mult"]) == 1 or any(".upsample.conv." in name for name in tensors)
    decoder["mid_attention"] = any(name.startswith("decoder.mid.attn_1.") for name in tensors)
    if "decoder.post_quant_conv.weight" in tensors:
        decoder["quant_conv_kernel"] = tensors["decoder.post_quant_conv.weight"].shape[-1]
    return encoder, decoder


def has_decoder(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether there is a decoder among tensors under our names: some projects publish encoders alone."""
    return any(name.startswith("decoder.up.") for name in tensors)


def with_config(arguments: Mapping[str, Any], config: Mapping[str, Any], *, encoder: bool) -> dict[str, Any]:
    """Return arguments of encoder or decoder with what a `ddconfig` of taming says over them."""
    said = {name: config[name] for name in OF_CONFIG if config.get(name) is not None}
    if "in_channels" in config:
        said["channels"] = config["in_channels"]
    if not encoder:
        said.pop("double_z", None)
    if "resolution" in said and "attn_resolutions" not in said:  # the guessed ones are for the nominal resolution
        levels = [NOMINAL // side for side in arguments["attn_resolutions"]]
        said["attn_resolutions"] = [said["resolution"] // level for level in levels]
    return {**arguments, **said}


def parts_of(
    tensors: Mapping[str, Tensor], ddconfig: Mapping[str, Any], quantizer: Mapping[str, Any], **both: Any
) -> dict[str, Any]:
    """Return the arguments of `VQGanVAE`.

    Args:
        tensors: under our names.
        ddconfig: what a configuration says of encoder and decoder, in taming's words.
        quantizer: its specification.
        **both: further arguments of encoder and decoder, as `groups`.
    """
    encoder, decoder = guessed(tensors)
    encoder = {**with_config(encoder, ddconfig, encoder=True), **both}
    made: dict[str, Any] = {"class_path": "none"}
    if decoder:
        made = {"class_path": "taming", "init_args": {**with_config(decoder, ddconfig, encoder=False), **both}}
    channels = encoder.pop("channels")
    made.get("init_args", {}).pop("channels", None)
    return {
        "encoder": {"class_path": "taming", "init_args": encoder},
        "decoder": made,
        "quantizer": dict(quantizer),
        "channels": channels,
    }


def codebook_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Return the number of codes and their width.

    Raises:
        KeyError: there is no such tensor.
    """
    size, width = tensors[name].shape
    return size, width


def resolution_of(arguments: Mapping[str, Any]) -> int:
    """Return the nominal side of the images of a tokenizer with taming's encoder."""
    return arguments["encoder"]["init_args"].get("resolution", NOMINAL)


def check_taming(model: VQGanVAE, title: str) -> None:
    """Raise `UserError` unless encoder and decoder of a model are taming's."""
    encoder, decoder = model.network.encoder, model.network.decoder
    if not isinstance(encoder, TamingEncoder) or not isinstance(decoder, TamingDecoder):
        kinds = f"{type(encoder).__name__} and {type(decoder).__name__}"
        raise UserError(f"a model of {kinds} has no form in {title}; expected encoder and decoder taming")


def check_attention_at_the_lowest(model: VQGanVAE, title: str) -> None:
    """Raise `UserError` unless attention is in the middle and at the lowest resolution, and nowhere else."""
    for levels, middle in ((model.network.encoder.down, model.network.encoder.mid), *_up(model)):
        placed = [bool(len(level.attn)) for level in levels]
        if placed != [*[False] * (len(placed) - 1), True] or middle.attn_1 is None:
            raise UserError(
                f"{title} has attention in the middle and at the lowest resolution only, and this model at others; "
                "convert it to taming"
            )


def _up(model: VQGanVAE) -> list[tuple[Any, Any]]:
    return [(model.network.decoder.up, model.network.decoder.mid)]


def _levels(tensors: Mapping[str, Tensor], place: str, ch: int) -> dict[str, Any]:
    """Return what the blocks at a place, `encoder.down` or `decoder.up`, say of the network."""
    found = [re.match(rf"{re.escape(place)}\.(\d+)\.(block|attn)\.(\d+)\.", name) for name in tensors]
    blocks = {(int(match[1]), match[2], int(match[3])) for match in found if match}
    levels = 1 + max((level for level, _, _ in blocks), default=-1)
    widths = [tensors[f"{place}.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    if not levels:
        raise KeyError(f"{place}.0.block.0.conv2.weight")
    return {
        "ch": ch,
        "ch_mult": [width // ch if width % ch == 0 else width / ch for width in widths],
        "num_res_blocks": 1 + max(number for _, kind, number in blocks if kind == "block"),
        "attn_resolutions": sorted({NOMINAL >> level for level, kind, _ in blocks if kind == "attn"}, reverse=True),
        "resolution": NOMINAL,
    }
