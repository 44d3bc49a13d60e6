"""The convolutional autoencoder of Open-MAGVIT2 (arXiv 2409.04410).

It has no attention; the decoder's levels are normed by what the codes of the whole image say. Names of tensors are
Open-MAGVIT2's, but for the decoder's last layer. Shapes: `b` batch, `c` channel, `h w` image, `d` width of the
features, `h' w'` map of codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist.models.networks.levels import (
    Blocks,
    ImageConv2d,
    Level,
    LevelDecoder,
    LevelEncoder,
    ResnetBlock,
    check_blocks,
    falling,
    group_norm,
    rising,
    widths_of,
)

VARIANCE_EPS = 1e-6


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift come from spread and mean of the quantized features over the whole image.

    Args:
        dim_style: channels of the quantized features.
        dim: channels of what is normed.
        groups: of the norm.
    """

    def __init__(self, dim_style: int, dim: int, groups: int):
        super().__init__()
        self.gn = nn.GroupNorm(groups, dim, eps=1e-6, affine=False)
        self.gamma = nn.Linear(dim_style, dim)
        self.beta = nn.Linear(dim_style, dim)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """(b, dim, h, w) and the quantized features (b, dim_style, h', w') -> (b, dim, h, w)."""
        flat = style.flatten(2)
        # a map of one position has no spread; dividing by the count less one would make it nan
        variance = flat.var(dim=2) if flat.shape[2] > 1 else flat.new_zeros(flat.shape[:2])
        scale, shift = self.gamma((variance + VARIANCE_EPS).sqrt()), self.beta(flat.mean(dim=2))
        return scale[..., None, None] * self.gn(x) + shift[..., None, None]


class DepthToSpace(nn.Module):
    """Twice the resolution: a 3x3 convolution to four times the channels, which are the four pixels in turn.

    The channels of a pixel stay together, (dy, dx, c); `torch.nn.PixelShuffle` has (c, dy, dx).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, 4 * dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) -> (b, d, 2 h, 2 w)."""
        return rearrange(self.conv1(x), "b (dy dx d) h w -> b d (h dy) (w dx)", dy=2, dx=2)


class MagvitEncoder(LevelEncoder):
    """Images (b, c, h, w) in [0, 1] -> features (b, d, h / stride, w / stride).

    Args:
        ch: channels of the first convolution.
        ch_mult: width of each resolution as a multiple of `ch`; the stride is 2 ** (len(ch_mult) - 1).
        num_res_blocks: residual blocks of each resolution, and in the middle.
        z_channels: width of the features: bits of a code.
        groups: of the group norms.
        channels: of the images.
        checkpointing: compute activations anew in the backward pass instead of keeping them.

    Attributes:
        dim: width of the features, d.
        stride: pixels per code along each side.
    """

    title = "magvit2"

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 4,
        z_channels: int = 18,
        groups: int = 32,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        check_blocks(channels, num_res_blocks=num_res_blocks, z_channels=z_channels)
        widths = widths_of("ch", ch, "ch_mult", ch_mult, groups)
        super().__init__(len(widths), checkpointing)
        self.dim = z_channels
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            Level(
                _blocks(within, groups),
                downsample=nn.Conv2d(width, width, 3, stride=2, padding=1) if level < len(widths) - 1 else None,
            )
            for level, (width, within) in enumerate(zip(widths, falling(ch, widths, num_res_blocks)))
        )
        self.mid_block = _blocks([widths[-1]] * (num_res_blocks + 1), groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features; raise `UserError` for a side that is no multiple of the stride."""
        return self.through(image * 2 - 1, self.mid_block)


class MagvitDecoder(LevelDecoder):
    """Quantized features (b, d, h', w') -> the input of the last layer (b, ch * ch_mult[0], h, w).

    Args:
        dim: width of the features, d.
        ch, ch_mult, num_res_blocks, groups, channels, checkpointing: see `MagvitEncoder`.

    Attributes:
        last_layer: a 3x3 convolution that gives images in [0, 1].
    """

    def __init__(
        self,
        dim: int,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 4,
        groups: int = 32,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__(checkpointing)
        check_blocks(channels, num_res_blocks=num_res_blocks, dim=dim)
        widths = widths_of("ch", ch, "ch_mult", ch_mult, groups)
        levels = rising(widths, num_res_blocks)
        self.dim = dim
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid_block = _blocks([widths[-1]] * (num_res_blocks + 1), groups)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(dim, before, groups) for before, *_ in levels)
        self.up = nn.ModuleList(
            Level(_blocks(within, groups), upsample=DepthToSpace(within[-1]) if level else None)
            for level, within in enumerate(levels)
        )
        self.norm_out = group_norm(widths[0], groups)
        self.last_layer = ImageConv2d(widths[0], channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(features), self.run)
        for norm, level in reversed(list(zip(self.adaptive, self.up))):
            x = level(norm(x, features), self.run)
        return F.silu(self.norm_out(x))


def _blocks(widths: Sequence[int], groups: int) -> Blocks:
    return Blocks(ResnetBlock(before, after, groups, bias=False) for before, after in zip(widths, widths[1:]))
