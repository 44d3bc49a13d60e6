"""Runs that begin from weights: of published files, exports and runs; what they record, and what is refused."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scenarios import QUIET, build_prior, build_trainer, build_vae
from torch import Tensor

from vqdist import Tokenizer, VQGanVAE, VQGanVAETrainer
from vqdist.backends import create_backend
from vqdist.backends.state import optimizer_state
from vqdist.cli import main
from vqdist.cli.models import MODELS
from vqdist.cli.train import make_trainer, train_options
from vqdist.data.codes import CodeDataset
from vqdist.data.dataset import ImageDataset
from vqdist.encoding import CodeWriter
from vqdist.errors import UserError
from vqdist.files import sha256_of
from vqdist.models.published.files import checksum_of_weights

FIXTURES = Path(__file__).parent.parent / "data" / "parity"
STEPS = 3
OPTIONS: dict[str, Any] = {**QUIET, "num_train_steps": STEPS, "batch_size": 2, "save_model_every": 2}
ALONE = {"perceptual": "none"}  # no weights to download


PREFIX = "loss.discriminator."


def weights_in(file: Path) -> dict[str, Tensor]:
    return {name: one.float() if one.is_floating_point() else one for name, one in load_file(file).items()}


def published(folder: Path, family: str, *, critic: bool) -> Path:
    """Write a fixture's weights as the project's training code does, with the discriminator if it is asked for."""
    own = weights_in(FIXTURES / family / "weights.safetensors")
    losses = weights_in(FIXTURES / family / "losses.safetensors") if critic else {}
    if family.startswith("taming"):
        content = {"state_dict": {**own, **losses}}
    else:
        critics = {name.removeprefix(PREFIX): one for name, one in losses.items() if name.startswith(PREFIX)}
        content = {"model": own, "discriminator": critics}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / f"{family}.pt")
    return folder / f"{family}.pt"


def begun(source: Path, out: Path, model: Any = ALONE, **options: Any) -> VQGanVAETrainer:
    return VQGanVAETrainer(model, **{**OPTIONS, "results_folder": str(out), "init_from": str(source), **options})


def weights_of(trainer: VQGanVAETrainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.named_tensors()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700
    return message


def check_resumed(whole: VQGanVAETrainer, source: Path, folder: Path) -> None:
    """Compare a run that is yet to train with one of two steps, and a third without the file that both began from."""
    start = weights_of(whole)
    whole.train()
    begun(source, folder / "cut", num_train_steps=2).train()
    moved = source.rename(source.with_name(f"moved_{source.name}"))
    cut = begun(source, folder / "cut")
    assert cut.step == 2
    cut.train()
    moved.rename(source)
    assert equal(weights_of(whole), weights_of(cut))
    assert not equal(start, weights_of(whole))


@pytest.mark.parametrize("family", ["taming_vqgan", "llamagen_vq"])
def test_a_published_file_gives_network_weights_and_discriminator(family, tmp_path, capfd):
    source = published(tmp_path / "files", family, critic=True)
    trainer = begun(source, tmp_path / "run")
    expected = Tokenizer.from_pretrained(source, 16).network.state_dict()
    assert equal(expected, trainer.model.network.state_dict())
    losses = weights_in(FIXTURES / family / "losses.safetensors")
    of_file = {name.removeprefix(PREFIX): one for name, one in losses.items() if name.startswith(PREFIX)}
    assert len(of_file) == 16 and equal(of_file, trainer.model.discriminator.state_dict())
    assert "discriminator" not in capfd.readouterr().err
    check_resumed(trainer, source, tmp_path)


def test_a_file_without_a_discriminator_begins_with_a_new_one_and_says_so(tmp_path, capfd):
    source = published(tmp_path, "llamagen_vq", critic=False)
    trainer = begun(source, tmp_path / "run", {**ALONE, "discriminator": PATCHES})
    assert type(trainer.model.discriminator).__name__ == "PatchGAN"
    assert capfd.readouterr().err.count("a new one begins at random") == 1
    trainer.close()
    again = begun(source, tmp_path / "twin", {**ALONE, "discriminator": PATCHES})  # of one seed
    assert equal(trainer.model.discriminator.state_dict(), again.model.discriminator.state_dict())


PATCHES = {"class_path": "patchgan", "init_args": {"width": 8, "layers": 2}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a run of three steps, whose average differs from its weights."""
    folder = tmp_path_factory.mktemp("source") / "run"
    trainer = build_trainer(folder, quantizer="vq", batch_size=2, num_train_steps=STEPS, lr=2e-3)
    trainer.train()
    trainer.save(folder.parent / "state")
    trainer.close()
    return folder


