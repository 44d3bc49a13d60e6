"""MaskGIT-VQGAN, Open-MAGVIT2 and TiTok: features and images against what the projects' own code gave."""

from __future__ import annotations

import pytest
import torch
from fixtures import arguments, tensors, weights
from torch import Tensor, nn

from vqdist.models.networks.magvit2 import MagvitDecoder, MagvitEncoder
from vqdist.models.networks.maskgit import MaskGITDecoder, MaskGITEncoder
from vqdist.models.networks.vit import TiTokDecoder, TiTokEncoder, TiTokProxyDecoder

CLOSE = {"atol": 1e-5, "rtol": 0}
TITOK = ["titok_stage1", "titok_stage2", "titok_rgb"]


def with_last_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("conv_out", "last_layer"): tensor for name, tensor in tensors.items()}


def load(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(tensors)
    return module.eval()


def titok_sizes(given: dict, half: str) -> dict:
    width, layers, heads = given["sizes"][half]
    model = given["vq_model"]
    return {
        "image_size": given["crop_size"],
        "patch_size": model[f"vit_{half}_patch_size"],
        "width": width,
        "layers": layers,
        "heads": heads,
        "num_latent_tokens": model["num_latent_tokens"],
    }


def pixel_options(given: dict) -> dict:
    config = given.get("config") or given["pixel"]
    return {name: config[name] for name in ("hidden_channels", "channel_mult", "num_res_blocks")}


@torch.no_grad()
def test_maskgit():
    name = "maskgit_vqgan"
    given, found = arguments(name), tensors(name)
    options = pixel_options(given)
    encoder = load(MaskGITEncoder(**options, z_channels=12), weights(name, "encoder."))
    decoder = load(MaskGITDecoder(12, **options), with_last_layer(weights(name, "decoder.")))
    torch.testing.assert_close(encoder(found["in.image"]), found["out.features"], **CLOSE)
    torch.testing.assert_close(decoder.last_layer(decoder(found["out.quantized"])), found["out.recon"], **CLOSE)


@torch.no_grad()
def test_magvit2():
    name = "open_magvit2"
    given, found = arguments(name), tensors(name)
    config = given["ddconfig"]
    options = {name: config[name] for name in ("ch", "ch_mult", "num_res_blocks")}
    encoder = load(MagvitEncoder(**options, z_channels=6), weights(name, "encoder."))
    decoder = load(MagvitDecoder(6, **options), with_last_layer(weights(name, "decoder.")))
    features = encoder((found["in.image"] + 1) / 2)
    torch.testing.assert_close(features, found["out.features"], **CLOSE)
    recon = decoder.last_layer(decoder(found["out.quantized"]))
    torch.testing.assert_close(recon * 2 - 1, found["out.recon"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", TITOK)
def test_encoder_of_titok(name):
    given, found = arguments(name), tensors(name)
    legacy = given["vq_model"].get("is_legacy", True)
    encoder = TiTokEncoder(**titok_sizes(given, "enc"), token_size=6, legacy=legacy)
    load(encoder, {**weights(name, "encoder."), "latent_tokens": weights(name)["latent_tokens"]})
    expected = found["out.features"].squeeze(2).mT
    torch.testing.assert_close(encoder(found["in.image"]), expected, **CLOSE)
    assert (encoder.code_shape(encoder.image_size), encoder.dim) == ((5,), 6)


@torch.no_grad()
@pytest.mark.parametrize("name", TITOK)
def test_decoder_of_titok(name):
    given, found = arguments(name), tensors(name)
    quantized, state = found["out.quantized"].squeeze(2).mT, weights(name, "decoder.")
    if name == "titok_rgb":
        decoder = load(TiTokDecoder(6, **titok_sizes(given, "dec")), with_last_layer(state))
        recon = decoder.last_layer(decoder(quantized))
        return torch.testing.assert_close(recon, found["out.decoded"], **CLOSE)
    second = name == "titok_stage2"
    pixel = {"dim": 12, **pixel_options(given)} if second else None
    decoder = TiTokProxyDecoder(6, **titok_sizes(given, "dec"), proxy_codebook_size=40, pixel=pixel)
    if second:
        state["pixel_embedding.weight"] = weights(name)["pixel_quantize.embedding.weight"]
        of_pixels = with_last_layer(weights(name, "pixel_decoder."))
        state |= {f"pixel_decoder.{key}": tensor for key, tensor in of_pixels.items()}
    load(decoder, state)
    logits = decoder.proxy(quantized)
    torch.testing.assert_close(logits, found["out.proxy_logits" if second else "out.decoded"], **CLOSE)
    if second:
        recon = decoder.last_layer(decoder(quantized))
        torch.testing.assert_close(recon, found["out.decoded"], **CLOSE)
    return None
