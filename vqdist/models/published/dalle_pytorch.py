"""The discrete VAE of DALLE-pytorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqdist.models.dvae import DiscreteVAE
from vqdist.models.published.base import Family


class DallePytorch(Family):
    """A `vae.pt` of DALLE-pytorch 1.6: {hparams, weights}."""

    aliases = ("dalle", "dvae")
    title = "DALLE-pytorch"

    def recognises(self, content: Any, config: Mapping[str, Any], path: Path) -> bool:
        return isinstance(content, Mapping) and {"hparams", "weights"} <= content.keys()

    def read(self, content: Any, config: Mapping[str, Any], path: Path) -> DiscreteVAE:
        return DiscreteVAE.from_dalle_pytorch(path)