def test_the_export_holds_the_discriminator_of_the_run(run):
    held = load_file(run / "export" / "discriminator.safetensors")
    saved = load_file(run.parent / "state" / "discriminator" / "weights.safetensors")
    assert equal(held, saved)
    assert "discriminator.safetensors" in json.loads((run / "export" / "export.json").read_text())["files"]


def test_an_old_export_and_a_damaged_discriminator_go_on_loading(run, tmp_path):
    for content in (None, b"nothing"):
        export = tmp_path / f"export_{content is None}"
        shutil.copytree(run / "export", export)
        (export / "discriminator.safetensors").unlink()
        if content is not None:
            (export / "discriminator.safetensors").write_bytes(content)
        tokenizer = Tokenizer.from_pretrained(export)
        assert equal(tokenizer.network.state_dict(), Tokenizer.from_pretrained(run).network.state_dict())
        VQGanVAE.from_pretrained(export)


def test_a_loaded_model_takes_the_discriminators_file_along_and_a_tokenizer_does_not(run, tmp_path):
    name = "discriminator.safetensors"
    VQGanVAE.from_pretrained(run).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / name).read_bytes() == (run / "export" / name).read_bytes()
    Tokenizer.from_pretrained(run).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / name).exists()
    build_vae().save_pretrained(tmp_path / "new")  # at random
    assert not (tmp_path / "new" / name).exists()
    VQGanVAE.from_pretrained(run, discr_layers=1).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / name).exists()


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_run_and_an_export_give_the_averaged_weights(kind, run, tmp_path, capfd):
    source = tmp_path / kind
    shutil.copytree(run if kind == "run" else run / "export", source)
    trainer = begun(source, tmp_path / "new")
    exported = load_file(run / "export" / "model.safetensors")
    assert equal({f"autoencoder.{name}": one for name, one in trainer.model.network.state_dict().items()}, exported)
    discriminator = load_file(run / "export" / "discriminator.safetensors")
    assert equal(trainer.model.discriminator.state_dict(), discriminator)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == (2 if kind == "run" else 0) and all("goes on from" in line for line in told)
    recorded = json.loads((tmp_path / "new" / "config.json").read_text())["trainer"]["init_from"]
    record = json.loads((run / "export" / "export.json").read_text())["files"]["model.safetensors"]
    codes = Tokenizer.from_pretrained(run).codes_fingerprint()
    assert recorded == {"path": str(source), "sha256": record, "codes": codes, "image_size": 16}
    if kind == "export":
        check_resumed(trainer, source, tmp_path)


def states(trainer: VQGanVAETrainer, engine: str = "generator") -> dict[str, Tensor]:
    """Return the optimizer's state of an engine by kind and weight."""
    held = optimizer_state(trainer.engines[engine].module, trainer.engines[engine].optimizer)
    return {name: one.clone() for name, one in held.items() if torch.is_tensor(one)}


def saved_states(run: Path, engine: str = "generator") -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step_{STEPS:08d}" / engine / "optimizer.safetensors")


