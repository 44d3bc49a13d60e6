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
from vqdist.models.autoencoder import VQAutoencoder
from vqdist.models.conv_options import ConvOptions
from vqdist.models.networks.base import (
    gives_rows,
    logits_of,
    own_image_size,
    require_module,
    whole_number,
)
from vqdist.models.networks.conv import ConvEncoder
from vqdist.models.presets import preset_named
from vqdist.models.pretrained import PretrainedModel
from vqdist.models.quantizers import Quantizer
from vqdist.models.tokenizer import check_images, check_pixels, check_scales
from vqdist.models.vqgan_checks import check_all_read, check_stage, check_terms, needs_of, record_of_terms
from vqdist.models.vqgan_losses import critic_loss, generator_loss
from vqdist.models.vqgan_parts import (
    build_autoencoder,
    class_of,
    quantizer_options,
    scales_of,
    with_phi_rule,
)
from vqdist.objectives import Objective, Perceptual, PerceptualLoss, Reconstruction
from vqdist.objectives.adversarial import DISCR_LOSSES, GEN_LOSSES, names_of_losses
from vqdist.objectives.named import check_image_size as check_perceptual_size
from vqdist.objectives.named import perceptual_terms
from vqdist.parts import Registry, Spec, UnavailablePart, recorded, unknown
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
            they are not given. TiTok's first stage has no discriminator; there `use_gan` needs one in `discriminator`.
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
        if not isinstance(perceptual, str | Mapping):  # a dictionary: an object that an export recorded
            raise UserError(
                f"perceptual is {an(type(perceptual).__name__)}, and a name is expected; give a module that makes "
                "features as vgg, or a loss of your own in terms"
            )
        with_gan = use_gan and use_vgg_and_gan
        given: dict[str, Any] = {"encoder": encoder, "quantizer": quantizer, "decoder": decoder}
        given |= {"discriminator": discriminator, "terms": terms}
        published = None if preset is None else preset_named(preset)
        alone = published is not None and published.discriminator is None and discriminator is None
        if alone and with_gan and "use_gan" in self.said:
            raise UserError(
                f"use_gan is true, and preset {preset} has no discriminator: it was trained without; give one "
                "(discriminator patchgan), or leave use_gan out"
            )
        with_gan = with_gan and not alone
        if published is not None:
            given = published.completed(given, with_gan=with_gan and dim is None)
        conv = ConvOptions(
            dim=dim,
            layers=layers,
            encdec_layer_mults=encdec_layer_mults,
            encdec_num_resnet_blocks=encdec_num_resnet_blocks,
            encdec_resnet_groups=encdec_resnet_groups,
            encdec_first_conv_kernel_size=encdec_first_conv_kernel_size,
            discr_layers=discr_layers,
        )
        conv.check(given, with_gan=with_gan, defaults=_defaults())
        self.channels = channels
        self.l2_recon_loss = l2_recon_loss
        self.use_hinge_loss = use_hinge_loss
        if not with_gan and (discr_loss or gen_loss):
            raise UserError("discr_loss or gen_loss is given but there is no discriminator; leave it out")
        self._discr_loss, self._gen_loss = names_of_losses(discr_loss, gen_loss, use_hinge_loss)
        self.perceptual = perceptual if use_vgg_and_gan else "none"
        vq_kwargs = {**(vq_kwargs or {}), **_vq_prefixed(kwargs)}
        self.autoencoder = build_autoencoder(
            {**given, "quantizer": given["quantizer"] or ("lfq" if lookup_free_quantization else "vq")},
            conv,
            channels=channels,
            codebook_size=codebook_size,
            size_is_set=codebook_size != DEFAULT_CODEBOOK_SIZE,
            options={"vq_kwargs": vq_kwargs, "lfq_kwargs": lfq_kwargs, "quantizer_kwargs": quantizer_kwargs},
        )
        self.image_size = own_image_size(self.autoencoder.encoder)
        if published is not None and self.image_size is None:
            self.image_size = published.image_size
        self._missing: dict[str, UnavailablePart] = {}  # what only training needs, and could not be built
        self.discriminator = self._build_discriminator(given["discriminator"], conv) if with_gan else None
        unavailable = check_terms(terms, l2_recon_loss=l2_recon_loss, perceptual=self.perceptual, vgg=vgg)
        if unavailable is not None:
            self._missing["terms"] = unavailable
        # in lists, so that nothing of it is ever part of this module
        self._terms: list[Any] = list(terms or [])
        self._vgg = [vgg] if vgg is not None and use_vgg_and_gan else []
        self._objective: list[Objective] = []
        self._record_parts(given)
        self._hub_mixin_config.pop("preset", None)  # the parts that it stands for are recorded
        if alone:
            self._hub_mixin_config["use_gan"] = False
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

    def __repr__(self) -> str:
        """Return one line; `print(vae.network)` shows the layers."""
        network, critic = self.autoencoder, self.discriminator
        against = [] if critic is None else [f"discriminator {type(critic).__name__}"]
        parts = [type(network.encoder).__name__, repr(network.quantizer), type(network.decoder).__name__]
        return self.in_brief(*parts, *against)

    @property
    def network(self) -> VQAutoencoder:
        """The network that reconstructs images: all that is saved."""
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
        """The device of the weights."""
        return next(self.autoencoder.parameters()).device

    def code_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        """Return the shape of the codes of an image of this size: (h', w'), or (n,) of a row of tokens."""
        return self.autoencoder.code_shape(image_size)

    def check_image_size(self, size: ImageSize) -> None:
        """Raise `UserError` if images of this size cannot be encoded."""
        shape = self.code_shape(size)
        if self.quantizer.scales is not None:
            check_scales(size, shape, self.quantizer.scales, f" (2 ** {self.layers} layers)" if self.layers else "")

    def check_training_size(self, size: int) -> None:
        """Raise `UserError` for a size that cannot be encoded or trained on: the discriminator may need more."""
        for name, part in self._replaced().items():
            self.part_options[name].check(part, type(part).__name__)
        self.check_image_size(size)
        check_stage(self, self._terms)
        critic = self.discriminator
        smallest = 0 if critic is None else whole_number(critic, "discriminator", "min_image_size", least=0)
        if size < smallest:
            raise UserError(f"image_size {size} is too small for {needs_of(critic, size, smallest)}")
        if not self._terms and not self._vgg and isinstance(self.perceptual, str):
            check_perceptual_size(self.perceptual, size)  # before anything is downloaded
        self.objective().check_image_size(size)
        for term in self.objective():
            if hasattr(term, "check_network"):
                term.check_network(self.autoencoder, size)

    def record_terms(self) -> None:
        """Let config.json also say what the terms read, as the fingerprint of a tokenizer whose codes are learned."""
        written = self._hub_mixin_config.get("terms")
        if written:
            self._hub_mixin_config["terms"] = record_of_terms(written, self.objective())

    def check_all_read(self) -> None:
        """Raise `UserError` for arguments that were given and that training with this model would not read."""
        without = self.discriminator is None and "discriminator" not in self._missing
        check_all_read(self.configuration(), _defaults(), without_critic=without, terms=self._terms)

    def get_encoded_fmap_size(self, image_size: int) -> int:
        """Return the codes along one side of an image with this side (in pixels)."""
        return self.code_shape(image_size)[0]

    def objective(self) -> Objective:
        """Return the terms on this model's device; made on first use, since the perceptual one may download weights.

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
        """Return the perceptual network on this model's device, made on first use; None if it is off."""
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
        """Return the reconstruction, or one player's loss, for a training loop of one's own on one process.

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
        if out.recon is None and not return_loss:
            self.autoencoder.decoder.from_proxy(out.proxy)  # says that there are no images
        if not return_loss and not return_discr_loss:
            return out.recon
        loss = (
            generator_loss(self, img, out, step) if return_loss else critic_loss(self, img, out, add_gradient_penalty)
        )
        return (loss, out.recon) if return_recons else loss

    def reconstruction_loss(self, recon: Tensor, image: Tensor) -> Tensor:
        """Return L1, or L2 with `l2_recon_loss`; 0-d."""
        return losses.reconstruction_loss(recon, image, "l2" if self.l2_recon_loss else "l1")

    def adversarial_loss(self, fake_logits: Tensor | list[Tensor]) -> Tensor:
        """Return the generator's loss by the discriminator's logits for reconstructions; 0-d."""
        return losses.over_outputs(GEN_LOSSES[self._gen_loss], logits_of(fake_logits))

    def discriminator_loss(self, real_logits: Tensor | list[Tensor], fake_logits: Tensor | list[Tensor]) -> Tensor:
        """Return the discriminator's loss, without the gradient penalty; 0-d."""
        return losses.over_outputs(DISCR_LOSSES[self._discr_loss], logits_of(real_logits), logits_of(fake_logits))

    def _check_image(self, image: Tensor) -> None:
        if self.layers is not None:
            return check_images(image, self.channels, self.layers, "layers")
        if image.ndim != 4 or image.shape[1] != self.channels:
            raise UserError(
                f"images of shape {tuple(image.shape)} were given; (batch, {self.channels}, height, width) is expected"
            )
        check_pixels(image)

    def _build_discriminator(self, given: Any, conv: ConvOptions) -> nn.Module | None:
        if given is None:
            return conv.discriminator(self.channels)
        try:
            return require_module(DISCRIMINATORS.build(given, channels=self.channels), "discriminator")
        except UnavailablePart as error:  # images are coded and decoded without it
            self._missing["discriminator"] = error
            return None

    def _default_terms(self) -> list[Any]:
        """Return pixels and the perceptual loss; where that is muse's, the adaptive weight compares with it alone."""
        kind: Literal["l1", "l2"] = "l2" if self.l2_recon_loss else "l1"
        if isinstance(self.perceptual, Mapping) and not self._vgg:  # of a model that was given a network as `vgg`
            Spec.of(self.perceptual, "vgg")  # says that it must be given again
        features = self._vgg[0] if self._vgg else self.perceptual
        return [Reconstruction(kind), *perceptual_terms(features)]

    def _record_parts(self, given: Mapping[str, Any]) -> None:
        """Let config.json say the true parts, also of those that were given as objects."""
        for name, part in given.items():
            if part is not None:
                self._hub_mixin_config[name] = recorded(part)
        self._built = {name: class_of(part) for name, part in self._parts().items()}

    def _parts(self) -> dict[str, nn.Module]:
        network = self.autoencoder
        parts = {"encoder": network.encoder, "quantizer": network.quantizer, "decoder": network.decoder}
        return parts if self.discriminator is None else {**parts, "discriminator": self.discriminator}

    def _replaced(self) -> dict[str, nn.Module]:
        """Return the parts that are of another class than those that the model was built with."""
        return {name: part for name, part in self._parts().items() if class_of(part) is not self._built.get(name)}

    def configuration(self) -> dict[str, Any]:
        """Return what config.json holds; of a part that was replaced after the model was built, what it is now."""
        config = {**super().configuration(), **{name: recorded(part) for name, part in self._replaced().items()}}
        scales = scales_of(self.quantizer)
        if scales is not None and self.quantizer.traits:
            config = with_phi_rule(config, scales.phi_rule)
        return config

    def follow_before(self, written: Mapping[str, Any]) -> None:
        scales = scales_of(self.quantizer)
        if scales is not None and "phi_rule" not in quantizer_options(written):
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


class _OnlyAutoencoder(nn.Module):
    """Gives the saved tensors their names: `autoencoder.` and nothing else."""

    def __init__(self, autoencoder: VQAutoencoder):
        super().__init__()
        self.autoencoder = autoencoder


def _defaults() -> dict[str, Any]:
    """Return the defaults of the constructor's arguments, by name."""
    return {name: parameter.default for name, parameter in inspect.signature(VQGanVAE.__init__).parameters.items()}


def _vq_prefixed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `{"decay": 0.9}` of `vq_decay=0.9`; any other keyword is an error that names the nearest."""
    for key in kwargs:
        if not key.startswith("vq_"):
            raise unknown("argument", key, _defaults(), of="VQGanVAE")
    return {key.removeprefix("vq_"): value for key, value in kwargs.items()}
