"""Files of Open-MAGVIT2, MaskGIT-VQGAN, TiTok and muse: read with the projects' numbers, written as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures import FOLDER, arguments, gradient_norms, in_unit_range, largest, tensors, values, weights
from safetensors.torch import save_file
from torch import Tensor

from vqdist import Tokenizer, UserError, VQGanVAE
from vqdist.cli import main
from vqdist.models.presets import PRESETS
from vqdist.models.published import family_named, published_names, read_published, write_published

NAMES = ["maskgit_vqgan", "open_magvit2", "titok_stage1", "titok_stage2", "titok_rgb", "muse_vqgan"]
every_name = pytest.mark.parametrize("name", NAMES)
PUBLISHED = sorted(path.stem for path in (FOLDER / "published").glob("*.json"))
OURS = ("maskgit", "open_magvit2", "titok", "muse")
SIDE_LOADS = ("loss.", "discr.", "vgg")


def file_of(name: str) -> Path:
    return FOLDER / name / ("vae.0.pt" if name == "muse_vqgan" else "weights.safetensors")


def model_of(name: str) -> VQGanVAE:
    return read_published(file_of(name), peer_config=arguments(name))


def image_of(name: str) -> Tensor:
    image = tensors(name)["in.image"]
    return in_unit_range(image) if name == "open_magvit2" else image


def rows(features: Tensor, name: str) -> Tensor:
    """Return their features (b, d, 1, n) of a row of tokens as ours, (b, n, d)."""
    return features.squeeze(2).mT if name.startswith("titok") else features


def held(name: str) -> dict[str, Tensor]:
    """Return the tensors of the tokenizer in a file."""
    found = weights(name) if name != "muse_vqgan" else torch.load(file_of(name), weights_only=True)
    return {key: tensor for key, tensor in found.items() if not key.startswith(SIDE_LOADS)}


@torch.no_grad()
@every_name
def test_features_codes_vectors_and_images(name):
    model, found = model_of(name), tensors(name)
    features = model.network.features(image_of(name))
    quantized, indices, _ = model.network.quantize(features)
    assert largest(features, rows(found["out.features"], name)) < 1e-5
    assert torch.equal(indices.flatten(), found["out.indices"].long().flatten())
    expected = found.get("out.quantized", found.get("out.quantized_eval"))
    assert largest(quantized, rows(expected, name)) < 1e-5
    if name == "titok_stage1":
        assert largest(model.network.decoder.proxy(quantized), found["out.decoded"]) < 1e-5
        with pytest.raises(UserError, match="first stage gives codes of its proxy tokenizer and no images"):
            model.decode_from_ids(indices)
        return
    recon = model.decode_from_ids(indices)
    recon = recon * 2 - 1 if name == "open_magvit2" else recon
    theirs = next(found[key] for key in ("out.recon", "out.recon_eval", "out.decoded") if key in found)
    assert largest(recon, theirs) < 1e-5


@every_name
def test_a_file_that_is_written_holds_what_was_read(name, tmp_path):
    write_published(model_of(name), name, tmp_path / "file.pt")
    written = torch.load(tmp_path / "file.pt", weights_only=True)
    written, expected = written.get("state_dict", written), held(name)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], tensor.to(written[key].dtype)) for key, tensor in expected.items())


def test_an_export_of_them_makes_the_same_codes(tmp_path):
    for name in ("open_magvit2", "titok_stage2", "titok_rgb"):
        model = model_of(name)
        model.save_pretrained(tmp_path / name)
        again = Tokenizer.from_pretrained(tmp_path / name, image_of(name).shape[-2:])
        expected = tensors(name)["out.indices"].long().flatten(1)
        assert torch.equal(again.encode(image_of(name)), expected)


def test_losses_and_gradients_of_maskgit():
    model, image, expected = model_of("maskgit_vqgan").train(), image_of("maskgit_vqgan"), values("maskgit_vqgan")
    out = model.network(image)
    loss = F.mse_loss(out.recon, image) + out.aux_loss
    check_gradients(model, loss, expected["l2_plus_codebook_loss"], expected["grad_norms"], "maskgit_vqgan")


def test_losses_and_gradients_of_titok():
    model, image, expected = model_of("titok_rgb").train(), image_of("titok_rgb"), values("titok_rgb")
    out = model.network(image)
    loss = F.mse_loss(out.recon, image) + out.aux_loss
    check_gradients(model, loss, expected["l2_plus_quantizer"], expected["grad_norms"], "titok")


def test_losses_and_gradients_of_the_first_stage():
    model, found, expected = model_of("titok_stage1").train(), tensors("titok_stage1"), values("titok_stage1")
    quantized, _, aux_loss = model.network.quantize(model.network.features(found["in.image"]))
    logits = model.network.decoder.proxy(quantized).flatten(2)
    loss = F.cross_entropy(logits, found["in.proxy_codes"].long()) + aux_loss
    check_gradients(model, loss, expected["stage1_loss"]["total_loss"], expected["grad_norms"], "titok")


def test_losses_and_gradients_of_the_second_stage():
    model, image, expected = model_of("titok_stage2"), image_of("titok_stage2"), values("titok_stage2")
    model.network.encoder.requires_grad_(False)
    model.network.quantizer.requires_grad_(False)
    out = model.network(image)
    check_gradients(model, F.mse_loss(out.recon, image), expected["l2"], expected["grad_norms"], "titok")


def check_gradients(model: VQGanVAE, loss: Tensor, value: float, norms: dict, family: str) -> None:
    """Compare a loss and the norms of its gradients, under the project's names."""
    assert loss.item() == pytest.approx(value, rel=1e-5)
    loss.backward()
    ours = gradient_norms(model.network)
    named = {name: torch.full((1,), norm) for name, norm in ours.items()}
    found = {name: norm.item() for name, norm in family_named(family).theirs(named).items()}
    expected = {name: norm for name, norm in norms.items() if norm is not None}
    assert found.keys() >= {name for name, norm in expected.items() if norm > 1e-6}
    for name, norm in expected.items():
        assert found.get(name, 0.0) == pytest.approx(norm, rel=1e-3, abs=1e-5), name