def test_a_run_gives_the_optimizers_states_too(run, tmp_path, capfd):
    trainer = begun(run, tmp_path / "new")
    for engine in ("generator", "discriminator"):
        assert equal(states(trainer, engine), saved_states(run, engine))
    assert not (tmp_path / "new" / "init_optimizer.partial").exists()
    assert capfd.readouterr().err.count("goes on from") == 2
    trainer.close()
    for options in ({"init_optimizer": False}, {"optimizer": "sgd"}):
        anew = begun(run, tmp_path / f"anew_{len(options['optimizer']) if 'optimizer' in options else 0}", **options)
        assert not states(anew) and not states(anew, "discriminator")
        anew.close()
    told = capfd.readouterr().err
    assert told.count("begins anew: it is torch.optim.sgd.SGD, and that of") == 2 and "goes on" not in told
    export = begun(run / "export", tmp_path / "export")
    assert not states(export)
    export.close()


def test_states_are_taken_of_the_weights_that_are_trained_and_fit(run, tmp_path, capfd):
    decoder = begun(run, tmp_path / "decoder", freeze=["encoder", "quantizer"])
    held, before = states(decoder), saved_states(run)
    assert held and all(name.partition("/")[2].startswith("decoder.") for name in held)
    assert equal(held, {name: one for name, one in before.items() if name.partition("/")[2].startswith("decoder.")})
    decoder.train()  # from there on
    decoder.close()
    whole = begun(tmp_path / "decoder", tmp_path / "whole")  # the encoder has none there
    assert states(whole).keys() == held.keys()
    whole.train_step()
    assert len(states(whole)) > len(held)
    whole.close()
    capfd.readouterr()
    other = begun(run, tmp_path / "other", {**ALONE, "discriminator": PATCHES})
    assert states(other) and not states(other, "discriminator")
    assert "the optimizer of the discriminator begins anew: no weight that is trained has" in capfd.readouterr().err


def test_states_are_taken_at_the_start_and_not_again(run, tmp_path, capfd):
    begun(run, tmp_path / "new", num_train_steps=2).train()
    capfd.readouterr()
    again = begun(run, tmp_path / "new")
    assert "goes on from" not in capfd.readouterr().err and again.step == 2
    counts = {float(one) for name, one in states(again).items() if name.startswith("step/")}
    assert counts == {STEPS + 2.0}


def test_family_and_configuration_may_be_said_where_a_file_does_not_say_them(tmp_path, run):
    folder = FIXTURES / "ibq"
    source = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights_in(folder / "weights.safetensors")}, source)
    config = {"peer_config": str(folder / "config.json")}
    kinds = {"ibq": "IBQ", "taming_vqgan": "GradientVQ"}
    for name, kind in kinds.items():
        trainer = begun(source, tmp_path / name, {**ALONE, "use_gan": False}, family=name, **config)
        assert type(trainer.model.quantizer).__name__ == kind
        trainer.close()
    by_configuration = begun(source, tmp_path / "by", {**ALONE, "use_gan": False}, **config)
    assert type(by_configuration.model.quantizer).__name__ == "IBQ"
    by_configuration.close()
    for options in ({"family": "ibq"}, config):
        assert "is for files of other projects" in refusal(
            lambda options=options: begun(run, tmp_path / "own", **options)
        )
        with pytest.raises(UserError, match="init_from is not given"):
            build_trainer(tmp_path / "plain", **options)
    arguments = [
        "--data",
        "synthetic:8",
        "--image_size",
        "16",
        "--out",
        str(tmp_path / "cli"),
        "--init_from",
        str(source),
    ]
    arguments += ["--family", "ibq", "--peer_config", str(folder / "config.json"), "--trainer.batch_size", "2"]
    arguments += ["--model.use_gan", "false", "--model.perceptual", "none", "--trainer.num_train_steps", "1"]
    assert main(["train", "vqgan", *arguments, "--data.num_workers", "0"]) == 0
    assert json.loads((tmp_path / "cli" / "config.json").read_text())["model"]["quantizer"]["class_path"] == "ibq"


def test_a_model_takes_the_weights_over(run, tmp_path):
    trainer = begun(run, tmp_path / "new", build_vae(quantizer="vq"))
    expected = Tokenizer.from_pretrained(run).network.state_dict()
    assert equal(expected, trainer.model.network.state_dict())


