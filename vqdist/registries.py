"""The kinds of parts, and where vqdist's own of each kind are. Imports none of them: names are known without torch.

A part of vqdist has its line here, in the order in which messages and --help list them. Users register theirs with
`@QUANTIZERS.add("bsq")`, or give the import path.
"""

from __future__ import annotations

from typing import Any

from vqdist.parts import Registry

# an encoder may ask for `channels`, a decoder for `channels` and `dim`, a discriminator for `channels`
ENCODERS: Registry[Any] = Registry(
    "encoder",
    "vqdist.models.networks.base.Encoder",
    contract="encoder (vqdist.models.networks.Encoder)",
    own={
        "conv": "vqdist.models.networks.conv.ConvEncoder",
        "taming": "vqdist.models.networks.taming.TamingEncoder",
        "magvit2": "vqdist.models.networks.magvit2.MagvitEncoder",
        "maskgit": "vqdist.models.networks.maskgit.MaskGITEncoder",
        "titok": "vqdist.models.networks.vit.TiTokEncoder",
    },
)
DECODERS: Registry[Any] = Registry(
    "decoder",
    "vqdist.models.networks.base.Decoder",
    contract="decoder (vqdist.models.networks.Decoder)",
    own={
        "conv": "vqdist.models.networks.conv.ConvDecoder",
        "taming": "vqdist.models.networks.taming.TamingDecoder",
        "none": "vqdist.models.networks.taming.NoDecoder",
        "magvit2": "vqdist.models.networks.magvit2.MagvitDecoder",
        "maskgit": "vqdist.models.networks.maskgit.MaskGITDecoder",
        "titok": "vqdist.models.networks.vit.TiTokDecoder",
        "titok_proxy": "vqdist.models.networks.vit.TiTokProxyDecoder",
    },
)
DISCRIMINATORS: Registry[Any] = Registry(
    "discriminator",
    "vqdist.models.networks.base.Discriminator",
    contract="discriminator (vqdist.models.networks.Discriminator)",
    own={
        "patch": "vqdist.models.networks.patch.PatchDiscriminator",
        "patchgan": "vqdist.models.networks.patchgan.PatchGAN",
        "blur": "vqdist.models.networks.blur.BlurDiscriminator",
    },
)
QUANTIZERS: Registry[Any] = Registry(
    "quantizer",
    "vqdist.models.quantizers.base.Quantizer",
    own={
        "vq": "vqdist.models.quantizers.vq.VQQuantizer",
        "lfq": "vqdist.models.quantizers.lfq.LFQQuantizer",
        "fsq": "vqdist.models.quantizers.fsq.FSQQuantizer",
        "simvq": "vqdist.models.quantizers.simvq.SimVQQuantizer",
        "residual_vq": "vqdist.models.quantizers.residual_vq.ResidualVQQuantizer",
        "multiscale_vq": "vqdist.models.quantizers.multiscale_vq.MultiScaleQuantizer",
        "gradient_vq": "vqdist.models.quantizers.gradient_vq.GradientVQ",
        "ibq": "vqdist.models.quantizers.ibq.IBQ",
        "gumbel": "vqdist.models.quantizers.gumbel.Gumbel",
        "magvit2_lfq": "vqdist.models.quantizers.magvit2_lfq.MagvitLFQ",
        "cvq": "vqdist.models.quantizers.cvq.CVQ",
    },
)
TERMS: Registry[Any] = Registry(
    "term",
    contract="term (vqdist.Term): a callable (recon, image, out) -> loss with `name` and `weight`",
    own={
        "reconstruction": "vqdist.objectives.reconstruction.Reconstruction",
        "perceptual": "vqdist.objectives.perceptual.Perceptual",
        "lpips": "vqdist.objectives.lpips.LPIPS",
        "convnext_s": "vqdist.objectives.convnext.ConvNeXtLogits",
        "proxy_codes": "vqdist.models.proxy.ProxyCodes",
    },
)
OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    "torch.optim.optimizer.Optimizer",
    own={
        "adam": "torch.optim.adam.Adam",
        "adamw": "torch.optim.adamw.AdamW",
        "sgd": "torch.optim.sgd.SGD",
        "muon": "vqdist.trainers.muon.muon",
        "schedule_free": "vqdist.trainers.library_optimizers.schedule_free",
        "adamw_8bit": "vqdist.trainers.library_optimizers.adamw_8bit",
    },
)
# a factory gets the whole of `name:rest` as `spec`, where it has that parameter, and `exts` likewise
SOURCES: Registry[Any] = Registry(
    "data source",
    "vqdist.data.sources.base.Source",
    own={
        "digits": "vqdist.data.sources.digits.DigitsSource",
        "synthetic": "vqdist.data.sources.synthetic.SyntheticSource",
        "torchvision": "vqdist.data.sources.torchvision_datasets.TorchvisionSource",
        "wds": "vqdist.data.sources.webdataset_shards.WebDatasetSource",
        "hf": "vqdist.data.sources.hugging_face.HuggingFaceSource",
    },
)
SINKS: Registry[Any] = Registry(
    "tracker",
    "vqdist.tracking.base.Sink",
    own={
        "tensorboard": "vqdist.tracking.tensorboard.TensorBoardSink",
        "wandb": "vqdist.tracking.wandb.WandbSink",
    },
)
# the general families first: of those that recognise a file, the last one reads it
FAMILIES: Registry[Any] = Registry(
    "family",
    "vqdist.models.published.base.Family",
    own={
        "dalle_pytorch": "vqdist.models.published.dalle_pytorch.DallePytorch",
        "taming_vqgan": "vqdist.models.published.taming.Taming",
        "taming_gumbel": "vqdist.models.published.taming.TamingGumbel",
        "llamagen_vq": "vqdist.models.published.llamagen.LlamaGen",
        "var_vqvae": "vqdist.models.published.var.VARTokenizer",
        "ibq": "vqdist.models.published.ibq.IBQFiles",
        "diffusers_vqmodel": "vqdist.models.published.hubs.Diffusers",
        "chameleon": "vqdist.models.published.hubs.Chameleon",
        "maskgit_vqgan": "vqdist.models.published.maskgit.MaskGITFiles",
        "open_magvit2": "vqdist.models.published.magvit2.OpenMagvit2",
        "titok": "vqdist.models.published.titok.TiTokFiles",
        "muse_vqgan": "vqdist.models.published.muse.MuseFiles",
        "janus": "vqdist.models.published.hubs.Janus",
    },
)
