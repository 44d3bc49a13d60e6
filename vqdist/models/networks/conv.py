"""The convolutional autoencoder of muse-maskgit: vqdist's default networks.

Each layer of the encoder halves the resolution with a strided convolution; the decoder is its mirror image.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.arguments import check_channels
from vqdist.models.networks.levels import run_block
from vqdist.models.tokenizer import check_image_size


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm and leaky ReLU, a 1x1 convolution, and the input added."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.GroupNorm(groups, dim),
            nn.LeakyReLU(0.1),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.GroupNorm(groups, dim),
            nn.LeakyReLU(0.1),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class GatedResidualBlock(nn.Module):
    """A `ResidualBlock` with gated linear units (arXiv 1612.08083) in place of leaky ReLU."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 3, padding=1),
            nn.GLU(dim=1),
            nn.GroupNorm(groups, dim),
            nn.Conv2d(dim, 2 * dim, 3, padding=1),
            nn.GLU(dim=1),
            nn.GroupNorm(groups, dim),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class ConvEncoder(nn.Sequential):
    """Images (b, c, h, w) -> features (b, d, h / 2**layers, w / 2**layers).

    Args:
        width: channels of the first convolution; a multiple of `groups`.
        channels: of the images.
        layers: halvings of the resolution.
        layer_mults: width of each resolution as a multiple of `width`; by default 1, 2, 4, ... (2 ** layer).
        num_resnet_blocks: residual blocks at the lowest resolution, or a list with one number per resolution.
        groups: of the group norms.
        first_kernel_size: of the first convolution, odd.
        checkpointing: compute the activations of each resolution anew in the backward pass instead of keeping them.

    Attributes:
        dim: width of the features, d.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: int = 3,
        layers: int = 4,
        layer_mults: list[int] | None = None,
        num_resnet_blocks: int | list[int] = 1,
        groups: int = 16,
        first_kernel_size: int = 5,
        checkpointing: bool = False,
    ):
        check_channels(channels)
        check_widths(width, layers, groups)
        if first_kernel_size % 2 == 0:
            raise UserError(f"encdec_first_conv_kernel_size {first_kernel_size} is even; try {first_kernel_size + 1}")
        widths = widths_of(width, layers, layer_mults)
        modules: list[nn.Module] = [nn.Conv2d(channels, widths[0], first_kernel_size, padding=first_kernel_size // 2)]
        blocks = blocks_of(num_resnet_blocks, layers)
        for dim_in, dim_out, num_blocks in zip(widths[:-1], widths[1:], blocks, strict=True):
            modules += [nn.Conv2d(dim_in, dim_out, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
            modules += [ResidualBlock(dim_out, groups) for _ in range(num_blocks)]
        super().__init__(*modules)
        self.layers = layers
        self.dim = widths[-1]
        self.checkpointing = checkpointing
        self._level_starts = level_starts(1, blocks)

    def forward(self, image: Tensor) -> Tensor:
        return through(self, self._level_starts, image, anew=self.checkpointing and self.training)

    def code_shape(self, image_size: int) -> tuple[int, int]:
        """Return the shape of the map of codes; raise `UserError` for a side that is no multiple of 2 ** layers."""
        check_image_size(image_size, self.layers, "layers")
        return image_size >> self.layers, image_size >> self.layers


class ConvDecoder(nn.Module):
    """Features (b, d, h', w') -> the input of the last layer, (b, width, h, w): the mirror image of `ConvEncoder`.

    Args:
        width: channels of the last convolution's input; a multiple of `groups`.
        channels: of the images.
        layers: doublings of the resolution.
        layer_mults, num_resnet_blocks, groups, checkpointing: see `ConvEncoder`.

    Attributes:
        dim: width of the features, d.
        last_layer: a 1x1 convolution.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: int = 3,
        layers: int = 4,
        layer_mults: list[int] | None = None,
        num_resnet_blocks: int | list[int] = 1,
        groups: int = 16,
        checkpointing: bool = False,
    ):
        super().__init__()
        check_channels(channels)
        check_widths(width, layers, groups)
        widths = widths_of(width, layers, layer_mults)
        self.dim = widths[-1]
        blocks = blocks_of(num_resnet_blocks, layers)
        modules: list[nn.Module] = []
        for dim_in, dim_out, num_blocks in reversed(list(zip(widths[:-1], widths[1:], blocks, strict=True))):
            modules += [GatedResidualBlock(dim_out, groups) for _ in range(num_blocks)]
            modules += [nn.ConvTranspose2d(dim_out, dim_in, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
        self.net = nn.Sequential(*modules)
        self.last_layer = nn.Conv2d(widths[0], channels, 1)
        self.checkpointing = checkpointing
        self._level_starts = level_starts(0, blocks[::-1])

    def forward(self, features: Tensor) -> Tensor:
        return through(self.net, self._level_starts, features, anew=self.checkpointing and self.training)


def level_starts(first: int, blocks: list[int]) -> list[int]:
    """Return where each resolution begins in a row of modules, and where the last one ends.

    Args:
        first: place of the first resolution.
        blocks: residual blocks of each, beside which it has two modules.
    """
    return list(accumulate((number + 2 for number in blocks), initial=first))


def through(modules: nn.Sequential, starts: list[int], x: Tensor, *, anew: bool) -> Tensor:
    """Return what a row of modules makes of x, (b, c, h, w); with `anew` only the inputs of its levels are kept."""
    if not anew:
        return nn.Sequential.forward(modules, x)
    x = nn.Sequential(*list(modules)[: starts[0]])(x)
    for start, end in pairwise(starts):
        x = run_block(nn.Sequential(*list(modules)[start:end]), x, anew=True)
    return x


def check_widths(width: int, layers: int, groups: int) -> None:
    """Raise `UserError` for sizes of which no network can be made; the options are called as `VQGanVAE` does."""
    if layers < 1:
        raise UserError(f"layers {layers} is not possible; at least one halving of the resolution is needed")
    if groups < 1:
        raise UserError(f"encdec_resnet_groups {groups} is not possible; it must be at least 1")
    if width < groups or width % groups:
        near = max(groups, width - width % groups)
        raise UserError(f"dim {width} is not a multiple of encdec_resnet_groups {groups}; try {near}")


def widths_of(width: int, layers: int, mults: list[int] | None) -> list[int]:
    """Return the widths from the first convolution to the lowest resolution, `layers + 1` of them."""
    mults = [2**layer for layer in range(layers)] if mults is None else list(mults)
    if any(mult < 1 for mult in mults):
        raise UserError(f"encdec_layer_mults {mults} is not possible; each must be at least 1")
    if len(mults) != layers:
        raise UserError(f"encdec_layer_mults has {len(mults)} numbers; layers {layers} needs {layers}")
    return [width, *(width * mult for mult in mults)]


def blocks_of(blocks: int | list[int], layers: int) -> list[int]:
    """Return the number of residual blocks of each resolution."""
    blocks = list(blocks) if isinstance(blocks, (list, tuple)) else [*[0] * (layers - 1), blocks]
    if any(number < 0 for number in blocks):
        raise UserError(f"encdec_num_resnet_blocks {blocks} is not possible; each must be at least 0")
    if len(blocks) != layers:
        raise UserError(f"encdec_num_resnet_blocks has {len(blocks)} numbers; layers {layers} needs {layers}")
    return blocks
