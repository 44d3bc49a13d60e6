"""The numbers of a validation by name: those that are measured on request, and which way each is better.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vqdist import protocol
from vqdist.errors import UserError
from vqdist.names import unknown

VALID = "valid/"
OF_SAMPLES = protocol.OF_SAMPLES
"""Measures of drawn images, by the features that an extractor sees."""

OF_FEATURES = tuple(f"r{name}" for name in OF_SAMPLES)
"""The same of reconstructions."""

LPIPS = "lpips"
_LPIPS = re.compile(r"lpips(?:-(vgg|alex|squeeze))?(?::(.+))?")
_OF_A_PART = re.compile(r"_(scale|level)_\d+$")

LOWER = (
    *("l1", LPIPS, "fid", "sfid", "kid", "rfid", "rsfid", "rkid"),
    *("nll", "bits_per_code", "perplexity", "proxy_loss"),
)
HIGHER = (
    *("psnr", "psnr_per_image", "ssim", "ssim_luma", "codebook_usage", "codebook_perplexity"),
    *("is", "precision", "recall", "ris", "rprecision", "rrecall", "accuracy", "proxy_accuracy"),
)


@dataclass(frozen=True)
class Measure:
    """The number of a validation by which steps are compared.

    Attributes:
        name: of the number, as `evaluate` returns it.
        higher: whether a higher one is better.
        margin: a step that is worse than the best by more is said to be.
        unit: of the number.
        advice: what to do about it.
        is_share: whether the margin is a share of the best number.
    """

    name: str
    higher: bool
    margin: float
    unit: str
    advice: str
    is_share: bool = False

    def gain(self, new: float, old: float) -> float:
        """Return by how much the new number is better than the old one; negative if it is worse."""
        return new - old if self.higher else old - new

    def has_fallen(self, new: float, best: float) -> bool:
        """Return whether the new number is worse than the best one by more than the margin."""
        return -self.gain(new, best) > self.margin * (abs(best) if self.is_share else 1)

    def shown(self, value: float) -> str:
        """Return a number with its unit."""
        return f"{value:.4g} {self.unit}".rstrip()


OF_RECONSTRUCTIONS = Measure("psnr", True, 1.0, "dB", "docs/gan.md says what to try")
OF_PREDICTIONS = Measure("nll", False, 0.1, "nats", "the model may be learning its training images by heart")


def measure_of(given: str, default: Measure | None = None) -> Measure:
    """Return the measure that somebody names, `valid/rfid` or `rfid`.

    Args:
        given: its name.
        default: that of the trainer, whose advice holds for others, too.

    Raises:
        UserError: no validation has such a number, or it is none by which steps can be compared.
    """
    name = given.removeprefix(VALID)
    for known in (OF_RECONSTRUCTIONS, OF_PREDICTIONS):
        if known.name == name:
            return known if default is None else replace(known, advice=default.advice)
    kind = _OF_A_PART.sub("", name)
    if kind not in (*LOWER, *HIGHER):
        raise unknown("number of a validation to compare steps by", name, (*LOWER, *HIGHER), "; see docs/metrics.md")
    advice = OF_RECONSTRUCTIONS.advice if default is None else default.advice
    return Measure(name, kind in HIGHER, 0.25, "", advice, is_share=True)


def known_names(trainer: Any) -> set[str] | None:
    """Return a trainer's `validation_names`; None where its class has an `evaluate` of other numbers."""
    for owner in type(trainer).__mro__:
        if "validation_names" in vars(owner):
            return trainer.validation_names()
        if "evaluate" in vars(owner):
            return None
    return None


def refuse_unmeasured(asked: Sequence[str], known: set[str] | None, trainer: str) -> None:
    """Raise `UserError` for a measure of `validate_with` that the validations of a trainer will not have.

    Args:
        asked: measures by name.
        known: see `known_names`.
        trainer: name of its class.
    """
    for name in asked:
        if name not in (known or ()):
            raise UserError(
                f"validate_with names {name}, and {trainer} does not say in validation_names that its evaluate "
                "measures it; leave it out, or see docs/extend.md"
            )


def compared_by(keep_best: str | bool, default: Measure | None, known: set[str] | None) -> Measure | None:
    """Return the measure by which steps are compared: the one that `keep_best` names, or that of the trainer.

    Args:
        keep_best: of the configuration.
        default: the trainer's own.
        known: see `known_names`.

    Raises:
        UserError: `keep_best` names what no validation will have.
    """
    if not isinstance(keep_best, str):
        return default
    measure = measure_of(keep_best, default)
    if known is not None and measure.name not in known:
        raise UserError(
            f"keep_best {keep_best} is none of the numbers of a validation ({', '.join(sorted(known))}); give one of "
            "them, or name it in validate_with, too"
        )
    return measure


class Asked(NamedTuple):
    """The measures that `validate_with` names.

    Attributes:
        names: as they are logged, without `valid/`.
        net: the network of LPIPS.
        weights: a file with its weights; None for those that are downloaded.
    """

    names: tuple[str, ...] = ()
    net: str = "vgg"
    weights: str | None = None

    @property
    def of_features(self) -> tuple[str, ...]:
        """Those that an extractor is needed for."""
        return tuple(name for name in self.names if name != LPIPS)

    @property
    def of_samples(self) -> tuple[str, ...]:
        """Those of drawn images."""
        return tuple(name for name in self.names if name in OF_SAMPLES)


def asked_for(words: Sequence[str], *, draws: bool) -> Asked:
    """Return the measures that these words name; `rfid` may be called `fid` where no samples are drawn.

    Args:
        words: of `validate_with`, each once or more often.
        draws: whether the model may draw images.

    Raises:
        UserError: a measure is not known, or two networks of LPIPS are named.
    """
    names: dict[str, None] = {}
    lpips: dict[str, tuple[str, str | None]] = {}
    for word in words:
        if match := _LPIPS.fullmatch(word):
            names[LPIPS] = None
            lpips[word] = match[1] or "vgg", match[2]
        elif word in OF_SAMPLES and not draws:
            names[f"r{word}"] = None
        elif word in (*OF_SAMPLES, *OF_FEATURES):
            names[word] = None
        else:
            known = (LPIPS, *OF_FEATURES, *(OF_SAMPLES if draws else ()))
            raise unknown("measure", word, known, "; see validate_with")
    if len(lpips) > 1:
        raise UserError(f"validate_with names LPIPS more than once ({', '.join(lpips)}); give one of them")
    (net, weights), *_ = (*lpips.values(), ("vgg", None))
    return Asked(tuple(names), net, weights)
