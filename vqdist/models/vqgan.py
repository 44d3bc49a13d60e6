"""VQGAN (arXiv 2012.09841): an encoder, a quantizer and a decoder, trained against a discriminator.

`VQAutoencoder` (autoencoder.py) is what the generator's engine trains and what the moving average follows. `VQGanVAE`
adds the discriminator and the objective, and is what users build, save and load. Each is a part: see `vqdist.parts`.
"""

from __future__ import annotations

import copy
import inspect
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from vqdist import losses
from vqdist.errors import UserError, an
from vqdist.files import follow_umask
from vqdist.locations import DISCRIMINATOR
from vqdist.models.arguments import check_channels
from vqdist.models.autoencoder import ForwardPass, VQAutoencoder
from vqdist.models.multiscale import MultiScaleResidual
from vqdist.models.networks.base import (
    gives_rows,
    logits_of,
    logits_of_both,
    own_image_size,
    require_module,
    whole_number,
)
from vqdist.models.networks.conv import ConvDecoder, ConvEncoder, check_widths, widths_of
from vqdist.models.networks.patch import PatchDiscriminator
from vqdist.models.presets import preset_named
from vqdist.models.pretrained import PretrainedModel
from vqdist.models.quantizers import Quantizer, build_quantizer
from vqdist.models.tokenizer import check_images, check_pixels, check_scales
from vqdist.objectives import Objective, Perceptual, PerceptualLoss, Reconstruction
from vqdist.objectives.adversarial import DISCR_LOSSES, GEN_LOSSES, names_of_losses
from vqdist.objectives.named import check_image_size as check_perceptual_size
from vqdist.objectives.named import perceptual_terms
from vqdist.parts import (
    GIVEN_BUILT,
    PartSpec,
    Registry,
    Spec,
    UnavailablePart,
    called,
    path_of,
    recorded,
    unknown,
)
from vqdist.registries import DECODERS, DISCRIMINATORS, ENCODERS, QUANTIZERS, TERMS
from vqdist.sizes import ImageSize
from vqdist.storage import save_module

DEFAULT_CODEBOOK_SIZE = 65_536
MOST_PIXELS = 2048  # a side, up to which an encoder is asked whether it takes images


