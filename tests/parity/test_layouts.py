"""Further forms of published files: shards, wrappers, discriminators, other sizes, repositories of the Hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.hub_mixin as hub_mixin
import pytest
import torch
import yaml
from fixtures import FOLDER, arguments, fixture, tensors, weights
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqdist import Tokenizer, UserError, VQGanVAE
from vqdist.cli import main
from vqdist.models import pretrained
from vqdist.models.networks.blur import BlurDiscriminator
from vqdist.models.networks.patchgan import PatchGAN
from vqdist.models.published import fetched, read_published, read_to_train, write_published
from vqdist.models.published.critics import Critic

TAMING = "taming_vqgan"


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def own(family: str = TAMING) -> dict[str, Tensor]:
    return {name: one for name, one in fixture(family).weights.items() if not name.startswith("loss.")}


def refusal(call: Callable) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    return message


def part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


# shards and wrappers


def sharded(folder: Path, held: dict[str, Tensor], index: str = "model.safetensors.index.json") -> Path:
    """Write tensors as two files and the list of them."""
    folder.mkdir(exist_ok=True)
    names, places = sorted(held), {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: held[name].contiguous() for name in chosen}, folder / file)
        places |= dict.fromkeys(chosen, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_shards_are_read_together(tmp_path):
    for source in (sharded(tmp_path / "a", own()), tmp_path / "a" / "model.safetensors.index.json"):
        found = read_published(source, family="taming")
        assert torch.equal(found.network.encoder.conv_in.weight, own()["encoder.conv_in.weight"])


def test_of_a_larger_model_its_tokenizer_is_read(tmp_path):
    """And no shard that holds nothing of it: the second one here is damaged."""
    encoder = {name: one for name, one in own().items() if not name.startswith(("decoder.", "post_quant"))}
    folder = sharded(tmp_path / "a", {f"model.vqmodel.{name}": one for name, one in encoder.items()})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.0.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(content))
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"damaged")
    (folder / "config.json").write_text(json.dumps({"model_type": "chameleon", "vq_config": {"resolution": 16}}))
    assert Tokenizer.from_pretrained(folder).image_size == 16


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", 3, "x.index.json"])
def test_an_index_that_points_elsewhere_is_refused(place, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    assert "says no weight_map of tensors and files beside it" in refusal(lambda: read_published(tmp_path))


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "nested": lambda held: {"model": {"state_dict": held}},
    "compiled within DDP": lambda held: {f"module._orig_mod.{name}": one for name, one in held.items()},
    "bfloat16": lambda held: {"state_dict": {name: one.bfloat16() for name, one in held.items()}},
    "averages by name": lambda held: {
        "model": {name: 0 * one for name, one in held.items()},
        "ema": held,
        "optimizer": {},
    },
    "a dictionary model_ema": lambda held: {"model_ema": held, "state_dict": {"x": torch.zeros(1)}},
    "first stage, compiled": lambda held: {
        "state_dict": {f"first_stage_model._orig_mod.{name}": one for name, one in held.items()}
    },
}


@pytest.mark.parametrize("layout", WRAPPED)
def test_wherever_the_weights_lie(layout, tmp_path):
    held = {name: one.bfloat16().float() for name, one in own().items()}
    model = read_published(saved(tmp_path / "file.pt", WRAPPED[layout](held)))
    for name in ("quantize.embedding.weight", "decoder.conv_out.bias"):
        ours = {"quantize.embedding.weight": model.quantizer.embedding.weight}
        ours["decoder.conv_out.bias"] = model.network.decoder.last_layer.bias
        assert torch.equal(ours[name], held[name])


def test_llamagens_tokenizer_within_janus(tmp_path):
    held = {f"gen_vision_model.{name}": one for name, one in own("llamagen_vq").items()}
    path = saved(tmp_path / "pytorch_model.bin", {**held, "language_model.x": torch.zeros(2)})
    assert read_published(path).codebook_size == 24


# other sizes: what is written is read again without a word, and with the configuration of the project


def taming(quantizer: dict[str, Any], *, kernel: int = 1, width: int | None = None, **sizes: Any) -> dict[str, Any]:
    both = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16}
    both |= {"z_channels": 4, "quant_conv_kernel": kernel, **sizes}
    of_decoder = {name: value for name, value in both.items() if name != "double_z"}
    return {
        "encoder": part("taming", **both, **({} if width is None else {"embed_dim": width})),
        "decoder": part("taming", **of_decoder),
        "quantizer": quantizer,
    }


LEGACY = part("gradient_vq", codebook_size=10, codebook_loss="legacy")
L2 = part("gradient_vq", codebook_size=10, l2_norm=True)
VAR = {"codebook_size": 10, "learnable_codebook": True, "v_patch_nums": [1, 3, 8]}
TITOK: dict[str, Any] = {"image_size": 16, "width": 32, "layers": 2, "heads": 4, "num_latent_tokens": 3}
PIXEL = {"dim": 4, "hidden_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1}
MAGVIT = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 2}
OTHER_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "taming, narrow codes": ("taming", taming(LEGACY, width=3)),
    "taming, three levels, attention at two": (
        "taming",
        taming(LEGACY, ch_mult=[1, 2, 2], attn_resolutions=[8, 4], num_res_blocks=2),
    ),
    "taming, wider first level": ("taming", taming(LEGACY, ch_mult=[2, 1], dropout=0.1)),
    "taming, no level has attention": ("taming", taming(LEGACY, attn_resolutions=[])),
    "taming, twice z_channels": ("taming", taming(LEGACY, double_z=True)),
    "taming, means in the place of strides": ("taming", taming(LEGACY, resamp_with_conv=False)),
    "taming, four blocks": ("taming", taming(LEGACY, num_res_blocks=4)),
    "ldm, no attention": ("ldm", taming(LEGACY, attn_resolutions=[], mid_attention=False)),
    "gumbel": ("taming_gumbel", taming(part("gumbel", codebook_size=10, kl_weight=0.1))),
    "llamagen": ("llamagen", taming(L2, width=2)),
    "llamagen, codes that keep their lengths": ("llamagen", taming(part("gradient_vq", codebook_size=10))),
    "var, cosine": ("var", taming(part("multiscale_vq", **VAR, use_cosine_sim=True), kernel=3)),
    "var, one convolution": ("var", taming(part("multiscale_vq", **VAR, num_phis=1, phi_ratio=0.25), kernel=3)),
    "var, no convolution": ("var", taming(part("multiscale_vq", **VAR, phi_ratio=0), kernel=1)),
    "ibq": ("ibq", taming(part("ibq", codebook_size=10, entropy_temperature=0.1))),
    "diffusers": ("diffusers", taming(LEGACY, groups=16, width=3)),
    "diffusers, no attention": ("diffusers", taming(LEGACY, attn_resolutions=[], mid_attention=False)),
    "chameleon": ("chameleon", taming(LEGACY, width=3) | {"decoder": part("none")}),
    "janus": ("janus", taming(part("gradient_vq", codebook_size=10, l2_norm_output=True), width=3)),
    "open_magvit2, factors": (
        "open_magvit2",
        {
            "encoder": part("magvit2", **MAGVIT, z_channels=6),
            "decoder": part("magvit2", **MAGVIT),
            "quantizer": part("magvit2_lfq", codebook_size=64, factorized_bits=[2, 4]),
        },
    ),
    "maskgit": (
        "maskgit",
        {
            "encoder": part("maskgit", hidden_channels=32, channel_mult=[1, 2, 1], z_channels=4, dropout=0.1),
            "decoder": part("maskgit", hidden_channels=32, channel_mult=[1, 2, 1], dropout=0.1),
            "quantizer": LEGACY,
        },
    ),
    "titok, pixels, vectors of length 1": (
        "titok",
        {
            "encoder": part("titok", **TITOK, patch_size=8, token_size=5),
            "decoder": part("titok", **TITOK, patch_size=4),
            "quantizer": L2,
        },
    ),
    "titok, second stage": (
        "titok",
        {
            "encoder": part("titok", **TITOK, patch_size=4, token_size=5, legacy=True),
            "decoder": part("titok_proxy", **TITOK, patch_size=2, proxy_codebook_size=12, pixel=PIXEL),
            "quantizer": part("gradient_vq", codebook_size=10),
        },
    ),
    "muse, groups and kernels": (
        "muse",
        {
            "dim": 16,
            "layers": 2,
            "codebook_size": 32,
            "encdec_resnet_groups": 4,
            "encdec_first_conv_kernel_size": 7,
            "encdec_num_resnet_blocks": [1, 2],
            "encdec_layer_mults": [1, 3],
        },
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("case", OTHER_SIZES)
def test_what_is_written_is_read_again(case, tmp_path, caplog):
    family, given = OTHER_SIZES[case]
    torch.manual_seed(len(case))
    model = VQGanVAE(**given, use_vgg_and_gan=False).eval()
    for weight in model.autoencoder.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    model.image_size, path = 16, tmp_path / "file"
    write_published(model, family, path)
    image = torch.rand(2, 3, 16, 16)
    codes = model.encode(image)[1]
    for options in ({}, {"family": family}):
        with caplog.at_level(logging.WARNING):
            again = read_published(path, **options)
        assert torch.equal(again.encode(image)[1], codes) and not caplog.messages
        assert Tokenizer(again, 16).codes_fingerprint() == Tokenizer(model).codes_fingerprint()
        if family != "chameleon":
            assert torch.equal(again.decode_from_ids(codes), model.decode_from_ids(codes))
            assert Tokenizer(again, 16).fingerprint() == Tokenizer(model).fingerprint()
    if path.is_file():
        config = yaml.safe_load((tmp_path / "file.yaml").read_text())
        (tmp_path / "file.yaml").unlink()
        assert torch.equal(read_published(path, peer_config=config, family=family).encode(image)[1], codes)
        (tmp_path / "file.yaml").write_text("")
        path.unlink()
        assert "file.yaml is there already" in refusal(lambda: write_published(model, family, path))


ALONE = {
    "llamagen, codes that keep their lengths": "codebook_l2_norm True",
    "taming, narrow codes": "family taming_vqgan (not ibq)",
    "ibq": "family taming_vqgan (not ibq)",
    "muse, groups and kernels": "encdec_resnet_groups 16",
    "titok, second stage": "heads of a transformer",
    "var, cosine": "say v_patch_nums",
    "taming, four blocks": "give --family ibq or --family taming_vqgan",
}


@pytest.mark.parametrize("case", ALONE)
def test_what_no_tensor_says_is_asked_for_or_said(case, tmp_path, caplog):
    family, given = OTHER_SIZES[case]
    model = VQGanVAE(**given, use_vgg_and_gan=False)
    model.image_size = 16
    write_published(model, family, tmp_path / "file")
    (tmp_path / "file.yaml").unlink()
    if family == "var":  # published files have their counts of uses, and these say the number of scales
        held = torch.load(tmp_path / "file", weights_only=True)
        torch.save({name: one for name, one in held.items() if "ema_vocab" not in name}, tmp_path / "file")
    try:
        with caplog.at_level(logging.WARNING):
            read_published(tmp_path / "file")
    except UserError as error:
        assert ALONE[case] in str(error)
    else:
        (line,) = caplog.messages
        assert ALONE[case] in line and "which is assumed; else give --peer_config" in line


def test_a_published_size_is_read_without_a_word(tmp_path, caplog):
    """Options are those that were published with it; nothing is assumed of anybody's own training."""
    from vqdist.models.published import presets_like

    with torch.device("meta"):
        model = VQGanVAE.preset("llamagen_vq16", use_vgg_and_gan=False)
        other = VQGanVAE.preset("llamagen_vq16", use_vgg_and_gan=False, quantizer=part("gradient_vq", codebook_size=9))
    assert presets_like(model) == presets_like(model, "llamagen_vq") == ["llamagen_vq16"]
    assert presets_like(other) == presets_like(model, "ibq") == []


