"""Names of options and words of the parser: short names, errors in sentences, `--help`, `--print_config`."""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml

from vqdist.cli import convert, encode, evaluate, main
from vqdist.cli.chosen import EPOCHS
from vqdist.cli.models import MODELS
from vqdist.cli.names import SHORT, Alias, full_name
from vqdist.cli.parsing import parse
from vqdist.cli.screen import kind_of
from vqdist.cli.train import parts_of, train_options, train_parser
from vqdist.errors import UserError

PARSERS = {
    **{f"train {model}": lambda model=model: train_parser(model) for model in MODELS},
    "encode": encode._parser,
    "evaluate": evaluate._evaluate_parser,
    "convert": convert._parser,
}
# words of Python, of its typing, and of the library that parses
FOREIGN = re.compile(
    r"<class|typing|\b(int|float|str|bool|dict|tuple|NoneType|Union|Optional|Subtypes|Expected|Path|Parser|parser)\b"
    r"|key \"|validate"
)
VQGAN = "train vqgan --data digits --image_size 32 --out RUN".split()


def wrong_values(kind: Any) -> list[str]:
    """Values, as YAML, that are not of an annotation; a bare word is a string wherever strings are taken."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    origins = {get_origin(part) or part for part in parts}
    if str in origins or Any in origins:
        return []
    values = {"word": {str}, "1.5": {float}, "[[x]]": {list}, "{a: {b: c}}": {dict}, "true": {bool}}
    values["12"] = {int, float}
    if NoneType not in origins:
        values["null"] = set()
    return [value for value, of in values.items() if not of & origins]


@pytest.fixture(scope="module", params=PARSERS)
def command(request):
    return request.param, PARSERS[request.param]()


def options_of(parser) -> dict[str, Any]:
    return {action.dest: kind_of(action) for action in parser._actions if action.option_strings and kind_of(action)}


def refused(parser, arguments: list[str], parts) -> str:
    with pytest.raises(UserError) as error:
        parse(parser, arguments, parts=parts)
    return str(error.value)


def test_a_value_of_another_type_is_a_sentence_for_every_option(command, tmp_path):
    """On the command line and in a file, which is named with the line."""
    name, parser = command
    parts, file, tried = (parts_of(name.split()[1]) if name.startswith("train") else {}), tmp_path / "a.yaml", 0
    for option, kind in options_of(parser).items():
        for value in wrong_values(kind):
            message = refused(parser, [f"--{option}", value], parts)
            assert message.startswith(f"--{option} {value!r} is not possible; give "), message
            assert not FOREIGN.search(message.partition("; give ")[2]), message
            *groups, last = option.split(".")
            lines = [*(f"{'  ' * depth}{group}:" for depth, group in enumerate(groups))]
            file.write_text("\n".join([*lines, f"{'  ' * len(groups)}{last}: {value}"]))
            message = refused(parser, ["--config", str(file)], parts)
            assert message.startswith(f"{file}, line {len(groups) + 1}: {option} {value} is not possible; give "), (
                message
            )
            assert not FOREIGN.search(message.partition("; give ")[2]), message
            tried += 1
    assert tried > (100 if name == "train vqgan" else 4)


def test_an_option_without_its_value_is_a_sentence_for_every_option(command):
    name, parser = command
    parts = parts_of(name.split()[1]) if name.startswith("train") else {}
    for option, kind in options_of(parser).items():
        if kind is not bool and bool not in get_args(kind):
            message = refused(parser, [f"--{option}"], parts)
            assert message.startswith(f"--{option} needs a value: ") and not FOREIGN.search(message[len(option) + 2 :])


def test_help_has_no_words_of_python(command):
    name, parser = command
    help_text = parser.format_help()
    assert not re.search(r"<class|typing|Optional\[|Union\[|\bNoneType\b|type: ", help_text)
    assert "(a whole number" in help_text or name == "convert"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1e-3"], "lr -0.001 is not possible; it must be at least 0"),
        (["--trainer.lr", "-1E-3"], "lr -0.001 is not possible; it must be at least 0"),
        (["--lr", "-.5"], "lr -0.5 is not possible"),
        (["--lr", "1", "--trainer.lr", "2"], "--lr 1 and --trainer.lr 2 contradict each other"),
        (["--batch_size", "4", "5"], "'5' belongs to no option, and the command takes options only"),
        (["-x"], "there is no option -x; options begin with two dashes"),
        (["--trainer", "3"], "--trainer '3' is not possible; give options of this group, as trainer.num_train_steps"),
        (["--config"], "--config needs a value: a YAML file, or the name of a recipe"),
        (
            ["--config", "digits_vqgam"],
            "no configuration 'digits_vqgam', as a file or a recipe; nearest: digits_vqgan",
        ),
        (["--config", "."], "configuration . is a folder; give a YAML file"),
        (["--print_config=all"], "--print_config=all is not possible; it takes skip_default or skip_unset"),
        (["--betaz", "1"], "there is no option --betaz; nearest: "),
        (["--ema_bet", "1"], "nearest: trainer.ema_beta"),
    ],
)
def test_other_mistakes_are_sentences(arguments, message, capsys):
    assert main([*VQGAN, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


SHORT_VALUES = {
    "data": "synthetic",
    "valid": "digits",
    "image_size": 64,
    "codebook_size": 128,
    "lr": 0.5,
    "batch_size": 3,
    "steps": 7,
    "epochs": 2.0,
    "workers": 1,
    "on_bad_image": "skip",
    "max_bad_frac": 0.5,
    "seed": 4,
    "out": "elsewhere",
}


@pytest.mark.parametrize("model", MODELS)
def test_short_names_are_the_same_for_every_model(model):
    of_tokenizer = {"image_size", "codebook_size"} if MODELS[model].over_tokenizer else set()
    for name in of_tokenizer:
        with pytest.raises(UserError, match=f"--{name} is the tokenizer's own; leave it out"):
            train_options(model, [f"--{name}", "32"])
    given = {name: value for name, value in SHORT_VALUES.items() if name not in of_tokenizer}
    options = train_options(model, [word for name, value in given.items() for word in (f"--{name}", str(value))])
    for name, value in given.items():
        assert value in [options.get(option) for option in (*SHORT.get(name, ()), name)], name


def test_the_end_of_a_name_will_do_where_no_other_option_ends_so():
    known = ["trainer.lr", "trainer.ema_beta", "model.width", "data.width", "model.vq_kwargs", "seed"]
    aliases = {"lr": Alias("trainer.lr")}
    assert full_name("ema_beta", known, aliases) == "trainer.ema_beta"
    assert full_name("vq_kwargs.decay", known, aliases) == "model.vq_kwargs.decay"
    assert full_name("lr", known, aliases) == "lr" and full_name("seed", known, aliases) == "seed"
    with pytest.raises(UserError, match="--width may be short for --model.width, --data.width; give one of these"):
        full_name("width", known, aliases)
    with pytest.raises(UserError, match="no option --ema_betta; nearest: trainer.ema_beta"):
        full_name("ema_betta", known, aliases)


def test_help_lists_the_short_names(capsys):
    with pytest.raises(SystemExit):
        main(["train", "dvae", "--help"])
    shown = capsys.readouterr().out
    assert re.search(r"--codebook_size +--model.num_tokens", shown) and re.search(r"--steps +--trainer.num_tr", shown)


def test_a_bare_option_that_is_true_or_false_is_true():
    options = train_options("vqgan", ["--image_size", "32", "--compile", "--tf32", "false", "--channels_last"])
    assert (options.trainer.compile, options.trainer.tf32, options.trainer.channels_last) == (True, False, True)


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        ("vqgan", "--image_size 32", {"model.dim": 32, "model.layers": 2, "trainer.batch_size": 64}),
        ("vqgan", "--image_size 28", {"model.dim": 32, "model.layers": 2, "model.discr_layers": 2}),
        ("vqgan", "--image_size 256", {"model.dim": 128, "model.layers": 4, "trainer.batch_size": 8}),
        ("vqgan", "--image_size 256 --dim 16", {"model.dim": 16, "model.layers": 4, "model.discr_layers": 4}),
        ("vqgan", "--image_size 32 --dim 16", {"model.layers": 4}),  # as before the choice
        ("vqgan", "--image_size 32 --preset llamagen_vq16", {"model.dim": None, "model.layers": 4}),
        ("vqgan", "--image_size 32 --steps 9", {"trainer.epochs": None, "trainer.num_train_steps": 9}),
        ("vqgan", "--config digits_vqgan", {"trainer.epochs": None, "trainer.batch_size": 32, "model.dim": 32}),
        ("vq_ar", "--image_size 28", {"model.patch_size": 4, "model.dim": 128, "trainer.batch_size": 64}),
        ("prior", "", {"trainer.epochs": EPOCHS, "trainer.batch_size": 32}),
        ("dvae", "", {"trainer.epochs": EPOCHS, "trainer.batch_size": 8, "data.image_size": 128}),
    ],
)
def test_what_nobody_says_is_chosen_by_the_image_size(model, arguments, expected):
    options = train_options(model, arguments.split())
    assert {option: options.get(option) for option in expected} == expected


def test_print_config_says_what_each_option_means_and_is_a_configuration(tmp_path, capsys):
    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["train", "vqgan", *arguments, "--print_config"])
        return capsys.readouterr().out

    first = printed("--config", "digits_vqgan", "--lr", "0.5")
    assert re.search(r"  # Peak learning rate[^\n]*\(a number; default: 0.001, in Python 0.0003\)\n  lr: 0.5\n", first)
    values = yaml.safe_load(first)
    assert values["trainer"]["lr"] == 0.5 and values["model"]["vq_kwargs"]["codebook_dim"] == 16
    (tmp_path / "again.yaml").write_text(first)
    assert printed("--config", str(tmp_path / "again.yaml")) == first
