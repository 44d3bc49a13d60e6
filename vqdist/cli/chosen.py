"""Options that the command line chooses by others, mostly by the image size, where nobody says them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import holds_steps, read_json
from vqdist.models.presets import PRESETS

EPOCHS = 20
OF_NETWORK = ("model.dim", "model.encoder", "model.preset", "init_from")
"""Options of a VQGAN that say its network: with any of them the network is the user's."""

Said = Mapping[str, Any]
"""Options by dotted name, as the command line and its files say them; null where they say so."""


@dataclass(frozen=True)
class Choice:
    """The value of an option that nobody says.

    Attributes:
        words: of `--help`; none where only a run that is gone on with has another value than the default.
        value: by what was said; None leaves the option as it is.
    """

    words: str
    value: Callable[[Said], Any]


def choices(model_class: type, config_class: Any, defaults: Mapping[str, Any]) -> dict[str, Choice]:
    """Return the options that are chosen for a model, by dotted name.

    Args:
        model_class: its constructor has the options of the model.
        config_class: of its trainer.
        defaults: of the command line, for this model.
    """
    taken = inspect.signature(model_class).parameters
    needed = {
        f.name for f in dataclasses.fields(config_class) if f.default is f.default_factory is dataclasses.MISSING
    }
    found = {
        "trainer.num_train_steps": Choice("null, or as so far of a run that is resumed", _steps),
        "trainer.epochs": Choice(f"{EPOCHS} of a new run where num_train_steps is not given, else as so far", _epochs),
    }
    if "batch_size" in needed:
        found["trainer.batch_size"] = Choice("2048 / image_size, from 1 to 64", lambda said: _batch_size(_side(said)))
    if {"dim", "layers", "discr_layers", "encoder"} <= set(taken):
        found |= OF_VQGAN
    if {"preset", "use_gan", "discriminator"} <= set(taken):
        found["model.use_gan"] = Choice("true, but false of a preset that has no discriminator", _use_gan)
    for option, choice in OF_VQ_AR.items():
        name = option.removeprefix("model.")
        if name in taken and taken[name].default is inspect.Parameter.empty and "patch_size" in taken:
            found[option] = choice
    return {option: choice for option, choice in found.items() if option not in defaults}


def chosen(options: Mapping[str, Choice], said: Said) -> dict[str, Any]:
    """Return the values of the options that nobody says."""
    values = {option: choice.value(said) for option, choice in options.items() if said.get(option) is None}
    return {option: value for option, value in values.items() if value is not None}


def run_before(said: Said) -> dict[str, Any]:
    """Return the configuration of the run that is gone on with; an empty one of a run that begins."""
    if said.get("out") is None or said.get("trainer.overwrite") is True:
        return {}
    with contextlib.suppress(UserError, OSError):  # whoever opens the run says what is wrong with it
        folder = Path(str(said["out"])).expanduser()
        path = folder / "config.json"
        found: Any = read_json(path) if path.is_file() and holds_steps(folder) else {}
        return found if isinstance(found, dict) else {}
    return {}


def _length_before(said: Said, option: str) -> Any:
    trainer = run_before(said).get("trainer")
    length = trainer.get(option) if isinstance(trainer, dict) else None
    return length if isinstance(length, (int, float)) else None


def _steps(said: Said) -> int | None:
    return _length_before(said, "num_train_steps") if said.get("trainer.epochs") is None else None


def _epochs(said: Said) -> float | None:
    if said.get("trainer.num_train_steps") is not None or _steps(said) is not None:
        return None
    return _length_before(said, "epochs") or EPOCHS


def _use_gan(said: Said) -> bool | None:
    preset = PRESETS.get(str(said.get("model.preset")))
    alone = preset is not None and preset.discriminator is None
    return False if alone and said.get("model.discriminator") is None else None


def _side(said: Said) -> int | None:
    side = said.get("data.image_size")
    return side if isinstance(side, int) and side >= 1 else None


def _batch_size(side: int | None) -> int:
    """Return as many images as fit well; those of a model of codes are small, whatever the tokenizer's."""
    return 32 if side is None else min(max(2048 // side, 1), 64)


def _of_network(value: Callable[[int], int | None]) -> Callable[[Said], int | None]:
    """Return a choice that is made where nothing says a VQGAN's network."""

    def choose(said: Said) -> int | None:
        side = _side(said)
        return None if side is None or any(said.get(option) is not None for option in OF_NETWORK) else value(side)

    return choose


def _width(side: int) -> int:
    return 32 if side <= 64 else 64 if side <= 128 else 128


def _halvings(said: Said) -> int | None:
    """Return as many halvings as widths are said, or else by the images."""
    mults = said.get("model.encdec_layer_mults")
    if not isinstance(mults, list) or not mults:
        return _of_network(_layers)(said)
    others = [option for option in OF_NETWORK if option != "model.dim"]
    return None if any(said.get(option) is not None for option in others) else len(mults)


def _layers(side: int) -> int:
    """Return the halvings to a map of about 8 x 8 codes, or of 16 x 16 from 128 pixels on, as far as they divide."""
    most = max(1, round(math.log2(side / (16 if side >= 128 else 8)))) if side > 8 else 1
    return next((layers for layers in range(most, 1, -1) if side % 2**layers == 0), 1)


def _discr_layers(side: int) -> int | None:
    return None if side >= 32 else max(1, int(math.log2(side)) - 2)


def _patch_size(said: Said) -> int | None:
    """Return the divisor of the side that is nearest to an eighth of it."""
    side = _side(said)
    if side is None:
        return None
    return min((size for size in range(1, side + 1) if side % size == 0), key=lambda size: abs(size - side / 8))


OF_VQGAN = {
    "model.dim": Choice("32, 64 from 65 pixels on, 128 from 129 on", _of_network(_width)),
    "model.layers": Choice(
        "4, or as many as make 8 x 8 to 16 x 16 codes where dim is not given, or as encdec_layer_mults are", _halvings
    ),
    "model.discr_layers": Choice("4, or as many as fit the images where dim is not given", _of_network(_discr_layers)),
}
OF_VQ_AR = {
    "model.patch_size": Choice("about an eighth of image_size", _patch_size),
    "model.dim": Choice("128", lambda said: 128),
    "model.codebook_size": Choice("512", lambda said: 512),
}
