"""vqdist: distributed training of image tokenizers. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vqdist.version import __version__

if TYPE_CHECKING:
    from vqdist.data.dataset import ImageDataset
    from vqdist.data.sources import DummyDataset
    from vqdist.errors import UserError
    from vqdist.models.dvae import DiscreteVAE
    from vqdist.models.tokenizer import Tokenizer
    from vqdist.models.vqgan import VQGanVAE
    from vqdist.trainers.dvae import DiscreteVAETrainer
    from vqdist.trainers.vqgan import VQGanVAETrainer

_PUBLIC = {
    "DiscreteVAE": "vqdist.models.dvae",
    "DiscreteVAETrainer": "vqdist.trainers.dvae",
    "DummyDataset": "vqdist.data.sources",
    "ImageDataset": "vqdist.data.dataset",
    "Tokenizer": "vqdist.models.tokenizer",
    "UserError": "vqdist.errors",
    "VQGanVAE": "vqdist.models.vqgan",
    "VQGanVAETrainer": "vqdist.trainers.vqgan",
}

__all__ = [
    "DiscreteVAE",
    "DiscreteVAETrainer",
    "DummyDataset",
    "ImageDataset",
    "Tokenizer",
    "UserError",
    "VQGanVAE",
    "VQGanVAETrainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vqdist' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
