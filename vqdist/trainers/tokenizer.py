"""What the trainers of image tokenizers share: reconstructions to measure and draw, codes to count, an export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vqdist.evaluation import evaluate_reconstruction, reconstruct
from vqdist.metrics import CodeHistogram
from vqdist.trainers.base import Trainer


class TokenizerTrainer(Trainer):
    """Trains a model whose first engine's network is a `TokenizerNetwork`.

    Attributes:
        codes: the codes of this rank's training images since the last line of numbers; `update` adds to it.
    """

    def _set_up_networks(self) -> None:
        super()._set_up_networks()
        self.codes = CodeHistogram(self.network, self.device)
        self._codes_before = torch.zeros_like(self.codes.counts)
        self._chart = torch.zeros_like(self.codes.counts)

    def numbers_over_ranks(self) -> dict[str, float]:
        """Usage and perplexity of the codebook on the training images since the last line."""
        numbers = self.codes.usage(self.backend)
        self._codes_before += self.codes.counts
        self.codes.reset()
        return numbers

    def counts_to_come(self) -> dict[str, Tensor]:
        return {"codes": self.codes.counts, "codes_before": self._codes_before}

    def evaluate(self) -> dict[str, float]:
        return evaluate_reconstruction(
            self.network, self.valid_batches(), self.backend, image_size=self.config.image_size
        )

    def before_pictures(self) -> None:
        """Count the codes of all ranks' training images since the last picture."""
        self._chart = self.backend.sum(self._codes_before + self.codes.counts)
        self._codes_before = -self.codes.counts  # the next line of numbers adds what is drawn now

    def save_pictures(self, images: Tensor, path: Path) -> None:
        """A sheet with the views of each image, and a bar chart of the codes since the last one."""
        self.tracker.picture(self.step, self.picture_name, torch.stack(self.views(images), dim=1), path)
        if bool(self._chart.any()):
            self.tracker.histogram(self.step, "codes", self._chart, path.with_name(f"{path.stem}_codes.png"))

    def views(self, images: Tensor) -> list[Tensor]:
        """What a picture shows of images (n, c, h, w): original, reconstruction, reconstruction of the average."""
        networks = [next(iter(self.engines.values())).module, *([self.ema.ema_model] if self.ema is not None else [])]
        return [images, *(reconstruct(network, images) for network in networks)]
