"""The discriminator of 1d-tokenizer and of Open-MAGVIT2's pretraining, which blurs before it halves the resolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.arguments import check_channels

KERNELS = {3: (1.0, 2.0, 1.0), 4: (1.0, 3.0, 3.0, 1.0), 5: (1.0, 4.0, 6.0, 4.0, 1.0)}
GROUPS = 32


class BlurDiscriminator(nn.Module):
    """Images (b, c, h, w) in [0, 1] -> logits (b, 1, pool, pool), positive for real.

    Each stage is a 3x3 convolution, a blur of stride 2, GroupNorm and leaky ReLU 0.1.

    Args:
        width: channels of the first convolution and of the first stage, doubled by each further stage; a multiple of
            32.
        channels: of the images.
        stages: halvings of the resolution.
        blur_kernel_size: 3, 4 or 5.
        pool: side of the map that the features are max-pooled to, whatever the image's size; null leaves them.
        zero_mean: show the network images in [-1, 1], as Open-MAGVIT2 does.
    """

    def __init__(
        self,
        width: int = 128,
        *,
        channels: int = 3,
        stages: int = 3,
        blur_kernel_size: int = 4,
        pool: int | None = 16,
        zero_mean: bool = False,
    ):
        super().__init__()
        check_channels(channels)
        if width < 1 or width % GROUPS or stages < 1 or (pool is not None and pool < 1):
            raise UserError(
                f"discriminator blur of width {width}, stages {stages} and pool {pool} is not possible; width must be "
                f"a multiple of {GROUPS}, and the others at least 1"
            )
        if blur_kernel_size not in KERNELS:
            raise UserError(
                f"blur_kernel_size {blur_kernel_size} of discriminator blur is not possible; give 3, 4 or 5"
            )
        self.stages = stages
        self.pool = pool
        self.zero_mean = zero_mean
        self.block_in = nn.Sequential(nn.Conv2d(channels, width, 5, padding=2), nn.LeakyReLU(0.1))
        widths = [width, *(width * 2**stage for stage in range(stages))]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width_in, width_out, 3, padding=1),
                Blur(blur_kernel_size),
                nn.GroupNorm(GROUPS, width_out),
                nn.LeakyReLU(0.1),
            )
            for width_in, width_out in zip(widths[:-1], widths[1:], strict=True)
        )
        last = widths[-1]
        self.to_logits = nn.Sequential(nn.Conv2d(last, last, 1), nn.LeakyReLU(0.1), nn.Conv2d(last, 1, 5, padding=2))

    @property
    def min_image_size(self) -> int:
        """The smallest image side, in pixels, that has a pixel of its own after the last stage."""
        return 2**self.stages

    def forward(self, image: Tensor) -> Tensor:
        features = self.block_in(2 * image - 1 if self.zero_mean else image)
        for block in self.blocks:
            features = block(features)
        if self.pool is not None:
            features = F.adaptive_max_pool2d(features, (self.pool, self.pool))
        return self.to_logits(features)


class Blur(nn.Module):
    """Each channel of (b, c, h, w) blurred by a binomial kernel, every second pixel taken: (b, c, ceil h/2, ceil w/2).

    The border is zero, with the larger half at the right and at the bottom.

    Args:
        size: of the kernel, see `KERNELS`.
    """

    kernel: Tensor

    def __init__(self, size: int):
        super().__init__()
        line = torch.tensor(KERNELS[size])
        kernel = torch.outer(line, line)
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        width, height = self._padding(x.shape[-1]), self._padding(x.shape[-2])
        weight = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(F.pad(x, (*width, *height)), weight, stride=2, groups=x.shape[1])

    def _padding(self, side: int) -> tuple[int, int]:
        total = max((math.ceil(side / 2) - 1) * 2 + self.kernel.shape[-1] - side, 0)
        return total // 2, total - total // 2
