"""The convolutional autoencoder of MaskGIT-VQGAN, in the form of the 1d-tokenizer project: no attention at all.

Names of tensors are the project's, but for the decoder's last layer. Shapes: `b` batch, `c` channel, `h w` image, `d`
width of the features, `h' w'` map of codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vqdist.models.networks.levels import (
    Blocks,
    Level,
    LevelDecoder,
    LevelEncoder,
    ResnetBlock,
    Run,
    check_blocks,
    falling,
    group_norm,
    rising,
    widths_of,
)


class MaskGITBlock(ResnetBlock):
    """Twice group norm, swish and a 3x3 convolution without bias; the input is added if the width stays.

    Where the width changes, a 1x1 convolution of the block's own result is added instead: published weights were
    trained so, and the input reaches the result through the two convolutions only.
    """

    shortcut_of_result = True


class MaskGITUpLevel(Level):
    """The blocks of one resolution of the decoder, then its doubling and a convolution, unless it is the last."""

    def __init__(self, widths: Sequence[int], groups: int, dropout: float, *, doubles: bool):
        super().__init__(_blocks(widths, groups, dropout))
        self.upsample_conv = nn.Conv2d(widths[-1], widths[-1], 3, padding=1) if doubles else None

    def forward(self, x: Tensor, run: Run) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w) or twice as large."""
        x = super().forward(x, run)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MaskGITEncoder(LevelEncoder):
    """Images (b, c, h, w) in [0, 1] -> features (b, d, h / stride, w / stride).

    Args:
        hidden_channels: channels of the first convolution.
        channel_mult: width of each resolution as a multiple of `hidden_channels`; the stride is 2 ** (length - 1).
        num_res_blocks: residual blocks of each resolution, and in the middle.
        z_channels: width of the features.
        dropout: share of the activations of each block that are dropped while training.
        groups: of the group norms.
        channels: of the images.
        checkpointing: compute activations anew in the backward pass instead of keeping them.

    Attributes:
        dim: width of the features, d.
        stride: pixels per code along each side.
    """

    title = "maskgit"
    mults_option = "channel_mult"

    def __init__(
        self,
        *,
        hidden_channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        dropout: float = 0.0,
        groups: int = 32,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        check_blocks(channels, dropout, num_res_blocks=num_res_blocks, z_channels=z_channels)
        widths = widths_of("hidden_channels", hidden_channels, "channel_mult", channel_mult, groups)
        super().__init__(len(widths), checkpointing)
        self.dim = z_channels
        self.conv_in = nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            Level(_blocks(within, groups, dropout), downsample=nn.AvgPool2d(2) if level < len(widths) - 1 else None)
            for level, within in enumerate(falling(hidden_channels, widths, num_res_blocks))
        )
        self.mid = _blocks([widths[-1]] * (num_res_blocks + 1), groups, dropout)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features; raise `UserError` for a side that is no multiple of the stride."""
        return self.through(image, self.mid)


class MaskGITDecoder(LevelDecoder):
    """Features (b, d, h', w') -> the input of the last layer (b, hidden_channels * channel_mult[0], h, w).

    Args:
        dim: width of the features, d.
        hidden_channels, channel_mult, num_res_blocks, dropout, groups, channels, checkpointing: see `MaskGITEncoder`.

    Attributes:
        last_layer: a 3x3 convolution that gives images in [0, 1].
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        groups: int = 32,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__(checkpointing)
        check_blocks(channels, dropout, num_res_blocks=num_res_blocks, dim=dim)
        widths = widths_of("hidden_channels", hidden_channels, "channel_mult", channel_mult, groups)
        self.dim = dim
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = _blocks([widths[-1]] * (num_res_blocks + 1), groups, dropout)
        self.up = nn.ModuleList(
            MaskGITUpLevel(within, groups, dropout, doubles=level > 0)
            for level, within in enumerate(rising(widths, num_res_blocks))
        )
        self.norm_out = group_norm(widths[0], groups)
        self.last_layer = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.through(features, self.mid)


def _blocks(widths: Sequence[int], groups: int, dropout: float) -> Blocks:
    return Blocks(
        MaskGITBlock(before, after, groups, dropout, bias=False) for before, after in zip(widths, widths[1:])
    )
