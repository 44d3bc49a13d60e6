"""An own encoder and decoder, a small vision transformer, and an own discriminator with two outputs."""

import torch
from torch import nn

from vqdist import UserError


class Encoder(nn.Module):
    """Cut the image into patches and let a transformer mix them.

    Args:
        width: of the features; a multiple of 4.
        patch: pixels of a patch along each side, any number.
        image_size: side of the images in pixels, for the positions.
        channels: of the images; vqdist passes it.
    """

    def __init__(self, width: int = 32, patch: int = 5, image_size: int = 20, channels: int = 3):
        super().__init__()
        self.dim, self.patch = width, patch
        self.to_tokens = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(width, *self.code_shape(image_size)) * 0.02)
        self.mix = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)

    def code_shape(self, image_size: int) -> tuple[int, int]:
        if image_size % self.patch:
            raise UserError(f"image_size {image_size} is not a multiple of the patch, {self.patch}")
        return image_size // self.patch, image_size // self.patch

    def forward(self, image):
        """Images (b, c, h, w) in [0, 1] -> features (b, d, h', w')."""
        tokens = self.to_tokens(image) + self.positions
        mixed = self.mix(tokens.flatten(2).transpose(1, 2))
        return mixed.transpose(1, 2).unflatten(2, tokens.shape[2:])


class Decoder(nn.Module):
    """Let a transformer mix the tokens, spread each over its patch, and smooth with a last 3x3 convolution.

    Args:
        dim: width of the features; vqdist passes it.
        channels: of the images; vqdist passes it.
        patch: as the encoder's.
    """

    def __init__(self, dim: int, channels: int = 3, patch: int = 5):
        super().__init__()
        self.mix = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        self.to_pixels = nn.ConvTranspose2d(dim, 8, patch, stride=patch)
        self.last_layer = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, features):
        """Features (b, d, h', w') -> the input of the last layer (b, 8, h, w)."""
        mixed = self.mix(features.flatten(2).transpose(1, 2))
        return self.to_pixels(mixed.transpose(1, 2).unflatten(2, features.shape[2:])).relu()


class TwoScales(nn.Module):
    """Judge patches of the image, and of the image at half its size.

    Args:
        channels: of the images; vqdist passes it.
        width: of the hidden layer.
    """

    min_image_size = 16

    def __init__(self, channels: int = 3, width: int = 8):
        super().__init__()
        self.judges = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 4, stride=2), nn.SiLU(), nn.Conv2d(width, 1, 3)) for _ in range(2)
        )

    def forward(self, image):
        """Images (b, c, h, w) -> a list of two tensors of logits."""
        fine, coarse = self.judges
        return [fine(image), coarse(nn.functional.avg_pool2d(image, 2))]
