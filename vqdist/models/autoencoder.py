"""The network that an image tokenizer of three parts trains: encoder, quantizer and decoder.

Shapes: `b` batch, `c` channel, `h w` image, `d` width of the features, `h' w'` map of codes, `n` codes in a row, `L`
codes of all scales.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from vqdist.models.networks.base import apply_last_layer, check_features, check_reconstruction, code_shape_of
from vqdist.models.networks.conv import ConvDecoder
from vqdist.models.quantizers import Quantizer
from vqdist.models.quantizers.base import checked
from vqdist.models.tokenizer import TokenizerNetwork
from vqdist.sizes import ImageSize


class ForwardPass(NamedTuple):
    """The result of one pass through the autoencoder.

    Attributes:
        recon: (b, c, h, w), in [0, 1] but for overshoot. None of a network that makes no images: the first stage of
            TiTok.
        indices: codes, (b, h', w') or (b, h', w', q) with q residual levels; (b, n) of a row of tokens, (b, L) of
            several scales.
        aux_loss: the quantizer's commitment or entropy loss, weighted; 0-d float32.
        hidden: input of the decoder's last layer, (b, d, h, w), without a gradient: the adaptive weight is computed
            from it. None of a decoder without a last layer.
        features: (b, d, h', w') or (b, n, d), what the encoder gave, with its graph.
        proxy: (b, v, h', w'), logits of another tokenizer's codes, of a decoder that predicts these; else None.
    """

    recon: Tensor | None
    indices: Tensor
    aux_loss: Tensor
    hidden: Tensor | None
    features: Tensor
    proxy: Tensor | None = None


class VQAutoencoder(TokenizerNetwork):
    """Encoder, quantizer and decoder.

    Args:
        channels: of the image.
        encoder: see `vqdist.models.networks.Encoder`.
        quantizer: maps features to codes.
        decoder: see `vqdist.models.networks.Decoder`.
    """

    channels: int
    encoder: Any  # a module and an `Encoder`, which Python's types cannot say at once
    decoder: Any  # likewise a `Decoder`

    def __init__(self, *, channels: int, encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module):
        super().__init__()
        self.channels = channels
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder

    def forward(self, image: Tensor) -> ForwardPass:
        """Images (b, c, h, w) in [0, 1] -> their reconstruction, codes and the quantizer's loss."""
        features = self.features(image)
        quantized, indices, aux_loss = self.quantize(features)
        # through `forward` in each case: where weights are sharded, no other method has them whole
        hidden, proxy = (
            self.decoder(quantized, with_proxy=True) if self.gives_proxy else (self.decoder(quantized), None)
        )
        if not self.makes_images:
            return ForwardPass(None, indices, aux_loss, None, features, proxy)
        recon = apply_last_layer(self.decoder, hidden)
        check_reconstruction(recon, image, self.decoder)
        kept = None if self.last_layer is None else hidden.detach()
        return ForwardPass(recon, indices, aux_loss, kept, features, proxy)

    def features(self, image: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> what the encoder gives for them, (b, d, h', w') or (b, n, d)."""
        features = self.encoder(image)
        check_features(features, image, self.encoder)
        return features

    def quantize(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the encoder -> quantized features of the same shape, codes, the quantizer's loss."""
        if features.ndim == 4:
            return checked(self.quantizer(features), features, self.quantizer)
        row = rearrange(features, "b n d -> b d n 1")  # of the quantizer's view a row of tokens is a narrow map
        quantized, indices, aux_loss = checked(self.quantizer(row), row, self.quantizer)
        return rearrange(quantized, "b d n 1 -> b n d"), rearrange(indices, "b n 1 ... -> b n ..."), aux_loss

    def decode(self, features: Tensor) -> Tensor:
        """Quantized features (b, d, h', w') or (b, n, d) -> images (b, c, h, w)."""
        return apply_last_layer(self.decoder, self.decoder(features))

    @property
    def last_layer(self) -> nn.Conv2d | None:
        """The decoder's last convolution, if it has one."""
        return self.decoder.last_layer

    @property
    def gives_proxy(self) -> bool:
        """Return whether the decoder predicts another tokenizer's codes."""
        return getattr(self.decoder, "gives_proxy", False) is True

    @property
    def makes_images(self) -> bool:
        """Return whether the decoder makes images; that of TiTok's first stage does not."""
        return not self.gives_proxy or self.decoder.makes_images

    @property
    def codebook_size(self) -> int:
        """Number of codes (of each level)."""
        return self.quantizer.codebook_size

    @property
    def num_levels(self) -> int:
        """Codes per position."""
        return self.quantizer.num_levels

    @property
    def scales(self) -> tuple[int, ...] | None:
        """Sides of the maps of codes of a `multiscale_vq`, growing; None of any other quantizer."""
        return self.quantizer.scales

    def code_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        """Shape of the codes of an image; see `vqdist.models.networks.Encoder`."""
        return code_shape_of(self.encoder, image_size)

    def tokenize(self, image: Tensor) -> Tensor:
        return self.quantize(self.features(image))[1]

    def detokenize(self, ids: Tensor) -> Tensor:
        row = self.scales is None and ids.ndim == (3 if self.num_levels > 1 else 2)
        if not row:
            return self.decode(self.quantizer.decode_indices(ids))
        features = self.quantizer.decode_indices(rearrange(ids, "b n ... -> b n 1 ..."))
        return self.decode(rearrange(features, "b d n 1 -> b n d"))

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        out = self(image)
        return self.decoder.from_proxy(out.proxy) if out.recon is None else out.recon, out.indices

    def first_name(self, name: str) -> str:
        if isinstance(self.decoder, ConvDecoder):
            name = re.sub(r"^decoder\.net\.", "decoder.", re.sub(r"^decoder\.(?=last_layer\.)", "", name))
        return name

    def makes_codes(self, name: str) -> bool:
        return not name.startswith("decoder.")

    # before decoders were parts, vqdist's own was a sequence of layers, and the last layer stood beside it
    _RENAMED = ((r"^decoder\.(\d+)\.", r"decoder.net.\1."), (r"^last_layer\.", "decoder.last_layer."))

    def current_name(self, name: str) -> str:
        """Return how a tensor is called now that a checkpoint or export calls by this name."""
        own = self.__dict__.get("_own_names")
        if own is None:
            own = self.__dict__["_own_names"] = frozenset(self.state_dict())
        if name in own:
            return name
        for pattern, replacement in self._RENAMED:
            renamed = re.sub(pattern, replacement, name)
            if renamed in own:
                return renamed
        return name
