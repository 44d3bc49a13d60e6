"""Parts of somebody else: one small file for each kind, given in YAML, on two ranks, resumed, exported and loaded.

If one of these files had to touch vqdist, the house would not be open. They are the examples of docs/extend.md, too.
"""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from launching import torchrun, vqdist
from safetensors.torch import load_file

from vqdist import Tokenizer, UserError, VQGanVAE
from vqdist.cli import main
from vqdist.models.pretrained import load_model_of_any_type

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("my_*.py"))
# how two ranks are started on each runtime: options of the command, and variables that `accelerate launch` would set
BACKENDS = {
    "accelerate": ([], {}),
    "zero2": (
        ["--backend", "deepspeed", "--deepspeed_config", str(HERE.parents[1] / "deepspeed_configs/zero2.json")],
        {},
    ),
    "fsdp2": (
        ["--trainer.apply_grad_penalty_every", "0"],  # impossible where weights are sharded
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    ),
}
SMALL_DIFFERENCE = 2e-6
# plain gradient descent: it does not blow rounding up to whole steps, as a sign does
PLAIN = ["--trainer.optimizer", "sgd", "--trainer.lr", "0.02", "--trainer.num_train_steps", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Make a user's folder: the parts and the configurations, importable for this process too."""
    folder = tmp_path_factory.mktemp("home")
    for path in (*FILES, *HERE.glob("*.yaml")):
        shutil.copy(path, folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for path in FILES:
        sys.modules.pop(path.stem, None)


def train(home: Path, backend: str, out: str, *more: str, model: str = "vqgan", config: str = "tokenizer.yaml"):
    """Run `vqdist train` on two ranks in the user's folder."""
    options, variables = BACKENDS[backend]
    command = ["-m", "vqdist", "train", model, "--config", config, "--out", out, *options, *more]
    return torchrun(command, cwd=home, **variables)


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, moments, average."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_resumes_to_the_bit(home: Path, run: str, resume) -> None:
    """Put the run back to step 2, go on, and compare with what it was at step 4."""
    before = weights_at(home / run, 4)
    shutil.rmtree(home / run / "checkpoints" / "step_00000004")
    resume()
    after = weights_at(home / run, 4)
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


@pytest.fixture(scope="module", params=["accelerate", "zero2", pytest.param("fsdp2", marks=pytest.mark.nightly)])
def tokenizer_run(home, request) -> tuple[str, str]:
    """Train a tokenizer of foreign parts only on two ranks; return the backend, and the run's name."""
    train(home, request.param, request.param)
    return request.param, request.param


def test_a_run_of_foreign_parts_is_resumed_to_the_bit(home, tokenizer_run):
    backend, run = tokenizer_run
    assert_resumes_to_the_bit(home, run, lambda: train(home, backend, run))


def test_their_weights_are_those_of_one_process(home, tokenizer_run, tmp_path):
    backend, _ = tokenizer_run
    train(home, backend, f"{backend}_plain", *PLAIN)
    options = BACKENDS[backend][0] if backend == "fsdp2" else []
    vqdist(
        *["train", "vqgan", "--config", "tokenizer.yaml", "--out", str(tmp_path / "one"), "--trainer.batch_size", "8"],
        *[*PLAIN, *options],
        cwd=home,
    )
    ranks, one = weights_at(home / f"{backend}_plain", 2), weights_at(tmp_path / "one", 2)
    assert ranks.keys() == one.keys()
    differences = {name: float((tensor.double() - one[name].double()).abs().max()) for name, tensor in ranks.items()}
    assert max(differences.values()) < SMALL_DIFFERENCE, max(differences, key=differences.get)


def test_the_run_says_which_parts_it_has_and_its_tracker_wrote(home, tokenizer_run):
    _, run = tokenizer_run
    written = json.loads((home / run / "config.json").read_text())
    assert written["model"]["encoder"] == {"class_path": "my_networks.Encoder", "init_args": {"width": 32}}
    assert written["trainer"]["optimizer"]["class_path"] == "my_optimizer.Lion"
    lines = [json.loads(line) for line in (home / run / "metrics.jsonl").read_text().splitlines()]
    logged = {"recon_loss", "edge_loss", "small_features_loss", "discr_loss"}
    assert logged <= set().union(*lines) and ("gradient_penalty" in set().union(*lines)) is (run != "fsdp2")
    table = (home / run / "table.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in table][:4] == ["1", "2", "3", "4"]


def test_its_export_is_loaded_with_trust_or_with_the_parts(home, tokenizer_run):
    import my_networks
    import my_quantizer

    run = home / tokenizer_run[1]
    with pytest.raises(UserError, match=r"my_networks\.Encoder is code that does not come with vqdist.*trust_code"):
        VQGanVAE.from_pretrained(run)
    with pytest.raises(UserError, match="trust_code"):
        Tokenizer.from_pretrained(run / "export")
    trusted = VQGanVAE.from_pretrained(run, trust_code=True)
    given = VQGanVAE.from_pretrained(
        run,
        encoder=my_networks.Encoder(32),
        quantizer=my_quantizer.Rounded(32, levels=4),
        decoder=my_networks.Decoder(32),
    )
    images = torch.rand(2, 3, 20, 20)
    for model in (trusted, given):
        tokenizer = Tokenizer(model)
        codes = tokenizer.encode(images)
        assert codes.shape == (2, 16) and int(codes.max()) < 16
        assert torch.equal(codes, Tokenizer(trusted).encode(images))
        assert tokenizer.decode(codes).shape == images.shape
    exported = load_file(run / "export" / "model.safetensors")
    assert "autoencoder.encoder.positions" in exported
    # the discriminator and the terms are not needed to code images, so nobody has to trust them
    assert trusted.discriminator is not None and given.discriminator is None
    with pytest.raises(UserError, match=r"my_networks\.TwoScales is code"):
        given.check_training_size(20)


def test_the_commands_ask_for_trust_too(home, tokenizer_run, capsys, monkeypatch):
    monkeypatch.chdir(home)
    command = ["reconstruct", tokenizer_run[1], "--data", "my_source.Stripes", "--out", str(home / "grid.png")]
    assert main(command) == 2 and "--trust_code true" in capsys.readouterr().err
    assert main([*command, "--trust_code", "true"]) == 0 and (home / "grid.png").is_file()


# --------------------------------------------------------------------------------------------- a generator


@pytest.fixture(scope="module")
def generator_run(home) -> str:
    """Train a foreign model of the codes of a foreign tokenizer on two ranks."""
    train(home, "accelerate", "for_chain", "--trainer.num_train_steps", "2")
    train_generator(home)
    return "chain"


def train_generator(home: Path) -> None:
    more = ["--tokenizer", "for_chain", "--trust_code", "true"]
    train(home, "accelerate", "chain", *more, model="my_generator.Chain", config="generator.yaml")


def test_a_foreign_generator_is_resumed_to_the_bit(home, generator_run):
    assert_resumes_to_the_bit(home, generator_run, lambda: train_generator(home))


def test_a_foreign_generator_is_loaded_with_trust_and_draws(home, generator_run, capsys, monkeypatch):
    with pytest.raises(UserError, match=r"model my_generator\.Chain is code that does not come with vqdist"):
        load_model_of_any_type(home / generator_run)
    model = load_model_of_any_type(home / generator_run, trust_code=True)
    assert type(model).__name__ == "Chain" and model.sample(2, label=3).shape == (2, 3, 20, 20)
    monkeypatch.chdir(home)
    command = ["sample", generator_run, "--num", "4", "--out", str(home / "samples.png")]
    assert main(command) == 2 and "--trust_code true" in capsys.readouterr().err
    assert main([*command, "--trust_code", "true"]) == 0 and (home / "samples.png").is_file()


# --------------------------------------------------------------------------------------------- in Python, and mistakes


def test_built_parts_are_recorded_by_their_path_and_asked_for(home, tmp_path):
    import my_losses
    import my_networks
    import my_quantizer

    vae = VQGanVAE(
        encoder=my_networks.Encoder(32),
        quantizer=my_quantizer.Rounded(32, levels=4),
        decoder=my_networks.Decoder(32),
        terms=["reconstruction", my_losses.EdgeLoss(0.5)],
        use_gan=False,
    )
    assert vae(torch.rand(2, 3, 20, 20), return_loss=True).requires_grad
    vae.save_pretrained(tmp_path)
    for trust in (False, True):
        with pytest.raises(UserError, match="encoder was given as an object of my_networks.Encoder"):
            VQGanVAE.from_pretrained(tmp_path, trust_code=trust)


def test_a_part_that_was_replaced_later_is_recorded_as_what_it_is(home, tmp_path):
    import my_networks

    vae = VQGanVAE(dim=16, layers=2, quantizer="fsq", codebook_size=256, use_vgg_and_gan=False)
    vae.autoencoder.encoder = my_networks.Encoder(32, patch=4)
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"object of my_networks\.Encoder"):
        VQGanVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--model.encoder", "my_net.Encoder"], ["no module 'my_net'", "PYTHONPATH"]),
        (["--model.encoder", "my_networks.Encodr"], ["my_networks has no 'Encodr'", "nearest: Encoder"]),
        (["--model.encoder.widthh", "8"], ["no argument 'widthh'", "nearest: width"]),
        (["--model.encoder", "my_quantizer.Rounded", "--model.encoder.dim", "8"], ["no encoder", "code_shape"]),
        (["--model.quantizer", "my_networks.Encoder"], ["my_networks.Encoder is no", "vqdist"]),
        (["--model.discriminator", "my_quantizer.Rounded", "--model.discriminator.dim", "8"], ["min_image_size"]),
        (["--model.terms", "[reconstruction, my_losses.Edge]"], ["my_losses has no 'Edge'", "nearest: EdgeLoss"]),
        (["--model.terms", "[my_losses.SmallFeatures]"], ["no term compares pixels"]),
        (["--model.dim", "16"], ["dim 16 does nothing"]),
        (["--trainer.optimizer", "my_optimizer.Lio"], ["my_optimizer has no 'Lio'", "nearest: Lion"]),
        (["--trainer.trackers", "[my_sink.Tablee]"], ["my_sink has no 'Tablee'", "nearest: Table"]),
        (["--data.folder", "my_source.Stripe"], ["my_source", "nearest: Stripes"]),
        (["--image_size", "21"], ["image_size 21 is not a multiple of the patch, 5"]),
    ],
)
def test_a_mistake_is_one_line(home, monkeypatch, capsys, options, expected):
    monkeypatch.chdir(home)
    assert main(["train", "vqgan", "--config", "tokenizer.yaml", "--out", "wrong", *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for words in expected:
        assert words in message
    assert not (home / "wrong").exists()


def test_help_says_what_a_foreign_part_takes(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit):
        main(["train", "vqgan", "--model.encoder.help", "my_networks.Encoder"])
    shown = capsys.readouterr().out
    assert "Cut the image into patches" in shown and "patch" in shown and "default: 5" in shown


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_they_import_public_names_only(path):
    public = importlib.import_module("vqdist").__all__
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "vqdist":
            assert node.module == "vqdist" and {alias.name for alias in node.names} <= set(public)
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("vqdist") for alias in node.names)
