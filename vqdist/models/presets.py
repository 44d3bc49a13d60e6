"""The published configurations of tokenizers, by name: what they are built of and what is known of them.

Nothing is downloaded: a preset is the network with weights at random, to train, or to hold a published file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vqdist.parts import unknown

IMAGENET = "no licence of its own; trained on ImageNet, whose terms forbid commercial use"
OPEN_IMAGES = "no licence of its own; trained on OpenImages"


@dataclass(frozen=True)
class Preset:
    """A published configuration.

    Attributes:
        encoder, decoder, quantizer: the parts, as `VQGanVAE` takes them.
        family: of the files with its weights, see `vqdist.models.published`.
        source: the project and the file.
        numbers: published results.
        licence: of the published weights.
        image_size: side in pixels of the images that it was trained on.
        discriminator: for training; the published one.
    """

    encoder: Mapping[str, Any]
    decoder: Mapping[str, Any]
    quantizer: Mapping[str, Any]
    family: str
    source: str
    numbers: str
    licence: str
    image_size: int = 256
    discriminator: Mapping[str, Any] = field(
        default_factory=lambda: {"class_path": "patch", "init_args": {"dim": 64, "layers": 3}}
    )

    def completed(self, given: Mapping[str, Any], *, with_gan: bool) -> dict[str, Any]:
        """Return the parts of a model, those that are not given from here; without a discriminator where none is."""
        own = {"encoder": self.encoder, "decoder": self.decoder, "quantizer": self.quantizer}
        own |= {"discriminator": self.discriminator} if with_gan else {}
        wanted = {name: copy.deepcopy(dict(part)) for name, part in own.items() if given.get(name) is None}
        return {**given, **wanted}


def preset_named(name: str) -> Preset:
    """Return a preset; raise `UserError` that names the nearest if there is none."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def _networks(width: int, **arguments: Any) -> dict[str, Any]:
    """Return encoder and decoder of taming's network with features of a width."""
    own = {"class_path": "taming", "init_args": {**arguments, "embed_dim": width}}
    return {"encoder": own, "decoder": {"class_path": "taming", "init_args": arguments}}


def _part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


F4 = {"ch_mult": [1, 2, 4], "attn_resolutions": []}
F8 = {"ch_mult": [1, 2, 2, 4], "attn_resolutions": [32]}
F8_TAMING = {"ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}
F16 = {"ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}


def _taming(codes: int, width: int, z_channels: int, network: Mapping[str, Any], **facts: Any) -> Preset:
    quantizer = _part("gradient_vq", codebook_size=codes, codebook_loss="legacy")
    networks = _networks(width, **network, z_channels=z_channels)
    return Preset(**networks, quantizer=quantizer, family="taming_vqgan", **facts)


def _llamagen(network: Mapping[str, Any], **facts: Any) -> Preset:
    quantizer = _part("gradient_vq", codebook_size=16384, l2_norm=True)
    networks = _networks(8, **network, z_channels=256)
    return Preset(**networks, quantizer=quantizer, family="llamagen_vq", licence=IMAGENET, **facts)


def _ibq(codes: int, numbers: str) -> Preset:
    networks = _networks(256, **F16, z_channels=256, num_res_blocks=4)
    source = f"TencentARC/SEED-Voken, IBQ with {codes} codes"
    quantizer = _part("ibq", codebook_size=codes)
    return Preset(**networks, quantizer=quantizer, family="ibq", source=source, numbers=numbers, licence=IMAGENET)


def _var(sides: list[int], **facts: Any) -> Preset:
    quantizer = _part("multiscale_vq", codebook_size=4096, v_patch_nums=sides, learnable_codebook=True, num_phis=4)
    quantizer["init_args"] |= {"phi_rule": "ticks"}
    networks = _networks(32, **F16, ch=160, z_channels=32, quant_conv_kernel=3)
    return Preset(**networks, quantizer=quantizer, family="var_vqvae", licence=OPEN_IMAGES, **facts)


PRESETS = {
    "taming_vqgan_f16_1024": _taming(
        1024,
        256,
        256,
        F16,
        source="CompVis/taming-transformers, vqgan_imagenet_f16_1024",
        numbers="rFID 7.94 (validation), 10.54 (train)",
        licence=IMAGENET,
    ),
    "taming_vqgan_f16_16384": _taming(
        16384,
        256,
        256,
        F16,
        source="CompVis/taming-transformers, vqgan_imagenet_f16_16384",
        numbers="rFID 4.98 (validation), 7.41 (train)",
        licence=IMAGENET,
    ),
    "taming_gumbel_f8_8192": Preset(
        **_networks(256, **F8_TAMING, z_channels=256),
        quantizer=_part("gumbel", codebook_size=8192, kl_weight=1e-8),
        family="taming_gumbel",
        source="CompVis/taming-transformers, vqgan_gumbel_f8",
        numbers="rFID 1.49 (validation), 3.24 (train)",
        licence=OPEN_IMAGES,
    ),
    "ldm_vq_f4": _taming(
        8192, 3, 3, F4, source="CompVis/latent-diffusion, vq-f4", numbers="rFID 0.58", licence=OPEN_IMAGES
    ),
    "ldm_vq_f8": _taming(
        16384, 4, 4, F8, source="CompVis/latent-diffusion, vq-f8", numbers="rFID 1.14", licence=OPEN_IMAGES
    ),
    "ldm_vq_f8_n256": _taming(
        256, 4, 4, F8, source="CompVis/latent-diffusion, vq-f8-n256", numbers="rFID 1.49", licence=OPEN_IMAGES
    ),
    "ldm_vq_f16": _taming(
        16384, 8, 8, F16, source="CompVis/latent-diffusion, vq-f16", numbers="rFID 5.15", licence=OPEN_IMAGES
    ),
    "llamagen_vq8": _llamagen(
        F8, source="FoundationVision/LlamaGen, vq_ds8_c2i.pt", numbers="rFID 0.59 at 256 pixels"
    ),
    "llamagen_vq16": _llamagen(
        F16,
        source="FoundationVision/LlamaGen, vq_ds16_c2i.pt",
        numbers="rFID 2.19 at 256 pixels, 0.94 at 384, 0.70 at 512",
    ),
    "var_vqvae": _var(
        [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
        source="FoundationVision/VAR, vae_ch160v4096z32.pth",
        numbers="none published",
    ),
    "var_vqvae_512": _var(
        [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
        source="FoundationVision/VAR, vae_ch160v4096z32.pth",
        numbers="none published",
        image_size=512,
    ),
    "ibq_1024": _ibq(1024, "rFID 2.24"),
    "ibq_8192": _ibq(8192, "rFID 1.87"),
    "ibq_16384": _ibq(16384, "rFID 1.37; pre-trained on 200 M images 2.06"),
    "ibq_262144": _ibq(262144, "rFID 1.00; pre-trained on 200 M images 1.53"),
}
"""By name; `vqdist models` lists them."""
