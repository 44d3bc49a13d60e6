"""`--protocol NAME`: the published choices of a measurement, and what an option or the data change of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vqdist import protocol
from vqdist.backends.environment import rank_of_launcher
from vqdist.conventions import CONVENTIONS, FLOAT, IMAGES, PIXELS, TEN, Choices, Convention, convention, described
from vqdist.data.config import View
from vqdist.errors import UserError

OWN = Choices(FLOAT, IMAGES, TEN, 1000)
"""Choices of vqdist where no protocol is asked for; the images are samples."""

EPILOG = f"Protocols, each with its source:\n\n{described()}"


@dataclass(frozen=True)
class Asked:
    """The choices of one command.

    Attributes:
        convention: that `--protocol` names, or None.
        round_pixels: as the user says it; None where nobody does.
    """

    convention: Convention | None
    round_pixels: bool | str | None = None

    @property
    def reconstructions(self) -> Choices:
        """Those of reconstructions, but for what options change."""
        return OWN if self.convention is None else self.convention.reconstructions

    @property
    def samples(self) -> Choices:
        """Those of samples."""
        return OWN if self.convention is None else self.convention.samples

    def pixels(self, choices: Choices) -> str:
        """Return how pixels are rounded, one of the values of `PIXELS`."""
        return choices.pixels if self.round_pixels is None else PIXELS[self.round_pixels]

    def view(self, resample: str) -> View:
        """Return the view of images, of a model that wants this filter where no protocol says another."""
        if self.convention is None:
            return View(resample=resample)
        return View(center=self.convention.center, resample=self.convention.resample)

    def said(
        self, found: Mapping[str, Any], choices: Choices, drawn: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what the stored protocol says of a named one, and say on rank 0 where it was not kept to.

        Args:
            found: choices as they came out, by the names of `Convention.differences`.
            choices: of reconstructions or of samples.
            drawn: choices of samples beside reconstructions, of a model that has both.
        """
        if self.convention is None:
            return {}
        differs = self.convention.differences(found, choices)
        of_samples = self.convention.differences(drawn or {}, self.samples)
        differs |= {f"{protocol.SAMPLES}{name}": pair for name, pair in of_samples.items()}
        if differs and rank_of_launcher() == 0:
            listed = ", ".join(f"{name} {value} for {published}" for name, (value, published) in differs.items())
            print(f"vqdist: this differs from protocol {self.convention.name}: {listed}", file=sys.stderr)
        return {"name": self.convention.name, "source": self.convention.source, "differs": differs}


def add_protocol_option(parser) -> None:
    """`--protocol`."""
    parser.add_argument(
        "--protocol",
        type=str | None,
        default=None,
        help=f"Published choices by name: {', '.join(CONVENTIONS)}, see below. An option that is given goes first, "
        "and is recorded as a difference.",
    )


def asked(options) -> Asked:
    """Return the choices of a command, whose extractor is set where nobody names one.

    Raises:
        UserError: there is no such protocol, or pixels are to be rounded in a way that is not known.
    """
    chosen, rounding = convention(options.protocol), getattr(options, "round_pixels", None)
    if rounding not in (None, *PIXELS):
        raise UserError(f"round_pixels {rounding!r} is not possible; give true, false, or `down` to cut off")
    if chosen is not None and options.features is None:
        options.features = chosen.features
    return Asked(chosen, rounding)
