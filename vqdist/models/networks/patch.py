"""The patch discriminator: says of overlapping patches whether they are real (PatchGAN, arXiv 1611.07004)."""

from __future__ import annotations

from torch import Tensor, nn

from vqdist.errors import UserError


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions, group norm (equal on any number of ranks, unlike batch norm) and leaky ReLU 0.1.

    Args:
        dim: channels after the first convolution; doubled by each layer but the first.
        channels: of the image.
        layers: halvings of the resolution.
        groups: of the group norms; must divide `dim`.
        first_kernel_size: of the first convolution, odd.
        head_padding: of the last convolution; 0 as in muse-maskgit, whose logits have no border.
    """

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 3,
        layers: int = 4,
        groups: int = 16,
        first_kernel_size: int = 5,
        head_padding: int = 1,
    ):
        super().__init__()
        if head_padding not in (0, 1):
            raise UserError(
                f"head_padding {head_padding!r} of discriminator patch is not possible; give 1, or 0 for none"
            )
        if layers < 1:
            raise UserError(f"discr_layers {layers} is not possible; at least one layer is needed")
        if dim % groups:
            raise UserError(
                f"dim {dim} is not a multiple of the discriminator's {groups} groups; try {dim - dim % groups}"
            )
        self.layers = layers
        self.head_padding = head_padding
        widths = [dim, *(dim * 2**layer for layer in range(layers))]
        stem = nn.Conv2d(channels, dim, first_kernel_size, padding=first_kernel_size // 2)
        blocks: list[nn.Module] = [stem, nn.LeakyReLU(0.1)]
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            blocks += [
                nn.Conv2d(width_in, width_out, 4, stride=2, padding=1),
                nn.GroupNorm(groups, width_out),
                nn.LeakyReLU(0.1),
            ]
        self.body = nn.Sequential(*blocks)
        width = widths[-1]
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 1, 4, padding=head_padding)
        )

    @property
    def min_image_size(self) -> int:
        """The smallest image side, in pixels, that gives at least one patch."""
        return 2 ** (self.layers + (1 if self.head_padding else 2))

    def forward(self, image: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> logits (b, 1, h', w'), positive for real."""
        return self.head(self.body(image))
