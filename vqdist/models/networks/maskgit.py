"""The convolutional autoencoder of MaskGIT-VQGAN, in the form of the 1d-tokenizer project: no attention at all.

Names of tensors are the project's, but for the decoder's last layer. Shapes: `b` batch, `c` channel, `h w` image, `d`
width of the features, `h' w'` map of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vqdist.models.arguments import check_channels, check_whole_numbers
from vqdist.models.networks.levels import Checkpointed, check_sides, check_strided, group_norm, widths_of


class MaskGITBlock(nn.Module):
    """Twice group norm, swish and a 3x3 convolution without bias; the input is added if the width stays.

    Where the width changes, a 1x1 convolution of the block's own result is added instead: published weights were
    trained so, and the input reaches the result through the two convolutions only.
    """

    def __init__(self, dim_in: int, dim_out: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(dim_in, groups)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(dim_out, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(dim_out, dim_out, 1, bias=False) if dim_in != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(hidden))


class MaskGITLevel(nn.Module):
    """The blocks of one resolution, and the convolution after its doubling if there is one."""

    def __init__(self, widths: Sequence[int], groups: int, dropout: float, *, upsample: bool = False):
        super().__init__()
        pairs = zip(widths[:-1], widths[1:])
        self.block = nn.ModuleList(MaskGITBlock(dim_in, dim_out, groups, dropout) for dim_in, dim_out in pairs)
        self.upsample_conv = nn.Conv2d(widths[-1], widths[-1], 3, padding=1) if upsample else None

    def forward(self, x: Tensor, network: Checkpointed) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w), twice as large with `upsample`; the network calls the blocks."""
        x = network.run_all(self.block, x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MaskGITEncoder(Checkpointed):
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
        super().__init__(checkpointing)
        _check(num_res_blocks, z_channels, channels)
        widths = widths_of("hidden_channels", hidden_channels, "channel_mult", channel_mult, groups)
        self.dim, self.stride = z_channels, 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            MaskGITLevel([before, *[width] * num_res_blocks], groups, dropout)
            for before, width in zip([hidden_channels, *widths], widths)
        )
        self.mid = _middle(widths[-1], num_res_blocks, groups, dropout)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features; raise `UserError` for a side that is no multiple of the stride."""
        check_sides(image, self.stride, "maskgit")
        x = self.conv_in(image)
        for level, stage in enumerate(self.down):
            x = stage(F.avg_pool2d(x, 2) if level else x, self)
        return self.conv_out(F.silu(self.norm_out(self.run_all(self.mid, x))))

    def code_shape(self, image_size: int) -> tuple[int, int]:
        """Return the shape of the map of codes; raise `UserError` for a side that is no multiple of the stride."""
        side = check_strided(image_size, len(self.down) - 1, "channel_mult")
        return side, side


class MaskGITDecoder(Checkpointed):
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
        _check(num_res_blocks, dim, channels)
        widths = widths_of("hidden_channels", hidden_channels, "channel_mult", channel_mult, groups)
        self.dim = dim
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], num_res_blocks, groups, dropout)
        self.up = nn.ModuleList(
            MaskGITLevel([before, *[width] * num_res_blocks], groups, dropout, upsample=level > 0)
            for level, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]]))
        )
        self.norm_out = group_norm(widths[0], groups)
        self.last_layer = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.run_all(self.mid, self.conv_in(features))
        for stage in reversed(self.up):
            x = stage(x, self)
        return F.silu(self.norm_out(x))


def _middle(width: int, blocks: int, groups: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList(MaskGITBlock(width, width, groups, dropout) for _ in range(blocks))


def _check(num_res_blocks: Any, z_channels: Any, channels: int) -> None:
    check_whole_numbers(num_res_blocks=(num_res_blocks, 1), z_channels=(z_channels, 1))
    check_channels(channels)
