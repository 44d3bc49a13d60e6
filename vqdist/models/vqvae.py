"""The smallest multi-scale tokenizer: four convolutions around the codes of VAR (arXiv 2404.02905).

Shapes: `b` batch, `c` channel, `h w` image, `d` embedding dimension, `v` codes, `L` codes of an image over all scales.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vqdist.models.arguments import check_channels, check_whole_numbers
from vqdist.models.multiscale import V_PATCH_NUMS, VectorQuantizer
from vqdist.models.pretrained import PretrainedModel
from vqdist.models.quantizers import build_quantizer
from vqdist.models.tokenizer import TokenizerNetwork, check_image_size, check_images, check_scales
from vqdist.sizes import ImageSize, sides_of

__all__ = ["SimpleVQVAE", "VectorQuantizer"]

LAYERS = 2  # halvings of the resolution
HALVINGS = "stride-2 convolutions"


class SimpleVQVAE(
    TokenizerNetwork,
    PretrainedModel,
    library_name="vqdist",
    tags=["image-tokenizer", "vqvae"],
):
    """Two stride-2 convolutions, a `VectorQuantizer` at every scale, two transposed convolutions.

    Save and load with `save_pretrained(folder)` and `SimpleVQVAE.from_pretrained(folder or repository)`.

    Args:
        vocab_size: number of codes.
        embedding_dim: dimension of a code's vector.
        hidden_dim: channels between the two convolutions.
        channels: channels of the images: 1 grey, 3 colour, 4 colour and alpha.
        image_size: side of the images in pixels; by default four times the last of `v_patch_nums`, 64.
        v_patch_nums: sides of the scales' maps of codes, growing; the last is a quarter of `image_size`.
        beta: weight of the commitment loss.
    """

    model_type = "simple_vqvae"
    channels: int
    scales: tuple[int, ...]
    image_size: int
    num_levels = 1
    stride = 2**LAYERS

    def __init__(
        self,
        vocab_size: int = 16,
        embedding_dim: int = 64,
        hidden_dim: int = 128,
        *,
        channels: int = 3,
        image_size: int | None = None,
        v_patch_nums: Sequence[int] = V_PATCH_NUMS,
        beta: float = 0.25,
    ):
        super().__init__()
        check_channels(channels)
        check_whole_numbers(vocab_size=(vocab_size, 2), embedding_dim=(embedding_dim, 1), hidden_dim=(hidden_dim, 1))
        self.channels = channels
        self.quantizer = build_quantizer(
            "multiscale_vq",
            dim=embedding_dim,
            codebook_size=vocab_size,
            v_patch_nums=v_patch_nums,
            beta=beta,
            learnable_codebook=True,
        )
        self.scales = self.quantizer.scales
        self.image_size = self.stride * self.scales[-1] if image_size is None else image_size
        self.check_image_size(self.image_size)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, hidden_dim, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, embedding_dim, 4, stride=2, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(embedding_dim, hidden_dim, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden_dim, channels, 4, stride=2, padding=1),
        )

    def __repr__(self) -> str:
        """Return one line; `print(vae.encoder)` shows the layers."""
        return self.in_brief(repr(self.quantizer))

    @property
    def network(self) -> SimpleVQVAE:
        """The part that reconstructs images: all of it."""
        return self

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.quantizer.codebook_size

    def check_image_size(self, size: ImageSize) -> None:
        """Raise `UserError` if images of this size cannot be encoded."""
        check_image_size(size, LAYERS, HALVINGS)
        check_scales(size, self.code_shape(size), self.scales, f" (2 ** {LAYERS} {HALVINGS})")

    def code_shape(self, image_size: ImageSize) -> tuple[int, int]:
        """Shape of the feature map of images of this size, (h', w')."""
        height, width = sides_of(image_size)
        return height // self.stride, width // self.stride

    def forward(self, img: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (b, c, h, w) in [0, 1] -> (decoded, vq_loss, indices).

        Returns:
            The reconstruction (b, c, h, w), in [0, 1] but for overshoot; the quantizer's loss (0-d), 0 in eval mode;
            the codes (b, L).
        """
        check_images(img, self.channels, LAYERS, HALVINGS)
        quantized, indices, vq_loss = self.quantizer(self.encoder(img))
        return self.decoder(quantized), vq_loss, indices

    def tokenize(self, image: Tensor) -> Tensor:
        return self(image)[2]

    def detokenize(self, ids: Tensor) -> Tensor:
        return self.decoder(self.quantizer.decode_indices(ids))