@pytest.mark.parametrize(
    "option, message",
    [
        ({"tanh_out": True}, "tanh_out True is of another network"),
        ({"attn_type": "linear"}, "attn_type 'linear' is not that of a VQGAN"),
        ({"use_linear_attn": True}, "use_linear_attn True is of another network"),
    ],
)
def test_options_that_make_other_images_and_add_no_tensor(option, message, tmp_path):
    config = {"model": {"params": {"ddconfig": {**arguments(TAMING)["ddconfig"], **option}}}}
    assert message in refusal(lambda: read_published(saved(tmp_path / "a.ckpt", own()), peer_config=config))


def test_a_configuration_names_the_family(tmp_path):
    path = saved(tmp_path / "a.ckpt", own("ibq"))
    for config in ({"family": "ibq"}, arguments("ibq"), {"use_entropy_loss": True, "n_embed": 24}):
        assert type(read_published(path, peer_config=config).quantizer).__name__ == "IBQ"


NO_FORM = {
    "halves that differ": (
        "taming",
        taming(LEGACY)
        | {
            "decoder": part(
                "taming", ch=64, ch_mult=[1, 1], z_channels=4, num_res_blocks=1, attn_resolutions=[8], resolution=16
            )
        },
        "no form in taming",
    ),  # fmt: skip
    "groups": ("taming", taming(LEGACY, groups=16), "has encoder 16 groups and not 32 groups"),
    "attention in the levels only": ("taming", taming(LEGACY, mid_attention=False), "has no form in taming"),
    "no convolution before the codes": ("taming", taming(LEGACY, kernel=0), "quant_conv_kernel 0"),
    "a larger convolution": ("llamagen", taming(L2, kernel=3), "quant_conv_kernel 3"),
    "no attention in the middle": (
        "ibq",
        taming(part("ibq", codebook_size=8), mid_attention=False, attn_resolutions=[]),
        "has attention in the middle",
    ),  # fmt: skip
}


