"""VQGAN (arXiv 2012.09841) with the networks of muse-maskgit: a convolutional autoencoder with a quantizer between.

`VQAutoencoder` is what the generator's engine trains and what EMA averages; `VQGanVAE` adds the discriminator and the
losses, and is what users build, save and load.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from vqdist import losses
from vqdist.errors import UserError
from vqdist.models.arguments import check_channels
from vqdist.models.discriminator import PatchDiscriminator
from vqdist.models.perceptual import MIN_IMAGE_SIZE, PerceptualLoss
from vqdist.models.pretrained import PretrainedModel
from vqdist.models.quantizers import Quantizer, build_quantizer
from vqdist.models.tokenizer import TokenizerNetwork, check_image_size, check_images, check_scales


class Reconstruction(NamedTuple):
    """What one pass through the autoencoder gives.

    Attributes:
        recon: (b, c, h, w), in [0, 1] but for overshoot.
        indices: codes, (b, h', w') or (b, h', w', q) with q residual levels; (b, L) of several scales.
        aux_loss: the quantizer's commitment or entropy loss, weighted; 0-d float32.
        hidden: input of the last layer, (b, d, h, w), without a gradient: the adaptive weight is computed from it.
    """

    recon: Tensor
    indices: Tensor
    aux_loss: Tensor
    hidden: Tensor


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
    """As `ResidualBlock`, with gated linear units (arXiv 1612.08083) in place of leaky ReLU."""

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


def build_encoder(
    channels: int, dims: list[int], blocks: list[int], groups: int, first_kernel_size: int
) -> nn.Sequential:
    """(b, c, h, w) -> (b, dims[-1], h / 2**layers, w / 2**layers)."""
    modules: list[nn.Module] = [nn.Conv2d(channels, dims[0], first_kernel_size, padding=first_kernel_size // 2)]
    for dim_in, dim_out, num_blocks in zip(dims[:-1], dims[1:], blocks, strict=True):
        modules += [nn.Conv2d(dim_in, dim_out, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
        modules += [ResidualBlock(dim_out, groups) for _ in range(num_blocks)]
    return nn.Sequential(*modules)


def build_decoder(dims: list[int], blocks: list[int], groups: int) -> nn.Sequential:
    """The encoder's mirror, up to the input of the last layer: (b, dims[-1], h', w') -> (b, dims[0], h, w)."""
    modules: list[nn.Module] = []
    for dim_in, dim_out, num_blocks in reversed(list(zip(dims[:-1], dims[1:], blocks, strict=True))):
        modules += [GatedResidualBlock(dim_out, groups) for _ in range(num_blocks)]
        modules += [nn.ConvTranspose2d(dim_out, dim_in, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*modules)


class VQAutoencoder(TokenizerNetwork):
    """Encoder, quantizer, decoder and a last 1x1 convolution.

    Args:
        channels: of the image.
        dims: widths from the first convolution to the bottom, `layers + 1` of them.
        blocks: residual blocks at each of the `layers` resolutions.
        groups: of the group norms.
        first_kernel_size: of the first convolution.
        quantizer: maps the feature map to codes.
    """

    def __init__(
        self,
        *,
        channels: int,
        dims: list[int],
        blocks: list[int],
        groups: int,
        first_kernel_size: int,
        quantizer: Quantizer,
    ):
        super().__init__()
        self.channels = channels
        self.encoder = build_encoder(channels, dims, blocks, groups, first_kernel_size)
        self.quantizer = quantizer
        self.decoder = build_decoder(dims, blocks, groups)
        self.last_layer = nn.Conv2d(dims[0], channels, 1)

    def forward(self, image: Tensor) -> Reconstruction:
        """Images (b, c, h, w) in [0, 1] -> their reconstruction, codes and the quantizer's loss."""
        quantized, indices, aux_loss = self.quantizer(self.encoder(image))
        hidden = self.decoder(quantized)
        return Reconstruction(self.last_layer(hidden), indices, aux_loss, hidden.detach())

    def decode(self, features: Tensor) -> Tensor:
        """Quantized features (b, d, h', w') -> images (b, c, h, w)."""
        return self.last_layer(self.decoder(features))

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

    def tokenize(self, image: Tensor) -> Tensor:
        return self.quantizer(self.encoder(image)).indices

    def detokenize(self, ids: Tensor) -> Tensor:
        return self.decode(self.quantizer.decode_indices(ids))

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        out = self(image)
        return out.recon, out.indices


class VQGanVAE(
    nn.Module,
    PretrainedModel,
    library_name="vqdist",
    tags=["image-tokenizer", "vqgan"],
    license="mit",
):
    """An image tokenizer: images to codes and back.

    Save and load with `save_pretrained(folder)`, `VQGanVAE.from_pretrained(folder or repository)` and
    `push_to_hub(repository)`; the discriminator and the perceptual network are not saved.

    Args:
        dim: channels of the first convolution; a multiple of `encdec_resnet_groups`.
        channels: channels of the images: 1 grey, 3 colour, 4 colour and alpha.
        layers: halvings of the resolution; image sides must be multiples of 2 ** layers.
        l2_recon_loss: mean squared error for the reconstruction instead of the mean absolute error.
        use_hinge_loss: hinge adversarial losses; false takes binary cross-entropy.
        quantizer: `vq` (EMA codebook), `lfq` (lookup-free), `fsq` (finite scalar), `simvq`, `residual_vq` or
            `multiscale_vq` (VAR's, a map of codes for each scale); by default what `lookup_free_quantization` says.
        lookup_free_quantization: `lfq` if true, `vq` if false; only where `quantizer` is not given.
        codebook_size: number of codes (of each level, for `residual_vq`).
        vq_kwargs: options of `vq` and `residual_vq` in vector-quantize-pytorch, over the defaults codebook_dim 256,
            decay 0.8, commitment_weight 1, kmeans_init and use_cosine_sim true.
        lfq_kwargs: options of `lfq` in vector-quantize-pytorch, over the default diversity_gamma 4.
        quantizer_kwargs: options of any other quantizer in vector-quantize-pytorch, `levels` of `fsq` for example;
            of `multiscale_vq`, those of `vqdist.models.quantizers.MultiScaleVQ`: `v_patch_nums`, ...
        use_vgg_and_gan: false turns perceptual and adversarial loss off, whatever `perceptual` and `use_gan` say.
        use_gan: train against a discriminator.
        perceptual: perceptual loss: `vgg16` (torchvision's weights), a file with VGG16 weights (.pth, .safetensors),
            or `none`.
        vgg: a module to take features from instead: its output's mean squared error is the perceptual loss. Not saved.
        discr_layers: halvings of the resolution in the discriminator.
        encdec_layer_mults: width of each resolution as a multiple of `dim`; by default 1, 2, 4, ... (2 ** layer).
        encdec_num_resnet_blocks: residual blocks at the lowest resolution, or a list with one number per resolution.
        encdec_resnet_groups: groups of the group norms.
        encdec_first_conv_kernel_size: kernel size of the first convolution, odd.
        **kwargs: `vq_NAME=value` is the same as `vq_kwargs={NAME: value}`.
    """

    model_type = "vqgan"

    def __init__(
        self,
        *,
        dim: int,
        channels: int = 3,
        layers: int = 4,
        l2_recon_loss: bool = False,
        use_hinge_loss: bool = True,
        quantizer: str | None = None,
        lookup_free_quantization: bool = True,
        codebook_size: int = 65536,
        vq_kwargs: dict[str, Any] | None = None,
        lfq_kwargs: dict[str, Any] | None = None,
        quantizer_kwargs: dict[str, Any] | None = None,
        use_vgg_and_gan: bool = True,
        use_gan: bool = True,
        perceptual: str = "vgg16",
        vgg: nn.Module | None = None,
        discr_layers: int = 4,
        encdec_layer_mults: list[int] | None = None,
        encdec_num_resnet_blocks: int | list[int] = 1,
        encdec_resnet_groups: int = 16,
        encdec_first_conv_kernel_size: int = 5,
        **kwargs: Any,
    ):
        super().__init__()
        vq_kwargs = {**(vq_kwargs or {}), **_vq_prefixed(kwargs)}
        _check_shape_options(dim, channels, layers, encdec_resnet_groups, encdec_first_conv_kernel_size)
        name = quantizer or ("lfq" if lookup_free_quantization else "vq")
        dims = [dim, *(dim * mult for mult in _layer_mults(encdec_layer_mults, layers))]
        self.channels = channels
        self.layers = layers
        self.l2_recon_loss = l2_recon_loss
        self.use_hinge_loss = use_hinge_loss
        self.perceptual = perceptual if use_vgg_and_gan else "none"
        self._perceptual_loss: list[PerceptualLoss | None] = []  # in a list, so that it is never part of this module
        if vgg is not None:
            self._perceptual_loss.append(PerceptualLoss(vgg) if use_vgg_and_gan else None)
        self._min_perceptual_size = MIN_IMAGE_SIZE if vgg is None and self.perceptual != "none" else 0
        self.autoencoder = VQAutoencoder(
            channels=channels,
            dims=dims,
            blocks=_blocks_per_layer(encdec_num_resnet_blocks, layers),
            groups=encdec_resnet_groups,
            first_kernel_size=encdec_first_conv_kernel_size,
            quantizer=build_quantizer(
                name,
                dim=dims[-1],
                codebook_size=codebook_size,
                **_options_of(name, vq_kwargs, lfq_kwargs, quantizer_kwargs),
            ),
        )
        self.discriminator = (
            PatchDiscriminator(dim, channels=channels, layers=discr_layers, groups=encdec_resnet_groups)
            if use_gan and use_vgg_and_gan
            else None
        )

    @property
    def network(self) -> VQAutoencoder:
        """What reconstructs images: all that is saved."""
        return self.autoencoder

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer between encoder and decoder."""
        return self.autoencoder.quantizer

    @property
    def codebook_size(self) -> int:
        """Number of codes (of each level)."""
        return self.quantizer.codebook_size

    @property
    def stride(self) -> int:
        """Pixels per code along each side: 2 ** layers."""
        return 2**self.layers

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.autoencoder.last_layer.weight.device

    def check_image_size(self, size: int) -> None:
        """Raise `UserError` if square images of this side (in pixels) cannot be encoded."""
        check_image_size(size, self.layers, "layers")
        if self.quantizer.scales is not None:
            check_scales(size, self.layers, "layers", self.quantizer.scales)

    def check_training_size(self, size: int) -> None:
        """As `check_image_size`, and for the networks that are needed for training only."""
        self.check_image_size(size)
        if self.discriminator is not None and size < self.discriminator.min_image_size:
            layers = size.bit_length() - 2
            fewer = f"discr_layers {layers} or " if layers > 0 else ""
            raise UserError(
                f"image_size {size} is too small for discr_layers {self.discriminator.layers}, which needs at least "
                f"{self.discriminator.min_image_size}; use {fewer}use_gan false"
            )
        if size < self._min_perceptual_size:
            raise UserError(
                f"image_size {size} is too small for the perceptual loss, whose VGG16 needs "
                f"{self._min_perceptual_size}; use perceptual none"
            )

    def get_encoded_fmap_size(self, image_size: int) -> int:
        """Codes along one side of an image with this side (in pixels)."""
        return image_size // self.stride

    def perceptual_loss(self) -> PerceptualLoss | None:
        """The perceptual network on this model's device, made on first use; None if it is off."""
        if not self._perceptual_loss:
            self._perceptual_loss.append(PerceptualLoss.build(self.perceptual))
        loss = self._perceptual_loss[0]
        return None if loss is None else loss.to(self.device)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (b, c, h, w) in [0, 1] -> quantized features (b, d, h', w'), codes (b, h', w'), quantizer's loss.

        Codes of several scales are (b, L).
        """
        self._check_image(image)
        return tuple(self.quantizer(self.autoencoder.encoder(image)))

    def decode(self, fmap: Tensor) -> Tensor:
        """Quantized features (b, d, h', w') -> images (b, c, h, w), not clamped."""
        return self.autoencoder.decode(fmap)

    def decode_from_ids(self, ids: Tensor) -> Tensor:
        """Codes (b, h', w'), or (b, n) of a square image, -> images (b, c, h, w), not clamped.

        Where a position has several codes they are the last axis: (b, h', w', q) or (b, n, q). Codes of several scales
        are (b, L), or those of the first scales.
        """
        if self.quantizer.scales is None and ids.ndim == (3 if self.quantizer.num_levels > 1 else 2):
            side = int(ids.shape[1] ** 0.5)
            if side * side != ids.shape[1]:
                raise UserError(
                    f"{ids.shape[1]} codes do not make a square; give codes of shape (batch, height, width)"
                )
            ids = rearrange(ids, "b (h w) ... -> b h w ...", h=side)
        return self.decode(self.quantizer.decode_indices(ids))

    def forward(
        self,
        img: Tensor,
        return_loss: bool = False,
        return_discr_loss: bool = False,
        return_recons: bool = False,
        add_gradient_penalty: bool = True,
    ):
        """The reconstruction, or one player's loss, for a training loop of one's own on one process.

        Args:
            img: (b, c, h, w) in [0, 1].
            return_loss: give the generator's loss (0-d).
            return_discr_loss: give the discriminator's loss (0-d).
            return_recons: give `(loss, reconstruction)`.
            add_gradient_penalty: to the discriminator's loss.
        """
        self._check_image(img)
        if return_loss and return_discr_loss:
            raise UserError("return_loss and return_discr_loss are both set; ask for one player's loss at a time")
        out = self.autoencoder(img)
        if not return_loss and not return_discr_loss:
            return out.recon
        loss = (
            self._generator_loss(img, out) if return_loss else self._discriminator_loss(img, out, add_gradient_penalty)
        )
        return (loss, out.recon) if return_recons else loss

    def _generator_loss(self, image: Tensor, out: Reconstruction) -> Tensor:
        reconstruction = self.reconstruction_loss(out.recon, image)
        perceptual_loss = self.perceptual_loss()
        perceptual = None if perceptual_loss is None else perceptual_loss(out.recon, image)
        total = reconstruction + out.aux_loss + (0 if perceptual is None else perceptual)
        if self.discriminator is None:
            return total
        # with weights held fixed: the generator's loss leaves no gradient in the discriminator
        fixed = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        adversarial = self.adversarial_loss(torch.func.functional_call(self.discriminator, fixed, (out.recon,)))
        reference = reconstruction if perceptual is None else perceptual
        weight = self.autoencoder.last_layer.weight
        gradients = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (reference, adversarial))
        return total + losses.adaptive_weight(*gradients) * adversarial

    def _discriminator_loss(self, image: Tensor, out: Reconstruction, add_gradient_penalty: bool) -> Tensor:
        if self.discriminator is None:
            raise UserError("return_discr_loss is set but this model has no discriminator; build it with use_gan=True")
        real, fake = self.discriminator(torch.cat([image, out.recon.detach()])).chunk(2)
        loss = self.discriminator_loss(real, fake)
        return loss + losses.gradient_penalty(self.discriminator, image) if add_gradient_penalty else loss

    def reconstruction_loss(self, recon: Tensor, image: Tensor) -> Tensor:
        """L1, or L2 with `l2_recon_loss`; 0-d."""
        return losses.reconstruction_loss(recon, image, "l2" if self.l2_recon_loss else "l1")

    def adversarial_loss(self, fake_logits: Tensor) -> Tensor:
        """What the generator minimises of the discriminator's logits for reconstructions; 0-d."""
        loss = losses.hinge_generator_loss if self.use_hinge_loss else losses.bce_generator_loss
        return loss(fake_logits)

    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """What the discriminator minimises, without the gradient penalty; 0-d."""
        loss = losses.hinge_discriminator_loss if self.use_hinge_loss else losses.bce_discriminator_loss
        return loss(real_logits, fake_logits)

    def _check_image(self, image: Tensor) -> None:
        check_images(image, self.channels, self.layers, "layers")

    def saved_part(self) -> nn.Module:
        return _OnlyAutoencoder(self.autoencoder)


class _OnlyAutoencoder(nn.Module):
    """Gives the saved tensors their names: `autoencoder.` and nothing else."""

    def __init__(self, autoencoder: VQAutoencoder):
        super().__init__()
        self.autoencoder = autoencoder


def _vq_prefixed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`vq_decay=0.9` -> `{"decay": 0.9}`; any other keyword is an error that names the nearest."""
    known = inspect.signature(VQGanVAE.__init__).parameters
    for key in kwargs:
        if not key.startswith("vq_"):
            nearest = difflib.get_close_matches(key, known, n=3)
            raise UserError(f"VQGanVAE has no argument {key!r}; nearest: {', '.join(nearest) or 'none'}")
    return {key.removeprefix("vq_"): value for key, value in kwargs.items()}


def _check_shape_options(dim: int, channels: int, layers: int, groups: int, first_kernel_size: int) -> None:
    check_channels(channels)
    if layers < 1:
        raise UserError(f"layers {layers} is not possible; at least one halving of the resolution is needed")
    if groups < 1:
        raise UserError(f"encdec_resnet_groups {groups} is not possible; it must be at least 1")
    if dim < groups or dim % groups:
        raise UserError(
            f"dim {dim} is not a multiple of encdec_resnet_groups {groups}; try {max(groups, dim - dim % groups)}"
        )
    if first_kernel_size % 2 == 0:
        raise UserError(f"encdec_first_conv_kernel_size {first_kernel_size} is even; try {first_kernel_size + 1}")


def _layer_mults(mults: list[int] | None, layers: int) -> list[int]:
    mults = [2**layer for layer in range(layers)] if mults is None else list(mults)
    if any(mult < 1 for mult in mults):
        raise UserError(f"encdec_layer_mults {mults} is not possible; each must be at least 1")
    if len(mults) != layers:
        raise UserError(f"encdec_layer_mults has {len(mults)} numbers; layers {layers} needs {layers}")
    return mults


def _blocks_per_layer(blocks: int | list[int], layers: int) -> list[int]:
    blocks = [*[0] * (layers - 1), blocks] if isinstance(blocks, int) else list(blocks)
    if any(number < 0 for number in blocks):
        raise UserError(f"encdec_num_resnet_blocks {blocks} is not possible; each must be at least 0")
    if len(blocks) != layers:
        raise UserError(f"encdec_num_resnet_blocks has {len(blocks)} numbers; layers {layers} needs {layers}")
    return blocks


def _options_of(
    name: str,
    vq_kwargs: dict[str, Any] | None,
    lfq_kwargs: dict[str, Any] | None,
    quantizer_kwargs: dict[str, Any] | None,
) -> dict[str, Any]:
    """The chosen quantizer's options; options of another one are errors."""
    belongs = {"vq_kwargs": ("vq", "residual_vq"), "lfq_kwargs": ("lfq",)}
    options = dict(quantizer_kwargs or {})
    for argument, given in (("vq_kwargs", vq_kwargs), ("lfq_kwargs", lfq_kwargs)):
        if not given:
            continue
        if name not in belongs[argument]:
            raise UserError(
                f"{argument} {given} is given but the quantizer is {name!r}; use quantizer_kwargs, or quantizer "
                f"{' or '.join(map(repr, belongs[argument]))}"
            )
        options.update(given)
    return options