class VQGanVAE(
    nn.Module,
    PretrainedModel,
    library_name="vqdist",
    tags=["image-tokenizer", "vqgan"],
):
    """An image tokenizer: images to codes and back.

    Save and load with `save_pretrained(folder)`, `VQGanVAE.from_pretrained(folder or repository)` and
    `push_to_hub(repository)`; the perceptual network is not saved. A trained discriminator has a file of its own,
    `discriminator.safetensors`, which only `init_from` of the trainer reads.

    Encoder, decoder, discriminator, quantizer and terms are parts: each takes a name, an import path with arguments
    (`{"class_path": "my_nets.MyEncoder", "init_args": {"width": 32}}`), or a built object. Arguments of vqdist's own
    networks (`dim`, `layers`, `encdec_...`, `discr_layers`) are refused where no such network is left to read them.

    Args:
        dim: channels of the first convolution of vqdist's own networks; a multiple of `encdec_resnet_groups`. Required
            unless encoder, decoder and discriminator are all given, or there is no discriminator.
        channels: channels of the images: 1 grey, 3 colour, 4 colour and alpha.
        layers: halvings of the resolution; image sides must be multiples of 2 ** layers.
        l2_recon_loss: mean squared error for the reconstruction instead of the mean absolute error.
        use_hinge_loss: muse's hinge losses of the two players; false takes its binary cross-entropy.
        discr_loss: loss of the discriminator: `hinge`, `vanilla` (each with a factor of one half, as most have it),
            `non_saturating` (logits averaged per image first), `hinge_sum` or `vanilla_sum` (muse's, without the
            half); by default what `use_hinge_loss` says.
        gen_loss: loss of the generator against it: `hinge`, `vanilla` or `non_saturating`; likewise.
        quantizer: `vq` (EMA codebook), `lfq` (lookup-free), `fsq` (finite scalar), `simvq`, `residual_vq`,
            `multiscale_vq` (VAR's, a map of codes for each scale), `gradient_vq` (taming's and LlamaGen's), `ibq` or
            `gumbel`, or one of your own, which is built with the features' `dim`, and with `codebook_size` if it takes
            that; by default what `lookup_free_quantization` says.
        lookup_free_quantization: `lfq` if true, `vq` if false; only where `quantizer` is not given.
        codebook_size: number of codes (of each level, for `residual_vq`).
        vq_kwargs: options of `vq` and `residual_vq` in vector-quantize-pytorch, over the defaults codebook_dim 256,
            decay 0.8, commitment_weight 1, kmeans_init and use_cosine_sim true.
        lfq_kwargs: options of `lfq` in vector-quantize-pytorch, over the default diversity_gamma 4.
        quantizer_kwargs: options of any other quantizer in vector-quantize-pytorch, `levels` of `fsq` for example;
            of `multiscale_vq`, those of `vqdist.models.quantizers.MultiScaleVQ`: `v_patch_nums`, ...
        use_vgg_and_gan: false turns perceptual and adversarial loss off, whatever `perceptual` and `use_gan` say.
        use_gan: train against a discriminator.
        perceptual: perceptual loss: `lpips`, `lpips-alex`, `lpips-squeeze`, `convnext_s` (its logits), each with
            `:FILE` for torchvision's weights from a file; `vgg16` (muse's, squared difference of features) or a file
            with VGG16 weights (.pth, .safetensors); `lpips-convnext_s-A-B` for two with their weights; or `none`.
        vgg: a module to take features from instead: its output's mean squared error is the perceptual loss. Not saved.
        discr_layers: halvings of the resolution in the discriminator.
        encdec_layer_mults: width of each resolution as a multiple of `dim`; by default 1, 2, 4, ... (2 ** layer).
        encdec_num_resnet_blocks: residual blocks at the lowest resolution, or a list with one number per resolution.
        encdec_resnet_groups: groups of the group norms.
        encdec_first_conv_kernel_size: kernel size of the first convolution, odd.
        encoder: images to features, see `vqdist.models.networks.Encoder`; by default `conv`.
        decoder: features to images, see `vqdist.models.networks.Decoder`; by default `conv`, the encoder's mirror.
        discriminator: images to logits, see `vqdist.models.networks.Discriminator`; by default `patch`.
        terms: what the generator minimises besides the quantizer's and the adversarial loss, see `vqdist.Term`: names,
            `{class_path: ..., init_args: {weight: 0.1}}`, or objects; by default what `l2_recon_loss` and `perceptual`
            say.
        preset: a published configuration, see `vqdist models`: encoder, quantizer, decoder and discriminator where
            they are not given.
        **kwargs: `vq_NAME=value` is the same as `vq_kwargs={NAME: value}`.
    """

    model_type = "vqgan"
    discriminator_is_trained = False  # a trainer says it: one at random is not worth a file
    channels: int
    discriminator: Any  # a module and a `Discriminator`, or None
    _hub_mixin_config: dict[str, Any]
    part_options: ClassVar[Mapping[str, Registry[Any]]] = {
        "encoder": ENCODERS,
        "quantizer": QUANTIZERS,
        "decoder": DECODERS,
        "discriminator": DISCRIMINATORS,
        "terms": TERMS,
    }

    def __init__(
        self,
        *,
        dim: int | None = None,
        channels: int = 3,
        layers: int = 4,
        l2_recon_loss: bool = False,
        use_hinge_loss: bool = True,
        discr_loss: str | None = None,
        gen_loss: str | None = None,
        quantizer: str | dict[str, Any] | None = None,
        lookup_free_quantization: bool = True,
        codebook_size: int = DEFAULT_CODEBOOK_SIZE,
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
        encoder: str | dict[str, Any] | None = None,
        decoder: str | dict[str, Any] | None = None,
        discriminator: str | dict[str, Any] | None = None,
        terms: list[str | dict[str, Any]] | None = None,
        preset: str | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        check_channels(channels)
        with_gan = use_gan and use_vgg_and_gan
        given: dict[str, Any] = {"encoder": encoder, "quantizer": quantizer, "decoder": decoder}
        given |= {"discriminator": discriminator, "terms": terms}
        published = None if preset is None else preset_named(preset)
        if published is not None:
            given = published.completed(given, with_gan=with_gan and dim is None)
            encoder, quantizer, decoder = given["encoder"], given["quantizer"], given["decoder"]
            discriminator = given["discriminator"]
        conv: dict[str, Any] = {
            "dim": dim,
            "layers": layers,
            "encdec_layer_mults": encdec_layer_mults,
            "encdec_num_resnet_blocks": encdec_num_resnet_blocks,
            "encdec_resnet_groups": encdec_resnet_groups,
            "encdec_first_conv_kernel_size": encdec_first_conv_kernel_size,
            "discr_layers": discr_layers,
        }
        _check_conv_options(conv, encoder, decoder, discriminator, with_gan)
        self.channels = channels
        self.l2_recon_loss = l2_recon_loss
        self.use_hinge_loss = use_hinge_loss
        if not with_gan and (discr_loss or gen_loss):
            raise UserError("discr_loss or gen_loss is given but there is no discriminator; leave it out")
        self._discr_loss, self._gen_loss = names_of_losses(discr_loss, gen_loss, use_hinge_loss)
        self.perceptual = perceptual if use_vgg_and_gan else "none"
        width = cast(int, dim)  # where vqdist's own networks read it, it is given
        own: dict[str, Any] = {"layers": layers, "layer_mults": encdec_layer_mults}
        own |= {"num_resnet_blocks": encdec_num_resnet_blocks, "channels": channels, "groups": encdec_resnet_groups}
        built_encoder: Any = None  # a module and an `Encoder`
        if encoder is not None:
            built_encoder = require_module(ENCODERS.build(encoder, channels=channels), "encoder")
            features = whole_number(built_encoder, "encoder", "dim")
        else:
            features = widths_of(width, layers, encdec_layer_mults)[-1]
        vq_kwargs = {**(vq_kwargs or {}), **_vq_prefixed(kwargs)}
        built_quantizer = _build_quantizer(
            quantizer or ("lfq" if lookup_free_quantization else "vq"),
            dim=features,
            codebook_size=codebook_size,
            groups={"vq_kwargs": vq_kwargs, "lfq_kwargs": lfq_kwargs, "quantizer_kwargs": quantizer_kwargs},
        )
        if encoder is None:
            built_encoder = ConvEncoder(width, **own, first_kernel_size=encdec_first_conv_kernel_size)
        if decoder is None:
            built_decoder: nn.Module = ConvDecoder(width, **own)
        else:
            built_decoder = require_module(DECODERS.build(decoder, channels=channels, dim=features), "decoder")
        _check_fit(built_encoder, built_decoder, channels)
        self.autoencoder = VQAutoencoder(
            channels=channels, encoder=built_encoder, quantizer=built_quantizer, decoder=built_decoder
        )
        self.image_size = own_image_size(built_encoder)
        if published is not None and self.image_size is None:
            self.image_size = published.image_size
        self._missing: dict[str, UnavailablePart] = {}  # what only training needs, and could not be built
        self.discriminator = self._build_discriminator(discriminator, conv) if with_gan else None
        self._check_terms(terms, vgg)
        # in lists, so that nothing of it is ever part of this module
        self._terms: list[Any] = list(terms or [])
        self._vgg = [vgg] if vgg is not None and use_vgg_and_gan else []
        self._objective: list[Objective] = []
        self._record_parts(given)
        self._hub_mixin_config.pop("preset", None)  # the parts that it stands for are recorded
        if vgg is not None:
            self._hub_mixin_config["perceptual"] = recorded(vgg) if use_vgg_and_gan else "none"

    @classmethod
    def preset(cls, name: str, **arguments: Any) -> VQGanVAE:
        """Return a model in a published configuration, with weights at random; `vqdist models` lists them.

        Args:
            name: of the configuration.
            **arguments: of the model, over those of the configuration.
        """
        return cls(preset=name, **arguments)

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
    def layers(self) -> int | None:
        """Halvings of the resolution by vqdist's own encoder; None of another."""
        encoder = self.autoencoder.encoder  # of somebody else `layers` may mean anything
        return encoder.layers if isinstance(encoder, ConvEncoder) else None

    @property
    def stride(self) -> int:
        """Pixels per code along each side: 2 ** layers. Only of vqdist's own encoder; see `code_shape` for any."""
        if self.layers is None:
            name = type(self.autoencoder.encoder).__name__
            raise UserError(f"encoder {name} need not have one stride; use code_shape(image_size)")
        return 2**self.layers

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.autoencoder.parameters()).device

    def code_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        """Shape of the codes of an image of this size: (h', w'), or (n,) of a row of tokens."""
        return self.autoencoder.code_shape(image_size)

    def check_image_size(self, size: ImageSize) -> None:
        """Raise `UserError` if images of this size cannot be encoded."""
        shape = self.code_shape(size)
        if self.quantizer.scales is not None:
            check_scales(size, shape, self.quantizer.scales, f" (2 ** {self.layers} layers)" if self.layers else "")

    def check_training_size(self, size: int) -> None:
        """As `check_image_size`, and for the networks that are needed for training only."""
        self.check_image_size(size)
        critic = self.discriminator
        smallest = 0 if critic is None else whole_number(critic, "discriminator", "min_image_size", least=0)
        if size < smallest:
            raise UserError(f"image_size {size} is too small for {self._discriminator_needs(size, smallest)}")
        if not self._terms and not self._vgg and isinstance(self.perceptual, str):
            check_perceptual_size(self.perceptual, size)  # before anything is downloaded
        self.objective().check_image_size(size)

    def check_all_read(self) -> None:
        """Raise `UserError` for arguments that were given and that training with this model would not read."""
        given = self.configuration()
        off: dict[str, str] = {}
        if self.discriminator is None and "discriminator" not in self._missing:
            off |= dict.fromkeys(("discr_layers", "use_hinge_loss"), "the model has no discriminator")
        if not given.get("use_vgg_and_gan", True) and given.get("perceptual") != "none":
            off["perceptual"] = "use_vgg_and_gan is false"
        if given.get("quantizer") is not None:
            off["lookup_free_quantization"] = "quantizer says which one"
        parameters = inspect.signature(VQGanVAE.__init__).parameters
        for name, reason in off.items():
            if given.get(name, parameters[name].default) != parameters[name].default:
                raise UserError(f"{name} {given[name]} does nothing, because {reason}; leave it out")
        named = [] if given.get("use_vgg_and_gan", True) else [term for term in self._terms if _is_perceptual(term)]
        if named:
            raise UserError(
                f"use_vgg_and_gan is false, which turns the perceptual loss off, and terms have {called(named[0])}; "
                "leave the term out, or give use_gan false in place of use_vgg_and_gan"
            )

    def _discriminator_needs(self, size: int, smallest: int) -> str:
        if not isinstance(self.discriminator, PatchDiscriminator):
            name = type(self.discriminator).__name__
            return f"discriminator {name}, which needs at least {smallest}; use larger images, or use_gan false"
        layers = size.bit_length() - 2
        fewer = f"discr_layers {layers} or " if layers > 0 else ""
        return f"discr_layers {self.discriminator.layers}, which needs at least {smallest}; use {fewer}use_gan false"

    def get_encoded_fmap_size(self, image_size: int) -> int:
        """Codes along one side of an image with this side (in pixels)."""
        return self.code_shape(image_size)[0]

    def objective(self) -> Objective:
        """The terms on this model's device; made on first use, since the perceptual one may download weights.

        Raises:
            UserError: weights are missing, or a part that only training needs came with the file of an export and is
                code that was not trusted, or an object that nobody recorded.
        """
        for missing in self._missing.values():
            raise missing
        if not self._objective:
            terms = [TERMS.build(term) for term in self._terms] or self._default_terms()
            self._objective.append(Objective(terms))
        return self._objective[0].to(self.device)

    def perceptual_loss(self) -> PerceptualLoss | None:
        """The perceptual network on this model's device, made on first use; None if it is off."""
        return next((term.loss for term in self.objective() if isinstance(term, Perceptual)), None)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (b, c, h, w) in [0, 1] -> quantized features (b, d, h', w'), codes (b, h', w'), quantizer's loss.

        Codes of several scales are (b, L).
        """
        self._check_image(image)
        return self.autoencoder.quantize(self.autoencoder.features(image))

    def decode(self, fmap: Tensor) -> Tensor:
        """Quantized features (b, d, h', w') -> images (b, c, h, w), not clamped."""
        return self.autoencoder.decode(fmap)

    def decode_from_ids(self, ids: Tensor) -> Tensor:
        """Codes (b, h', w'), or (b, n) of a row of tokens or a map, -> images (b, c, h, w), not clamped.

        A map in a row has the shape of the model's image size, or is square.

        Where a position has several codes they are the last axis: (b, h', w', q) or (b, n, q). Codes of several scales
        are (b, L), or those of the first scales.
        """
        row = ids.ndim == (3 if self.quantizer.num_levels > 1 else 2)
        if row and self.quantizer.scales is None and not self._codes_in_a_row:
            ids = rearrange(ids, "b (h w) ... -> b h w ...", h=self._rows_of_map(ids.shape[1]))
        return self.autoencoder.detokenize(ids)

    def _rows_of_map(self, count: int) -> int:
        """Return the height of the map of so many codes: that of the model's image size if it fits, or a square's."""
        if self.image_size is not None:
            shape = self.code_shape(self.image_size)
            if math.prod(shape) == count:
                return shape[0]
        side = math.isqrt(count)
        if side * side != count:
            raise UserError(f"{count} codes do not make a square; give codes of shape (batch, height, width)")
        return side

    @property
    def _codes_in_a_row(self) -> bool:
        """Return whether the encoder gives rows; it is asked for the known size first, then for any that it takes."""
        known = [] if self.image_size is None else [self.image_size]
        return gives_rows(self.autoencoder.encoder, [*known, *range(1, MOST_PIXELS + 1)])

    def forward(
        self,
        img: Tensor,
        return_loss: bool = False,
        return_discr_loss: bool = False,
        return_recons: bool = False,
        add_gradient_penalty: bool = True,
        step: int = 0,
    ):
        """The reconstruction, or one player's loss, for a training loop of one's own on one process.

        Args:
            img: (b, c, h, w) in [0, 1].
            return_loss: give the generator's loss (0-d).
            return_discr_loss: give the discriminator's loss (0-d).
            return_recons: give `(loss, reconstruction)`.
            add_gradient_penalty: to the discriminator's loss.
            step: finished updates, for terms whose weight has a schedule.
        """
        self._check_image(img)
        if return_loss and return_discr_loss:
            raise UserError("return_loss and return_discr_loss are both set; ask for one player's loss at a time")
        out = self.autoencoder(img)
        if not return_loss and not return_discr_loss:
            return out.recon
        loss = (
            self._generator_loss(img, out, step)
            if return_loss
            else self._discriminator_loss(img, out, add_gradient_penalty)
        )
        return (loss, out.recon) if return_recons else loss

    def _generator_loss(self, image: Tensor, out: ForwardPass, step: int) -> Tensor:
        terms = self.objective().whole(out.recon, image, out, step)
        total = terms.loss + out.aux_loss
        if self.discriminator is None:
            return total
        # with weights held fixed: the generator's loss leaves no gradient in the discriminator
        fixed = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        adversarial = self.adversarial_loss(torch.func.functional_call(self.discriminator, fixed, (out.recon,)))
        if self.autoencoder.last_layer is None:
            return total + adversarial
        weight = self.autoencoder.last_layer.weight
        of_reference, of_adversarial = (
            torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (terms.reference, adversarial)
        )
        return total + losses.adaptive_weight(of_reference, of_adversarial) * adversarial

    def _discriminator_loss(self, image: Tensor, out: ForwardPass, add_gradient_penalty: bool) -> Tensor:
        if self.discriminator is None:
            raise UserError("return_discr_loss is set but this model has no discriminator; build it with use_gan=True")
        loss = self.discriminator_loss(
            *logits_of_both(self.discriminator, self.discriminator, image, out.recon.detach())
        )
        return loss + losses.gradient_penalty(self.discriminator, image) if add_gradient_penalty else loss

    def reconstruction_loss(self, recon: Tensor, image: Tensor) -> Tensor:
        """L1, or L2 with `l2_recon_loss`; 0-d."""
        return losses.reconstruction_loss(recon, image, "l2" if self.l2_recon_loss else "l1")

    def adversarial_loss(self, fake_logits: Tensor | list[Tensor]) -> Tensor:
        """What the generator minimises of the discriminator's logits for reconstructions; 0-d."""
        return losses.over_outputs(GEN_LOSSES[self._gen_loss], logits_of(fake_logits))

    def discriminator_loss(self, real_logits: Tensor | list[Tensor], fake_logits: Tensor | list[Tensor]) -> Tensor:
        """What the discriminator minimises, without the gradient penalty; 0-d."""
        return losses.over_outputs(DISCR_LOSSES[self._discr_loss], logits_of(real_logits), logits_of(fake_logits))

    def _check_image(self, image: Tensor) -> None:
        if self.layers is not None:
            return check_images(image, self.channels, self.layers, "layers")
        if image.ndim != 4 or image.shape[1] != self.channels:
            raise UserError(
                f"images of shape {tuple(image.shape)} were given; (batch, {self.channels}, height, width) is expected"
            )
        check_pixels(image)

    def _build_discriminator(self, given: Any, conv: Mapping[str, Any]) -> nn.Module | None:
        if given is None:
            return PatchDiscriminator(
                conv["dim"], channels=self.channels, layers=conv["discr_layers"], groups=conv["encdec_resnet_groups"]
            )
        try:
            return require_module(DISCRIMINATORS.build(given, channels=self.channels), "discriminator")
        except UnavailablePart as error:  # images are coded and decoded without it
            self._missing["discriminator"] = error
            return None

    def _check_terms(self, terms: list[Any] | None, vgg: nn.Module | None) -> None:
        """Raise `UserError` for terms that cannot be, or beside an option that says the same."""
        if terms is None:
            return
        set_too = {"l2_recon_loss": self.l2_recon_loss, "perceptual": self.perceptual not in ("vgg16", "none")}
        if isinstance(self.perceptual, Mapping):  # an export's record of `vgg`, in whose place terms are given now
            set_too["perceptual"] = False
        for name, is_set in {**set_too, "vgg": vgg is not None}.items():
            if is_set:
                raise UserError(f"{name} is set, and terms say the same; leave it out and give it as a term")
        if not isinstance(terms, (list, tuple)) or not terms:
            raise UserError(f"terms {terms!r} are not possible; give a list, as [reconstruction, perceptual]")
        try:
            for term in terms:
                if isinstance(term, (str, Mapping)):
                    TERMS.factory(Spec.of(term, "terms").target)
        except UnavailablePart as error:  # images are coded and decoded without them
            self._missing["terms"] = error

    def _default_terms(self) -> list[Any]:
        """Pixels and the perceptual loss; where that is muse's, the adaptive weight compares with it alone."""
        kind: Literal["l1", "l2"] = "l2" if self.l2_recon_loss else "l1"
        if isinstance(self.perceptual, Mapping) and not self._vgg:  # of a model that was given a network as `vgg`
            Spec.of(self.perceptual, "vgg")  # says that it must be given again
        features = self._vgg[0] if self._vgg else self.perceptual
        return [Reconstruction(kind), *perceptual_terms(features)]

    def _record_parts(self, given: Mapping[str, Any]) -> None:
        """Let config.json say truly what the parts are, also of those that were given as objects."""
        for name, part in given.items():
            if part is not None:
                self._hub_mixin_config[name] = recorded(part)
        self._built = {name: _class_of(part) for name, part in self._parts().items()}

    def _parts(self) -> dict[str, nn.Module]:
        network = self.autoencoder
        return {"encoder": network.encoder, "quantizer": network.quantizer, "decoder": network.decoder}

    def configuration(self) -> dict[str, Any]:
        """Return what config.json holds; of a part that was replaced after the model was built, what it is now."""
        replaced = {name: part for name, part in self._parts().items() if _class_of(part) is not self._built[name]}
        config = {**super().configuration(), **{name: recorded(part) for name, part in replaced.items()}}
        scales = _scales_of(self.quantizer)
        if scales is not None and self.quantizer.traits:
            config = _with_phi_rule(config, scales.phi_rule)
        return config

    def follow_before(self, written: Mapping[str, Any]) -> None:
        scales = _scales_of(self.quantizer)
        if scales is not None and "phi_rule" not in _quantizer_options(written):
            scales.follow_rule("proportional")
            cast(Any, self.quantizer).is_of_before = True

    def current_name(self, name: str) -> str:
        prefix = "autoencoder."
        return prefix + self.autoencoder.current_name(name.removeprefix(prefix))

    def with_network(self, network: VQAutoencoder, discriminator: nn.Module | None = None) -> VQGanVAE:
        """Return this model with other networks of the same kind; nothing is copied.

        Args:
            network: encoder, quantizer and decoder.
            discriminator: by default its own.
        """
        twin = copy.copy(self)
        twin._modules = {**self._modules, "autoencoder": network}
        if discriminator is not None:
            twin._modules["discriminator"] = discriminator
        return twin

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        path, before = save_directory / DISCRIMINATOR, self.discriminator_file
        if self.discriminator is not None and self.discriminator_is_trained:
            save_module(self.discriminator, path)
            follow_umask(path)
        elif before is None or not before.is_file():
            path.unlink(missing_ok=True)  # of the model that was here
        elif not path.exists() or not path.samefile(before):
            shutil.copyfile(before, path)

    def saved_part(self) -> nn.Module:
        return _OnlyAutoencoder(self.autoencoder)