def test_another_network_is_named_tensor_by_tensor(run, tmp_path):
    message = refusal(lambda: begun(run, tmp_path / "new", build_vae(quantizer="vq", dim=32)))
    assert "has in another shape" in message and "decoder." in message and " and not " in message
    message = refusal(lambda: begun(run, tmp_path / "new", build_vae(quantizer="lfq")))
    assert "has besides quantizer." in message and "lacks quantizer." in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "given, found",
    [
        ({"dim": 32}, "dim 32 is given, and"),
        ({"layers": 3}, "layers 3 is given, and"),
        ({"codebook_size": 64}, "codebook_size 64 is given, and"),
        ({"quantizer": "fsq"}, "quantizer 'fsq' is given, and"),
        ({"encoder": {"class_path": "taming"}}, "encoder {'class_path': 'taming'} is given, and"),
        ({"preset": "llamagen_vq16"}, "is given, and"),
    ],
)
def test_options_of_another_network_are_refused(given, found, run, tmp_path):
    message = refusal(lambda: begun(run, tmp_path / "new", {**ALONE, **given}))
    assert found in message and "leave it out" in message and str(run) in message


@pytest.mark.parametrize("option", ["codebook_size", "layers"])
def test_an_option_that_says_the_default_is_said_all_the_same(option, run, tmp_path):
    default = inspect.signature(VQGanVAE).parameters[option].default
    assert f"{option} {default} is given, and " in refusal(lambda: begun(run, tmp_path / "new", {option: default}))
    assert f"{option} {default} is given, and " in refusal(
        lambda: make_trainer(MODELS["vqgan"], *given_options(run, tmp_path, f"--model.{option}", str(default)))
    )


def given_options(run: Path, folder: Path, *arguments: str) -> tuple[Any, set[str]]:
    """Return the options of a command that begins from a run, and the names of those that it says."""
    names: set[str] = set()
    start = ["--init_from", str(run), "--data", "synthetic:8", "--out", str(folder / "new"), "--image_size", "16"]
    return train_options("vqgan", [*start, *arguments], names), names


def test_a_discriminator_that_is_asked_for_joins_a_run_without_one(run, tmp_path):
    alone = begun(run, tmp_path / "alone", {**ALONE, "use_gan": False})
    alone.train()
    alone.close()
    for given, discriminates in (({}, False), ({"use_gan": True, "discr_layers": 2}, True)):
        trainer = begun(tmp_path / "alone", tmp_path / str(discriminates), given)
        assert (trainer.model.discriminator is not None) == discriminates
        trainer.close()


def test_options_that_say_the_same_pass(run, tmp_path):
    same = {"dim": 16, "layers": 2, "quantizer": "vq", "codebook_size": 32, "vq_kwargs": {"codebook_dim": 8}}
    assert begun(run, tmp_path / "new", {**ALONE, **same}).model.layers == 2


def test_another_discriminator_begins_at_random_and_says_so(run, tmp_path, capfd):
    trainer = begun(run, tmp_path / "new", {**ALONE, "discriminator": PATCHES})
    assert type(trainer.model.discriminator).__name__ == "PatchGAN"
    assert "the discriminator begins at random: that of" in capfd.readouterr().err
    assert begun(run, tmp_path / "none", {**ALONE, "use_gan": False}, lr=1e-3).discriminator is None


def test_a_resumed_run_does_not_begin_from_another(run, tmp_path):
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(run / "export", source)
    begun(source, tmp_path / "new", num_train_steps=2).train()
    shutil.copytree(source, other)
    assert begun(other, tmp_path / "new").step == 2  # the same weights
    tensors = load_file(other / "model.safetensors")
    save_file({name: 2 * one for name, one in tensors.items()}, other / "model.safetensors")
    for place in (other, tmp_path / "nowhere"):
        message = refusal(lambda place=place: begun(place, tmp_path / "new", allow_config_change=True))
        assert str(source) in message and str(place) in message and "began from" in message
    build_trainer(tmp_path / "plain", quantizer="vq", num_train_steps=2).train()
    assert "did not begin from" in refusal(lambda: begun(source, tmp_path / "plain"))


