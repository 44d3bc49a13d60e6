"""The convolutional autoencoder of taming-transformers (arXiv 2012.09841), which most of the field's tokenizers share.

One encoder and one decoder hold the networks of taming, LDM, LlamaGen, VAR and IBQ: they differ in their arguments and
in the names of their tensors, which `vqdist.models.published` translates. Names here are taming's.

Shapes: `b` batch, `c` channel, `h w` image, `d` width of the features, `h' w'` map of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.arguments import check_channels, check_whole_numbers
from vqdist.models.networks.levels import Checkpointed, ImageConv2d, check_sides, check_strided, group_norm


class ResnetBlock(nn.Module):
    """Twice group norm, swish and a 3x3 convolution, and the input added, by a 1x1 convolution if the width changes.

    Args:
        dim_in: channels of the input.
        dim_out: channels of the output.
        groups: of the group norms.
        dropout: share of the activations before the second convolution that are dropped while training.
    """

    def __init__(self, dim_in: int, dim_out: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(dim_in, groups)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm2 = group_norm(dim_out, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Group norm, attention of one head over all positions, and the input added."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.norm = group_norm(dim, groups)
        self.q = nn.Conv2d(dim, dim, 1)
        self.k = nn.Conv2d(dim, dim, 1)
        self.v = nn.Conv2d(dim, dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) -> (b, d, h, w)."""
        normed, height = self.norm(x), x.shape[2]
        q, k, v = (rearrange(conv(normed), "b d h w -> b 1 (h w) d") for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) d -> b d h w", h=height))


