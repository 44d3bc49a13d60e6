"""An image tokenizer and an autoregressive model of its codes, learnt end to end: the demo of genie2-pytorch.

Patches of the image become vectors, a codebook turns them into codes, and a causal transformer predicts the vector of
each code from the codes before it; how far that prediction is from every code gives the logits. The image is decoded
from the predictions too, so encoder, codebook, transformer and decoder learn from one loss.

Shapes: `b` batch, `c` channel, `h w` image, `h' w'` patches (image / patch_size), `n` = h' * w' codes, `d` width,
`v` codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from vqdist import losses
from vqdist.errors import UserError
from vqdist.models.arguments import check_channels, check_whole_numbers
from vqdist.models.attention import Decoder, check_heads
from vqdist.models.autoregressive import AutoregressiveModel
from vqdist.models.dvae import ResBlock
from vqdist.models.quantizers import build_quantizer, float32_arithmetic, rotated_onto
from vqdist.models.tokenizer import TokenizerNetwork, check_pixels
from vqdist.sampling import DrawOptions, draw

DEFAULT_DECAY = 0.9


class CodesAndImage(NamedTuple):
    """Result of `VQImageAutoregressiveAutoencoder.forward`.

    Attributes:
        logits: (b, n, v) float32, minus logit_scale times the distance of each predicted vector to every code.
        indices: (b, n) int64, the image's codes.
        recon: (b, c, h, w), the reconstruction, in [0, 1] but for overshoot.
        vq_commit_loss: what the quantizer adds to the loss (commitment, diversity), 0-d float32; 0 in eval mode.
        ar_commit_loss: mean squared difference of predicted and quantized vectors, 0-d float32.
    """

    logits: Tensor
    indices: Tensor
    recon: Tensor
    vq_commit_loss: Tensor
    ar_commit_loss: Tensor


class PatchEncoder(nn.Module):
    """Images (b, c, h, w) in [0, 1] -> features (b, d, h', w'): each patch through a linear layer, then blocks."""

    def __init__(self, channels: int, patch_size: int, dim: int, num_blocks: int):
        super().__init__()
        self.patch_size = patch_size
        self.to_features = nn.Linear(channels * patch_size**2, dim)
        self.blocks = nn.Sequential(*(ResBlock(dim) for _ in range(num_blocks)))

    def forward(self, image: Tensor) -> Tensor:
        size = self.patch_size
        patches = rearrange(2 * image - 1, "b c (h p) (w q) -> b h w (c p q)", p=size, q=size)
        return self.blocks(rearrange(self.to_features(patches), "b h w d -> b d h w"))


class PatchDecoder(nn.Module):
    """The mirror image of `PatchEncoder`: features (b, d, h', w') -> images (b, c, h, w)."""

    def __init__(self, channels: int, patch_size: int, dim: int, num_blocks: int):
        super().__init__()
        self.patch_size = patch_size
        self.blocks = nn.Sequential(*(ResBlock(dim) for _ in range(num_blocks)))
        self.to_pixels = nn.Linear(dim, channels * patch_size**2)

    def forward(self, features: Tensor) -> Tensor:
        patches = self.to_pixels(rearrange(self.blocks(features), "b d h w -> b h w d"))
        size = self.patch_size
        return (rearrange(patches, "b h w (c p q) -> b c (h p) (w q)", p=size, q=size) + 1) / 2


class VQImageAutoregressiveAutoencoder(
    AutoregressiveModel,
    TokenizerNetwork,
    library_name="vqdist",
    tags=["image-tokenizer", "image-generation", "autoregressive"],
):
    """A tokenizer and a generator of images in one model.

    `vqdist.Tokenizer(model)` makes codes and images of each other; `sample` draws new images. Save and load with
    `save_pretrained(folder)`, `VQImageAutoregressiveAutoencoder.from_pretrained(folder or repository)` and
    `push_to_hub(repository)`. In train mode the codebook moves in `forward`, with collectives over ranks.

    Args:
        image_size: side of the images in pixels; a multiple of patch_size.
        patch_size: pixels per code along each side.
        dim: width of the features, of the codes and of the transformer.
        codebook_size: number of codes.
        decay: of the codebook's moving average; 0 takes each batch's mean.
        depth: layers of the transformer, each attention and feed-forward.
        dim_head: width of an attention head.
        heads: attention heads of a layer.
        recon_from_pred_codes_weight: share of the reconstruction's gradient, 0 to 1, that goes to the predicted
            vectors, rotated onto their codes; the rest goes to the quantized vectors, past the transformer.
        recon_loss_weight: weight of the reconstruction's mean squared error, of pixels in [0, 1].
        vq_commit_loss_weight: weight of the quantizer's losses.
        ar_commit_loss_weight: weight of the mean squared difference of predicted and quantized vectors.
        channels: channels of the images: 1 grey, which is all that the ancestor knows, 3 colour, 4 colour and alpha.
        num_resnet_blocks: residual blocks over the map of patches, in encoder and decoder each. With 0, as in the
            ancestor, a code depends on its own patch alone, so that all blank patches share one code.
        logit_scale: factor of the distances in the logits. With 1, as in the ancestor, a codebook of many codes near
            one another cannot be predicted with confidence, however good the prediction: samples become noise unless
            the temperature is as much lower.
        vq_kwargs: options of vector-quantize-pytorch's VectorQuantize over those of the ancestor: Euclidean codebook
            as wide as dim, commitment_weight 1, rotation trick, no k-means start, no replacement of unused codes.
    """

    model_type = "vq_ar"
    channels: int
    image_size: int
    num_levels = 1
    draw_defaults = {"min_p": 0.25, "temperature": 1.5}

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        codebook_size: int,
        decay: float = DEFAULT_DECAY,
        depth: int = 3,
        dim_head: int = 16,
        heads: int = 4,
        recon_from_pred_codes_weight: float = 1.0,
        recon_loss_weight: float = 1.0,
        vq_commit_loss_weight: float = 1.0,
        ar_commit_loss_weight: float = 1.0,
        channels: int = 1,
        num_resnet_blocks: int = 0,
        logit_scale: float = 1.0,
        vq_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        _check_sizes(image_size, patch_size, dim, depth, dim_head, heads, channels, num_resnet_blocks)
        check_heads(dim, heads, dim_head)
        _check_weights(recon_from_pred_codes_weight, recon_loss_weight, vq_commit_loss_weight, ar_commit_loss_weight)
        self.image_size = image_size
        self.patch_size = patch_size
        self.channels = channels
        self.recon_from_pred_codes_weight = recon_from_pred_codes_weight
        self.recon_loss_weight = recon_loss_weight
        self.vq_commit_loss_weight = vq_commit_loss_weight
        self.ar_commit_loss_weight = ar_commit_loss_weight
        if not 0 < logit_scale < math.inf:
            raise UserError(f"logit_scale {logit_scale} is not possible; it must be above 0 and finite")
        self.logit_scale = logit_scale
        self.check_image_size(image_size)
        options = _quantizer_options(dim, decay, vq_kwargs or {})
        self.quantizer = build_quantizer("vq", dim=dim, codebook_size=codebook_size, **options)
        self.encoder = PatchEncoder(channels, patch_size, dim, num_resnet_blocks)
        self.decoder = PatchDecoder(channels, patch_size, dim, num_resnet_blocks)
        self.start_token = nn.Parameter(torch.zeros(dim))
        # verbose: the library warns of few rotary dimensions in language models, which have thousands of positions
        self.transformer = Decoder(
            dim=dim,
            depth=depth,
            heads=heads,
            attn_dim_head=dim_head,
            rotary_pos_emb=True,
            attn_flash=True,
            verbose=False,
        )
        self.to_code = nn.Linear(dim, dim)

    # ------------------------------------------------------------------------------------- facts

    @property
    def network(self) -> VQImageAutoregressiveAutoencoder:
        """The part that reconstructs images: this very model."""
        return self

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.quantizer.codebook_size

    @property
    def stride(self) -> int:
        """Pixels per code along each side."""
        return self.patch_size

    @property
    def num_codes(self) -> int:
        """Codes of an image."""
        return (self.image_size // self.patch_size) ** 2

    def code_shape(self, image_size: int) -> tuple[int, int]:
        """Shape of the map of codes of square images of this side in pixels, (h', w')."""
        return image_size // self.stride, image_size // self.stride

    def check_image_size(self, size: int) -> None:
        """Raise `UserError` if square images of this side (in pixels) cannot be cut into patches."""
        _check_side("image_size", size, self.patch_size)

    # ------------------------------------------------------------------------------------- images and codes

    def tokenize(self, image: Tensor) -> Tensor:
        self._check_images(image)
        return self.quantizer(self.encoder(image)).indices

    def detokenize(self, ids: Tensor) -> Tensor:
        return self.decoder(self.quantizer.decode_indices(ids).to(self.start_token.dtype))

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.detokenize(rearrange(codes, "b (h w) -> b h w", h=self.image_size // self.patch_size))

    def codebook(self) -> Tensor:
        """Return the vector of every code, (v, d) float32."""
        every = torch.arange(self.codebook_size, device=self.start_token.device)
        return rearrange(self.quantizer.decode_indices(rearrange(every, "v -> 1 1 v")), "1 d 1 v -> v d")

    # ------------------------------------------------------------------------------------- training

    def inputs(self, item: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        check_pixels(item)
        return (item,)

    def forward(self, image: Tensor) -> CodesAndImage:
        """Codes of images, what the transformer expected of each, and the reconstruction.

        Args:
            image: (b, c, image_size, image_size) in [0, 1].
        """
        self._check_images(image)
        self._check_training_size(image)
        features, indices, vq_commit_loss = self.quantizer(self.encoder(image))
        quantized = rearrange(features, "b d h w -> b (h w) d")
        predicted = self.predict(quantized[:, :-1])
        with float32_arithmetic(image.device):
            # the codebook as the quantizer left it: with a k-means start there is none before the first batch
            logits = self.logit_scale * distance_logits(predicted, self.codebook())
            ar_commit_loss = F.mse_loss(predicted.float(), quantized.float())
        mixed = rearrange(self._mix(predicted, quantized), "b (h w) d -> b d h w", h=features.shape[2])
        indices = rearrange(indices, "b h w -> b (h w)")
        return CodesAndImage(logits, indices, self.decoder(mixed), vq_commit_loss, ar_commit_loss)

    def predict(self, tokens: Tensor) -> Tensor:
        """Vectors of codes (b, m, d) -> predicted vectors (b, m + 1, d): the first of nothing, the last of all."""
        start = repeat(self.start_token, "d -> b 1 d", b=len(tokens))
        return self.to_code(self.transformer(torch.cat([start, tokens], dim=1)))

    def _mix(self, predicted: Tensor, quantized: Tensor) -> Tensor:
        """Return what is decoded, (b, n, d): quantized vectors in value, with part of the gradient to the predicted.

        Decoding this once is mixing two images, in value and in gradient: both are decoded from the same vectors.
        """
        weight = self.recon_from_pred_codes_weight
        if weight == 0:
            return quantized
        rotated = rotated_onto(predicted, quantized).to(quantized.dtype)
        return rotated if weight == 1 else weight * rotated + (1 - weight) * quantized

    def loss(self, out: CodesAndImage, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the codes, and the weighted sum of the other parts; parts are without their weights.

        Args:
            out: what `forward` gave.
            image: (b, c, h, w) in [0, 1].
        """
        with float32_arithmetic(image.device):
            cross_entropy = F.cross_entropy(rearrange(out.logits, "b n v -> (b n) v"), out.indices.flatten())
            recon_loss = losses.reconstruction_loss(out.recon, image, "l2")
            total = (
                cross_entropy
                + self.recon_loss_weight * recon_loss
                + self.vq_commit_loss_weight * out.vq_commit_loss
                + self.ar_commit_loss_weight * out.ar_commit_loss
            )
        return total, {
            "cross_entropy": cross_entropy,
            "recon_loss": recon_loss,
            "vq_commit_loss": out.vq_commit_loss,
            "ar_commit_loss": out.ar_commit_loss,
        }

    # ------------------------------------------------------------------------------------- drawing

    @torch.no_grad()
    def draw_codes(self, uniform: Tensor, label: Tensor, options: DrawOptions, *, use_cache: bool = True) -> Tensor:
        codebook = self.codebook()
        vectors = codebook.to(self.start_token.dtype)
        tokens: Tensor = repeat(self.start_token, "d -> b 1 d", b=len(uniform))
        codes: list[Tensor] = []
        cache: Any = None
        for chance in uniform.unbind(dim=1):
            hidden, kept = self.transformer(tokens, cache=cache, return_hiddens=True, input_not_include_cache=True)
            logits = self.logit_scale * distance_logits(self.to_code(hidden[:, -1]), codebook)
            codes.append(draw(logits, chance, options))
            newest = vectors[codes[-1]][:, None]
            tokens, cache = (newest, kept) if use_cache else (torch.cat([tokens, newest], dim=1), None)
        return torch.stack(codes, dim=1)

    # ------------------------------------------------------------------------------------- checks

    def _check_images(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != self.channels:
            raise UserError(
                f"images of shape {tuple(image.shape)} were given; (batch, {self.channels}, height, width) is expected"
            )
        check_pixels(image)
        for side in image.shape[-2:]:
            _check_side("image side", side, self.patch_size)

    def _check_training_size(self, image: Tensor) -> None:
        size = self.image_size
        if image.shape[-2:] != (size, size):
            found = " x ".join(map(str, image.shape[-2:]))
            raise UserError(f"images of {found} pixels were given; the model is for {size} x {size}")


def distance_logits(predicted: Tensor, codebook: Tensor) -> Tensor:
    """Minus the Euclidean distance of predicted vectors (..., d) to all codes (v, d): (..., v), float32."""
    predicted = predicted.float()
    with float32_arithmetic(predicted.device):
        # in one row: of a batch, cdist would copy the codebook for every image
        return -torch.cdist(predicted.flatten(0, -2), codebook).unflatten(0, predicted.shape[:-1])


def _quantizer_options(dim: int, decay: float, vq_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ancestor's, with those of the user over them."""
    for name in ("decay", "codebook_size", "dim"):
        if name in vq_kwargs:
            raise UserError(f"vq_kwargs has {name} {vq_kwargs[name]}, which is an argument of the model; set it there")
    options = {
        "codebook_dim": dim,
        "commitment_weight": 1.0,
        "kmeans_init": False,
        "use_cosine_sim": False,
        "decay": decay,
        **vq_kwargs,
    }
    if decay == DEFAULT_DECAY and vq_kwargs.get("ema_update") is False:
        del options["decay"]  # nobody asked for it, and the quantizer refuses what it would not read
    return options


def _check_side(what: str, side: int, patch_size: int) -> None:
    if side % patch_size or side < patch_size:
        below = max(0, side - side % patch_size)
        near = " or ".join(str(size) for size in (below, below + patch_size) if size > 0)
        raise UserError(f"{what} {side} is not a multiple of patch_size {patch_size}; try {near}")


def _check_sizes(image_size, patch_size, dim, depth, dim_head, heads, channels, num_resnet_blocks) -> None:
    check_whole_numbers(
        image_size=(image_size, 1),
        patch_size=(patch_size, 1),
        dim=(dim, 1),
        depth=(depth, 1),
        dim_head=(dim_head, 6),  # half of it is rotated, and the library cannot rotate 2
        heads=(heads, 1),
        num_resnet_blocks=(num_resnet_blocks, 0),
    )
    check_channels(channels)


def _check_weights(recon_from_pred_codes, recon_loss, vq_commit_loss, ar_commit_loss) -> None:
    if not 0 <= recon_from_pred_codes <= 1:
        raise UserError(
            f"recon_from_pred_codes_weight {recon_from_pred_codes} is not possible; give a share in [0, 1]"
        )
    weights = {"recon_loss": recon_loss, "vq_commit_loss": vq_commit_loss, "ar_commit_loss": ar_commit_loss}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"{name}_weight {weight} is not possible; it must be at least 0 and finite")