def test_weights_in_several_files_are_recorded_by_all_of_them(tmp_path):
    index = sharded(tmp_path / "files")
    checksums = {checksum_of_weights(index)}
    for file in index.parent.glob("*.safetensors"):
        save_file({name: 2 * one for name, one in load_file(file).items()}, file)
        checksums.add(checksum_of_weights(index))
    assert len(checksums) == 3
    trainer = begun(index, tmp_path / "run", {**ALONE, "use_gan": False}, family="taming")
    assert trainer.config.init_from["sha256"] == checksum_of_weights(index)


@pytest.mark.parametrize(
    "path, said",
    [
        ("nowhere", "there is no"),
        ("someone/tokenizer", "hf download"),
        ("empty", "has no config.json"),
    ],
)
def test_where_nothing_is_to_begin_from_is_one_line(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert said in refusal(lambda: begun(Path(path), tmp_path / "new"))


def test_the_command_needs_no_option_of_the_model(run, tmp_path):
    arguments = [
        "--data",
        "synthetic:64",
        "--image_size",
        "16",
        "--trainer.batch_size",
        "2",
        "--data.num_workers",
        "0",
    ]
    arguments += ["--init_from", str(run), "--out", str(tmp_path / "new"), "--model.perceptual", "none"]
    assert main(["train", "vqgan", *arguments, "--trainer.num_train_steps", "1"]) == 0
    recorded = json.loads((tmp_path / "new" / "config.json").read_text())
    assert recorded["trainer"]["init_from"]["path"] == str(run) and recorded["model"]["dim"] == 16
    assert main(["train", "vqgan", *arguments, "--trainer.num_train_steps", "2"]) == 0
    assert main(["train", "vqgan", *arguments, "--trainer.num_train_steps", "2", "--model.dim", "32"]) == 2


@pytest.fixture(scope="module")
def stored(run, tmp_path_factory) -> tuple[Path, ImageDataset]:
    """Return codes of the run's tokenizer in a folder, and the images that they are of."""
    images = ImageDataset("synthetic:24", 16, augment=False)
    folder = tmp_path_factory.mktemp("codes") / "codes"
    writer = CodeWriter(Tokenizer.from_pretrained(run), images, folder, batch_size=8, shard_size=16)
    writer.write(create_backend("local"), num_workers=0)
    return folder, images


def tuned(run: Path, out: Path, **options: Any) -> Tokenizer:
    trainer = begun(run, out, lr=1e-2, **options)
    trainer.train()
    trainer.close()
    return Tokenizer.from_pretrained(out)


def test_a_decoder_alone_leaves_every_code_and_stored_codes_are_accepted(run, stored, tmp_path):
    folder, images = stored
    before, after = Tokenizer.from_pretrained(run), tuned(run, tmp_path / "new", freeze=["encoder", "quantizer"])
    pixels = torch.stack([images[index] for index in range(len(images))])
    codes = before.encode(pixels)
    assert torch.equal(after.encode(pixels), codes) and len(codes.unique()) > 1
    assert not torch.equal(after.decode(codes), before.decode(codes))
    assert after.codes_fingerprint() == before.codes_fingerprint() and after.fingerprint() != before.fingerprint()
    CodeDataset(folder).check_made_by(after)
    again = CodeWriter(after, images, folder, batch_size=8, shard_size=16)
    assert again.write(create_backend("local"), num_workers=0)["encoded"] == 0


def test_other_codes_are_refused(run, stored, tmp_path):
    folder, images = stored
    for name, options in {"both": {}, "codebook": {"freeze": ["encoder"], "freeze_codebook": False}}.items():
        after = tuned(run, tmp_path / name, **options)
        assert after.codes_fingerprint() != Tokenizer.from_pretrained(run).codes_fingerprint()
        assert "were made by the tokenizer" in refusal(lambda after=after: CodeDataset(folder).check_made_by(after))
        message = refusal(lambda after=after: CodeWriter(after, images, folder, batch_size=8, shard_size=16))
        assert "tokenizer: " in message and "codes of another encoding" in message


def test_codes_of_an_older_version_go_by_all_weights(run, stored, tmp_path):
    folder = shutil.copytree(stored[0], tmp_path / "codes")
    for name in ("manifest.json", "encode.json"):
        content = json.loads((folder / name).read_text())
        del content["codes_fingerprint"]
        (folder / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.from_pretrained(run)
    CodeDataset(folder).check_made_by(tokenizer)
    CodeWriter(tokenizer, stored[1], folder, batch_size=8, shard_size=16)
    after = tuned(run, tmp_path / "new", freeze=["encoder", "quantizer"])
    assert "were made by the tokenizer" in refusal(lambda: CodeDataset(folder).check_made_by(after))


def moves(run: Path, out: Path, **options: Any) -> dict[str, float]:
    """Return the largest change of each part's weights in the first step; Adam's first is the rate in each weight."""
    trainer = begun(run, out, lr=1e-3, num_train_steps=1, init_optimizer=False, **options)
    before = {name: one.detach().clone() for name, one in trainer.model.autoencoder.named_parameters()}
    trainer.train_step()
    after = dict(trainer.model.autoencoder.named_parameters())
    found: dict[str, float] = {}
    for name, tensor in before.items():
        part = name.partition(".")[0]
        found[part] = max(found.get(part, 0.0), float((after[name] - tensor).detach().abs().max()))
    trainer.close()
    return found


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_each_part_has_its_rate(decay, run, tmp_path):
    found = moves(run, tmp_path / "both", lr_scale={"decoder": 0.1, "encoder": 0.5}, weight_decay=decay)
    assert found["decoder"] == pytest.approx(1e-4, rel=0.1) and found["encoder"] == pytest.approx(5e-4, rel=0.1)
    found = moves(run, tmp_path / "none", lr_scale={"decoder": 0})
    assert found["decoder"] == 0 and found["encoder"] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lr_scale": {"decoders": 0.1}}, "lr_scale names 'decoders', which is no part; give some of encoder"),
        ({"lr_scale": {"discriminator": 0.1}}, "that of the discriminator is discr_lr"),
        ({"lr_scale": {"decoder": -1}}, "lr_scale -1 of decoder is not possible"),
        ({"lr_scale": {"decoder": "slow"}}, "lr_scale 'slow' of decoder is not possible"),
        ({"lr_scale": {"encoder": 0.1}, "freeze": ["encoder"]}, "lr_scale names encoder, which is frozen"),
        ({"lr_scale": {"quantizer": 0.1}, "freeze": "encoder,quantizer"}, "lr_scale names quantizer, which is frozen"),
        ({"init_from": ""}, "init_from '' is not possible"),
        ({"lr_scale": {"quantizer": 0.1}, "freeze": ["encoder"]}, "lr_scale names quantizer, which is frozen"),
    ],
)
def test_a_rate_that_nothing_reads_is_refused(options, said, run, tmp_path):
    assert said in refusal(lambda: begun(run, tmp_path / "new", **options))