def _class_of(part: nn.Module) -> type:
    """Return the class of a network; of one that `fully_shard` has cut, the class that it was of before."""
    bases = type(part).__bases__
    of_torch = any(base.__module__.startswith("torch.distributed.") for base in bases)
    return bases[-1] if of_torch else type(part)


def _scales_of(quantizer: Quantizer) -> MultiScaleResidual | None:
    """Return the scales of `multiscale_vq`, or None of another quantizer; to name its class imports its library."""
    inner = getattr(quantizer, "inner", None)
    return inner if isinstance(inner, MultiScaleResidual) else None


def _quantizer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the quantizer that a configuration says, wherever it says them."""
    given = config.get("quantizer")
    return dict((given.get("init_args") if isinstance(given, Mapping) else config.get("quantizer_kwargs")) or {})


def _with_phi_rule(config: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return a configuration that says the rule: one that says none is of a model of before there was a choice."""
    options, given = {"phi_rule": rule, **_quantizer_options(config)}, config.get("quantizer")
    if not isinstance(given, Mapping):
        return {**config, "quantizer_kwargs": options}
    return config if given.get(GIVEN_BUILT) else {**config, "quantizer": {**given, "init_args": options}}


def _is_perceptual(term: Any) -> bool:
    """Return whether a term, given in any form, is one of vqdist's perceptual losses."""
    factory = TERMS.factory(Spec.of(term, "terms").target) if isinstance(term, (str, Mapping)) else type(term)
    return factory in [TERMS[name] for name in ("perceptual", "lpips", "convnext_s")]


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
            raise unknown("argument", key, known, of="VQGanVAE")
    return {key.removeprefix("vq_"): value for key, value in kwargs.items()}


