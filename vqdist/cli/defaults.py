"""Defaults of `vqdist train vqgan` that are others than those of the Python classes, and where they hold.

Those of the classes are the ancestors'. Those of the command came of a search, see docs/defaults.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from vqdist.cli.chosen import Choice, Said, run_before
from vqdist.models.presets import PRESETS

# of the discriminator, which nothing reads where there is none
OF_PLAYERS = {
    "trainer.adversarial_weight": 0.1,
    "trainer.discriminator_warmup_steps": 50,
    "trainer.adversarial_ramp_steps": 100,
    "trainer.discr_max_grad_norm": 1.0,
}
OF_SCHEDULE = ("trainer.discriminator_warmup_steps", "trainer.adversarial_ramp_steps")
OF_BEGINNING = "trainer.lr"  # of weights at random
VQGAN_DEFAULTS = {OF_BEGINNING: 1e-3, "trainer.max_grad_norm": 1.0, **OF_PLAYERS}
# of quantizer vq
VQ_OPTIONS = {"codebook_dim": 32, "decay": 0.9, "threshold_ema_dead_code": 2}
QUANTIZER = "model.quantizer"
FSQ_SIZES = (2**8, 2**10, 2**12, 2**14, 2**16)
"""Codebook sizes for which the paper of `fsq` has levels: those of `FSQ_LEVELS`, which torch comes with."""
OF_OTHERS = ("model.lfq_kwargs", "model.quantizer_kwargs", "model.lookup_free_quantization")  # say another quantizer
# of a codebook that does not follow the encoder by itself they were not measured
OTHER_CODEBOOKS = ("learnable_codebook", "ema_update", "directional_reparam", "implicit_neural_codebook")
VQ = "model.vq_kwargs"
NOTE = (
    "Some defaults are others than those of the Python classes, which keep muse-maskgit-pytorch's. They came of a "
    "search, see docs/defaults.md: a discriminator that joins late undoes nothing that was learnt, and codes stay in "
    f"use. Quantizer vq has {', '.join(f'{name} {value}' for name, value in VQ_OPTIONS.items())} where vq_kwargs says "
    "nothing else. The quantizer that nobody says is fsq, or vq where fsq has no levels for codebook_size; in Python "
    "it is lfq. A run that was begun with the classes' defaults goes on with them."
)


def measured(config_class: type) -> dict[str, Choice]:
    """Return the defaults that were measured, as choices of what nobody says.

    Args:
        config_class: of the trainer of a VQGAN.
    """
    found = {}
    for option, value in VQGAN_DEFAULTS.items():
        in_python = default_in_python(config_class, option)
        words = f"{value}, in Python {'null' if in_python is None else in_python}"
        found[option] = Choice(words, partial(_of_trainer, option, value, in_python))
    for name, value in VQ_OPTIONS.items():
        found[f"{VQ}.{name}"] = Choice(f"{value}", partial(_of_codebook, name, value))
    found[QUANTIZER] = Choice("fsq, or vq where fsq has no levels for codebook_size; in Python lfq", _quantizer)
    return found


def as_begun() -> dict[str, Choice]:
    """Return the same defaults as choices of a run that began with them, of a class that has its own since then."""
    options = [*VQGAN_DEFAULTS.items(), *((f"{VQ}.{name}", value) for name, value in VQ_OPTIONS.items())]
    return {option: Choice("", partial(_if_begun_with, option, value)) for option, value in options}


def _if_begun_with(option: str, value: Any, said: Said) -> Any:
    if option in said or option.removeprefix(f"{VQ}.") in _codebook_of(said):
        return None
    before: Any = run_before(said)
    for name in option.split("."):
        before = before.get(name) if isinstance(before, Mapping) else None
    return value if before == value else None


def default_in_python(config_class: type, option: str) -> Any:
    """Return the default of an option of the trainer by the signature of its configuration."""
    return inspect.signature(config_class).parameters[option.removeprefix("trainer.")].default


def _of_trainer(option: str, value: Any, in_python: Any, said: Said) -> Any:
    if option in said:  # as null, which is a value of some
        return None
    if option in OF_PLAYERS and not _has_discriminator(said):
        return None
    if option in OF_SCHEDULE and said.get("trainer.adversarial_weight") == 0:
        return None
    trainer = run_before(said).get("trainer")
    name = option.removeprefix("trainer.")
    before = trainer.get(name, in_python) if isinstance(trainer, dict) else None
    if option == OF_BEGINNING and said.get("init_from") is not None:  # weights that are learnt already
        return value if before == value else None
    return None if isinstance(trainer, dict) and before == in_python else value


def _quantizer(said: Said) -> str | None:
    """Return the quantizer of a new codebook, where nobody says one nor has options of another than `vq`."""
    begun = run_before(said).get("model")
    if _says(said, QUANTIZER, "model.preset", "init_from", *OF_OTHERS) or (
        isinstance(begun, dict) and begun.get("quantizer") is None
    ):
        return None
    size = said.get("model.codebook_size")
    return "fsq" if (size is None or size in FSQ_SIZES) and not _says(said, VQ) else "vq"


def _says(said: Said, *options: str) -> bool:
    """Return whether somebody says one of these options, or a part of one."""
    return any(
        value is not None and any(name == option or name.startswith(f"{option}.") for option in options)
        for name, value in said.items()
    )


def _of_codebook(name: str, value: Any, said: Said) -> Any:
    given = _codebook_of(said)
    if not _is_vq(said) or name in given or any(other in given for other in OTHER_CODEBOOKS):
        return None
    model = run_before(said).get("model")
    begun_without = isinstance(model, dict) and name not in (model.get("vq_kwargs") or {})
    return None if begun_without else value


def _has_discriminator(said: Said) -> bool:
    """Return whether there is one for sure: `init_from` may name a model without."""
    if said.get("init_from") is not None or False in (said.get("model.use_gan"), said.get("model.use_vgg_and_gan")):
        return False
    preset = PRESETS.get(str(said.get("model.preset")))
    return preset is None or preset.discriminator is not None or said.get("model.discriminator") is not None


def _codebook_of(said: Said) -> dict[str, Any]:
    """Return the options of the codebook that were said, as a whole or one by one."""
    whole = said.get(VQ)
    single = {name.removeprefix(f"{VQ}."): value for name, value in said.items() if name.startswith(f"{VQ}.")}
    return {**(whole if isinstance(whole, Mapping) else {}), **single}


def _is_vq(said: Said) -> bool:
    """Return whether a new codebook is made, by quantizer vq: `init_from` gives the codebook, too."""
    if said.get("init_from") is not None:
        return False
    if said.get(QUANTIZER) is None and said.get("model.lookup_free_quantization") is False:
        return said.get("model.preset") is None
    return (said.get(QUANTIZER) or _quantizer(said)) == "vq"