def test_a_rate_of_a_part_without_weights_is_refused(tmp_path):
    width = build_vae().autoencoder.encoder.dim
    codebook = {"codebook_dim": width, "kmeans_init": False}  # nothing to project
    with pytest.raises(UserError, match="lr_scale names quantizer, which has no weights"):
        build_trainer(tmp_path, quantizer="vq", model={"vq_kwargs": codebook}, lr_scale={"quantizer": 0.1})


def test_a_prior_decodes_with_a_new_decoder_and_with_no_other_codebook(run, tmp_path):
    before, after = Tokenizer.from_pretrained(run), tuned(run, tmp_path / "new", freeze=["encoder", "quantizer"])
    prior = build_prior(before)
    codes = torch.arange(before.num_codes)[None] % before.codebook_size
    images = prior.decode_codes(codes)
    prior.decode_with(after)
    assert torch.equal(prior.decode_codes(codes), after.decode(codes)) and not torch.equal(
        prior.decode_codes(codes), images
    )
    other = tuned(run, tmp_path / "other")
    assert "would mean other pictures" in refusal(lambda: prior.decode_with(other))


@pytest.mark.parametrize(
    "change",
    [
        {"use_cosine_sim": True},
        {"phi_ratio": 0.25},
        {"use_cosine_sim": True, "v_patch_nums": [1, 2, 3, 4, 5]},  # the rule matters, too
    ],
    ids=["angle", "share", "angle and rule"],
)
def test_codes_of_a_multiscale_export_of_before_are_known_as_unchanged(tmp_path, change):
    """Its fingerprint does not say the angle and the share of the convolutions; that of what is tuned does."""
    options = {"v_patch_nums": [1, 2, 4], "num_phis": 3, "kmeans_init": False, **change}
    model = build_vae(quantizer="multiscale_vq", quantizer_kwargs=options, codebook_size=16, use_vgg_and_gan=False)
    model.image_size = side = 4 * options["v_patch_nums"][-1]
    model.save_pretrained(tmp_path / "before")
    config = json.loads((tmp_path / "before" / "config.json").read_text())
    config["quantizer_kwargs"].pop("phi_rule", None)
    (tmp_path / "before" / "config.json").write_text(json.dumps(config))
    before = Tokenizer.from_pretrained(tmp_path / "before")
    pixels = torch.rand(4, 3, side, side)
    plain = {"model": {**ALONE, "use_gan": False}, "image_size": side}
    after = tuned(tmp_path / "before", tmp_path / "new", **plain, freeze=["encoder", "quantizer"])
    assert torch.equal(after.encode(pixels), before.encode(pixels))
    assert not torch.equal(after.decode(after.encode(pixels)), before.decode(before.encode(pixels)))
    assert after.keeps_codes_of_source() is True and after.makes_codes_of(before.codes_fingerprint())
    other = tuned(tmp_path / "before", tmp_path / "other", **plain)
    assert other.keeps_codes_of_source() is False and not other.makes_codes_of(before.codes_fingerprint())