# --------------------------------------------------------------------------------------------- layouts of files


def test_averages_of_open_magvit2_are_taken_as_published(tmp_path):
    live = weights("open_magvit2")
    network = {name: tensor for name, tensor in live.items() if not name.startswith("loss.")}
    averages = {f"model_ema.{name.replace('.', '')}": tensor / 2 for name, tensor in network.items()}
    counts = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    torch.save({"state_dict": {**live, **averages, **counts}, "epoch": 3, "callbacks": {}}, tmp_path / "last.ckpt")
    model = read_published(tmp_path / "last.ckpt")
    found = family_named("open_magvit2").theirs(model.network.state_dict())
    assert found.keys() == network.keys()
    assert all(torch.equal(found[name], tensor / 2) for name, tensor in network.items())
    assert model.quantizer.codebook_size == 64 and model.network.encoder.stride == 2


def test_options_of_open_magvit2_come_from_its_configuration(tmp_path):
    losses = {"class_path": "x.Loss", "init_args": {"codebook_weight": 0.2, "commit_weight": 0.5}}
    options = {"ddconfig": {"resolution": 128}, "lossconfig": losses, "sample_minimization_weight": 2.0}
    config = {"model": {"init_args": {**options, "token_factorization": True, "factorized_bits": [2, 4]}}}
    model = read_published(file_of("open_magvit2"), peer_config=config)
    quantizer = model.quantizer
    assert (quantizer.entropy_weight, quantizer.commitment_weight) == (0.2, 0.5)
    assert (quantizer.sample_minimization_weight, quantizer.num_levels, model.image_size) == (2.0, 2, 128)


@pytest.mark.parametrize("kind", ["bare", "average", "trainer"])
def test_all_files_of_muse(kind, tmp_path):
    folder, path = FOLDER / "muse_vqgan", tmp_path / "vae.pt"
    if kind == "trainer":
        inner = torch.load(folder / "vae.0.pt", weights_only=True)
        torch.save({"model": inner, "optim": {"state": {}}, "discr_optim": {}}, path)
    else:
        path = folder / ("vae.0.pt" if kind == "bare" else "vae.0.ema.pt")
    model, found = read_published(path), tensors("muse_vqgan")
    share = 0.5 if kind == "average" else 1.0  # the fixture's averages are half the weights
    first = torch.load(folder / "vae.0.pt", weights_only=True)["enc_dec.encoders.0.weight"]
    assert torch.equal(model.network.encoder[0].weight, first * share)
    if kind != "average":
        _, codes, _ = model.encode(found["in.image"])
        assert torch.equal(codes, found["out.indices"].long())


def test_blocks_of_muse_may_stand_after_any_layer(tmp_path):
    torch.manual_seed(3)
    options = {"dim": 16, "layers": 3, "encdec_num_resnet_blocks": [0, 2, 1], "encdec_layer_mults": [1, 2, 2]}
    model = VQGanVAE(**options, codebook_size=64, discr_layers=2, perceptual="none").eval()
    write_published(model, "muse", tmp_path / "vae.pt")
    written = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert {
        "enc_dec.encoders.3.net.0.weight",
        "enc_dec.decoders.0.net.0.weight",
        "discr.layers.1.1.bias",
    } <= written.keys()
    expected = torch.load(FOLDER / "muse_vqgan" / "vae.0.pt", weights_only=True)
    assert {key for key in written if key.startswith("discr")} == {key for key in expected if key.startswith("discr")}
    again, image = read_published(tmp_path / "vae.pt"), torch.rand(1, 3, 16, 24)
    assert torch.equal(again(image), model(image))


def test_a_folder_of_titok_from_the_hub_says_what_shapes_do_not(tmp_path):
    given = arguments("titok_rgb")
    config = {"model": {"vq_model": {**given["vq_model"], "sizes": given["sizes"]}}, "dataset": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(held("titok_rgb"), tmp_path / "model.safetensors")
    codes = Tokenizer(read_published(tmp_path)).encode(image_of("titok_rgb"))
    assert torch.equal(codes, tensors("titok_rgb")["out.indices"].long().flatten(1))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="heads of a transformer of width 32 cannot be told .* vit_enc_model_size"):
        read_published(tmp_path)


