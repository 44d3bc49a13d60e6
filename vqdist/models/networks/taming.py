"""The convolutional autoencoder of taming-transformers (arXiv 2012.09841), which most of the field's tokenizers share.

One encoder and one decoder hold the networks of taming, LDM, LlamaGen, VAR and IBQ: they differ in their arguments and
in the names of their tensors, which `vqdist.models.published` translates. Names here are taming's.

Shapes: `b` batch, `c` channel, `h w` image, `d` width of the features, `h' w'` map of codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.arguments import check_whole_numbers
from vqdist.models.networks.levels import (
    ImageConv2d,
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


def _blocks(widths: Sequence[int], groups: int, dropout: float) -> list[nn.Module]:
    return [ResnetBlock(dim_in, dim_out, groups, dropout) for dim_in, dim_out in zip(widths, widths[1:])]


def _attention(placed: bool, widths: Sequence[int], groups: int) -> list[nn.Module]:
    return [AttnBlock(width, groups) for width in widths[1:] if placed]


class Middle(nn.Module):
    """The blocks between the levels of encoder or decoder and its features."""

    def __init__(self, dim: int, attention: bool, groups: int, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(dim, dim, groups, dropout)
        self.attn_1 = AttnBlock(dim, groups) if attention else None
        self.block_2 = ResnetBlock(dim, dim, groups, dropout)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        """(b, d, h, w) -> (b, d, h, w)."""
        x = run(self.block_1, x)
        x = x if self.attn_1 is None else run(self.attn_1, x)
        return run(self.block_2, x)


class TamingEncoder(LevelEncoder):
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

    title = "taming"

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
        check_blocks(channels, dropout, num_res_blocks=num_res_blocks, resolution=resolution, z_channels=z_channels)
        widths = widths_of("ch", ch, "ch_mult", ch_mult, groups)
        super().__init__(len(widths), checkpointing)
        self.traits = f"{groups} groups"  # which no tensor says, see `Tokenizer.fingerprint`
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                _blocks(within, groups, dropout),
                _attention(resolution >> level in attn_resolutions, within, groups),
                downsample=Downsample(within[-1], resamp_with_conv) if level < len(widths) - 1 else None,
            )
            for level, within in enumerate(falling(ch, widths, num_res_blocks))
        )
        self.mid = Middle(widths[-1], mid_attention, groups, dropout)
        self.norm_out = group_norm(widths[-1], groups)
        before_quant = 2 * z_channels if double_z else z_channels
        self.conv_out = nn.Conv2d(widths[-1], before_quant, 3, padding=1)
        self.dim = z_channels if embed_dim is None else embed_dim
        self.quant_conv = _adapter(before_quant, self.dim, quant_conv_kernel, "encoder", "embed_dim")

    def forward(self, image: Tensor) -> Tensor:
        """Return the features; raise `UserError` for a side that is no multiple of the stride."""
        features = self.through(image * 2 - 1, self.mid)
        return features if self.quant_conv is None else self.quant_conv(features)


class TamingDecoder(LevelDecoder):
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
        check_blocks(channels, dropout, num_res_blocks=num_res_blocks, resolution=resolution, z_channels=z_channels)
        super().__init__(checkpointing)
        widths = widths_of("ch", ch, "ch_mult", ch_mult, groups)
        self.traits = f"{groups} groups"
        self.dim = dim
        self.post_quant_conv = _adapter(dim, z_channels, quant_conv_kernel, "decoder", "z_channels")
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], mid_attention, groups, dropout)
        halvings = len(widths) - 1
        side = resolution >> halvings  # the encoder's rounding, then doubled
        self.up = nn.ModuleList(
            Level(
                _blocks(within, groups, dropout),
                _attention(side << (halvings - level) in attn_resolutions, within, groups),
                upsample=Upsample(within[-1], resamp_with_conv) if level else None,
            )
            for level, within in enumerate(rising(widths, num_res_blocks + 1))
        )
        self.norm_out = group_norm(widths[0], groups)
        self.last_layer = ImageConv2d(widths[0], channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.through(features if self.post_quant_conv is None else self.post_quant_conv(features), self.mid)


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


def _adapter(dim_in: int, dim_out: int, kernel: int, half: str, option: str) -> nn.Conv2d | None:
    """Return the convolution between the network and the quantizer."""
    check_whole_numbers(quant_conv_kernel=(kernel, 0))
    if kernel and kernel % 2 == 0:
        raise UserError(f"quant_conv_kernel {kernel} is even; give an odd kernel size, or 0 for none")
    if kernel:
        return nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2)
    if dim_in != dim_out:
        raise UserError(
            f"{half} taming has quant_conv_kernel 0, so {dim_in} channels cannot become {option} {dim_out}; make "
            "them equal, or give a kernel size"
        )
    return None
