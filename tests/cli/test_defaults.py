"""Defaults of `vqdist train vqgan` that are not those of the classes: where they hold, and where they are said."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import yaml
from launching import ROOT

from vqdist.cli import main
from vqdist.cli.defaults import OF_PLAYERS, VQ_OPTIONS, VQGAN_DEFAULTS, default_in_python
from vqdist.cli.models import MODELS
from vqdist.cli.train import refuse_mistakes, train_options
from vqdist.models.presets import PRESETS
from vqdist.models.quantizers.vq import VQ_DEFAULTS
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
    assert options.trainer.lr == VQGAN_DEFAULTS["trainer.lr"]


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


def begun(folder, **trainer) -> None:
    """Write what a run of the time before these defaults had in its folder."""
    before = {name.removeprefix("trainer."): value for name, value in IN_PYTHON.items()}
    configuration = {"trainer": {**before, **trainer}, "model": {"quantizer": "vq", "vq_kwargs": {"decay": 0.8}}}
    (folder / "config.json").write_text(json.dumps(configuration))


def test_a_run_from_before_goes_on_as_it_was(tmp_path):
    begun(tmp_path)
    options = options_of("--model.quantizer", "vq", "--model.vq_kwargs.decay", "0.8", out=tmp_path)
    assert {name: options[name] for name in VQGAN_DEFAULTS} == IN_PYTHON
    assert options.model.vq_kwargs == {"decay": 0.8}


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
