"""The published configurations of tokenizers, by name: what they are built of and what is known of them.

Nothing is downloaded: a preset is the network with weights at random, to train, or to hold a published file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vqdist.names import unknown

IMAGENET = "no licence of its own; trained on ImageNet, whose terms forbid commercial use"
OPEN_IMAGES = "no licence of its own; trained on OpenImages"
TITOK = "Apache-2.0 on the Hub, for research use by the project's tables; trained on ImageNet"


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
        discriminator: for training; the published one. None where training has none: TiTok's first stage.
    """

    encoder: Mapping[str, Any]
    decoder: Mapping[str, Any]
    quantizer: Mapping[str, Any]
    family: str
    source: str
    numbers: str
    licence: str
    image_size: int = 256
    discriminator: Mapping[str, Any] | None = field(default_factory=lambda: _part("patchgan", width=64, layers=3))

    def completed(self, given: Mapping[str, Any], *, with_gan: bool) -> dict[str, Any]:
        """Return the parts of a model, those that are not given from here; without a discriminator where none is."""
        own = {"encoder": self.encoder, "decoder": self.decoder, "quantizer": self.quantizer}
        own |= {"discriminator": self.discriminator} if with_gan and self.discriminator is not None else {}
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


def _magvit(ch_mult: list[int], bits: int, image_size: int, **facts: str) -> Preset:
    """Return an Open-MAGVIT2; that of 14 bits was trained against another discriminator than the others."""
    network = {"ch_mult": ch_mult, "num_res_blocks": 4}
    return Preset(
        encoder=_part("magvit2", **network, z_channels=bits),
        decoder=_part("magvit2", **network),
        quantizer=_part("magvit2_lfq", codebook_size=2**bits),
        family="open_magvit2",
        licence=IMAGENET,
        image_size=image_size,
        discriminator=_part("patchgan") if bits == 18 else _part("blur", pool=None, zero_mean=True),
        **facts,
    )


TITOK_SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
MASKGIT_PIXELS = {"dim": 256, "hidden_channels": 128, "channel_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2}


def _titok(sizes: tuple[str, str], codes: int, numbers: str, *, stage: int | None = None, name: str) -> Preset:
    """Return a TiTok; with a stage it is one of the first models, which decode by the codes of a MaskGIT-VQGAN."""
    both = {"image_size": 256, "patch_size": 16, "num_latent_tokens": codes}
    halves = [dict(zip(("width", "layers", "heads"), TITOK_SIZES[size])) for size in sizes]
    first = stage is not None
    quantizer = _part("gradient_vq", codebook_size=4096 if first else 8192, l2_norm=first)
    decoder: dict[str, Any] = {**both, **halves[1]}
    if first:
        decoder |= {"proxy_codebook_size": 1024, "pixel": MASKGIT_PIXELS if stage == 2 else None}
    return Preset(
        encoder=_part("titok", **both, **halves[0], token_size=12 if first else 64, legacy=first),
        decoder=_part("titok_proxy" if first else "titok", **decoder),
        quantizer=quantizer,
        family="titok",
        source=f"bytedance/1d-tokenizer, {name}",
        numbers=numbers,
        licence=TITOK,
        discriminator=None if stage == 1 else _part("blur"),
    )


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
        discriminator=_part("patchgan", width=64, layers=2),
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
    "open_magvit2_128_262144": _magvit(
        [1, 2, 2, 4],
        18,
        128,
        source="TencentARC/SEED-Voken, Open-MAGVIT2 imagenet_128_L",
        numbers="rFID 1.18 at 128 pixels, 0.34 at 256; PSNR 25.08",
    ),
    "open_magvit2_256_262144": _magvit(
        [1, 1, 2, 2, 4],
        18,
        256,
        source="TencentARC/SEED-Voken, Open-MAGVIT2 imagenet_256_L",
        numbers="rFID 1.17; PSNR 21.90",
    ),
    "open_magvit2_pretrain_16384": _magvit(
        [1, 1, 2, 2, 4],
        14,
        256,
        source="TencentARC/SEED-Voken, Open-MAGVIT2 pretrain256_16384",
        numbers="rFID 2.55; PSNR 22.21",
    ),
    "open_magvit2_pretrain_262144": _magvit(
        [1, 1, 2, 2, 4],
        18,
        256,
        source="TencentARC/SEED-Voken, Open-MAGVIT2 pretrain256_262144",
        numbers="rFID 1.67; PSNR 22.70",
    ),
    "maskgit_vqgan_f16_1024": Preset(
        encoder=_part("maskgit", z_channels=256),
        decoder=_part("maskgit"),
        quantizer=_part("gradient_vq", codebook_size=1024, codebook_loss="legacy"),
        family="maskgit_vqgan",
        source="bytedance/1d-tokenizer, maskgit-vqgan-imagenet-f16-256.bin",
        numbers="rFID 2.28",
        licence=IMAGENET,
    ),
    "titok_l32": _titok(("large", "large"), 32, "rFID 2.21", stage=2, name="tokenizer_titok_l32.bin"),
    "titok_l32_stage1": _titok(("large", "large"), 32, "none published", stage=1, name="TiTok-L-32, first stage"),
    "titok_b64": _titok(("base", "base"), 64, "rFID 1.70", stage=2, name="tokenizer_titok_b64.bin"),
    "titok_b64_stage1": _titok(("base", "base"), 64, "none published", stage=1, name="TiTok-B-64, first stage"),
    "titok_s128": _titok(("small", "small"), 128, "rFID 1.71", stage=2, name="tokenizer_titok_s128.bin"),
    "titok_bl64_vq8k": _titok(("base", "large"), 64, "rFID 2.06", name="TiTok-BL-64, 8192 codes"),
    "titok_bl128_vq8k": _titok(("base", "large"), 128, "rFID 1.49", name="TiTok-BL-128, 8192 codes"),
    "titok_sl256_vq8k": _titok(("small", "large"), 256, "rFID 1.03", name="TiTok-SL-256, 8192 codes"),
    "muse_vqgan_dim256_65536": Preset(
        encoder=_part("conv", width=256, layers=4),
        decoder=_part("conv", width=256, layers=4),
        quantizer=_part("lfq", codebook_size=65536),
        family="muse_vqgan",
        source="lucidrains/muse-maskgit-pytorch, VQGanVAE(dim=256)",
        numbers="none published",
        licence="no weights are published",
        discriminator=_part("patch", dim=256, layers=4),
    ),
}
"""By name; `vqdist models` lists them."""
