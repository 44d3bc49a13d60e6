"""The convolutional autoencoder of Open-MAGVIT2 (arXiv 2409.04410).

It has no attention; the decoder's levels are normed by what the codes of the whole image say. Names of tensors are
Open-MAGVIT2's, but for the decoder's last layer. Shapes: `b` batch, `c` channel, `h w` image, `d` width of the
features, `h' w'` map of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist.models.arguments import check_channels, check_whole_numbers
from vqdist.models.networks.levels import Checkpointed, ImageConv2d, check_sides, check_strided, group_norm, widths_of

VARIANCE_EPS = 1e-6


class MagvitBlock(nn.Module):
    """Twice group norm, swish and a 3x3 convolution without bias; the input is added, by a 1x1 if widths differ."""

    def __init__(self, dim_in: int, dim_out: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(dim_in, groups)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(dim_out, groups)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(dim_in, dim_out, 1, bias=False) if dim_in != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


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


class MagvitLevel(nn.Module):
    """The blocks of one resolution, and the change to the next."""

    def __init__(self, widths: Sequence[int], groups: int):
        super().__init__()
        self.block = nn.ModuleList(MagvitBlock(before, after, groups) for before, after in zip(widths, widths[1:]))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor, network: Checkpointed) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w) at the next resolution; the network calls the blocks."""
        x = network.run_all(self.block, x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class MagvitEncoder(Checkpointed):
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
        super().__init__(checkpointing)
        _check(num_res_blocks, z_channels, channels)
        widths = widths_of("ch", ch, "ch_mult", ch_mult, groups)
        self.dim, self.stride = z_channels, 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip([ch, *widths], widths)):
            stage = MagvitLevel([before, *[width] * num_res_blocks], groups)
            stage.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1) if level < len(widths) - 1 else None
            self.down.append(stage)
        self.mid_block = _middle(widths[-1], num_res_blocks, groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features; raise `UserError` for a side that is no multiple of the stride."""
        check_sides(image, self.stride, "magvit2")
        x = self.conv_in(image * 2 - 1)
        for stage in self.down:
            x = stage(x, self)
        return self.conv_out(F.silu(self.norm_out(self.run_all(self.mid_block, x))))

    def code_shape(self, image_size: int) -> tuple[int, int]:
        """Return the shape of the map of codes; raise `UserError` for a side that is no multiple of the stride."""
        side = check_strided(image_size, len(self.down) - 1, "ch_mult")
        return side, side


class MagvitDecoder(Checkpointed):
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
        _check(num_res_blocks, dim, channels)
        widths = widths_of("ch", ch, "ch_mult", ch_mult, groups)
        entering = [*widths[1:], widths[-1]]
        self.dim = dim
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid_block = _middle(widths[-1], num_res_blocks, groups)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(dim, width, groups) for width in entering)
        self.up = nn.ModuleList()
        for level, (width, before) in enumerate(zip(widths, entering)):
            stage = MagvitLevel([before, *[width] * num_res_blocks], groups)
            stage.upsample = DepthToSpace(width) if level else None
            self.up.append(stage)
        self.norm_out = group_norm(widths[0], groups)
        self.last_layer = ImageConv2d(widths[0], channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.run_all(self.mid_block, self.conv_in(features))
        for norm, stage in reversed(list(zip(self.adaptive, self.up))):
            x = stage(norm(x, features), self)
        return F.silu(self.norm_out(x))


def _middle(width: int, blocks: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(MagvitBlock(width, width, groups) for _ in range(blocks))


def _check(num_res_blocks: Any, z_channels: Any, channels: int) -> None:
    check_whole_numbers(num_res_blocks=(num_res_blocks, 1), z_channels=(z_channels, 1))
    check_channels(channels)
