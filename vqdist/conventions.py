"""Published choices of how a tokenizer or a generator is measured, by name: the options that papers leave to a file.

A convention sets all that vqdist has an option for. `remains` says what the publication does beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vqdist.names import unknown

FLOAT, NEAREST, TRUNCATED = "float", "8 bits", "8 bits, truncated"
PIXELS: dict[bool | str, str] = {False: FLOAT, True: NEAREST, "down": TRUNCATED}
"""Values of `--round_pixels`, and what they are called in a protocol."""

TEN, SHUFFLED, WHOLE, OF_5000 = "10", "10 shuffled", "1", "5000 images"
SPLITS = (TEN, SHUFFLED, WHOLE, OF_5000)
"""Parts over which an inception score is averaged: ten consecutive or shuffled ones, the whole, or of 5,000 images."""

IMAGES, STATISTICS = "images", "statistics"


@dataclass(frozen=True)
class Choices:
    """Measures of one kind of images, reconstructions or samples.

    Attributes:
        pixels: rounding before all measures, one of `PIXELS`.
        compared_with: `images`, looked at by the same extractor, or a file of `statistics`.
        splits: of the inception score, one of `SPLITS`.
        images: their number.
    """

    pixels: str
    compared_with: str
    splits: str
    images: int = 50_000


@dataclass(frozen=True)
class Convention:
    """The way in which one publication measures.

    Attributes:
        name: as it is asked for.
        source: paper and file of its code that say so.
        center, resample: how an image comes to its size, see `vqdist.data.config.CENTERS`.
        reconstructions, samples: choices of either kind.
        remains: deviations of the publication that no option of vqdist makes.
        image_size: side in pixels.
        features: the extractor.
    """

    name: str
    source: str
    center: str
    resample: str
    reconstructions: Choices
    samples: Choices
    remains: str
    image_size: int = 256
    features: str = "inception"

    def differences(self, found: Mapping[str, Any], choices: Choices) -> dict[str, list[Any]]:
        """Return what was measured otherwise: by name what was found, and what was published."""
        wanted = {"image_size": self.image_size, "center": self.center, "features": self.features, **vars(choices)}
        return {name: [value, wanted[name]] for name, value in found.items() if value != wanted[name]}


_ALL = (
    Convention(
        "llamagen",
        "arXiv 2406.06525; tokenizer/tokenizer_image/reconstruction_vq_ddp.py and evaluations/c2i of its code",
        center="adm",
        resample="bicubic",
        reconstructions=Choices(NEAREST, IMAGES, OF_5000),
        samples=Choices(NEAREST, STATISTICS, OF_5000),
        remains="its SSIM has a flat window of 7 pixels and a range of 2, and its generators draw at 384 pixels",
    ),
    Convention(
        "adm",
        "arXiv 2105.05233; evaluations/evaluator.py and guided_diffusion/image_datasets.py of its code",
        center="adm",
        resample="bicubic",
        reconstructions=Choices(TRUNCATED, STATISTICS, OF_5000),
        samples=Choices(TRUNCATED, STATISTICS, OF_5000),
        remains="its distances of precision and recall are of half precision where they are finite",
    ),
    Convention(
        "taming",
        "arXiv 2012.09841; taming/data/base.py and scripts/sample_fast.py of its code, FID by torch-fidelity",
        center="albumentations",
        resample="bilinear",
        reconstructions=Choices(TRUNCATED, IMAGES, SHUFFLED),
        samples=Choices(TRUNCATED, IMAGES, SHUFFLED),
        remains="its table gives FID against the training images, too",
    ),
    Convention(
        "titok",
        "arXiv 2406.07550; evaluator/evaluator.py, data/webdataset_reader.py and demo_util.py of its code",
        center="torchvision",
        resample="bicubic",
        reconstructions=Choices(NEAREST, IMAGES, WHOLE),
        samples=Choices(TRUNCATED, STATISTICS, OF_5000),
        remains="its extractor computes in double precision for reconstructions",
    ),
)
CONVENTIONS = {one.name: one for one in _ALL}


def convention(name: str | None) -> Convention | None:
    """Return a convention by its name, and None for none.

    Raises:
        UserError: there is none of that name.
    """
    if name is None or name in CONVENTIONS:
        return None if name is None else CONVENTIONS[name]
    raise unknown("protocol", name, CONVENTIONS)


def described() -> str:
    """Return a paragraph for each convention: its choices, its source, and what remains."""
    lines = []
    for one in _ALL:
        kinds = {"reconstructions": one.reconstructions, "samples": one.samples}
        said = "; ".join(
            f"{kind}: {choices.images:,} with pixels in {choices.pixels}, against {choices.compared_with}, inception "
            f"score over {choices.splits}"
            for kind, choices in kinds.items()
        )
        lines.append(
            f"{one.name}: {one.image_size} pixels, centre of {one.center} ({one.resample}), {one.features}; {said}. "
            f"Source: {one.source}. Beyond it, {one.remains}."
        )
    return "\n".join(lines)