def sharded(folder: Path) -> Path:
    """Write the weights of a fixture into two files, and return the list of them."""
    weights = weights_in(FIXTURES / "taming_vqgan" / "weights.safetensors")
    tensors = {name: one.contiguous() for name, one in weights.items() if not name.startswith("loss.")}
    halves = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    folder.mkdir()
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, names in halves.items() for name in names}}))
    return index


@pytest.mark.parametrize("place", ["there", "moved", "gone"])
def test_the_checksum_of_a_list_of_before_becomes_that_of_all_its_files(tmp_path, place):
    """It was of the list alone; a run goes on from where its weights are now, and is recorded by all of them."""
    index, out = sharded(tmp_path / "files"), tmp_path / "run"
    options = {"model": {**ALONE, "use_gan": False}, "family": "taming", "save_model_every": 1}
    begun(index, out, **options, num_train_steps=1).train()
    config = json.loads((out / "config.json").read_text())
    whole = config["trainer"]["init_from"]["sha256"]
    config["trainer"]["init_from"]["sha256"] = sha256_of(index)
    (out / "config.json").write_text(json.dumps(config))
    path = index if place != "moved" else tmp_path / "elsewhere" / index.name
    if place != "there":
        index.parent.rename(tmp_path / "elsewhere")
    again = begun(path, out, **options, num_train_steps=2)
    assert again.step == 1
    recorded = sha256_of(tmp_path / "elsewhere" / index.name) if place == "gone" else whole
    assert again.config.init_from["sha256"] == recorded
    assert json.loads((out / "config.json").read_text())["trainer"]["init_from"]["sha256"] == recorded
    again.close()
    assert begun(path, out, **options, num_train_steps=2).step == 1
    if place == "moved":  # from then on its files are compared, too
        part = path.with_name("a.safetensors")
        save_file({name: 2 * one for name, one in load_file(part).items()}, part)
        path.parent.rename(tmp_path / "changed")
        message = refusal(lambda: begun(tmp_path / "changed" / index.name, out, **options, num_train_steps=2))
        assert "began from" in message
