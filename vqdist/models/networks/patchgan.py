"""PatchGAN as taming-transformers, LlamaGen and SEED-Voken train against it (arXiv 1611.07004), with their names."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.arguments import check_channels
from vqdist.models.quantizers.base import is_distributed, mean_over_ranks

NORMS = ("batch", "actnorm")
WIDEST = 8  # times the width of the first layer


class PatchGAN(nn.Module):
    """Images (b, c, h, w) in [0, 1] -> logits (b, 1, h', w'), positive for real, of patches of 70 pixels by default.

    4x4 convolutions with leaky ReLU 0.2: `layers` of stride 2, two of stride 1, and norms between them.

    BatchNorm is the published one and plain: real and reconstructed images are normalised apart, each by the batch of
    its rank, so two ranks are not one process with twice the batch. Its running statistics are of no use in training.
    They are a rank's own: a checkpoint keeps those of every rank, and ranks are not compared by them.

    Args:
        width: channels after the first convolution.
        channels: of the images.
        layers: halvings of the resolution.
        norm: `batch`, or `actnorm`: an affine map of each channel that begins with the mean and deviation of the
            first batch over all ranks, and is trained.
        zero_mean: show the network images in [-1, 1], as all who published it do.

    Attributes:
        batch_statistics: whether `parts` matter.
    """

    def __init__(
        self,
        width: int = 64,
        *,
        channels: int = 3,
        layers: int = 3,
        norm: str = "batch",
        zero_mean: bool = True,
    ):
        super().__init__()
        check_channels(channels)
        if norm not in NORMS:
            raise UserError(f"norm {norm!r} of discriminator patchgan is not known; choose one of {', '.join(NORMS)}")
        if width < 1 or layers < 1:
            raise UserError(f"width {width} and layers {layers} of discriminator patchgan must be at least 1")
        self.layers = layers
        self.zero_mean = zero_mean
        self.batch_statistics = norm == "batch"
        self.initialises_itself = norm == "actnorm"
        widths = [width * min(2**layer, WIDEST) for layer in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer, (width_in, width_out) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
            stride = 2 if layer < layers else 1
            modules.append(nn.Conv2d(width_in, width_out, 4, stride=stride, padding=1, bias=norm != "batch"))
            modules.append(nn.BatchNorm2d(width_out) if norm == "batch" else ActNorm(width_out))
            modules.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_init)

    @property
    def min_image_size(self) -> int:
        """The smallest image side, in pixels, that gives at least one patch."""
        return 3 * 2**self.layers

    def forward(self, image: Tensor, parts: int = 1) -> Tensor:
        """Return the logits; `parts` of the batch of equal size are normalised apart."""
        image = 2 * image - 1 if self.zero_mean else image
        if parts == 1 or not self.batch_statistics:
            return self.main(image)
        return torch.cat([self.main(part) for part in image.chunk(parts)])


class ActNorm(nn.Module):
    """(x + loc) * scale, of features (b, c, h, w) (arXiv 1807.03039).

    The first batch in training sets `loc` and `scale` so that each channel has mean 0 and deviation 1 over all ranks.

    Args:
        width: channels, c.
    """

    initialized: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, width, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._began: bool | None = None  # as `initialized`, which lies on the device; None where it must be read

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._has_begun():
            self._begin(x)
        return self.scale * (x + self.loc)

    def _has_begun(self) -> bool:
        if self._began is None:
            self._began = bool(self.initialized)
        return self._began

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        channels = x.float().transpose(0, 1).flatten(1)
        mean = mean_over_ranks(channels.mean(dim=1, keepdim=True))
        ranks = dist.get_world_size() if is_distributed() else 1
        squares = ranks * mean_over_ranks((channels - mean).square().sum(dim=1, keepdim=True))
        deviation = (squares / (ranks * channels.shape[1] - 1)).sqrt()
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_((1 / (deviation + 1e-6)).view_as(self.scale))
        self.initialized.fill_(1)
        self._began = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._began = None
        super()._load_from_state_dict(*args, **kwargs)


def _init(module: nn.Module) -> None:
    """Draw weights of convolutions from N(0, 0.02), and those of BatchNorm from N(1, 0.02)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
