"""Files of other projects: layouts, averages, prefixes, what is refused, and the commands."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures import FOLDER, fixture
from safetensors.torch import save_file
from torch import Tensor

from vqdist import DiscreteVAE, Tokenizer, UserError, VQGanVAE
from vqdist.cli import main
from vqdist.models.pretrained import load_model_of_any_type
from vqdist.models.published import family_named, is_published, read_published, write_published
from vqdist.models.published.files import options_in, read_content
from vqdist.models.published.names import Names
from vqdist.models.quantizers import GradientVQ

LAYOUTS = FOLDER / "layouts"
CONFIG = {family: FOLDER / family / "config.json" for family in ("taming_vqgan", "llamagen_vq", "var_vqvae", "ibq")}


def weights(family: str) -> dict[str, Tensor]:
    return dict(fixture(family).weights)


def saved(folder: Path, content, name: str = "file.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def refusal(call: Callable) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    return message


# layouts


def test_lightnings_classes_become_inert_ones():
    content = read_content(LAYOUTS / "taming_last.ckpt")
    found = family_named("taming").weights(content, LAYOUTS)
    assert found and all(torch.equal(one, weights("taming_vqgan")[name]) for name, one in found.items())
    assert not [name for name in found if name.startswith("loss.")]
    assert "global_step" in content and "callbacks" in content


def test_the_average_of_llamagens_training_file_is_taken():
    found = family_named("llamagen").weights(read_content(LAYOUTS / "llamagen_vq_training.pt"), LAYOUTS)
    public = family_named("llamagen").weights(read_content(LAYOUTS / "llamagen_vq_public.pt"), LAYOUTS)
    assert found.keys() == public.keys()
    assert all(torch.equal(found[name], 0.5 * public[name]) for name in found if name.endswith("weight"))


def test_vars_training_file_holds_the_tokenizer():
    found = family_named("var").weights(read_content(LAYOUTS / "var_ar-ckpt-last.pth"), LAYOUTS)
    assert list(found) == ["quantize.embedding.weight"]


def test_averages_of_lightning_have_names_without_dots(tmp_path):
    own = weights("ibq")
    names = json.loads((LAYOUTS / "seed_ema_names.json").read_text())["ibq"]
    averages = {average: 0.5 * own[name] for average, name in names.items() if name in own}
    assert len(averages) == len(own)
    others = {
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(-1),
        "loss.x": own["quant_conv.bias"],
    }
    path = saved(tmp_path, {"state_dict": {**own, **averages, **others}, "epoch": 1}, "last.ckpt")
    model = read_published(path, peer_config=CONFIG["ibq"])  # which names the family
    assert torch.equal(model.quantizer.embedding.weight, 0.5 * own["quantize.embedding.weight"])
    assert torch.equal(model.network.encoder.conv_in.weight, 0.5 * own["encoder.conv_in.weight"])
    assert "give --family ibq or --family taming_vqgan" in refusal(lambda: read_published(path))
    # LDM and taming encode and decode with the weights themselves; averages are for their pictures of training
    live = read_published(path, family="ldm")
    assert torch.equal(live.quantizer.embedding.weight, own["quantize.embedding.weight"])
    assert torch.equal(live.network.encoder.conv_in.weight, own["encoder.conv_in.weight"])


WRAPPED = {
    "bare": lambda own: own,
    "data parallel": lambda own: {"model": {f"module.{name}": one for name, one in own.items()}},
    "within a diffusion model": lambda own: {
        "state_dict": {
            **{f"first_stage_model.{name}": one for name, one in own.items()},
            "model.diffusion_model.out.weight": torch.zeros(2),
            "cond_stage_model.embedding.weight": torch.zeros(2),
        }
    },
    "half precision": lambda own: {name: one.half() for name, one in own.items()},
    "with a discriminator": lambda own: {"state_dict": {**own, "loss.discriminator.main.0.weight": torch.zeros(2)}},
    "remapped": lambda own: {**own, "quantize.used": torch.arange(4)},
}


@pytest.mark.parametrize("layout", WRAPPED)
def test_wherever_the_weights_lie(layout, tmp_path):
    own = weights("taming_vqgan")
    model = read_published(saved(tmp_path, WRAPPED[layout](own)))
    assert torch.equal(model.network.encoder.quant_conv.weight, own["quant_conv.weight"])
    assert model.network.decoder.last_layer.weight.dtype == torch.float32


def test_vars_convolutions_in_every_numbering(tmp_path):
    own, residual = weights("var_vqvae"), "quantize.quant_resi."
    sides = [1, 2, 4, 6, 8]
    rest = {name: one for name, one in own.items() if not name.startswith((residual, "quantize.ema"))}
    phi = {part: own[f"{residual}qresi_ls.0.{part}"] for part in ("weight", "bias")}
    forms = {1: "qresi.", 5: "{}."}
    for number, form in forms.items():
        convolutions = {
            f"{residual}{form.format(k)}{part}": one + k for k in range(number) for part, one in phi.items()
        }
        path = saved(tmp_path, {**rest, **convolutions})
        model = read_published(path, peer_config={"v_patch_nums": sides})
        assert (
            model.quantizer.inner.phi_of == ((0,) * 5 if number == 1 else (0, 1, 2, 3, 4)) and model.image_size == 16
        )
        write_published(model, "var", tmp_path / f"{number}.pth")
        found = torch.load(tmp_path / f"{number}.pth", weights_only=True)
        assert found.pop("quantize.ema_vocab_hit_SV").shape == (5, 24)
        assert found.keys() == {*rest, *convolutions}
        assert all(torch.equal(found[name], one) for name, one in {**rest, **convolutions}.items())


def test_the_sides_of_vars_maps_must_be_said(tmp_path):
    path = saved(tmp_path, weights("var_vqvae"))
    assert "has 7 scales, whose sides stand in no tensor; say v_patch_nums" in refusal(lambda: read_published(path))


# networks of transformers


def as_janus(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """LlamaGen's tensors under Janus' names: those of taming, the levels of the decoder from the lowest up."""
    names = Names(
        [
            ("encoder.conv_blocks.{level}.res.", "encoder.down.{level}.block."),
            ("encoder.conv_blocks.{level}.", "encoder.down.{level}."),
            ("decoder.conv_blocks.{level}.res.", "decoder.up.{level}.block."),
            ("decoder.conv_blocks.{level}.", "decoder.up.{level}."),
            ("{half}.mid.0.", "{half}.mid.block_1."),
            ("{half}.mid.1.", "{half}.mid.attn_1."),
            ("{half}.mid.2.", "{half}.mid.block_2."),
        ]
    )
    return {names.theirs(name, 2): one for name, one in own.items()}


def test_janus(tmp_path):
    given = fixture("llamagen_vq")
    save_file(as_janus(given.weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "janus_vqgan", "num_patches": 8, "base_channels": 32})
    )
    model = read_published(tmp_path)
    assert model.image_size == 16
    features, codebook = given.found["features"], given.weights["quantize.embedding.weight"]
    with torch.no_grad():
        found = model.autoencoder.features((given.given["image"] + 1) / 2)
        torch.testing.assert_close(found, features, atol=1e-5, rtol=0)
        indices = torch.cdist(features.permute(0, 2, 3, 1).flatten(0, 2), codebook).argmin(dim=1).view(2, 8, 12)
        quantized, ids, _ = model.encode((given.given["image"] + 1) / 2)
    assert torch.equal(ids, indices)
    torch.testing.assert_close(quantized, F.normalize(codebook, dim=1)[indices].permute(0, 3, 1, 2))
    torch.testing.assert_close(
        model.decode(given.found["quantized"].float()).detach(), (given.found["recon_eval"] + 1) / 2, atol=1e-5, rtol=0
    )


def test_chameleon_has_no_decoder(tmp_path):
    given = fixture("taming_vqgan")
    own = {name: one for name, one in given.weights.items() if not name.startswith("decoder.")}
    model = read_published(saved(tmp_path, {f"model.vqmodel.{name}": one for name, one in own.items()}))
    _, ids, _ = model.encode((given.given["image"] + 1) / 2)
    assert torch.equal(ids, given.found["indices"]) and model.image_size == 64
    assert "has no decoder" in refusal(lambda: model.decode_from_ids(ids))
    model.save_pretrained(tmp_path / "export")
    assert torch.equal(VQGanVAE.from_pretrained(tmp_path / "export").encode((given.given["image"] + 1) / 2)[1], ids)


# what is refused


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_code_is_never_run(tmp_path, capsys):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": weights("taming_vqgan"), "callbacks": Evil()}, path)
    message = refusal(lambda: read_published(path))
    assert "evil.ckpt cannot be read as tensors and plain values (it holds " in message and "print)" in message
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content, message",
    [(b"", "it is empty"), (b"<html>404</html>", "it is text that begins with '<html>404</html>'")],
)
def test_no_checkpoint_at_all(content, message, tmp_path):
    (tmp_path / "file.pt").write_bytes(content)
    assert message in refusal(lambda: read_published(tmp_path / "file.pt"))
    assert "no such file" in refusal(lambda: read_published(tmp_path / "gone.pt"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps([1, 2]))
    assert "plain.pt" in refusal(lambda: read_published(tmp_path / "plain.pt"))


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    own = weights("taming_vqgan") | {name: one for name, one in changes.items() if one is not None}
    return {name: one for name, one in own.items() if name not in changes or changes[name] is not None}


BROKEN = {
    "lacks encoder.mid.block_1.conv1.bias": {"encoder.mid.block_1.conv1.bias": None},
    "lacks decoder.up.0.block.1.conv1.weight": {"decoder.up.0.block.1.conv1.weight": None},
    "lacks encoder.conv_in.weight, so it is no tokenizer": {"encoder.conv_in.weight": None},
    "has besides encoder.conv_in.scale": {"encoder.conv_in.scale": torch.zeros(1)},
    "has in another shape decoder.mid.attn_1.q.weight 4 and not 32x32x1x1": {
        "decoder.mid.attn_1.q.weight": torch.zeros(4)
    },
}


@pytest.mark.parametrize("message", BROKEN)
def test_tensors_that_do_not_fit_are_named(message, tmp_path):
    path = saved(tmp_path, changed(**BROKEN[message]))
    assert message in refusal(lambda: read_published(path, family="taming"))


def test_a_configuration_that_is_not_of_the_file(tmp_path):
    config = {"model": {"params": {"ddconfig": {"ch_mult": [1, 1], "z_channels": 12}}}}
    (tmp_path / "model.yaml").write_text(json.dumps(config))
    path = saved(tmp_path, weights("taming_vqgan"))
    message = refusal(lambda: read_published(path, peer_config=tmp_path / "model.yaml"))
    assert "has besides decoder.up.0.block.0.nin_shortcut.bias" in message and " has in another shape " in message
    assert "decoder.conv_out.weight 3x64x3x3 and not 3x32x3x3" in message


def test_unknown_families(tmp_path):
    path = saved(tmp_path, {"layer.weight": torch.zeros(2)})
    assert "holds layer.weight, which is of no known family; give --family" in refusal(lambda: read_published(path))
    assert "no family 'tamming'; nearest: taming" in refusal(lambda: read_published(path, family="tamming"))


FORMLESS = {
    "llamagen": "has attention in the middle and at the lowest resolution only",
    "diffusers": "the first convolution has 32 channels and the first resolution 64",
    "var": "expected multiscale_vq with learnable_codebook",
    "ibq": "expected ibq",
    "taming_gumbel": "expected gumbel",
    "dalle_pytorch": "files of DALLE-pytorch are read and not written",
}


@pytest.mark.parametrize("family", FORMLESS)
def test_a_model_that_a_project_has_no_form_for(family, tmp_path):
    arguments = {"ch_mult": [2, 1], "ch": 32, "z_channels": 4, "attn_resolutions": [256]}
    if family == "diffusers":
        arguments["attn_resolutions"] = [128]
    parts = {half: {"class_path": "taming", "init_args": arguments} for half in ("encoder", "decoder")}
    model = VQGanVAE(**parts, quantizer="gradient_vq", codebook_size=8, use_vgg_and_gan=False)
    assert FORMLESS[family] in refusal(lambda: write_published(model, family, tmp_path / "out"))
    conv = VQGanVAE(dim=16, layers=1, quantizer="gradient_vq", codebook_size=8, use_vgg_and_gan=False)
    if family != "dalle_pytorch":
        assert "ConvEncoder and ConvDecoder has no form" in refusal(
            lambda: write_published(conv, family, tmp_path / "b")
        )


MOVED = {"class_path": "cvq", "init_args": {"codebook_size": 8}}
FREE, NORMED = (
    {"class_path": "gradient_vq", "init_args": {"codebook_size": 8, "l2_norm": on}} for on in (False, True)
)
OF_JANUS = {"class_path": "gradient_vq", "init_args": {"codebook_size": 8, "l2_norm_output": True}}
NO_FORM = {
    **{f"{family}, moved codes": (family, MOVED) for family in ("taming", "llamagen", "diffusers")},
    "taming, codes of length 1": ("taming", NORMED),
    "llamagen, codes of length 1 in the decoder only": ("llamagen", OF_JANUS),
    "janus, codes that keep their lengths": ("janus", FREE),
    "chameleon, codes of length 1": ("chameleon", NORMED),
}


@pytest.mark.parametrize("case", NO_FORM)
def test_codes_that_a_file_could_not_say_are_not_written(case, tmp_path):
    family, quantizer = NO_FORM[case]
    model = taming_network(quantizer)
    assert "has no form in" in refusal(lambda: write_published(model, family, tmp_path / "out"))


def taming_network(quantizer, **changes) -> VQGanVAE:
    arguments = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [128], "z_channels": 4}
    parts = {half: {"class_path": "taming", "init_args": {**arguments, **changes}} for half in ("encoder", "decoder")}
    return VQGanVAE(**parts, quantizer=quantizer, use_vgg_and_gan=False).eval()


# files that were made to do harm


BAD_TENSORS = {
    "numbers that the file has not": torch.zeros(1).half().expand(10**12, 6),
    "sparse": torch.eye(24, 6).to_sparse(),
    "no numbers at all": torch.zeros(24, 6, device="meta"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_without_all_their_numbers_are_refused(case, tmp_path):
    path = saved(tmp_path, {"state_dict": changed(**{"quantize.embedding.weight": BAD_TENSORS[case]})})
    assert "has quantize.embedding.weight of shape" in refusal(lambda: read_published(path))
    assert "without all its numbers" in refusal(lambda: read_published(path, family="taming"))


BAD_SHAPES = {
    "no rank": {"encoder.conv_in.weight": torch.zeros(())},
    "no channels": {"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)},
    "a row of codes": {"quantize.embedding.weight": torch.zeros(24)},
    "a billion blocks": {"decoder.up.0.block.999999999.norm1.weight": torch.zeros(3)},
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_shapes_that_say_no_network_are_refused(case, tmp_path):
    path = saved(tmp_path, changed(**BAD_SHAPES[case]))
    expected = (
        "too few for num_res_blocks 999999999" if "blocks" in case else "a shape of its tensors is none of taming"
    )
    assert expected in refusal(lambda: read_published(path))


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path):
    path, bomb = saved(tmp_path, weights("taming_vqgan")), tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.namelist():
            packed.writestr(entry, bytes(10**5) if "/data/" in entry else whole.read(entry))
    assert "would unpack to" in refusal(lambda: read_published(bomb))
    assert read_published(path).codebook_size == 24


TOO_LARGE = {
    "codes": {"n_embed": 10**13},
    "channels": {"ddconfig": {"z_channels": 10**12}},
    "blocks": {"ddconfig": {"num_res_blocks": 10**7}},
    "width": {"ddconfig": {"ch": 10**9}},
}
NOT_SO = {
    "a number for a group": ("taming_vqgan", {"ddconfig": 5}),
    "a word for a number": ("var_vqvae", {"quant_resi": "half", "v_patch_nums": [1, 2, 8]}),
    "a number for a list": ("var_vqvae", {"v_patch_nums": 5}),
    "a group of images": ("open_magvit2", {"ddconfig": 3}),
    "sizes": ("titok_stage1", {"sizes": {"enc": [1]}}),
    "a side": ("maskgit_vqgan", {"resolution": "large"}),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_sizes_are_compared_before_memory_is_taken(case, tmp_path):
    path = saved(tmp_path, weights("taming_vqgan"))
    refusal(lambda: read_published(path, peer_config=TOO_LARGE[case]))


@pytest.mark.parametrize("case", NOT_SO)
def test_options_of_another_type_are_refused(case, tmp_path):
    family, config = NOT_SO[case]
    path = FOLDER / family / "weights.safetensors"
    message = refusal(lambda: read_published(path, peer_config=config))
    assert "option of its configuration, is none of" in message or "image_size 'large' is not possible" in message


# configurations


ALONE = {
    "llamagen_vq": ({"codebook_l2_norm": False}, lambda model: model.quantizer.l2_norm is False),
    "taming_gumbel": ({"kl_weight": 0.5}, lambda model: model.quantizer.kl_weight == 0.5),
    "ibq": ({"entropy_temperature": 0.5, "a": "IBQ"}, lambda model: model.quantizer.entropy_temperature == 0.5),
    "titok_rgb": (
        {"use_l2_norm": True, "sizes": {}},
        lambda model: model.quantizer.l2_norm,
    ),
    "maskgit_vqgan": ({"dropout": 0.5}, lambda model: model.network.decoder.mid[0].dropout.p == 0.5),
    "muse_vqgan": ({"l2_recon_loss": True}, lambda model: model.l2_recon_loss),
}


@pytest.mark.parametrize("family", ALONE)
def test_one_option_alone_is_read(family):
    config, holds = ALONE[family]
    folder = FOLDER / family
    path = next(folder / name for name in ("weights.safetensors", "vae.0.pt") if (folder / name).is_file())
    if "sizes" in config:
        config = {**config, "sizes": json.loads((folder / "config.json").read_text())["arguments"]["sizes"]}
    assert holds(read_published(path, peer_config=config))


def test_a_configuration_beside_a_file_of_the_hub_is_read(tmp_path):
    save_file(weights("llamagen_vq"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"codebook_l2_norm": false}')
    assert not read_published(tmp_path / "model.safetensors").quantizer.l2_norm
    assert not read_published(tmp_path).quantizer.l2_norm
    (tmp_path / "config.json").write_text("[]")
    assert "config.json holds a list" in refusal(lambda: read_published(tmp_path / "model.safetensors"))
    assert "config.json holds a list" in refusal(lambda: read_published(tmp_path, family="llamagen"))


def test_a_configuration_that_refers_to_itself_is_read_once(tmp_path):
    (tmp_path / "model.yaml").write_text("a: &a {b: *a, c: {n_embed: 24}}\n")
    path = saved(tmp_path, weights("taming_vqgan"))
    assert read_published(path, peer_config=tmp_path / "model.yaml").codebook_size == 24


def test_a_configuration_of_taming_is_not_of_ibq_however_many_the_blocks(tmp_path):
    model = taming_network(FREE, num_res_blocks=4)
    write_published(model, "taming", tmp_path / "last.ckpt")
    assert type(read_published(tmp_path / "last.ckpt").quantizer) is GradientVQ  # by the configuration beside it
    (tmp_path / "last.ckpt.yaml").unlink()
    for target, expected in (("taming.models.vqgan.VQModel", "GradientVQ"), ("src.IBQ.models.ibqgan.IBQ", "IBQ")):
        config = {"model": {"target": target, "params": {"n_embed": 8}}}
        found = read_published(tmp_path / "last.ckpt", peer_config=config)
        assert type(found.quantizer).__name__ == expected
    message = refusal(lambda: read_published(tmp_path / "last.ckpt"))
    assert "has four residual blocks a resolution as IBQ has, and sizes that nobody published" in message
    assert "give --family ibq or --family taming_vqgan" in message
    assert message == refusal(lambda: read_published(tmp_path / "last.ckpt", peer_config={"n_embed": 8}))
    of_both = [Tokenizer.from_pretrained(tmp_path / "last.ckpt", family=family) for family in ("ibq", "taming")]
    assert of_both[0].fingerprint() != of_both[1].fingerprint()  # of equal tensors, and other codes


def test_ibq_is_told_by_the_sizes_that_it_published():
    of_2048 = {"class_path": "ibq", "init_args": {"codebook_size": 2048}}
    with torch.device("meta"):
        model = VQGanVAE.preset("ibq_1024", use_vgg_and_gan=False)
        other = VQGanVAE.preset("ibq_1024", use_vgg_and_gan=False, quantizer=of_2048)
    for found, family in ((model, "ibq"), (other, None)):
        tensors = family_named("ibq").theirs(dict(found.network.state_dict()))
        assert family_named("ibq").fits(tensors, {}) == (family == "ibq")


def test_fewer_scales_than_convolutions(tmp_path):
    path = saved(tmp_path, {name: one for name, one in weights("var_vqvae").items() if "ema_vocab" not in name})
    model = read_published(path, peer_config={"v_patch_nums": [1, 3, 8]})
    inner = model.quantizer.inner
    assert inner.phi_of == (0, 2, 3) and [phi.weight.requires_grad for phi in inner.phis] == [True, False, True, True]
    model.save_pretrained(tmp_path / "export")
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / "export").encode(image), Tokenizer(model).encode(image))


def test_factors_of_open_magvit2_are_of_nine_bits_where_nothing_is_said():
    shapes = {"conv_in": (32, 3, 3, 3), "down.0.block.0.conv2": (32, 32, 3, 3), "conv_out": (18, 32, 1, 1)}
    tensors = {f"encoder.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    found = family_named("open_magvit2").arguments(tensors, {"token_factorization": True})
    assert found["quantizer"]["init_args"]["factorized_bits"] == [9, 9]


def test_options_are_found_wherever_a_project_writes_them():
    known = ("ddconfig", "n_embed")
    wanted = {"ddconfig": {"ch": 32}, "n_embed": 8}
    for config in (
        wanted,
        {"arguments": wanted},
        {"model": {"target": "x", "params": wanted}},
        {"model": {"class_path": "x", "init_args": wanted}},
        {"model": {"params": {"unet_config": {"a": 1}, "first_stage_config": {"params": wanted}}}},
    ):
        assert options_in(config, known) == wanted
    assert options_in({"a": {"b": 1}}, known) == {}


def test_a_configuration_says_what_shapes_do_not(tmp_path):
    path = saved(tmp_path, weights("llamagen_vq"))
    said = {"codebook_l2_norm": False, "commit_loss_beta": 0.5, "entropy_loss_ratio": 0.2, "dropout_p": 0.1}
    model = read_published(path, peer_config={"codebook_size": 24, **said})
    quantizer = model.quantizer
    assert (quantizer.l2_norm, quantizer.beta, quantizer.entropy_weight) == (False, 0.5, 0.2)
    assert model.network.encoder.mid.block_1.dropout.p == 0.1
    assert "is not that of a VQGAN" in refusal(
        lambda: read_published(
            saved(tmp_path, weights("diffusers_vqmodel")), peer_config={"norm_num_groups": 32, "norm_type": "spatial"}
        )
    )


# folders, commands


def test_exports_of_vqdist_are_not_of_another_project(tmp_path):
    model = VQGanVAE(dim=16, layers=1, codebook_size=16, use_vgg_and_gan=False)
    model.save_pretrained(tmp_path / "own")
    DiscreteVAE(image_size=8, num_layers=1, num_tokens=8, codebook_dim=4, hidden_dim=4).save_pretrained(
        tmp_path / "dvae"
    )
    assert not is_published(tmp_path / "own") and not is_published(tmp_path / "dvae")
    assert isinstance(load_model_of_any_type(tmp_path / "dvae"), DiscreteVAE)
    (tmp_path / "llamagen").mkdir()
    save_file(weights("llamagen_vq"), tmp_path / "llamagen" / "model.safetensors")
    (tmp_path / "llamagen" / "config.json").write_text('{"codebook_size": 24}')
    assert is_published(tmp_path / "llamagen")
    assert VQGanVAE.from_pretrained(tmp_path / "llamagen").quantizer.l2_norm
    assert "holds a model of type 'vqgan'; DiscreteVAE loads 'dvae'" in refusal(
        lambda: DiscreteVAE.from_pretrained(tmp_path / "llamagen")
    )
    assert "with family and peer_config only, not revision" in refusal(
        lambda: VQGanVAE.from_pretrained(tmp_path / "llamagen", revision="main")
    )


def test_convert_in_and_out(tmp_path, capsys):
    source, export, back = FOLDER / "taming_vqgan" / "weights.safetensors", tmp_path / "export", tmp_path / "last.ckpt"
    arguments = ["--peer_config", str(CONFIG["taming_vqgan"]), "--out", str(export)]
    assert main(["convert", str(source), *arguments]) == 0
    tokenizer = Tokenizer.from_pretrained(export)
    assert tokenizer.image_size == 16 and tokenizer.codebook_size == 24
    assert main(["convert", str(export), "--to", "taming", "--out", str(back)]) == 0
    found = torch.load(back, weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], one) for name, one in weights("taming_vqgan").items())
    assert capsys.readouterr().out == f"{export}\n{back}\n"
    assert main(["convert", str(export), "--to", "taming", "--out", str(back)]) == 2
    assert f"--out {back} is there already" in capsys.readouterr().err
    assert main(["convert", str(export), "--out", str(tmp_path / "again")]) == 2
    assert "is an export of vqdist already; give --to" in capsys.readouterr().err
    assert main(["convert", str(export), "--to", "var", "--out", str(tmp_path / "var.pth")]) == 2
    assert "expected multiscale_vq" in capsys.readouterr().err
    assert main(["convert", str(export), "--to", "taming", "--family", "var", "--out", str(tmp_path / "c")]) == 2
    assert "--family is for reading" in capsys.readouterr().err
    wide = ["--image_size", "[16, 24]", "--out", str(tmp_path / "wide")]
    assert main(["convert", str(source), *wide]) == 0
    assert Tokenizer.from_pretrained(tmp_path / "wide").image_size == (16, 24)
    dalle = FOLDER.parent / "dalle_pytorch" / "rgb" / "vae.pt"
    assert main(["convert", str(dalle), "--image_size", "32", "--out", str(tmp_path / "dalle")]) == 0
    assert Tokenizer.from_pretrained(tmp_path / "dalle").image_size == 32
    assert main(["convert", str(source), "--image_size", "[16, 25]", "--out", str(tmp_path / "odd")]) == 2
    assert "image_size 25 is not a multiple of 2" in capsys.readouterr().err and not (tmp_path / "odd").exists()
    muse = FOLDER / "muse_vqgan" / "vae.0.pt"
    assert main(["convert", str(muse), "--out", str(tmp_path / "muse")]) == 0
    assert Tokenizer.from_pretrained(tmp_path / "muse").image_size == 256


def test_models_are_listed(capsys):
    assert main(["models", "llamagen_vq16", "var_vqvae_512"]) == 0
    text = capsys.readouterr().out
    assert "71.9 M parameters, stride 16, 16384 codes, 256 pixels" in text and "rFID 2.19" in text
    assert "4096 codes, 512 pixels" in text and "weights: no licence of its own" in text
    assert main(["models", "llamagen_vq61"]) == 2
    assert "there is no preset 'llamagen_vq61'; nearest: llamagen_vq16" in capsys.readouterr().err