@pytest.mark.parametrize("case", NO_FORM)
def test_networks_that_a_project_could_not_build_are_not_written(case, tmp_path):
    family, given, message = NO_FORM[case]
    model = VQGanVAE(**given, use_vgg_and_gan=False)
    assert message in refusal(lambda: write_published(model, family, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_ldms_configuration_names_its_module(tmp_path):
    model = VQGanVAE(**taming(LEGACY), use_vgg_and_gan=False)
    for family, module in (("ldm", "ldm.models.autoencoder.VQModel"), ("taming", "taming.models.vqgan.VQModel")):
        write_published(model, family, tmp_path / family)
        config = yaml.safe_load((tmp_path / f"{family}.yaml").read_text())["model"]
        assert config["target"] == module and config["params"]["ddconfig"]["ch_mult"] == [1, 2]


# discriminators


def critics() -> dict[str, tuple[Any, type, dict[str, Any]]]:
    """Return contents of files with a discriminator, its class, and what no shape but the form of the file says."""
    torch.manual_seed(1)
    patchgan, blur = PatchGAN(8, layers=2), BlurDiscriminator(32, stages=2, pool=None)
    losses = {f"loss.discriminator.{name}": one for name, one in patchgan.state_dict().items()}
    blurred = {f"loss.discriminator.{name}": one for name, one in blur.state_dict().items()}
    wrapped = {f"module.{name}": one for name, one in patchgan.state_dict().items()}
    return {
        TAMING: ({"state_dict": {**own(), **losses}}, PatchGAN, {"width": 8, "layers": 2}),
        "llamagen_vq": ({"model": own("llamagen_vq"), "discriminator": wrapped}, PatchGAN, {"width": 8}),
        "open_magvit2": (
            {"state_dict": {**own("open_magvit2"), **blurred}},
            BlurDiscriminator,
            {"stages": 2, "pool": None, "zero_mean": True},
        ),
    }


@pytest.mark.parametrize("family", [TAMING, "llamagen_vq", "open_magvit2"])
def test_the_discriminator_of_a_file_goes_into_the_export_and_into_the_run(family, tmp_path):
    from vqdist import VQGanVAETrainer

    content, kind, options = critics()[family]
    path, export = saved(tmp_path / "last.ckpt", content), tmp_path / "export"
    config = ["--peer_config", str(FOLDER / family / "config.json")]
    assert main(["convert", str(path), *config, "--out", str(export)]) == 0
    held = load_file(export / "discriminator.safetensors")
    assert VQGanVAE.from_pretrained(export).discriminator is None  # images need none
    run = {"folder": "synthetic:8", "image_size": 32, "batch_size": 2, "num_train_steps": 1, "num_workers": 0}
    for source in (export, path):
        trainer = VQGanVAETrainer(
            {"perceptual": "none"},
            init_from=str(source),
            results_folder=str(tmp_path / f"run_{source.name}"),
            apply_grad_penalty_every=0,
            **({"peer_config": str(FOLDER / family / "config.json")} if source == path else {}),
            **run,
        )
        critic = trainer.model.discriminator
        assert type(critic) is kind
        said = trainer.model.configuration()["discriminator"]["init_args"]
        assert {name: said[name] for name in options} == options
        state = critic.state_dict()
        assert state.keys() == held.keys() and all(torch.equal(one, held[name]) for name, one in state.items())
        trainer.close()


def test_titoks_training_state_has_the_discriminator_in_a_file_of_its_own(tmp_path):
    critic = BlurDiscriminator(32, stages=2)
    save_file(own("titok_rgb"), tmp_path / "model.safetensors")
    state = {f"discriminator.{name}": one for name, one in critic.state_dict().items()}
    save_file({**state, "perceptual_loss.x": torch.zeros(1)}, tmp_path / "model_1.safetensors")
    _, found = read_to_train(tmp_path, peer_config=arguments("titok_rgb"))
    assert isinstance(found, Critic) and found.part["init_args"] == {"width": 32, "stages": 2, "blur_kernel_size": 4}
    assert all(torch.equal(one, found.tensors[name]) for name, one in critic.state_dict().items())


def test_muses_discriminator_is_that_of_the_weights_in_training(tmp_path):
    path = FOLDER / "muse_vqgan" / "vae.0.ema.pt"
    held = torch.load(path, weights_only=True)
    _, found = read_to_train(path)
    assert isinstance(found, Critic) and found.part["init_args"]["head_padding"] == 0
    first = held["online_model.discr.layers.0.0.weight"]
    assert torch.equal(found.tensors["body.0.weight"], first.float())


def test_a_discriminator_that_vqdist_has_not_is_left_out_in_one_line(tmp_path, capsys):
    styled = {"blocks.0.0.weight": torch.zeros(8, 3, 3, 3), "final_conv.0.weight": torch.zeros(8, 9, 3, 3)}
    path = saved(tmp_path / "a.pt", {"model": own("llamagen_vq"), "discriminator": styled})
    assert main(["convert", str(path), "--out", str(tmp_path / "export")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "discriminator" in line]
    assert (
        len(lines) == 1 and "is left out, since vqdist has no network with its tensors (blocks.0.0.weight" in lines[0]
    )
    assert not (tmp_path / "export" / "discriminator.safetensors").exists()


def test_a_discriminators_file_that_names_code_is_refused(tmp_path):
    from vqdist import VQGanVAETrainer

    write = tmp_path / "export"
    assert main(["convert", str(saved(tmp_path / "a.pt", {"model": own("llamagen_vq")})), "--out", str(write)]) == 0
    part_of_file = json.dumps({"class_path": "os.system", "init_args": {"command": "true"}})
    save_file({"x": torch.zeros(1)}, write / "discriminator.safetensors", {"vqdist.discriminator": part_of_file})
    options = {"image_size": 16, "batch_size": 2, "num_train_steps": 1, "results_folder": str(tmp_path / "run")}
    message = refusal(lambda: VQGanVAETrainer({"perceptual": "none"}, init_from=str(write), **options))
    assert "os.system" in message and "is none of vqdist" in message


# the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Return the folder of the one repository of a Hub."""

    def download(repo_id, filename, **_):
        path = tmp_path / "main" / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {filename}")
        return str(path)

    for module in (pretrained, hub_mixin):
        monkeypatch.setattr(module, "hf_hub_download", download)
    (tmp_path / "main").mkdir()
    return tmp_path / "main"


def write_config(hub: Path, content: Any) -> None:
    (hub / "config.json").write_text(json.dumps(content))


def test_a_repository_of_another_project_is_read(hub):
    save_file(own("llamagen_vq"), hub / "model.safetensors")
    write_config(hub, {"codebook_size": 24, "codebook_l2_norm": False})
    tokenizer = Tokenizer.from_pretrained("someone/vq-ds16", image_size=(16, 24), revision="main")
    assert not tokenizer.network.quantizer.l2_norm
    found = VQGanVAE.from_pretrained("someone/vq-ds16", local_files_only=True)
    assert found.codebook_size == 24
    (hub / "model.safetensors").unlink()
    sharded(hub, own("llamagen_vq"))
    assert VQGanVAE.from_pretrained("someone/vq-ds16").codebook_size == 24


def test_a_repository_of_diffusers_is_read(hub):
    save_file(own("diffusers_vqmodel"), hub / "diffusion_pytorch_model.safetensors")
    write_config(hub, json.loads((FOLDER / "diffusers_vqmodel" / "diffusers_config.json").read_text()))
    found = Tokenizer.from_pretrained("someone/vq", image_size=(16, 24))
    given = fixture("diffusers_vqmodel")
    assert torch.equal(found.encode((given.given["image"] + 1) / 2), given.found["indices"].flatten(1))


def test_of_shards_those_with_the_tokenizer_are_fetched(tmp_path):
    sharded(tmp_path, {f"model.vqmodel.{name}": one for name, one in own().items()})
    index, shards = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("*.safetensors"))
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "model.layers.0.weight": "another"}}))
    there, asked = {"config.json", index.name, *(file.name for file in shards)}, []

    def download(name: str) -> str:
        asked.append(name)
        if name not in there:
            raise LocalEntryNotFoundError(f"no {name}")
        return str(tmp_path / name)

    assert fetched(download, "someone/vq") == tmp_path
    assert there <= set(asked) and "another" not in asked
    there.remove(shards[1].name)
    assert f"lacks {shards[1].name}, which its {index.name} names" in refusal(lambda: fetched(download, "someone/vq"))


