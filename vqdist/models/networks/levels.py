"""Networks of several resolutions: their widths, strides and group norm, and activations that are computed anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqdist.errors import UserError
from vqdist.models.arguments import check_whole_numbers
from vqdist.models.tokenizer import check_image_size
from vqdist.options import is_whole


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
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    def run_all(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Return the output of blocks one after the other."""
        for block in blocks:
            x = self.run(block, x)
        return x


class ImageConv2d(nn.Conv2d):
    """A convolution whose output in [-1, 1] becomes an image in [0, 1]: weights stay those of the published files."""

    image_gain = 0.5

    def forward(self, input: Tensor) -> Tensor:
        """(b, d, h, w) -> (b, c, h, w)."""
        return (super().forward(input) + 1) / 2


def group_norm(dim: int, groups: int) -> nn.GroupNorm:
    """Return a group norm with the epsilon of published tokenizers, 1e-6."""
    return nn.GroupNorm(groups, dim, eps=1e-6)


def widths_of(option: str, width: int, mults_option: str, mults: Sequence[int], groups: int) -> list[int]:
    """Return the width of each resolution.

    Args:
        option, width: name and value of the option with the first width.
        mults_option, mults: name and value of the one with each resolution's width as a multiple of it.
        groups: of the group norms.

    Raises:
        UserError: a width is no multiple of the groups.
    """
    check_whole_numbers(**{option: (width, 1), "groups": (groups, 1)})
    if not isinstance(mults, (list, tuple)) or not mults or not all(is_whole(m) and m > 0 for m in mults):
        raise UserError(
            f"{mults_option} {mults!r} is not possible; give a width for each resolution, as [1, 1, 2, 2, 4]"
        )
    if width % groups:
        raise UserError(f"{option} is {width}, which {groups} groups do not divide; give a multiple of {groups}")
    return [width * mult for mult in mults]


def check_strided(image_size: int, halvings: int, mults_option: str) -> int:
    """Return the side of the map of codes; raise `UserError` for a side that cannot be halved so many times."""
    check_image_size(image_size, halvings, f"halvings by {mults_option}, which has {halvings + 1} numbers")
    return image_size >> halvings


def check_sides(image: Tensor, stride: int, encoder: str) -> None:
    """Raise `UserError` for images (b, c, h, w) whose sides are no multiples of the stride."""
    for side in image.shape[-2:]:
        if side % stride:
            raise UserError(f"image side {side} is not a multiple of {stride}, the stride of encoder {encoder}")