def test_heads_of_titok_are_told_by_published_widths_only(tmp_path):
    arguments = {"image_size": 16, "patch_size": 8, "layers": 1, "num_latent_tokens": 2}
    for width, heads in ((512, 8), (1024, 16)):
        parts = titok(arguments | {"width": width, "heads": heads})
        model = VQGanVAE(**parts, quantizer="gradient_vq", codebook_size=8, use_vgg_and_gan=False)
        write_published(model, "titok", tmp_path / "file.bin")
        (tmp_path / "file.bin.yaml").unlink()
        assert read_published(tmp_path / "file.bin").network.encoder.transformer[0].attn.heads == heads
    wrong = {"vit_enc_model_size": "base", "vit_dec_model_size": "large"}
    with pytest.raises(UserError, match="vit_enc_model_size base is 768 wide, and the tensors .* are 1024 wide"):
        read_published(tmp_path / "file.bin", peer_config=wrong)
    parts = titok(arguments | {"width": 128, "heads": 4})
    model = VQGanVAE(**parts, quantizer="gradient_vq", codebook_size=8, use_vgg_and_gan=False)
    write_published(model, "titok", tmp_path / "file.bin")
    (tmp_path / "file.bin.yaml").unlink()
    with pytest.raises(UserError, match="heads of a transformer of width 128 cannot be told"):
        read_published(tmp_path / "file.bin")
    sizes = {half: [128, 1, 4] for half in ("enc", "dec")}
    read = read_published(tmp_path / "file.bin", peer_config={"sizes": sizes})
    model.image_size = 16
    assert Tokenizer(read).fingerprint() == Tokenizer(model.eval()).fingerprint()


def test_a_codebook_of_titok_whose_codes_move_is_read_and_written(tmp_path):
    state = {**held("titok_rgb"), "quantize.embed_prob": torch.rand(24)}
    save_file(state, tmp_path / "in.safetensors")
    model = read_published(tmp_path / "in.safetensors", peer_config=arguments("titok_rgb"))
    with torch.no_grad():
        model.quantizer.moved += 1.0
    write_published(model, "titok", tmp_path / "out.bin")
    written = torch.load(tmp_path / "out.bin", weights_only=True)
    assert written.keys() == state.keys()
    torch.testing.assert_close(written["quantize.embedding.weight"], state["quantize.embedding.weight"] + 1)
    assert torch.equal(written["quantize.embed_prob"], state["quantize.embed_prob"])


def test_the_list_of_configurations_says_how_codes_lie(capsys):
    assert main(["models", "titok_b64", "open_magvit2_128_262144"]) == 0
    listed = capsys.readouterr().out
    assert "204.8 M parameters, 64 tokens in a row, 4096 codes, 256 pixels" in listed
    assert "112.0 M parameters, stride 8, 262144 codes, 128 pixels" in listed


@pytest.mark.parametrize("family", ["open_magvit2", "maskgit_vqgan", "titok", "muse_vqgan"])
def test_a_model_of_another_kind_is_not_written(family, tmp_path):
    with pytest.raises(UserError, match="has no form in"):
        write_published(
            model_of("muse_vqgan" if family != "muse_vqgan" else "maskgit_vqgan"), family, tmp_path / "x.pt"
        )


def test_what_no_tensor_says_is_in_the_fingerprint():
    arguments = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "num_latent_tokens": 2}
    torch.manual_seed(0)
    first = VQGanVAE(
        **titok(arguments | {"heads": 2}), quantizer="gradient_vq", codebook_size=8, use_vgg_and_gan=False
    )
    found = {Tokenizer(first).fingerprint()}
    for change in ({"heads": 4}, {"heads": 2, "legacy": True}):
        other = VQGanVAE(**titok(arguments | change), quantizer="gradient_vq", codebook_size=8, use_vgg_and_gan=False)
        other.load_state_dict(first.state_dict())
        found.add(Tokenizer(other).fingerprint())
    assert len(found) == 3
    assert Tokenizer(other).fingerprint() in found


def titok(arguments: dict) -> dict:
    of_decoder = {name: value for name, value in arguments.items() if name != "legacy"}
    return {
        "encoder": {"class_path": "titok", "init_args": {**arguments, "token_size": 4}},
        "decoder": {"class_path": "titok", "init_args": of_decoder},
    }


# --------------------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith(OURS)])
def test_a_preset_has_the_tensors_of_the_published_file(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        model = VQGanVAE(
            encoder=preset.encoder, decoder=preset.decoder, quantizer=preset.quantizer, use_vgg_and_gan=False
        )
    published = json.loads((FOLDER / "published" / f"{name}.json").read_text())
    expected = {key: shape for key, shape in published.items() if not key.startswith(SIDE_LOADS)}
    assert published_names(model, preset.family) == expected
