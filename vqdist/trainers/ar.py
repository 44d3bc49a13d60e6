"""Training a model that predicts codes: end to end (VQ-AR), or over a frozen tokenizer (prior, VAR)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqdist.backends import Engine
from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import Batch
from vqdist.errors import UserError
from vqdist.evaluation import evaluate_prediction, evaluate_reconstruction, reconstruct
from vqdist.metrics import CodeHistogram, CodePredictionMetrics, RunningMeans, codebook_usage
from vqdist.models.autoregressive import AutoregressiveModel
from vqdist.models.tokenizer import TokenizerNetwork
from vqdist.sampling import DrawOptions, uniform_per_image
from vqdist.seeding import derive_seed
from vqdist.trainers.base import Trainer, mark_last
from vqdist.trainers.config import TrainerConfig

CODES = "codes:"


@dataclass(kw_only=True)
class ARTrainerConfig(TrainerConfig):
    """How to train a model that predicts codes: the options of every trainer, and those of labels and samples."""

    folder: str | None = None
    """Images, as for every trainer; or `codes:FOLDER`, what `vqdist encode` wrote with the model's tokenizer."""
    image_size: int | None = None
    """Side of the square training images in pixels; by default the model's."""
    label_dropout: float = 0.1
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
    num_images_save: int = 64
    """Images in a picture of samples."""