@pytest.mark.parametrize("places", [None, [], {}, {"a": 3}])
def test_a_list_of_shards_that_names_none_is_one_line(places, hub):
    write_config(hub, {"codebook_size": 24})
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "says no weight_map" in refusal(lambda: VQGanVAE.from_pretrained("someone/vq"))


def test_weights_that_cannot_be_fetched_are_not_called_missing(tmp_path):
    error = LocalEntryNotFoundError("not here")
    error.__cause__ = ConnectionError("timed out")
    for problem in (error, OSError("no space left"), RuntimeError("the connection was reset")):

        def download(name, problem=problem):
            if name != "config.json":
                raise problem
            return str(tmp_path / name)

        message = refusal(lambda download=download: fetched(download, "someone/vq"))
        assert message.startswith("diffusion_pytorch_model.safetensors of someone/vq cannot be fetched (")
        assert str(problem.__cause__ or problem) in message


WRONG = {
    "another model of diffusers": ({"_class_name": "AutoencoderKL"}, "config.json is of 'AutoencoderKL'"),
    "another project than its tensors": ({"_class_name": "VQModel"}, "lacks the tensors of diffusers' VQModel"),
    "tensors of no Janus": ({"model_type": "janus_vqgan"}, "lacks the tensors of Janus"),
    "an unknown type": ({"model_type": "llama"}, "holds a model of type 'llama'; "),
    "a size beyond the file": (
        {"model_type": "vqgan", "image_size": 16, "dim": 10**9, "layers": 2},
        "dim is 1000000000; expected at most",
    ),
    "a word for a number": ({"model_type": "vqgan", "image_size": 16, "dim": "wide"}, "dim is 'wide'; expected"),
    "no object": ([1], "no model of that name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_repository_whose_configuration_is_wrong_is_one_line(case, hub):
    content, expected = WRONG[case]
    save_file(own("llamagen_vq"), hub / "model.safetensors")
    write_config(hub, content)
    for load in (Tokenizer.from_pretrained, VQGanVAE.from_pretrained):
        message = refusal(lambda load=load: load("someone/thing"))
        assert expected in message or case == "no object"


def test_a_repository_without_weights_is_one_line(hub):
    write_config(hub, {"codebook_embed_dim": 8})
    assert "someone/thing has none of" in refusal(lambda: VQGanVAE.from_pretrained("someone/thing"))


# every published file


def test_every_list_of_published_names_is_compared():
    """By a test of this folder; of the others of the field vqdist has no tokenizer: generators and binary codes."""
    from test_published import PUBLISHED
    from test_token_files import OURS

    there = {path.stem for path in (FOLDER / "published").glob("*.json")}
    assert there == {*PUBLISHED, *(name for name in there if name.startswith(OURS))}
    assert len(there) == 20 and weights(TAMING) and tensors(TAMING)


@pytest.mark.parametrize("name, kind", [("nlayer_discriminator", PatchGAN), ("blur_discriminator", BlurDiscriminator)])
def test_published_discriminators_have_these_tensors(name, kind):
    with torch.device("meta"):
        found = {key: list(one.shape) for key, one in kind().state_dict().items()}
    assert found == json.loads((FOLDER / name / "published.json").read_text())