def _check_conv_options(
    conv: Mapping[str, Any], encoder: Any, decoder: Any, discriminator: Any, with_gan: bool
) -> None:
    """Raise `UserError` for options of vqdist's own networks that are missing, or that no network would read."""
    own_ends, own_critic = encoder is None or decoder is None, with_gan and discriminator is None
    readers = dict.fromkeys(conv, own_ends)
    readers |= {"encdec_first_conv_kernel_size": encoder is None, "discr_layers": own_critic}
    readers |= {"dim": own_ends or own_critic, "encdec_resnet_groups": own_ends or own_critic}
    defaults = {name: parameter.default for name, parameter in inspect.signature(VQGanVAE.__init__).parameters.items()}
    for name, is_read in readers.items():
        # a model without a discriminator has always taken discr_layers
        if not is_read and conv[name] != defaults[name] and (name != "discr_layers" or discriminator is not None):
            raise UserError(
                f"{name} {conv[name]} does nothing: all networks that would read it are given; leave it out"
            )
    if discriminator is not None and not with_gan:
        raise UserError("a discriminator is given but use_gan (or use_vgg_and_gan) is false; leave one of them out")
    if conv["dim"] is None and readers["dim"]:
        needs = "discriminator" if not own_ends else "encoder" if encoder is None else "decoder"
        raise UserError(f"dim is missing, and vqdist's own {needs} needs it; give it, or {an(needs)} of your own")
    if own_ends:
        check_widths(conv["dim"], conv["layers"], conv["encdec_resnet_groups"])
    elif own_critic:
        check_widths(conv["dim"], 1, conv["encdec_resnet_groups"])


