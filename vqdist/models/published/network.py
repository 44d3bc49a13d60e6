"""The arguments of taming's encoder and decoder, from the shapes of their tensors and from configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.networks.taming import NoDecoder, TamingDecoder, TamingEncoder
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
    refuse_other_networks(config)
    said = {name: config[name] for name in OF_CONFIG if config.get(name) is not None}
    if config.get("attn_type") == "none":  # of LDM: then `attn_resolutions` place nothing
        said |= {"attn_resolutions": [], "mid_attention": False}
    if "in_channels" in config:
        said["channels"] = config["in_channels"]
    if not encoder:
        said.pop("double_z", None)
    if "resolution" in said and "attn_resolutions" not in said:  # the guessed ones are for the nominal resolution
        levels = [NOMINAL // side for side in arguments["attn_resolutions"]]
        said["attn_resolutions"] = [said["resolution"] // level for level in levels]
    return {**arguments, **said}


def refuse_other_networks(config: Mapping[str, Any]) -> None:
    """Raise `UserError` for options of LDM's and taming's networks that make other images and add no tensor."""
    for name in ("tanh_out", "give_pre_end", "use_linear_attn"):
        if config.get(name):
            raise UserError(f"{name} {config[name]} is of another network than vqdist has; only false can be read")
    if config.get("attn_type") not in (None, "vanilla", "none"):
        raise UserError(f"attn_type {config['attn_type']!r} is not that of a VQGAN; only vanilla and none can be read")


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


def check_taming(model: VQGanVAE, title: str, *, with_decoder: bool = True, kernel: int | None = 1) -> None:
    """Raise `UserError` unless encoder and decoder of a model are taming's.

    Args:
        model: the tokenizer.
        title: the project.
        with_decoder: whether its files have a decoder.
        kernel: size of the convolutions around the quantizer; None for any.
    """
    encoder, decoder = model.network.encoder, model.network.decoder
    of_decoder = isinstance(decoder, TamingDecoder) or (not with_decoder and isinstance(decoder, NoDecoder))
    if not isinstance(encoder, TamingEncoder) or not of_decoder:
        kinds = f"{type(encoder).__name__} and {type(decoder).__name__}"
        raise UserError(f"a model of {kinds} has no form in {title}; expected encoder and decoder taming")
    adapters = {"quant_conv": encoder.quant_conv, "post_quant_conv": getattr(decoder, "post_quant_conv", None)}
    for name, adapter in adapters.items():
        if isinstance(decoder, NoDecoder) and name == "post_quant_conv":
            continue
        found = 0 if adapter is None else adapter.kernel_size[0]
        if not found or found != (kernel or found):
            raise UserError(
                f"this model has quant_conv_kernel {found}, and {title} has a convolution {name} of size "
                f"{kernel or 'above 0'}, so it has no form there"
            )


def ddconfig_of(model: VQGanVAE) -> dict[str, Any]:
    """Return the `ddconfig` of taming's that a model's encoder is built from, and its decoder where both agree."""
    encoder: Any = model.network.encoder
    levels, ch, size = len(encoder.down), encoder.conv_in.out_channels, model.image_size
    side = size if isinstance(size, int) and size >> (levels - 1) else NOMINAL
    z_channels, double_z = encoder.conv_out.out_channels, False
    decoder: Any = model.network.decoder
    if not isinstance(model.network.decoder, NoDecoder):
        of_decoder = decoder.conv_in.in_channels
        z_channels, double_z = of_decoder, z_channels == 2 * of_decoder
    without = {} if encoder.mid.attn_1 is not None else {"attn_type": "none"}
    resamples = [level.downsample.conv is not None for level in encoder.down if level.downsample is not None]
    return {
        "double_z": double_z,
        "z_channels": z_channels,
        "resolution": side,
        "in_channels": model.channels,
        "out_ch": model.channels,
        "ch": ch,
        "ch_mult": multiples_of(widths_in(encoder.down), ch),
        "num_res_blocks": len(encoder.down[0].block),
        "attn_resolutions": [side >> level for level, stage in enumerate(encoder.down) if len(stage.attn)],
        "dropout": encoder.mid.block_1.dropout.p,
        **({} if all(resamples) else {"resamp_with_conv": False}),
        **without,
    }


def widths_in(levels: Any) -> list[int]:
    """Return the width of each resolution of taming's encoder or decoder, `down` or `up`."""
    return [level.block[-1].conv2.out_channels for level in levels]


def multiples_of(widths: Sequence[int], ch: int) -> list[float]:
    """Return widths as multiples of one, whole numbers where they are whole."""
    return [width // ch if width % ch == 0 else width / ch for width in widths]


def check_middle_attention(model: VQGanVAE, title: str) -> None:
    """Raise `UserError` unless there is attention in the middle, as in all networks of a project."""
    if model.network.encoder.mid.attn_1 is None:
        raise UserError(f"{title} has attention in the middle of its networks, and this model has none there")


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
        "ch_mult": multiples_of(widths, ch),
        "num_res_blocks": 1 + max(number for _, kind, number in blocks if kind == "block"),
        "attn_resolutions": sorted({NOMINAL >> level for level, kind, _ in blocks if kind == "attn"}, reverse=True),
        "resolution": NOMINAL,
    }
