"""vqdist: distributed training of image tokenizers and autoregressive image models.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vqdist.version import __version__

if TYPE_CHECKING:
    from vqdist.data.codes import CodeDataset
    from vqdist.data.dataset import ImageDataset
    from vqdist.data.sources import DummyDataset, Source
    from vqdist.errors import PeerLost, RanksDiverged, UserError
    from vqdist.models.autoregressive import AutoregressiveModel, CodePrediction, SecondStage
    from vqdist.models.dvae import DiscreteVAE
    from vqdist.models.networks import Decoder, Discriminator, Encoder
    from vqdist.models.prior import Prior
    from vqdist.models.quantizers import Quantized, Quantizer
    from vqdist.models.tokenizer import Tokenizer
    from vqdist.models.var import VAR
    from vqdist.models.vq_ar import VQImageAutoregressiveAutoencoder
    from vqdist.models.vqgan import VQGanVAE
    from vqdist.models.vqvae import SimpleVQVAE, VectorQuantizer
    from vqdist.objectives import Objective, Perceptual, Reconstruction, Term
    from vqdist.sampling import DrawOptions, draw
    from vqdist.stopping import Stopped
    from vqdist.tracking import Sink
    from vqdist.tracking.curves import LivePlot
    from vqdist.trainers.ar import ARTrainer
    from vqdist.trainers.dvae import DiscreteVAETrainer
    from vqdist.trainers.vqgan import VQGanVAETrainer

_PUBLIC = {
    "ARTrainer": "vqdist.trainers.ar",
    "AutoregressiveModel": "vqdist.models.autoregressive",
    "CodeDataset": "vqdist.data.codes",
    "CodePrediction": "vqdist.models.autoregressive",
    "Decoder": "vqdist.models.networks",
    "DiscreteVAE": "vqdist.models.dvae",
    "DiscreteVAETrainer": "vqdist.trainers.dvae",
    "Discriminator": "vqdist.models.networks",
    "DrawOptions": "vqdist.sampling",
    "DummyDataset": "vqdist.data.sources",
    "Encoder": "vqdist.models.networks",
    "ImageDataset": "vqdist.data.dataset",
    "Objective": "vqdist.objectives",
    "PeerLost": "vqdist.errors",
    "Perceptual": "vqdist.objectives",
    "Prior": "vqdist.models.prior",
    "Quantized": "vqdist.models.quantizers",
    "Quantizer": "vqdist.models.quantizers",
    "RanksDiverged": "vqdist.errors",
    "Reconstruction": "vqdist.objectives",
    "SecondStage": "vqdist.models.autoregressive",
    "SimpleVQVAE": "vqdist.models.vqvae",
    "LivePlot": "vqdist.tracking.curves",
    "Sink": "vqdist.tracking",
    "Source": "vqdist.data.sources",
    "Stopped": "vqdist.stopping",
    "Term": "vqdist.objectives",
    "Tokenizer": "vqdist.models.tokenizer",
    "UserError": "vqdist.errors",
    "VAR": "vqdist.models.var",
    "VQGanVAE": "vqdist.models.vqgan",
    "VQGanVAETrainer": "vqdist.trainers.vqgan",
    "VQImageAutoregressiveAutoencoder": "vqdist.models.vq_ar",
    "VectorQuantizer": "vqdist.models.vqvae",
    "draw": "vqdist.sampling",
}

__all__ = [
    "ARTrainer",
    "AutoregressiveModel",
    "CodeDataset",
    "CodePrediction",
    "Decoder",
    "DiscreteVAE",
    "DiscreteVAETrainer",
    "Discriminator",
    "DrawOptions",
    "DummyDataset",
    "Encoder",
    "ImageDataset",
    "LivePlot",
    "Objective",
    "PeerLost",
    "Perceptual",
    "Prior",
    "Quantized",
    "Quantizer",
    "RanksDiverged",
    "Reconstruction",
    "SecondStage",
    "SimpleVQVAE",
    "Sink",
    "Source",
    "Stopped",
    "Term",
    "Tokenizer",
    "UserError",
    "VAR",
    "VQGanVAE",
    "VQGanVAETrainer",
    "VQImageAutoregressiveAutoencoder",
    "VectorQuantizer",
    "__version__",
    "draw",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vqdist' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
