"""Vision transformers between images and a row of latent tokens: the networks of TiTok (arXiv 2406.07550).

The encoder reads patches and a few latent tokens, and gives the latent tokens only; the decoder gives a mask token for
each patch and reads the latent tokens beside them. Names of tensors are those of the 1d-tokenizer project, but for the
latent tokens, which the encoder owns, and for the decoder's last layer.

Shapes: `b` batch, `c` channel, `h w` image, `p` patches of it, `n` latent tokens, `m` width of a network, `d` width of
the features, `v` codes of the tokenizer whose codes a decoder predicts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.arguments import check_whole_numbers
from vqdist.models.networks.levels import Blocks, Checkpointed, check_blocks
from vqdist.models.networks.maskgit import MaskGITDecoder
from vqdist.sizes import ImageSize, image_size_of, sides_of


class SelfAttention(nn.Module):
    """Attention of several heads over all tokens, with the tensors of `torch.nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, m) -> (b, t, m)."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(projected, "b t (three heads e) -> three b heads t e", three=3, heads=self.heads)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads t e -> b t (heads e)"))


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times as wide in between."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, m) -> (b, t, m)."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward network, each on a layer norm of its input, which is added."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, m) -> (b, t, m)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _Transformer(Checkpointed):
    """The common part of encoder and decoder: positions, norms and blocks over patches and latent tokens."""

    class_embedding: nn.Parameter  # (1, m)
    positional_embedding: nn.Parameter  # (1 + p, m)
    latent_token_positional_embedding: nn.Parameter  # (n, m)

    def __init__(
        self,
        *,
        image_size: ImageSize,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        num_latent_tokens: int,
        channels: int,
        checkpointing: bool,
    ):
        super().__init__(checkpointing)
        check_blocks(
            channels,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            num_latent_tokens=num_latent_tokens,
        )
        if width % heads:
            raise UserError(f"width {width} is not a multiple of heads {heads}")
        self.image_size, self.patch_size = image_size_of(image_size), patch_size
        self.num_latent_tokens = num_latent_tokens
        self.traits = f"{heads} heads"  # which no tensor says, see `Tokenizer.fingerprint`
        self.grid = _grid_of(self.image_size, patch_size)
        patches = self.grid[0] * self.grid[1]
        self.class_embedding = _embedding(1, width)
        self.positional_embedding = _embedding(1 + patches, width)
        self.latent_token_positional_embedding = _embedding(num_latent_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Blocks(TransformerBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def mixed(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Patches (b, p, m) and latent tokens (b, n, m) -> the class token, patches and latents (b, 1 + p + n, m)."""
        first = repeat(self.class_embedding, "one m -> b one m", b=len(patches))
        patches = torch.cat([first, patches], dim=1) + self.positional_embedding
        latents = latents + self.latent_token_positional_embedding[: latents.shape[1]]
        return self.transformer(self.ln_pre(torch.cat([patches, latents], dim=1)), self.run)


class TiTokEncoder(_Transformer):
    """Images (b, c, h, w) in [0, 1], of one size, -> features of the latent tokens (b, n, d).

    Args:
        image_size: side of the images in pixels, or (height, width); multiples of `patch_size`.
        patch_size: side of a patch in pixels.
        width: of the transformer; a multiple of `heads`.
        layers: blocks of the transformer.
        heads: attention heads of each block.
        num_latent_tokens: codes of an image.
        token_size: width of the features.
        legacy: take the latent tokens (n, m) as (m, n) without transposing them, as the first published models do.
        channels: of the images.
        checkpointing: compute activations anew in the backward pass instead of keeping them.

    Attributes:
        dim: width of the features, d.
    """

    def __init__(
        self,
        *,
        image_size: ImageSize = 256,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        num_latent_tokens: int = 64,
        token_size: int = 12,
        legacy: bool = False,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            num_latent_tokens=num_latent_tokens,
            channels=channels,
            checkpointing=checkpointing,
        )
        check_whole_numbers(token_size=(token_size, 1))
        self.dim, self.legacy = token_size, legacy
        self.traits += " legacy" if legacy else ""
        self.patch_embed = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.latent_tokens = _embedding(num_latent_tokens, width)
        self.conv_out = nn.Conv2d(width, token_size, 1)
        self.apply(_initialize)

    def forward(self, image: Tensor) -> Tensor:
        """Return the features; raise `UserError` for images of another size."""
        if tuple(image.shape[-2:]) != sides_of(self.image_size):
            raise UserError(
                f"images of {image.shape[-2]} x {image.shape[-1]} pixels were given; this encoder titok takes "
                f"{' x '.join(map(str, sides_of(self.image_size)))} only"
            )
        patches = rearrange(self.patch_embed(image), "b m h w -> b (h w) m")
        latents = repeat(self.latent_tokens, "n m -> b n m", b=len(image))
        tokens = self.ln_post(self.mixed(patches, latents)[:, 1 + patches.shape[1] :])
        if self.legacy:
            tokens = tokens.reshape(len(image), -1, self.num_latent_tokens, 1)
        else:
            tokens = rearrange(tokens, "b n m -> b m n 1")
        return rearrange(self.conv_out(tokens), "b d n 1 -> b n d")

    def code_shape(self, image_size: int) -> tuple[int]:
        """Return the number of codes; raise `UserError` for images of another size."""
        return self.code_shape_of_sides(image_size, image_size)

    def code_shape_of_sides(self, height: int, width: int) -> tuple[int]:
        """Return the number of codes; raise `UserError` for images of another size."""
        if (height, width) != sides_of(self.image_size):
            size = height if height == width else [height, width]
            raise UserError(f"image_size {size} is not possible; this encoder titok takes {self.image_size} only")
        return (self.num_latent_tokens,)


class _TokenDecoder(_Transformer):
    """Features of latent tokens (b, n, d) -> a map with a vector for each patch (b, m, h', w')."""

    def __init__(self, dim: int, *, width: int, **options: Any):
        super().__init__(width=width, **options)
        check_whole_numbers(dim=(dim, 1))
        self.dim = dim
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))

    def patch_map(self, features: Tensor) -> Tensor:
        """(b, n, d) -> (b, m, h', w')."""
        rows, columns = self.grid
        patches = self.mask_token.expand(len(features), rows * columns, -1)
        mixed = self.mixed(patches, self.decoder_embed(features))
        return rearrange(self.ln_post(mixed[:, 1 : 1 + rows * columns]), "b (h w) m -> b m h w", h=rows)


class TiTokDecoder(_TokenDecoder):
    """Features of latent tokens (b, n, d) -> the input of the last layer, images (b, c, h, w) that it smooths.

    Args:
        dim: width of the features, d.
        image_size, patch_size, width, layers, heads, num_latent_tokens, channels, checkpointing: see `TiTokEncoder`.

    Attributes:
        last_layer: a 3x3 convolution that gives images in [0, 1].
    """

    def __init__(
        self,
        dim: int,
        *,
        image_size: ImageSize = 256,
        patch_size: int = 16,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        num_latent_tokens: int = 64,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__(
            dim,
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            num_latent_tokens=num_latent_tokens,
            channels=channels,
            checkpointing=checkpointing,
        )
        self.ffn = nn.Sequential(nn.Conv2d(width, patch_size**2 * channels, 1))
        self.last_layer = nn.Conv2d(channels, channels, 3, padding=1)
        self.apply(_initialize)

    def forward(self, features: Tensor) -> Tensor:
        pixels, side = self.ffn(self.patch_map(features)), self.patch_size
        return rearrange(pixels, "b (dy dx c) h w -> b c (h dy) (w dx)", dy=side, dx=side)


class TiTokProxyDecoder(_TokenDecoder):
    """Features of latent tokens (b, n, d) -> probabilities of another tokenizer's codes, and these -> images.

    In the first stage of its training it learns the codes that a MaskGIT-VQGAN gives to the images: its `proxy` gives
    logits for the cross-entropy. In the second stage images are made, by the mean of the codes' vectors under these
    probabilities, and by that tokenizer's decoder.

    Args:
        dim: width of the features, d.
        image_size, patch_size, width, layers, heads, num_latent_tokens, channels, checkpointing: see `TiTokEncoder`.
        proxy_codebook_size: codes of the other tokenizer, v; its map has a code for each patch.
        pixel: arguments of its decoder, `MaskGITDecoder`, with its width `dim`; null for a decoder without one, which
            predicts codes and makes no images.

    Attributes:
        last_layer: the last one of the other tokenizer's decoder.
        gives_proxy: true, see `vqdist.models.networks.Decoder`.
    """

    gives_proxy = True

    def __init__(
        self,
        dim: int,
        *,
        image_size: ImageSize = 256,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        num_latent_tokens: int = 64,
        proxy_codebook_size: int = 1024,
        pixel: dict[str, Any] | None = None,
        channels: int = 3,
        checkpointing: bool = False,
    ):
        super().__init__(
            dim,
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=heads,
            num_latent_tokens=num_latent_tokens,
            channels=channels,
            checkpointing=checkpointing,
        )
        check_whole_numbers(proxy_codebook_size=(proxy_codebook_size, 2))
        self.proxy_codebook_size = proxy_codebook_size
        self.ffn = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, proxy_codebook_size, 1)
        )
        self.apply(_initialize)
        self.pixel_embedding: nn.Embedding | None = None
        self.pixel_decoder: MaskGITDecoder | None = None
        if pixel is not None:
            self.pixel_decoder = _pixel_decoder(pixel, channels, checkpointing)
            self.pixel_embedding = nn.Embedding(proxy_codebook_size, self.pixel_decoder.dim)

    @property
    def makes_images(self) -> bool:
        """Return whether there is a pixel decoder: in the first stage of its training there is none."""
        return self.pixel_decoder is not None

    @property
    def proxy_shape(self) -> tuple[int, int]:
        """Shape of the map of the other tokenizer's codes, (h', w')."""
        return self.grid

    @property
    def last_layer(self) -> nn.Conv2d | None:
        """The last convolution of the pixel decoder."""
        return None if self.pixel_decoder is None else self.pixel_decoder.last_layer

    def proxy(self, features: Tensor) -> Tensor:
        """Return the logits (b, v, h', w') of the other tokenizer's codes."""
        return self.ffn(self.patch_map(features))

    def from_proxy(self, logits: Tensor) -> Tensor:
        """Logits (b, v, h', w') -> the input of the last layer; `UserError` of a decoder that makes no images."""
        if self.pixel_decoder is None or self.pixel_embedding is None:
            raise UserError(
                "this TiTok of the first stage gives codes of its proxy tokenizer and no images; train the second "
                "stage: --init_from its run, --trainer.init_pixel_from that tokenizer"
            )
        mean = torch.einsum("b v h w, v e -> b e h w", logits.softmax(dim=1), self.pixel_embedding.weight)
        return self.pixel_decoder(mean)

    def forward(self, features: Tensor, with_proxy: bool = False) -> Any:
        """Return the input of the last layer; `with_proxy` also the logits, and None where no images are made."""
        logits = self.proxy(features)
        if not with_proxy:
            return self.from_proxy(logits)
        return self.from_proxy(logits) if self.makes_images else None, logits


def _pixel_decoder(options: dict[str, Any], channels: int, checkpointing: bool) -> MaskGITDecoder:
    try:
        return MaskGITDecoder(**{"dim": 256, "channels": channels, "checkpointing": checkpointing, **options})
    except TypeError as error:
        raise UserError(f"pixel of decoder titok_proxy: {error}; give arguments of MaskGITDecoder") from error


def _embedding(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(count, width))


def _initialize(module: nn.Module) -> None:
    """Start linear layers and convolutions from a truncated normal distribution."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(cast(Tensor, module.bias))


def _grid_of(image_size: ImageSize, patch_size: int) -> tuple[int, int]:
    """Return the patches along height and width; raise `UserError` for sides that are no multiples of a patch."""
    height, width = sides_of(image_size)
    for side in (height, width):
        if side < patch_size or side % patch_size:
            raise UserError(f"image_size {side} is not a multiple of patch_size {patch_size}")
    return height // patch_size, width // patch_size