def _check_fit(encoder: nn.Module, decoder: nn.Module, channels: int) -> None:
    """Raise `UserError` for a decoder that cannot take the encoder's features, or whose last layer cannot be used."""
    if isinstance(decoder, ConvDecoder) and decoder.dim != encoder.dim:
        raise UserError(
            f"decoder conv takes features of width {decoder.dim} and encoder {type(encoder).__name__} gives "
            f"{encoder.dim}; make them equal"
        )
    last = decoder.last_layer
    if last is None:
        return
    if not isinstance(last, nn.Conv2d) or last.padding_mode != "zeros":
        raise UserError(
            f"the last_layer of decoder {type(decoder).__name__} is {an(type(last).__name__)}; give a Conv2d with "
            "zero padding, or None if forward returns the image"
        )
    if last.out_channels != channels:
        raise UserError(
            f"the last_layer of decoder {type(decoder).__name__} gives {last.out_channels} channels and the images "
            f"have {channels}; give the model these channels, or the decoder that last_layer"
        )
    spread = [rate * (size - 1) for rate, size in zip(last.dilation, last.kernel_size, strict=True)]
    if last.padding == "same" and any(total % 2 for total in spread):
        raise UserError(
            f"the last_layer of decoder {type(decoder).__name__} has a kernel of even size {last.kernel_size} and "
            "padding 'same', which pads one side more than the other; give it an odd kernel, or padding in numbers"
        )


