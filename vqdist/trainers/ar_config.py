"""The options of training a model that predicts codes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vqdist.data.config import CODES, VIEW_OPTIONS
from vqdist.draw_options import DrawOptions
from vqdist.options import option
from vqdist.trainers.config import TrainerConfig

MOST_SAMPLES = 4096  # of a picture: they are drawn at once
IMAGE_OPTIONS = (
    *("augment", *VIEW_OPTIONS),
    *("exts", "on_bad_image", "max_bad_frac", "max_pixels"),
)


@dataclass(kw_only=True, frozen=True)
class ARTrainerConfig(TrainerConfig):
    """Options of training a model that predicts codes: those of every trainer, of labels and of samples."""

    draws_samples = True

    image_size: int | None = option(None, at_least=1)  # type: ignore[assignment]  # until `check_model` takes the model's
    """Side of the square training images in pixels; by default the model's."""
    label_dropout: float = option(0.1, at_least=0, at_most=1)
    """Share of the training images whose class is hidden, so that the model learns to do without: what `cfg` needs."""
    sample_temperature: float | None = None
    """Temperature of the samples in a picture; by default the model's."""
    sample_top_k: int | None = None
    """Draw the samples in a picture from the so many most probable codes; by default the model's choice."""
    sample_top_p: float | None = None
    """Draw them from the fewest codes whose probabilities reach this sum; by default the model's choice."""
    sample_min_p: float | None = None
    """Draw them from codes of at least this share of the largest probability; by default the model's choice."""
    sample_cfg: float | None = None
    """Scale of classifier-free guidance in them; 1 does not guide; by default the model's."""
    validate_samples: int = option(1000, at_least=4, free=True)
    """Samples to draw for `fid` and the like in validate_with."""
    validate_samples_every: int = option(1, at_least=1, free=True)
    """Draw them at every so many validations, and at the end."""
    num_images_save: int = option(64, at_least=1, at_most=MOST_SAMPLES, free=True)
    """Images in a picture of samples."""

    @property
    def codes_folder(self) -> str | None:
        """The folder of stored codes, where `folder` names one."""
        folder = self.folder
        return folder.removeprefix(CODES) if isinstance(folder, str) and folder.startswith(CODES) else None

    @property
    def sample_options(self) -> dict[str, Any]:
        """The options that were given of the samples in a picture, by the names of `DrawOptions`."""
        names = [f.name for f in fields(DrawOptions)]
        said = {name: getattr(self, f"sample_{name}") for name in names}
        return {name: value for name, value in said.items() if value is not None}

    def check_values(self) -> None:
        super().check_values()
        DrawOptions(**self.sample_options)
        if not self.measures.of_samples:
            names = ("validate_samples", "validate_samples_every")
            self.refuse_set(*names, because="validate_with names no measure of samples, as fid")
        if self.codes_folder is not None:
            self.refuse_set(*IMAGE_OPTIONS, because="codes are stored, not images")
