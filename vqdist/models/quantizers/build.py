"""A quantizer by its name, by its import path, or as an object."""

from __future__ import annotations

from typing import Any

from vqdist.errors import UserError
from vqdist.models.quantizers.base import Quantizer
from vqdist.models.quantizers.options import is_integer
from vqdist.parts import PartSpec, Spec
from vqdist.registries import QUANTIZERS


def build_quantizer(
    name: PartSpec | Quantizer, *, dim: int, codebook_size: int | None = None, **options: Any
) -> Quantizer:
    """Return the quantizer that is named, or the given one if it fits.

    Args:
        name: a key of `QUANTIZERS`, an import path, both with arguments as `{class_path: ..., init_args: {...}}`, or a
            quantizer that is built already.
        dim: channels of the features, and of what the quantizer gives back.
        codebook_size: codes per level; of vqdist's quantizers only `fsq` with `levels` needs none.
        **options: arguments. Those of the library's class stand over `DEFAULT_OPTIONS`; `fsq` takes `levels`, or finds
            them in `FSQ_LEVELS` (its codebook then has as many codes as the levels make, 64000 for 65536).

    Raises:
        UserError: for an unknown name or option, a value out of range, and options that contradict each other or would
            be ignored.
    """
    if isinstance(name, Quantizer):
        if options:
            raise UserError(f"the quantizer is built already, so it cannot take {', '.join(options)}; leave them out")
        return _fitting(name, type(name).__name__, dim)
    spec = Spec.of(name, "quantizer")
    factory, arguments = QUANTIZERS.factory(spec.target), {**spec.init_args, **options}
    of_options = getattr(factory, "of_options", None)
    if of_options is not None:  # a `LibraryQuantizer`; to name the class would import the library
        return of_options(dim, arguments.pop("codebook_size", codebook_size), arguments)
    context = {"dim": dim} if codebook_size is None else {"dim": dim, "codebook_size": codebook_size}
    built = QUANTIZERS.build({"class_path": spec.target, "init_args": arguments}, **context)
    return _fitting(built, spec.target, dim)


def _fitting(quantizer: Quantizer, called: str, dim: int) -> Quantizer:
    """Return a quantizer of somebody else if it says what the contract asks for, and takes features of this width."""
    for fact in ("dim", "codebook_size", "num_levels"):
        value = getattr(quantizer, fact, None)
        if not is_integer(value) or value < 1:
            raise UserError(
                f"quantizer {called} has {fact} {value!r}; set it to an integer of at least 1, as "
                "Quantizer.__init__ does"
            )
    if quantizer.dim != dim:
        raise UserError(
            f"quantizer {called} takes features of {quantizer.dim} channels and there are {dim}; build it "
            f"with dim {dim}"
        )
    return quantizer