def _build_quantizer(
    given: Any, *, dim: int, codebook_size: int, groups: Mapping[str, dict[str, Any] | None]
) -> Quantizer:
    """The quantizer of a name with its group of options, or another part."""
    if isinstance(given, str) and given in QUANTIZERS:
        return build_quantizer(given, dim=dim, codebook_size=codebook_size, **_options_of(given, **groups))
    for name, options in groups.items():
        if options:
            raise UserError(f"{name} {options} is given beside the quantizer's init_args; move it into these")
    set_size = codebook_size != DEFAULT_CODEBOOK_SIZE
    if not isinstance(given, (str, Mapping)):
        built = build_quantizer(QUANTIZERS.check(given, type(given).__name__), dim=dim)
        if set_size and built.codebook_size != codebook_size:
            raise UserError(
                f"codebook_size {codebook_size} is given, and the quantizer has {built.codebook_size} codes"
            )
        return built
    spec = Spec.of(given, "quantizer")
    factory = QUANTIZERS.factory(spec.target)
    own_size = spec.init_args.get("codebook_size", codebook_size)
    if set_size and own_size != codebook_size:
        raise UserError(
            f"codebook_size {codebook_size} is given, and init_args of quantizer say {own_size}; leave one of them out"
        )
    for name in QUANTIZERS:
        if QUANTIZERS.place(name) == path_of(factory):
            size = {"codebook_size": codebook_size} if set_size or "levels" not in spec.init_args else {}
            return build_quantizer(name, **{"dim": dim, **size, **spec.init_args})
    built = build_quantizer(cast(PartSpec, given), dim=dim, codebook_size=codebook_size)
    if set_size and built.codebook_size != codebook_size:
        raise UserError(
            f"codebook_size {codebook_size} is given, and quantizer {spec.target} has {built.codebook_size} codes; "
            "leave it out"
        )
    return built


def _options_of(
    name: str,
    *,
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
