"""Defaults of `vqdist train vqgan` that are not those of the classes: where they hold, and where they are said."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import yaml
from launching import ROOT

from vqdist.cli import main
from vqdist.cli.chosen import EPOCHS
from vqdist.cli.defaults import OF_PLAYERS, VQ_OPTIONS, VQGAN_DEFAULTS, default_in_python
from vqdist.cli.models import MODELS, model_entry
from vqdist.cli.parts import joined
from vqdist.cli.train import refuse_mistakes, train_options
from vqdist.errors import UserError
from vqdist.models.presets import PRESETS
from vqdist.models.quantizers.vq import VQ_DEFAULTS
from vqdist.registries import ENCODERS
from vqdist.trainers.vqgan_config import VQGanTrainerConfig

PAGE = (ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
IN_PYTHON = {name: default_in_python(VQGanTrainerConfig, name) for name in VQGAN_DEFAULTS}
GIVEN = ["--data", "digits", "--image_size", "32", "--model.dim", "16", "--trainer.batch_size", "4"]
GIVEN += ["--trainer.num_train_steps", "2"]


def options_of(*arguments: str, out="nowhere/run"):
    """Return the options of the command, which must be possible together."""
    options = train_options("vqgan", [*GIVEN, *arguments, "--out", str(out)])
    refuse_mistakes(MODELS["vqgan"], options, {})
    return options


def test_the_command_has_the_documented_defaults():
    options = options_of("--model.quantizer", "vq")
    assert {name: options[name] for name in VQGAN_DEFAULTS} == VQGAN_DEFAULTS
    assert options.model.vq_kwargs == VQ_OPTIONS
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \| `[^`]+` \|$", PAGE, re.MULTILINE))
    assert {name: yaml.safe_load(value) for name, value in rows.items()} == {
        **VQGAN_DEFAULTS,
        **{f"model.vq_kwargs.{name}": value for name, value in VQ_OPTIONS.items()},
    }


def test_the_documented_defaults_of_the_classes_are_theirs():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `[^`]+` \| `([^`]+)` \|$", PAGE, re.MULTILINE))
    of_library = {"threshold_ema_dead_code": 0, **VQ_DEFAULTS}
    for option, value in rows.items():
        name = option.removeprefix("model.vq_kwargs.")
        expected = of_library[name] if name != option else IN_PYTHON[option]
        assert yaml.safe_load(value) == expected, option


def test_help_says_which_defaults_differ_and_why(capsys):
    with pytest.raises(SystemExit):
        main(["train", "vqgan", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "0.1, in Python 1.0" in said and "They came of a search, see docs/defaults.md" in said
    assert f"codebook_dim {VQ_OPTIONS['codebook_dim']}" in said


@pytest.mark.parametrize(
    "said",
    [
        ["--model.use_gan", "false"],
        ["--model.use_vgg_and_gan", "false"],
        ["--model.preset", "titok_l32_stage1"],
        ["--init_from", "runs/a"],
    ],
    ids=" ".join,
)
def test_what_nothing_may_read_without_a_discriminator_is_not_chosen(said):
    options = options_of(*said)
    assert {name: options[name] for name in OF_PLAYERS} == {name: IN_PYTHON[name] for name in OF_PLAYERS}
    rates = IN_PYTHON if "--init_from" in said else VQGAN_DEFAULTS
    assert options.trainer.lr == rates["trainer.lr"]


def test_what_is_said_of_a_discriminator_that_is_not_there_is_a_mistake(tmp_path, capsys):
    arguments = ["--model.use_gan", "false", "--trainer.adversarial_weight", "0.1", "--model.perceptual", "none"]
    assert main(["train", "vqgan", *GIVEN, *arguments, "--model.channels", "1", "--out", str(tmp_path)]) == 2
    assert "adversarial_weight 0.1 does nothing" in capsys.readouterr().err


def test_null_is_a_value():
    assert options_of("--trainer.max_grad_norm", "null").trainer.max_grad_norm is None


def test_an_adversarial_weight_of_zero_needs_no_schedule():
    options = options_of("--trainer.adversarial_weight", "0")
    assert options.trainer.discriminator_warmup_steps == options.trainer.adversarial_ramp_steps == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.quantizer", "vq", "--model.vq_kwargs.decay", "0.7"], {**VQ_OPTIONS, "decay": 0.7}),
        (["--model.lookup_free_quantization", "false"], VQ_OPTIONS),
        (["--model.quantizer", "lfq"], None),
        (["--model.quantizer", "vq", "--init_from", "runs/a"], None),
        (["--model.quantizer", "residual_vq"], None),
        ([], None),
        (
            ["--model.quantizer", "vq", "--model.vq_kwargs", '{"learnable_codebook": true, "ema_update": false}'],
            {"learnable_codebook": True, "ema_update": False},
        ),
    ],
)
def test_options_of_the_codebook_are_completed(arguments, expected):
    assert options_of(*arguments).model.vq_kwargs == expected


@pytest.mark.parametrize(
    ("arguments", "expected", "codebook"),
    [
        ([], "fsq", None),
        (["--codebook_size", "1024"], "fsq", None),
        (["--codebook_size", "512"], "vq", VQ_OPTIONS),
        (["--model.vq_kwargs.decay", "0.7"], "vq", {**VQ_OPTIONS, "decay": 0.7}),
        (["--model.lfq_kwargs.diversity_gamma", "2"], None, None),
        (["--model.quantizer_kwargs.levels", "[8, 5]"], None, None),
        (["--model.lookup_free_quantization", "true"], None, None),
        (["--model.preset", "llamagen_vq16"], None, None),
        (["--init_from", "runs/a"], None, None),
    ],
)
def test_the_quantizer_that_nobody_says(arguments, expected, codebook):
    options = options_of(*arguments)
    assert options.model.quantizer == expected and options.model.vq_kwargs == codebook


def test_a_run_that_began_without_a_word_on_the_quantizer_keeps_it(tmp_path):
    for quantizer, size, expected in ((None, 1024, None), ("fsq", 1024, "fsq"), ("vq", 512, "vq")):
        (tmp_path / "config.json").write_text(json.dumps({"model": {"quantizer": quantizer}, "trainer": {}}))
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        assert options_of("--codebook_size", str(size), out=tmp_path).model.quantizer == expected


def begun(folder, **trainer) -> None:
    """Write what a run of the time before these defaults had in its folder."""
    before = {name.removeprefix("trainer."): value for name, value in IN_PYTHON.items()}
    configuration = {"trainer": {**before, **trainer}, "model": {"quantizer": "vq", "vq_kwargs": {"decay": 0.8}}}
    (folder / "config.json").write_text(json.dumps(configuration))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


def test_a_run_from_before_goes_on_as_it_was(tmp_path):
    begun(tmp_path)
    options = options_of("--model.quantizer", "vq", "--model.vq_kwargs.decay", "0.8", out=tmp_path)
    assert {name: options[name] for name in VQGAN_DEFAULTS} == IN_PYTHON
    assert options.model.vq_kwargs == {"decay": 0.8}


def test_a_run_that_begins_has_nothing_of_another_in_its_folder(tmp_path):
    begun(tmp_path)
    options = options_of("--overwrite", out=tmp_path)
    assert {name: options[name] for name in VQGAN_DEFAULTS} == VQGAN_DEFAULTS
    (tmp_path / "metrics.jsonl").write_text("")  # it ended before its first step
    options = options_of(out=tmp_path)
    assert {name: options[name] for name in VQGAN_DEFAULTS} == VQGAN_DEFAULTS


def test_a_run_from_learnt_weights_has_the_rate_of_the_class_unless_it_began_otherwise(tmp_path):
    started = ["--init_from", "runs/a"]
    assert options_of(*started, out=tmp_path).trainer.lr == IN_PYTHON["trainer.lr"]
    begun(tmp_path, lr=VQGAN_DEFAULTS["trainer.lr"])
    assert options_of(*started, out=tmp_path).trainer.lr == VQGAN_DEFAULTS["trainer.lr"]


@pytest.mark.parametrize(
    ("length", "said", "expected"),
    [
        ({"num_train_steps": 700, "epochs": None}, [], (700, None)),
        ({"num_train_steps": None, "epochs": 3.5}, [], (None, 3.5)),
        ({"num_train_steps": 700, "epochs": None}, ["--epochs", "4"], (None, 4.0)),
        ({"num_train_steps": None, "epochs": 3.5}, ["--steps", "9"], (9, None)),
        ({"num_train_steps": 700, "epochs": None}, ["--overwrite"], (None, EPOCHS)),
    ],
)
def test_a_run_that_is_resumed_keeps_its_length(length, said, expected, tmp_path):
    begun(tmp_path, **length)
    options = train_options("vqgan", ["--data", "digits", "--image_size", "32", *said, "--out", str(tmp_path)])
    assert (options.trainer.num_train_steps, options.trainer.epochs) == expected


@pytest.mark.parametrize("model", ["my_tokenizers.Plain", "vqdist.models.vqgan.VQGanVAE"])
def test_a_class_of_ones_own_has_its_own_defaults(model, tmp_path, monkeypatch):
    (tmp_path / "my_tokenizers.py").write_text(
        "from vqdist import VQGanVAE\n\n\nclass Plain(VQGanVAE):\n"
        "    def __init__(self, *, dim: int = 16, quantizer: str = 'vq'):\n"
        "        super().__init__(dim=dim, quantizer=quantizer, use_gan=False, perceptual='none')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = train_options(model, [*GIVEN, "--model.quantizer", "vq", "--out", "nowhere"])
    expected = IN_PYTHON if "Plain" in model else VQGAN_DEFAULTS
    assert {name: options[name] for name in VQGAN_DEFAULTS} == expected
    refuse_mistakes(model_entry(model), options, {})


@pytest.mark.parametrize("missing", [[], ["trainer.lr"], ["model.vq_kwargs.decay"]], ids=str)
def test_a_run_of_such_a_class_that_began_with_the_defaults_of_the_command_goes_on_with_them(
    missing, tmp_path, monkeypatch
):
    """They held for each class once; one by one, and not for what the run began with otherwise or somebody says."""
    (tmp_path / "my_models.py").write_text(
        "from typing import Any\nfrom vqdist import VQGanVAE\n\n\nclass Wide(VQGanVAE):\n"
        "    def __init__(self, *, dim: int = 16, vq_kwargs: dict[str, Any] | None = None):\n"
        "        super().__init__(dim=dim, quantizer='vq', vq_kwargs=vq_kwargs, perceptual='none')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    found = {**VQGAN_DEFAULTS, **{f"model.vq_kwargs.{name}": one for name, one in VQ_OPTIONS.items()}}
    written = {name: value for name, value in found.items() if name not in missing}
    begun(out, **{name.removeprefix("trainer."): one for name, one in written.items() if name.startswith("trainer.")})
    config = json.loads((out / "config.json").read_text())
    of_codebook = {name: one for name, one in VQ_OPTIONS.items() if f"model.vq_kwargs.{name}" not in missing}
    config["model"] = {"vq_kwargs": of_codebook}
    (out / "config.json").write_text(json.dumps(config))
    again = train_options("my_models.Wide", [*GIVEN, "--out", str(out)])
    assert {name: again[name] for name in VQGAN_DEFAULTS} == {
        name: IN_PYTHON[name] if name in missing else value for name, value in VQGAN_DEFAULTS.items()
    }
    assert again.model.vq_kwargs == of_codebook
    said = train_options("my_models.Wide", [*GIVEN, "--out", str(out), "--trainer.max_grad_norm", "null"])
    assert said.trainer.max_grad_norm is None
    new = train_options("my_models.Wide", [*GIVEN, "--out", str(tmp_path / "new")])
    assert new.model.vq_kwargs is None and {name: new[name] for name in VQGAN_DEFAULTS} == IN_PYTHON


def test_a_preset_without_a_discriminator_is_one_without_a_gan(capsys):
    """Unless one is given; to ask for it without saying which is a mistake, in Python too."""
    alone = ["--model.preset", "titok_l32_stage1"]
    assert options_of(*alone).model.use_gan is False
    assert options_of(*alone, "--model.discriminator", "patchgan").model.use_gan is True
    assert options_of("--model.preset", "titok_l32_stage2").model.use_gan is True
    asked = [*GIVEN, *alone, "--model.use_gan", "true", "--model.perceptual", "none", "--out", "nowhere/run"]
    asked[asked.index("32")] = "256"
    for arguments in (asked, [*asked[:4], *asked[6:]]):
        assert main(["train", "vqgan", *arguments]) == 2
        assert "preset titok_l32_stage1 has no discriminator" in capsys.readouterr().err


def test_merged_options_of_a_file_are_said(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "data: {folder: digits, image_size: 32}\n"
        "model: {quantizer: vq, vq_kwargs: {decay: 0.7}}\n"
        "trainer: {<<: [{lr: 1.0e-4}, {max_grad_norm: &n 5.0}], batch_size: 2, discr_max_grad_norm: *n}\n"
    )
    options = train_options("vqgan", ["--config", str(tmp_path / "a.yaml"), "--out", "nowhere"])
    assert options.trainer.lr == 1e-4 and options.trainer.max_grad_norm == options.trainer.discr_max_grad_norm == 5.0
    assert options.model.vq_kwargs == {**VQ_OPTIONS, "decay": 0.7}
    (tmp_path / "a.yaml").write_text("trainer:\n  <<: 3\n")
    with pytest.raises(UserError, match="a.yaml, line 2: no YAML: expected a mapping"):
        train_options("vqgan", ["--config", str(tmp_path / "a.yaml")])


def test_halvings_are_those_of_the_widths_that_are_said():
    arguments = ["--data", "digits", "--image_size", "256", "--out", "nowhere"]
    arguments += ["--model.encdec_layer_mults", "[1, 2, 4]"]
    assert train_options("vqgan", arguments).model.layers == 3
    assert train_options("vqgan", [*arguments, "--model.dim", "16"]).model.layers == 3
    assert train_options("vqgan", [*arguments, "--model.layers", "2"]).model.layers == 2  # the model refuses it


def test_a_file_of_weights_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    assert options_of("--model.perceptual", "lpips:~/vgg.pth").model.perceptual == "lpips:~/vgg.pth"
    with pytest.raises(UserError, match="no such file: ~/other.pth"):
        options_of("--model.perceptual", "lpips:~/other.pth")


def test_a_date_is_a_word(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {encoder: {class_path: my.Encoder, init_args: {tag: 2026-11-29}}}\n")
    expected = {"class_path": "my.Encoder", "init_args": {"tag": "2026-11-29", "width": 3}}
    of_width = ("model.encoder.width", "3")
    pieces = [("model.encoder.class_path", "my.Encoder"), ("model.encoder.tag", "2026-11-29"), of_width]
    for given in (pieces, [("config", str(tmp_path / "a.yaml")), of_width]):
        *_, (_, specification) = joined(given, {"model.encoder": ENCODERS})
        assert json.loads(str(specification)) == expected


def test_what_is_said_of_a_run_from_before_is_compared(tmp_path):
    begun(tmp_path, max_grad_norm=0.5)
    options = options_of("--trainer.adversarial_weight", "0.1", out=tmp_path)
    assert options.trainer.adversarial_weight == 0.1  # it was 1: refused, or allowed by allow_config_change
    assert options.trainer.max_grad_norm == 1.0  # it was said then and is not now: refused as ever
    assert options.trainer.lr == IN_PYTHON["trainer.lr"]


@pytest.mark.parametrize("content", ["not JSON", "[]", "{}", '{"trainer": 3, "model": []}'])
def test_a_configuration_that_says_nothing_is_left_to_the_run(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert options_of("--model.quantizer", "vq", out=tmp_path).trainer.adversarial_weight in (0.1, 1.0)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_two_players_depend_on_no_default_of_the_command(recipe):
    said = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    model, trainer = said.get("model", {}), said["trainer"]
    preset = PRESETS.get(model.get("preset"))
    alone = not model.get("use_gan", True) or (preset is not None and preset.discriminator is None)
    if not re.search(r"vqdist train vqgan", recipe.read_text(encoding="utf-8")) or alone:
        assert not OF_PLAYERS.keys() & {f"trainer.{name}" for name in trainer}
        return
    assert [name for name in VQGAN_DEFAULTS if name.partition(".")[2] not in trainer] == []
    if model.get("quantizer") == "vq":
        assert VQ_OPTIONS.keys() <= model["vq_kwargs"].keys()


def test_python_keeps_its_defaults():
    assert inspect.signature(VQGanTrainerConfig).parameters["adversarial_weight"].default == 1.0


@pytest.mark.nightly  # 300 steps; that the command has these defaults is shown above
@pytest.mark.parametrize(("images", "channels", "least"), [("digits", "1", 150), ("synthetic:500", "3", 40)])
def test_a_discriminator_that_joins_late_undoes_nothing(images, channels, least, tmp_path):
    """The least perplexity is less than half of those seen with three seeds, 353 and 101 codes.

    With the defaults of the classes the PSNR falls by 4.0 and 2.7 dB, and 15 of 512 codes are left in colour.
    """
    network = ["--image_size", "32", "--model.channels", channels, "--model.dim", "16", "--model.layers", "2"]
    codes = ["--model.discr_layers", "3", "--model.quantizer", "vq", "--model.codebook_size", "512"]
    length = ["--steps", "300", "--batch_size", "8", "--trainer.discriminator_start", "150"]
    often = ["--trainer.validate_every", "150", "--trainer.save_model_every", "0", "--trainer.save_results_every", "0"]
    other = ["--data", images, "--data.num_workers", "0", "--model.perceptual", "none"]
    given = [*other, *network, *codes, *length, *often]
    assert main(["train", "vqgan", *given, "--out", str(tmp_path / "run")]) == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    half, end = (line for line in lines if "valid/psnr" in line)
    assert (half["step"], end["step"]) == (150, 300)
    assert end["valid/psnr"] > half["valid/psnr"]
    assert end["valid/codebook_perplexity"] > least
