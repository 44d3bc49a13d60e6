"""What the trainers of image tokenizers share: reconstructions to measure and draw, codes to count, an export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vqdist.evaluation import evaluate_reconstruction, reconstruct
from vqdist.metrics import CodeHistogram, codebook_usage
from vqdist.trainers.base import Trainer


class TokenizerTrainer(Trainer):
    """Trains a model whose first engine's network is a `TokenizerNetwork`.

    Attributes:
        codes: the codes of the training images since the last line of numbers; `update` adds to it.
    """

    def _set_up_networks(self) -> None:
        super()._set_up_networks()
        self.codes = CodeHistogram(self.network, self.device)
        self._codes_to_draw = torch.zeros_like(self.codes.counts)

    def numbers_over_ranks(self) -> dict[str, float]:
        """Usage and perplexity of the codebook on the training images since the last line."""
        counts = self.codes.over_ranks(self.backend)
        usage, perplexity = codebook_usage(counts, self.codes.num_levels)
        self._codes_to_draw += counts
        self.codes.reset()
        return {"codebook_usage": usage, "codebook_perplexity": perplexity}

    def evaluate(self) -> dict[str, float]:
        return evaluate_reconstruction(
            self.network, self.valid_batches(), self.backend, image_size=self.config.image_size
        )

    def save_pictures(self, images: Tensor, path: Path) -> None:
        """A sheet with the views of each image, and a bar chart of the codes since the last one."""
        self.tracker.picture(self.step, "reconstructions", torch.stack(self.views(images), dim=1), path)
        if bool(self._codes_to_draw.any()):
            chart = path.with_name(f"{path.stem}_codes.png")
            self.tracker.histogram(self.step, "codes", self._codes_to_draw, chart)
            self._codes_to_draw.zero_()

    def views(self, images: Tensor) -> list[Tensor]:
        """What a picture shows of images (n, c, h, w): original, reconstruction, reconstruction of the average."""
        networks = [next(iter(self.engines.values())).module, *([self.ema.ema_model] if self.ema is not None else [])]
        return [images, *(reconstruct(network, images) for network in networks)]