class Downsample(nn.Module):
    """Half the resolution: a strided 3x3 convolution, padded on the right and below only, or means of 2x2."""

    def __init__(self, dim: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) -> (b, d, h / 2, w / 2)."""
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: each position four times, then a 3x3 convolution if there is one."""

    def __init__(self, dim: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w) -> (b, d, 2 h, 2 w)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Level(nn.Module):
    """The blocks of one resolution: `block`, after each its `attn` if there is any, then the change of resolution."""

    def __init__(self, widths: Sequence[int], attention: bool, groups: int, dropout: float):
        super().__init__()
        pairs = zip(widths[:-1], widths[1:])
        self.block = nn.ModuleList(ResnetBlock(dim_in, dim_out, groups, dropout) for dim_in, dim_out in pairs)
        self.attn = nn.ModuleList(AttnBlock(width, groups) for width in widths[1:] if attention)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w) at the next resolution; `run(module, x)` calls a block."""
        for number, block in enumerate(self.block):
            x = run(block, x)
            x = run(self.attn[number], x) if len(self.attn) else x
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class Middle(nn.Module):
    """The blocks between the levels of encoder or decoder and its features."""

    def __init__(self, dim: int, attention: bool, groups: int, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(dim, dim, groups, dropout)
        self.attn_1 = AttnBlock(dim, groups) if attention else None
        self.block_2 = ResnetBlock(dim, dim, groups, dropout)

    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """(b, d, h, w) -> (b, d, h, w); `run(module, x)` calls a block."""
        x = run(self.block_1, x)
        x = x if self.attn_1 is None else run(self.attn_1, x)
        return run(self.block_2, x)


class _Half(Checkpointed):
    """The common part of encoder and decoder: their widths and stride."""

    def __init__(self, ch: int, ch_mult: Sequence[float], groups: int, checkpointing: bool):
        super().__init__(checkpointing)
        self.widths = widths_of(ch, ch_mult, groups)
        self.traits = f"{groups} groups"  # which no tensor says, see `Tokenizer.fingerprint`
        self.stride = 2 ** (len(self.widths) - 1)


class TamingEncoder(_Half):
    """Images (b, c, h, w) in [0, 1] -> features (b, d, h / stride, w / stride): taming's, LDM's, LlamaGen's, VAR's.

    Args:
        ch: channels of the first convolution.
        ch_mult: width of each resolution as a multiple of `ch`; the number of them is the number of resolutions, so
            the stride is 2 ** (len(ch_mult) - 1).
        num_res_blocks: residual blocks of each resolution.
        attn_resolutions: which have attention, by the side that a square image of `resolution` pixels has there.
        resolution: side of an image in pixels, for `attn_resolutions` only; images may have any size and shape.
        z_channels: channels before `quant_conv`.
        embed_dim: width of the features; by default `z_channels`.
        double_z: twice `z_channels` before `quant_conv`, as for a mean and a variance.
        dropout: share of the activations of each residual block that are dropped while training.
        resamp_with_conv: halve the resolution by a convolution; false takes means.
        mid_attention: attention between the two blocks in the middle.
        quant_conv_kernel: kernel size of the convolution that makes the features, odd: 1, 3 in VAR, 0 for none.
        groups: of the group norms.
        channels: of the images.
        checkpointing: compute activations anew in the backward pass instead of keeping them: less memory, a third
            more time.

    Attributes:
        dim: width of the features, d.
        stride: pixels per code along each side.
    """

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[float] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        z_channels: int = 256,
        embed_dim: int | None = None,
        double_z: bool = False,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        mid_attention: bool = True,
        quant_conv_kernel: int = 1,
        groups: int = 32,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        _check(num_res_blocks, resolution, z_channels, dropout, quant_conv_kernel, channels)
        super().__init__(ch, ch_mult, groups, checkpointing)
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip([ch, *self.widths], self.widths)):
            attention = resolution >> level in attn_resolutions
            stage = Level([before, *[width] * num_res_blocks], attention, groups, dropout)
            stage.downsample = Downsample(width, resamp_with_conv) if level < len(self.widths) - 1 else None
            self.down.append(stage)
        self.mid = Middle(self.widths[-1], mid_attention, groups, dropout)
        self.norm_out = group_norm(self.widths[-1], groups)
        before_quant = 2 * z_channels if double_z else z_channels
        self.conv_out = nn.Conv2d(self.widths[-1], before_quant, 3, padding=1)
        self.dim = z_channels if embed_dim is None else embed_dim
        self.quant_conv = _adapter(before_quant, self.dim, quant_conv_kernel, "encoder", "embed_dim")

    def forward(self, image: Tensor) -> Tensor:
        """Return the features; raise `UserError` for a side that is no multiple of the stride."""
        check_sides(image, self.stride, "taming")
        x = self.conv_in(image * 2 - 1)
        for stage in self.down:
            x = stage(x, self.run)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x, self.run))))
        return x if self.quant_conv is None else self.quant_conv(x)

    def code_shape(self, image_size: int) -> tuple[int, int]:
        """Return the shape of the map of codes; raise `UserError` for a side that is no multiple of the stride."""
        side = check_strided(image_size, len(self.widths) - 1, "ch_mult")
        return side, side


class TamingDecoder(_Half):
    """Features (b, d, h', w') -> the input of the last layer, (b, ch * ch_mult[0], h, w); see `TamingEncoder`.

    Args:
        dim: width of the features, d.
        ch, ch_mult, attn_resolutions, resolution, z_channels, dropout, mid_attention, groups, checkpointing: see
            `TamingEncoder`.
        num_res_blocks: as the encoder's; the decoder has one more block at each resolution.
        resamp_with_conv: a convolution after each doubling of the resolution.
        quant_conv_kernel: kernel size of the convolution that takes the features, odd; 0 for none.
        channels: of the images.

    Attributes:
        last_layer: a 3x3 convolution that gives images in [0, 1].
    """

    def __init__(
        self,
        dim: int,
        *,
        ch: int = 128,
        ch_mult: Sequence[float] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        z_channels: int = 256,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        mid_attention: bool = True,
        quant_conv_kernel: int = 1,
        groups: int = 32,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        _check(num_res_blocks, resolution, z_channels, dropout, quant_conv_kernel, channels)
        super().__init__(ch, ch_mult, groups, checkpointing)
        self.dim = dim
        self.post_quant_conv = _adapter(dim, z_channels, quant_conv_kernel, "decoder", "z_channels")
        lowest = self.widths[-1]
        self.conv_in = nn.Conv2d(z_channels, lowest, 3, padding=1)
        self.mid = Middle(lowest, mid_attention, groups, dropout)
        self.up = nn.ModuleList()
        at_lowest = resolution >> (len(self.widths) - 1)  # the encoder's rounding, then doubled
        for level, (width, before) in enumerate(zip(self.widths, [*self.widths[1:], lowest])):
            attention = at_lowest << (len(self.widths) - 1 - level) in attn_resolutions
            stage = Level([before, *[width] * (num_res_blocks + 1)], attention, groups, dropout)
            stage.upsample = Upsample(width, resamp_with_conv) if level else None
            self.up.append(stage)
        self.norm_out = group_norm(self.widths[0], groups)
        self.last_layer = ImageConv2d(self.widths[0], channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = features if self.post_quant_conv is None else self.post_quant_conv(features)
        x = self.mid(self.conv_in(x), self.run)
        for stage in reversed(self.up):
            x = stage(x, self.run)
        return F.silu(self.norm_out(x))


class NoDecoder(nn.Module):
    """No decoder, of a tokenizer whose file holds an encoder and a codebook alone: images get codes, and none back."""

    last_layer = None

    def __init__(self) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> Tensor:
        """Raise `UserError`."""
        raise UserError(
            "this tokenizer has no decoder, so its codes become no image: the file that it is of holds none"
        )


def widths_of(ch: int, ch_mult: Sequence[float], groups: int) -> list[int]:
    """Return the width of each resolution; raise `UserError` for one that is no whole multiple of the groups."""
    check_whole_numbers(ch=(ch, 1), groups=(groups, 1))
    if not isinstance(ch_mult, (list, tuple)) or not ch_mult:
        raise UserError(f"ch_mult {ch_mult!r} is not possible; give a width for each resolution, as [1, 1, 2, 2, 4]")
    widths: list[int] = []
    for name, width in [("ch", ch), *((f"ch * ch_mult[{level}]", ch * mult) for level, mult in enumerate(ch_mult))]:
        if width < 1 or width != round(width) or round(width) % groups:
            raise UserError(f"{name} is {width:g}, which {groups} groups do not divide; give a multiple of {groups}")
        widths.append(round(width))
    return widths[1:]


def _adapter(dim_in: int, dim_out: int, kernel: int, half: str, option: str) -> nn.Conv2d | None:
    """Return the convolution between the network and the quantizer."""
    if kernel:
        return nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2)
    if dim_in != dim_out:
        raise UserError(
            f"{half} taming has quant_conv_kernel 0, so {dim_in} channels cannot become {option} {dim_out}; make "
            "them equal, or give a kernel size"
        )
    return None


def _check(*given: Any) -> None:
    num_res_blocks, resolution, z_channels, dropout, kernel, channels = given
    check_whole_numbers(num_res_blocks=(num_res_blocks, 1), resolution=(resolution, 1), z_channels=(z_channels, 1))
    check_whole_numbers(quant_conv_kernel=(kernel, 0))
    check_channels(channels)
    if kernel and kernel % 2 == 0:
        raise UserError(f"quant_conv_kernel {kernel} is even; give an odd kernel size, or 0 for none")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout {dropout} is not possible; it must be at least 0 and below 1")
