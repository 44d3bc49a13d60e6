"""The parts of a VQGAN: built from what its constructor was given, checked to fit, and said in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from vqdist.errors import UserError, an
from vqdist.models.autoencoder import VQAutoencoder
from vqdist.models.conv_options import ConvOptions
from vqdist.models.multiscale import MultiScaleResidual
from vqdist.models.networks.base import require_module, whole_number
from vqdist.models.networks.conv import ConvDecoder
from vqdist.models.quantizers import Quantizer, build_quantizer
from vqdist.parts import GIVEN_BUILT, PartSpec, Spec, path_of
from vqdist.registries import DECODERS, ENCODERS, QUANTIZERS


def build_autoencoder(
    given: Mapping[str, Any],
    conv: ConvOptions,
    *,
    channels: int,
    codebook_size: int,
    size_is_set: bool,
    options: Mapping[str, dict[str, Any] | None],
) -> VQAutoencoder:
    """Return encoder, quantizer and decoder; those that are not given are vqdist's own.

    Args:
        given: the parts.
        conv: options of vqdist's own.
        channels: of the images.
        codebook_size: of the quantizer.
        size_is_set: whether somebody has set it.
        options: groups of its options, by the names of the arguments.
    """
    encoder: Any = None  # a module and an `Encoder`
    if given["encoder"] is not None:
        encoder = require_module(ENCODERS.build(given["encoder"], channels=channels), "encoder")
    features = conv.features if encoder is None else whole_number(encoder, "encoder", "dim")
    quantizer = quantizer_of(
        given["quantizer"], dim=features, codebook_size=codebook_size, set_size=size_is_set, groups=options
    )
    if encoder is None:
        encoder = conv.encoder(channels)
    if given["decoder"] is None:
        decoder: nn.Module = conv.decoder(channels)
    else:
        decoder = require_module(DECODERS.build(given["decoder"], channels=channels, dim=features), "decoder")
    check_fit(encoder, decoder, channels)
    return VQAutoencoder(channels=channels, encoder=encoder, quantizer=quantizer, decoder=decoder)


def quantizer_of(
    given: Any, *, dim: int, codebook_size: int, set_size: bool, groups: Mapping[str, dict[str, Any] | None]
) -> Quantizer:
    """Return the quantizer of a name with its group of options, or another part."""
    if isinstance(given, str) and given in QUANTIZERS:
        return build_quantizer(given, dim=dim, codebook_size=codebook_size, **_options_of(given, **groups))
    for name, options in groups.items():
        if options:
            raise UserError(f"{name} {options} is given beside the quantizer's init_args; move it into these")
    if not isinstance(given, (str, Mapping)):
        built = build_quantizer(QUANTIZERS.check(given, type(given).__name__), dim=dim)
        if set_size and built.codebook_size != codebook_size:
            raise UserError(
                f"codebook_size {codebook_size} is given, and the quantizer has {built.codebook_size} codes"
            )
        return built
    spec = Spec.of(given, "quantizer")
    factory = QUANTIZERS.factory(spec.target)
    own_size = spec.init_args.get("codebook_size", codebook_size)
    if set_size and own_size != codebook_size:
        raise UserError(
            f"codebook_size {codebook_size} is given, and init_args of quantizer say {own_size}; leave one of them out"
        )
    for name in QUANTIZERS:
        if QUANTIZERS.place(name) == path_of(factory):
            size = {"codebook_size": codebook_size} if set_size or "levels" not in spec.init_args else {}
            return build_quantizer(name, **{"dim": dim, **size, **spec.init_args})
    built = build_quantizer(cast(PartSpec, given), dim=dim, codebook_size=codebook_size)
    if set_size and built.codebook_size != codebook_size:
        raise UserError(
            f"codebook_size {codebook_size} is given, and quantizer {spec.target} has {built.codebook_size} codes; "
            "leave it out"
        )
    return built


def _options_of(
    name: str,
    *,
    vq_kwargs: dict[str, Any] | None,
    lfq_kwargs: dict[str, Any] | None,
    quantizer_kwargs: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the chosen quantizer's options; those of another one are errors."""
    belongs = {"vq_kwargs": ("vq", "residual_vq"), "lfq_kwargs": ("lfq",)}
    options = dict(quantizer_kwargs or {})
    for argument, given in (("vq_kwargs", vq_kwargs), ("lfq_kwargs", lfq_kwargs)):
        if not given:
            continue
        if name not in belongs[argument]:
            raise UserError(
                f"{argument} {given} is given but the quantizer is {name!r}; use quantizer_kwargs, or quantizer "
                f"{' or '.join(map(repr, belongs[argument]))}"
            )
        options.update(given)
    return options


def check_fit(encoder: nn.Module, decoder: nn.Module, channels: int) -> None:
    """Raise `UserError` for a decoder that cannot take the encoder's features, or whose last layer cannot be used."""
    if isinstance(decoder, ConvDecoder) and decoder.dim != encoder.dim:
        raise UserError(
            f"decoder conv takes features of width {decoder.dim} and encoder {type(encoder).__name__} gives "
            f"{encoder.dim}; make them equal"
        )
    last = decoder.last_layer
    if last is None:
        return
    if not isinstance(last, nn.Conv2d) or last.padding_mode != "zeros":
        raise UserError(
            f"the last_layer of decoder {type(decoder).__name__} is {an(type(last).__name__)}; give a Conv2d with "
            "zero padding, or None if forward returns the image"
        )
    if last.out_channels != channels:
        raise UserError(
            f"the last_layer of decoder {type(decoder).__name__} gives {last.out_channels} channels and the images "
            f"have {channels}; give the model these channels, or the decoder that last_layer"
        )
    spread = [rate * (size - 1) for rate, size in zip(last.dilation, last.kernel_size, strict=True)]
    if last.padding == "same" and any(total % 2 for total in spread):
        raise UserError(
            f"the last_layer of decoder {type(decoder).__name__} has a kernel of even size {last.kernel_size} and "
            "padding 'same', which pads one side more than the other; give it an odd kernel, or padding in numbers"
        )


def class_of(part: nn.Module) -> type:
    """Return the class of a network; of one that `fully_shard` has cut, the class that it was of before."""
    bases = type(part).__bases__
    of_torch = any(base.__module__.startswith("torch.distributed.") for base in bases)
    return bases[-1] if of_torch else type(part)


def scales_of(quantizer: Quantizer) -> MultiScaleResidual | None:
    """Return the scales of `multiscale_vq`, or None of another quantizer; to name its class imports its library."""
    inner = getattr(quantizer, "inner", None)
    return inner if isinstance(inner, MultiScaleResidual) else None


def quantizer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the quantizer that a configuration says, wherever it says them."""
    given = config.get("quantizer")
    return dict((given.get("init_args") if isinstance(given, Mapping) else config.get("quantizer_kwargs")) or {})


def with_phi_rule(config: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return a configuration that says the rule: one that says none is of a model of before there was a choice."""
    options, given = {"phi_rule": rule, **quantizer_options(config)}, config.get("quantizer")
    if not isinstance(given, Mapping):
        return {**config, "quantizer_kwargs": options}
    return config if given.get(GIVEN_BUILT) else {**config, "quantizer": {**given, "init_args": options}}
