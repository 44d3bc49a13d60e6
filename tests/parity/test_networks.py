"""MaskGIT-VQGAN, Open-MAGVIT2 and TiTok: features and images against what the projects' own code gave."""

from __future__ import annotations

import pytest
import torch
from parity_fixtures import Fixture, fixture, under
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


def titok_sizes(given: Fixture, half: str) -> dict:
    width, layers, heads = given.arguments["sizes"][half]
    model = given.arguments["vq_model"]
    return {
        "image_size": given.arguments["crop_size"],
        "patch_size": model[f"vit_{half}_patch_size"],
        "width": width,
        "layers": layers,
        "heads": heads,
        "num_latent_tokens": model["num_latent_tokens"],
    }


def pixel_options(given: Fixture) -> dict:
    config = given.arguments.get("config") or given.arguments["pixel"]
    return {name: config[name] for name in ("hidden_channels", "channel_mult", "num_res_blocks")}


@torch.no_grad()
def test_maskgit():
    given = fixture("maskgit_vqgan")
    options = pixel_options(given)
    encoder = load(MaskGITEncoder(**options, z_channels=12), under(given.weights, "encoder."))
    decoder = load(MaskGITDecoder(12, **options), with_last_layer(under(given.weights, "decoder.")))
    torch.testing.assert_close(encoder(given.given["image"]), given.found["features"], **CLOSE)
    torch.testing.assert_close(decoder.last_layer(decoder(given.found["quantized"])), given.found["recon"], **CLOSE)


@torch.no_grad()
def test_magvit2():
    given = fixture("open_magvit2")
    config = given.arguments["ddconfig"]
    options = {name: config[name] for name in ("ch", "ch_mult", "num_res_blocks")}
    encoder = load(MagvitEncoder(**options, z_channels=6), under(given.weights, "encoder."))
    decoder = load(MagvitDecoder(6, **options), with_last_layer(under(given.weights, "decoder.")))
    features = encoder((given.given["image"] + 1) / 2)
    torch.testing.assert_close(features, given.found["features"], **CLOSE)
    recon = decoder.last_layer(decoder(given.found["quantized"]))
    torch.testing.assert_close(recon * 2 - 1, given.found["recon"], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", TITOK)
def test_encoder_of_titok(name):
    given = fixture(name)
    legacy = given.arguments["vq_model"].get("is_legacy", True)
    encoder = TiTokEncoder(**titok_sizes(given, "enc"), token_size=6, legacy=legacy)
    load(encoder, {**under(given.weights, "encoder."), "latent_tokens": given.weights["latent_tokens"]})
    expected = given.found["features"].squeeze(2).mT
    torch.testing.assert_close(encoder(given.given["image"]), expected, **CLOSE)
    assert (encoder.code_shape(encoder.image_size), encoder.dim) == ((5,), 6)


@torch.no_grad()
@pytest.mark.parametrize("name", TITOK)
def test_decoder_of_titok(name):
    given = fixture(name)
    quantized, weights = given.found["quantized"].squeeze(2).mT, under(given.weights, "decoder.")
    if name == "titok_rgb":
        decoder = load(TiTokDecoder(6, **titok_sizes(given, "dec")), with_last_layer(weights))
        recon = decoder.last_layer(decoder(quantized))
        return torch.testing.assert_close(recon, given.found["decoded"], **CLOSE)
    second = name == "titok_stage2"
    pixel = {"dim": 12, **pixel_options(given)} if second else None
    decoder = TiTokProxyDecoder(6, **titok_sizes(given, "dec"), proxy_codebook_size=40, pixel=pixel)
    if second:
        weights["pixel_embedding.weight"] = given.weights["pixel_quantize.embedding.weight"]
        of_pixels = with_last_layer(under(given.weights, "pixel_decoder."))
        weights |= {f"pixel_decoder.{name}": tensor for name, tensor in of_pixels.items()}
    load(decoder, weights)
    logits = decoder.proxy(quantized)
    torch.testing.assert_close(logits, given.found["proxy_logits" if second else "decoded"], **CLOSE)
    if second:
        recon = decoder.last_layer(decoder(quantized))
        torch.testing.assert_close(recon, given.found["decoded"], **CLOSE)
    return None
