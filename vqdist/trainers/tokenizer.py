"""Shared by the trainers of image tokenizers: reconstructions to measure and draw, codes to count, an export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqdist.evaluation import evaluate_reconstruction, reconstruct
from vqdist.metrics import CodeHistogram
from vqdist.models.tokenizer import TokenizerNetwork
from vqdist.tracking import Tracker
from vqdist.trainers.base import Trainer
from vqdist.trainers.measure import OF_RECONSTRUCTIONS

QUALITY = ("l1", "psnr", "psnr_per_image", "ssim", "ssim_luma")


def names_of_reconstruction(network: TokenizerNetwork) -> set[str]:
    """Return the names of the numbers that `evaluate_reconstruction` gives of a network, but for that of images."""
    kind, parts = ("scale", len(network.scales)) if network.scales is not None else ("level", network.num_levels)
    of_parts = {f"codebook_{name}_{kind}_{number + 1}" for name in ("usage", "perplexity") for number in range(parts)}
    return {*QUALITY, "codebook_usage", "codebook_perplexity", *(of_parts if kind == "scale" or parts > 1 else ())}


class TokenizerTrainer(Trainer):
    """Trains a model whose first engine's network is a `TokenizerNetwork`.

    Attributes:
        codes: the codes of this rank's training images since the last log line; `update` adds to it.
    """

    measure = OF_RECONSTRUCTIONS

    def _set_up_networks(self) -> None:
        super()._set_up_networks()
        self.codes = CodeHistogram(cast(TokenizerNetwork, self.main_engine.module), self.device)
        self._codes_before = torch.zeros_like(self.codes.counts)

    def numbers_over_ranks(self) -> dict[str, float]:
        """Usage and perplexity of the codebook on the training images since the last line."""
        numbers = self.codes.usage(self.backend)
        self.report.watch_codebook(self.codes.few)
        self._codes_before += self.codes.counts
        self.codes.reset()
        return numbers

    def counts_to_come(self) -> dict[str, Tensor]:
        return {"codes": self.codes.counts, "codes_before": self._codes_before}

    def evaluate(self) -> dict[str, float]:
        with self.averaged_network() as network:
            return self.further.of_reconstructions(
                partial(
                    evaluate_reconstruction,
                    cast(TokenizerNetwork, network),
                    self.valid_batches(),
                    self.backend,
                    image_size=self.config.image_size,
                )
            )

    def validation_names(self) -> set[str]:
        network = cast(Any, self.model).network
        return {*names_of_reconstruction(network), *self.config.measures.names}

    def save_pictures(self, path: Path) -> None:
        """Draw a sheet with the views of each image, and a bar chart of all ranks' codes since the last one."""
        chart = self.backend.sum(self._codes_before + self.codes.counts)
        self._codes_before = -self.codes.counts  # the next log line adds what is drawn now
        with self.main_engine.whole() as live, self.averaged_network() as averaged:
            if self.tracker is not None:  # on rank 0
                networks = [live, averaged] if self.networks.has_average else [live]
                self.report.draw_alone(partial(self._draw_views, self.tracker, networks, path))
        if self.tracker is not None and bool(chart.any()):
            self.tracker.histogram(self.step, "codes", chart, path.with_name(f"{path.stem}_codes.png"))

    def _draw_views(self, tracker: Tracker, networks: list[nn.Module], path: Path) -> None:
        views = torch.stack(self.views(self.picture_images(), networks), dim=1)
        tracker.picture(self.step, self.picture_name, views, path)

    def views(self, images: Tensor, networks: list[nn.Module]) -> list[Tensor]:
        """Return what a picture shows of images (n, c, h, w): the original and its reconstructions.

        They are those of the live network and of the averaged one, if there is one.
        """
        return [images, *(reconstruct(cast(TokenizerNetwork, network), images) for network in networks)]
