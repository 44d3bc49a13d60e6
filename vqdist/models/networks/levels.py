"""Networks of several resolutions: the blocks, levels, encoder and decoder that the field's autoencoders share.

Each file of a family says its blocks and constructors; names of tensors are those of its published files.

Shapes: `b` batch, `c` channel, `h w` image, `d` width of the features, `h' w'` map of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqdist.errors import UserError
from vqdist.models.arguments import check_channels, check_dropout, check_whole_numbers
from vqdist.models.tokenizer import check_image_size
from vqdist.options import is_number

Run = Callable[..., Tensor]
"""Calls a block: `run(block, x)`, see `Checkpointed.run`."""


class Checkpointed(nn.Module):
    """A network that may compute the activations of its blocks anew in the backward pass.

    Args:
        checkpointing: do so, for less memory and about a third more time.
    """

    def __init__(self, checkpointing: bool):
        super().__init__()
        self.checkpointing = checkpointing

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Return `block(*inputs)`; its activations are not kept where checkpointing is on."""
        return run_block(block, *inputs, anew=self.checkpointing and self.training)


def run_block(block: Callable[..., Tensor], *inputs: Tensor, anew: bool) -> Tensor:
    """Return `block(*inputs)`; with `anew` its activations are computed once more in the backward pass."""
    if not (anew and torch.is_grad_enabled()):
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False)


class ResnetBlock(nn.Module):
    """Twice group norm, swish and a 3x3 convolution, and the input added, by a 1x1 convolution if the width changes.

    Args:
        dim_in: channels of the input.
        dim_out: channels of the output.
        groups: of the group norms.
        dropout: share of the activations before the second convolution that are dropped while training.
        bias: of the convolutions.
    """

    shortcut_of_result = False

    def __init__(self, dim_in: int, dim_out: int, groups: int, dropout: float = 0.0, *, bias: bool = True):
        super().__init__()
        self.norm1 = group_norm(dim_in, groups)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(dim_out, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=bias)
        shortcut_in = dim_out if self.shortcut_of_result else dim_in
        self.nin_shortcut = nn.Conv2d(shortcut_in, dim_out, 1, bias=bias) if dim_in != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        if self.nin_shortcut is None:
            return hidden + x
        return hidden + self.nin_shortcut(hidden if self.shortcut_of_result else x)


class Blocks(nn.ModuleList):
    """Blocks one after the other."""

    def forward(self, x: Tensor, run: Run) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w)."""
        for block in self:
            x = run(block, x)
        return x


class Level(nn.Module):
    """The blocks of one resolution, then the change to the next: `block`, `attn`, `downsample` and `upsample`.

    Args:
        blocks: of this resolution.
        attention: a block after each of them, or none at all.
        downsample, upsample: the change of resolution.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        attention: Iterable[nn.Module] = (),
        *,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor, run: Run) -> Tensor:
        """(b, dim_in, h, w) -> (b, dim_out, h, w) at the next resolution."""
        for number, block in enumerate(self.block):
            x = run(block, x)
            x = run(self.attn[number], x) if len(self.attn) else x
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class LevelEncoder(Checkpointed):
    """Images (b, c, h, w) -> features (b, d, h / stride, w / stride): a convolution, levels, a middle, a convolution.

    Attributes:
        title: the name that messages call it by.
        mults_option: the option with a width for each resolution.
        stride: pixels per code along each side.
    """

    title: str
    mults_option = "ch_mult"
    conv_in: nn.Module
    down: nn.ModuleList
    norm_out: nn.Module
    conv_out: nn.Module

    def __init__(self, resolutions: int, checkpointing: bool):
        super().__init__(checkpointing)
        self.stride = 2 ** (resolutions - 1)

    def through(self, x: Tensor, middle: nn.Module) -> Tensor:
        """Return the features of images in the network's range; raise `UserError` for a side that is not possible."""
        for side in x.shape[-2:]:
            if side % self.stride:
                raise UserError(
                    f"image side {side} is not a multiple of {self.stride}, the stride of encoder {self.title}"
                )
        x = self.conv_in(x)
        for level in self.down:
            x = level(x, self.run)
        return self.conv_out(F.silu(self.norm_out(middle(x, self.run))))

    def code_shape(self, image_size: int) -> tuple[int, int]:
        """Return the shape of the map of codes; raise `UserError` for a side that is no multiple of the stride."""
        halvings = len(self.down) - 1
        check_image_size(image_size, halvings, f"halvings by {self.mults_option}, which has {halvings + 1} numbers")
        return image_size >> halvings, image_size >> halvings


class LevelDecoder(Checkpointed):
    """Features (b, d, h', w') -> the input of the last layer: a convolution, a middle, and the levels upwards."""

    conv_in: nn.Module
    up: nn.ModuleList
    norm_out: nn.Module

    def through(self, x: Tensor, middle: nn.Module) -> Tensor:
        """Return the input of the last layer."""
        x = middle(self.conv_in(x), self.run)
        for level in reversed(self.up):
            x = level(x, self.run)
        return F.silu(self.norm_out(x))


class ImageConv2d(nn.Conv2d):
    """A convolution whose output in [-1, 1] becomes an image in [0, 1]: weights stay those of the published files."""

    image_gain = 0.5

    def forward(self, input: Tensor) -> Tensor:
        """(b, d, h, w) -> (b, c, h, w)."""
        return (super().forward(input) + 1) / 2


def group_norm(dim: int, groups: int) -> nn.GroupNorm:
    """Return a group norm with the epsilon of published tokenizers, 1e-6."""
    return nn.GroupNorm(groups, dim, eps=1e-6)


def check_blocks(channels: int, dropout: float = 0.0, **given: int) -> None:
    """Raise `UserError` for channels or dropout that are not possible, or another number that is not at least 1."""
    check_whole_numbers(**{name: (value, 1) for name, value in given.items()})
    check_channels(channels)
    check_dropout(dropout)


def widths_of(option: str, width: int, mults_option: str, mults: Sequence[float], groups: int) -> list[int]:
    """Return the width of each resolution.

    Args:
        option, width: name and value of the option with the first width.
        mults_option, mults: name and value of the one with each resolution's width as a multiple of it.
        groups: of the group norms.

    Raises:
        UserError: a width is no whole multiple of the groups.
    """
    check_whole_numbers(**{option: (width, 1), "groups": (groups, 1)})
    if not isinstance(mults, (list, tuple)) or not mults or not all(is_number(mult) for mult in mults):
        raise UserError(
            f"{mults_option} {mults!r} is not possible; give a width for each resolution, as [1, 1, 2, 2, 4]"
        )
    names = (f"{option} * {mults_option}[{level}]" for level in range(len(mults)))
    widths = [width, *(width * mult for mult in mults)]
    for name, wide in zip((option, *names), widths, strict=True):
        if wide < 1 or wide != round(wide) or round(wide) % groups:
            raise UserError(f"{name} is {wide:g}, which {groups} groups do not divide; give a multiple of {groups}")
    return [round(wide) for wide in widths[1:]]


def falling(first: int, widths: Sequence[int], blocks: int) -> list[list[int]]:
    """Return the widths before, between and after the blocks of each of an encoder's levels."""
    return [[before, *[width] * blocks] for before, width in zip([first, *widths], widths)]


def rising(widths: Sequence[int], blocks: int) -> list[list[int]]:
    """Return the same of a decoder's levels, which are numbered as the encoder's and run backwards."""
    return [[before, *[width] * blocks] for width, before in zip(widths, [*widths[1:], widths[-1]])]
