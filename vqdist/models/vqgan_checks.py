"""The arguments of a VQGAN that say the same twice, or that its training would not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vqdist.errors import UserError
from vqdist.models.networks.patch import PatchDiscriminator
from vqdist.parts import GIVEN_BUILT, Spec, UnavailablePart, called
from vqdist.registries import TERMS

if TYPE_CHECKING:
    from vqdist.models.vqgan import VQGanVAE


def check_terms(
    terms: list[Any] | None, *, l2_recon_loss: bool, perceptual: Any, vgg: nn.Module | None
) -> UnavailablePart | None:
    """Raise `UserError` for terms that cannot be, or beside an option that says the same.

    Returns:
        The error of a term that cannot be built here: images are coded and decoded without it.
    """
    if terms is None:
        return None
    # a mapping is an export's record of `vgg`, in whose place terms are given now
    named = not isinstance(perceptual, Mapping) and perceptual not in ("vgg16", "none")
    for name, is_set in {"l2_recon_loss": l2_recon_loss, "perceptual": named, "vgg": vgg is not None}.items():
        if is_set:
            raise UserError(f"{name} is set, and terms say the same; leave it out and give it as a term")
    if not isinstance(terms, (list, tuple)) or not terms:
        raise UserError(f"terms {terms!r} are not possible; give a list, as [reconstruction, perceptual]")
    try:
        for term in terms:
            if isinstance(term, (str, Mapping)):
                TERMS.factory(Spec.of(term, "terms").target)
    except UnavailablePart as error:
        return error
    return None


def check_all_read(
    given: Mapping[str, Any], defaults: Mapping[str, Any], *, without_critic: bool, terms: list[Any]
) -> None:
    """Raise `UserError` for arguments that were given and that training would not read.

    Args:
        given: the model's configuration.
        defaults: of its arguments.
        without_critic: whether no discriminator was asked for.
        terms: of the objective.
    """
    off: dict[str, str] = {}
    if without_critic:
        off |= dict.fromkeys(("discr_layers", "use_hinge_loss"), "the model has no discriminator")
    losses_off = not given.get("use_vgg_and_gan", True)
    if losses_off and given.get("perceptual") != "none":
        off["perceptual"] = "use_vgg_and_gan is false"
    if given.get("quantizer") is not None:
        off["lookup_free_quantization"] = "quantizer says which one"
    for name, reason in off.items():
        if given.get(name, defaults[name]) != defaults[name]:
            raise UserError(f"{name} {given[name]} does nothing, because {reason}; leave it out")
    named = [term for term in terms if _is_perceptual(term)] if losses_off else []
    if named:
        raise UserError(
            f"use_vgg_and_gan is false, which turns the perceptual loss off, and terms have {called(named[0])}; "
            "leave the term out, or give use_gan false in place of use_vgg_and_gan"
        )


def _is_perceptual(term: Any) -> bool:
    """Return whether a term, given in any form, is one of vqdist's perceptual losses."""
    factory = TERMS.factory(Spec.of(term, "terms").target) if isinstance(term, (str, Mapping)) else type(term)
    return factory in [TERMS[name] for name in ("perceptual", "lpips", "convnext_s")]


def needs_of(discriminator: nn.Module, size: int, smallest: int) -> str:
    """Return, for a message, a discriminator that is too large for images of a size, and what to do."""
    if not isinstance(discriminator, PatchDiscriminator):
        name = type(discriminator).__name__
        return f"discriminator {name}, which needs at least {smallest}; use larger images, or use_gan false"
    layers = size.bit_length() - 2
    fewer = f"discr_layers {layers} or " if layers > 0 else ""
    return f"discr_layers {discriminator.layers}, which needs at least {smallest}; use {fewer}use_gan false"


def check_stage(model: VQGanVAE, terms: Sequence[Any]) -> None:
    """Raise `UserError` for losses on images of a network that makes none, as that of TiTok's first stage.

    Args:
        model: the model.
        terms: of the loss as they were given; empty for the default ones, which compare pixels.
    """
    if model.autoencoder.makes_images:
        return
    name = type(model.autoencoder.decoder).__name__
    if model.discriminator is not None:
        raise UserError(
            f"decoder {name} makes no images in this stage, and a discriminator compares images; give "
            "--model.use_gan false"
        )
    if not terms or any(term.acts_on == "pixels" for term in model.objective()):
        raise UserError(
            f"decoder {name} makes no images in this stage, and the loss compares pixels; give model.terms with "
            "{class_path: proxy_codes, init_args: {tokenizer: FILE}}, the tokenizer whose codes it learns"
        )


def record_of_terms(written: Sequence[Any], terms: Iterable[Any]) -> list[Any]:
    """Return what config.json says of the terms, with what these add: see `ProxyCodes.recorded_arguments`."""
    found = []
    for part, term in zip(written, terms):
        is_object = isinstance(part, Mapping) and part.get(GIVEN_BUILT)
        if hasattr(term, "recorded_arguments") and not is_object:
            spec = Spec.of(part, "terms")
            part = {"class_path": spec.target, "init_args": {**spec.init_args, **term.recorded_arguments()}}
        found.append(part)
    return found
