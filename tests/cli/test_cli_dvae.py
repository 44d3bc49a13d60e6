"""`vqdist train dvae` with the flags of DALL-E's train_vae: each has an effect, and none is taken without a word."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import ROOT, torchrun, vqdist
from PIL import Image
from scenarios import QUALITY

from vqdist.backends import resolve_backend
from vqdist.cli import main
from vqdist.cli.models import MODELS
from vqdist.cli.train import train_options
from vqdist.errors import UserError

ALIASES = MODELS["dvae"].aliases
SMALL = (
    "--image_size 16 --epochs 1 --batch_size 4 --num_tokens 32 --num_layers 2 --num_resnet_blocks 1 --emb_dim 16 "
    "--hidden_dim 16"
).split()

# flag of train_vae: (value on the command line or None for a bare flag, option, its value)
EFFECTS = {
    "image_folder": ("images", "data.folder", "images"),
    "image_size": ("64", "data.image_size", 64),
    "epochs": ("7", "trainer.epochs", 7.0),
    "batch_size": ("3", "trainer.batch_size", 3),
    "learning_rate": ("2e-4", "trainer.lr", 2e-4),
    "lr_decay_rate": ("0.9", "trainer.lr_decay_rate", 0.9),
    "starting_temp": ("2", "trainer.starting_temp", 2.0),
    "temp_min": ("0.1", "trainer.temp_min", 0.1),
    "anneal_rate": ("1e-3", "trainer.anneal_rate", 1e-3),
    "num_images_save": ("9", "trainer.num_images_save", 9),
    "num_tokens": ("16", "model.num_tokens", 16),
    "num_layers": ("4", "model.num_layers", 4),
    "num_resnet_blocks": ("1", "model.num_resnet_blocks", 1),
    "smooth_l1_loss": (None, "model.smooth_l1_loss", True),
    "emb_dim": ("8", "model.codebook_dim", 8),
    "hidden_dim": ("8", "model.hidden_dim", 8),
    "kl_loss_weight": ("0.5", "model.kl_div_loss_weight", 0.5),
    "transparent": (None, "model.channels", 4),
    "distributed_backend": ("dummy", "backend", "local"),
    "deepspeed": (None, "backend", "deepspeed"),
    "deepspeed_config": ("zero.json", "deepspeed_config", "zero.json"),
}


def options(*arguments: str) -> dict:
    """Return what `vqdist train dvae ARGUMENTS` resolves to, by dotted option."""
    groups = train_options("dvae", list(arguments)).as_dict()
    return {
        (f"{group}.{name}" if name else group): value
        for group, content in groups.items()
        for name, value in (content.items() if isinstance(content, dict) else [("", content)])
    }


@pytest.fixture(scope="module")
def defaults() -> dict:
    """Return what no argument at all resolves to."""
    return options()


def error_of(arguments: list[str], capsys) -> str:
    """Return the one line of a mistake."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("vqdist: error: ") and captured.err.count("\n") == 1
    return captured.err.strip()


# ----------------------------------------------------------------------------------------------- flags


def test_every_flag_has_a_case():
    assert EFFECTS.keys() == ALIASES.keys()


@pytest.mark.parametrize("flag", EFFECTS)
def test_flag_changes_its_option_and_nothing_else(flag, defaults):
    value, option, expected = EFFECTS[flag]
    forms = [[f"--{flag}"]] if value is None else [[f"--{flag}", value], [f"--{flag}={value}"]]
    assert defaults[option] != expected
    for arguments in forms:
        assert options(*arguments) == {**defaults, option: expected}


@pytest.mark.parametrize("flag", [flag for flag, (value, *_) in EFFECTS.items() if value is None])
def test_a_bare_flag_may_stand_beside_its_option(flag, defaults):
    option, value = ALIASES[flag].option, ALIASES[flag].value
    assert options(f"--{option}", value) == options(f"--{flag}") == options(f"--{flag}", f"--{option}={value}")


def test_backends_go_by_both_of_their_names(defaults):
    flags = ["--distributed_backend", "DeepSpeed", "--deepspeed", "--deepspeed_config", "zero.json"]
    assert options(*flags) == {**defaults, "backend": "deepspeed", "deepspeed_config": "zero.json"}


def test_defaults_are_those_of_train_vae(defaults):
    data = {"image_size": 128}
    model = {"num_tokens": 8192, "num_layers": 3, "num_resnet_blocks": 2, "codebook_dim": 512, "hidden_dim": 256}
    losses = {"smooth_l1_loss": False, "kl_div_loss_weight": 0, "channels": 3}
    trainer = {"batch_size": 8, "lr": 1e-3, "lr_schedule": "exponential", "lr_decay_rate": 0.98, "num_images_save": 4}
    draw = {"starting_temp": 1, "temp_min": 0.5, "anneal_rate": 1e-6}
    groups = {"data": data, "model": {**model, **losses}, "trainer": {**trainer, **draw}}
    expected = {f"{group}.{name}": value for group, content in groups.items() for name, value in content.items()}
    assert {name: defaults[name] for name in expected} == expected
    assert {"model.image_size", "model.temperature"}.isdisjoint(defaults)  # the data's and the trainer's own


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(
    "words",
    [["--local_rank", "0"], ["--local_rank=0"], ["--local_rank", "-1"], ["--local-rank", "0"], ["--local-rank=1"]],
)
def test_local_rank_is_the_launchers(words, place, capsys):
    arguments = ["train", "dvae", "--transparent", "--print_config"]
    printed = []
    for line in (arguments, [*arguments[:place], *words, *arguments[place:]]):
        with pytest.raises(SystemExit):
            main(line)
        printed.append(capsys.readouterr().out)
    assert "channels: 4" in printed[0] and printed[1] == printed[0]


# ----------------------------------------------------------------------------------------------- mistakes

CONTRADICTIONS = {
    "--transparent --model.channels 3": "--transparent and --model.channels 3 contradict each other: "
    "model.channels is 4 or 3; leave one out",
    "--distributed_backend dummy --deepspeed": "--distributed_backend dummy and --deepspeed contradict each other: "
    "backend is local or deepspeed; leave one out",
    "--learning_rate 0.1 --trainer.lr 0.2": "--learning_rate 0.1 and --trainer.lr 0.2 contradict each other",
    "--trainer.lr=0.2 --learning_rate=0.1": "--trainer.lr 0.2 and --learning_rate 0.1 contradict each other",
    "--deepspeed --backend accelerate": "--deepspeed and --backend accelerate contradict each other",
    "--smooth_l1_loss --model.smooth_l1_loss false": "--smooth_l1_loss and --model.smooth_l1_loss false contradict",
    "--image_folder a --data b": "--image_folder a and --data b contradict each other: data.folder is a or b",
    "--data a --data.folder a --image_folder b": "--data a and --image_folder b contradict each other",
    "--image_folder a --epochs 2 --trainer.num_train_steps 9 --out OUT": "num_train_steps 9 and epochs 2 are both",
    "--lr_decay_rate 0.5 --trainer.lr_schedule constant --data synthetic --out OUT": "lr_decay_rate 0.5 does nothing",
}
MISTAKES = {
    "--lerning_rate 1": "there is no option --lerning_rate; nearest: learning_rate",
    "--image_foldr images": "there is no option --image_foldr; nearest: image_folder",
    "--batch_sise 4": "nearest: batch_size, trainer.batch_size",
    "--smooth_l1_loss true": "--smooth_l1_loss takes no value, but 'true' follows it; it is short for --model.smooth",
    "--transparent=4": "--transparent takes no value, but '4' follows it; it is short for --model.channels 4",
    "--distributed_backend mpi": "--distributed_backend 'mpi' is not known; choose one of dummy, deepspeed, horovod",
    "--local_rank zero": "--local_rank 'zero' is no number",
    "--local_rank": "--local_rank '' is no number",
    "--local-rank zero": "--local-rank 'zero' is no number",
    "--epochs .inf --data synthetic:64 --out OUT": "epochs inf is not possible; it must be above 0 and at most 1e+09",
    "--dist_timeout .inf --data synthetic:64 --out OUT": "dist_timeout inf is not possible",
    "--lr_decay_rate 1e200 --data synthetic:64 --out OUT": "lr_decay_rate 1e+200 is not possible; it must be above",
    "--starting_temp .inf --data synthetic:64 --out OUT": "starting_temp inf is not possible",
    "--anneal_rate .inf --data synthetic:64 --out OUT": "anneal_rate inf is not possible",
    "--kl_loss_weight .inf --data synthetic:64 --out OUT": "kl_div_loss_weight inf is not possible",
    "--model.normalization [[.inf,0,0],[1,1,1]] --data synthetic:64 --out OUT": "normalization has the means [inf, 0.",
    "--model.kl_reduction dalle --data synthetic:64 --out OUT": "kl_reduction dalle does nothing, because the model's",
    "--model.temperature 1": "there is no option --model.temperature",
    "--model.image_size 64": "there is no option --model.image_size; nearest: data.image_size, image_size",
    "--learning_rate": "--learning_rate needs a value: a number",
    "--data synthetic": "--out is missing; give the run folder",
    "--out OUT": "--data (or --image_folder) is missing; give an image folder, or digits",
    "--out OUT --data synthetic --image_size 30": "image_size 30 is not a multiple of 8 (2 ** 3 num_layers)",
    "--out OUT --data synthetic --image_size 16 --deepspeed_config zero.json": "use --backend deepspeed",
}


@pytest.mark.parametrize("words, message", [*CONTRADICTIONS.items(), *MISTAKES.items()])
def test_a_mistake_is_one_line(words, message, capsys, tmp_path):
    arguments = words.replace("OUT", str(tmp_path / "run")).split()
    assert message in error_of(["train", "dvae", *arguments], capsys)
    assert not (tmp_path / "run").exists()


def test_horovod_is_told_what_does_its_job(capsys, tmp_path):
    with pytest.raises(UserError) as refused:
        resolve_backend("horovod")
    arguments = ["train", "dvae", "--image_folder", "synthetic", "--distributed_backend", "horovod"]
    assert error_of([*arguments, "--out", str(tmp_path / "run")], capsys) == f"vqdist: error: {refused.value}"


def test_a_file_has_options_under_their_own_names(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 0.1\n")
    message = error_of(["train", "dvae", "--config", str(tmp_path / "config.yaml")], capsys)
    assert message.endswith("line 1: there is no option learning_rate; in a file it is trainer.lr")


@pytest.mark.parametrize(
    "content, option",
    [
        ("trainer:\n  learning_rate: 0.1\n", "trainer.lr"),
        ("model:\n  emb_dim: 8\n", "model.codebook_dim"),
        ("trainer:\n  hidden_dim: 8\n", "model.hidden_dim"),
        ("model:\n  transparent: true\n", "model.channels: 4"),
        ("transparent: true\n", "model.channels: 4"),
    ],
)
def test_also_within_the_groups_of_a_file(content, option, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    message = error_of(["train", "dvae", "--config", str(tmp_path / "config.yaml")], capsys)
    assert message.endswith(f"; in a file it is {option}")


def test_a_flag_goes_before_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text("data:\n  image_size: 64\nmodel:\n  channels: 1\n  num_layers: 2\n")
    resolved = options("--transparent", "--config", str(tmp_path / "config.yaml"))
    assert (resolved["data.image_size"], resolved["model.channels"], resolved["model.num_layers"]) == (64, 4, 2)


# ----------------------------------------------------------------------------------------------- help


def test_help_lists_the_flags_and_what_they_stand_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["train", "dvae", "--help"])
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if not line.startswith("  --")) <= 100  # names are not broken
    listed = text.partition("\nflags of DALL-E's train_vae, under their own names:\n")[2]
    listed, _, changed = listed.partition("\nwhere they mean something else than in train_vae:\n")
    lines = dict(line.strip().split(maxsplit=1) for line in listed.strip().splitlines())
    assert lines.keys() == {*(f"--{flag}" for flag in ALIASES), "--local_rank"}
    assert lines["--learning_rate"] == "= --trainer.lr" and lines["--transparent"] == "= --model.channels 4"
    changed = " ".join(changed.split())
    for flag in ("lr_decay_rate", "kl_loss_weight", "anneal_rate", "batch_size"):
        assert f"--{flag} {ALIASES[flag].note}" in changed
    assert "per epoch" in changed and "--model.kl_reduction dalle" in changed
    assert "max(starting_temp * exp(-anneal_rate * step), temp_min)" in changed


def test_both_models_are_listed(capsys):
    assert main(["train"]) == 0
    assert re.findall(r"^  (\w+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE) == [
        (name, entry.title) for name, entry in MODELS.items()
    ]


# ----------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """60 PNGs, each half transparent."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(60):
        image = Image.new("RGBA", (24, 20), (index * 4, 255 - index * 4, 90, 255))
        image.paste((0, 0, 0, 0), (0, 0, 12, 20))
        image.save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """Return a run that was started with the flags of train_vae alone, but for --out."""
    out = tmp_path_factory.mktemp("runs") / "dvae"
    flags = [*SMALL, "--image_folder", str(images), "--transparent", "--smooth_l1_loss", "--kl_loss_weight=0.1"]
    result = vqdist(*"train dvae --distributed_backend dummy --local_rank 0 --out".split(), str(out), *flags)
    assert "15 steps on local, 60 images" in result.stdout  # 57 of 60 train, 4 at a time, once
    assert str(out / "results" / "step_00000015.png") in result.stdout and str(out / "export") in result.stdout
    return out


def test_train_writes_what_the_flags_say(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["trainer"]["image_size"] == config["model"]["image_size"] == 16
    assert config["model"]["channels"] == 4 and config["model"]["smooth_l1_loss"] is True
    exported = json.loads((trained / "export" / "config.json").read_text())
    assert (exported["model_type"], exported["image_size"], exported["num_tokens"]) == ("dvae", 16, 32)
    first = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl_weight"] == pytest.approx(0.1) and first["temperature"] == 1


def test_evaluate_run_and_export_alike(trained, images, capsys):
    for folder in (trained, trained / "export"):
        assert main(["evaluate", str(folder), "--data", str(images)]) == 0
    of_run, of_export = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(of_run) == [*QUALITY, "codebook_usage", "codebook_perplexity", "images", "protocol"]
    assert of_run["images"] == 60 and 0 < of_run["l1"] < 1 and of_export == of_run


def test_evaluate_at_another_size(trained, capsys):
    assert main(["evaluate", str(trained), "--data", "synthetic:8", "--image_size", "32"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 8
    assert "image_size 30 is not a multiple of 4" in error_of(
        ["evaluate", str(trained), "--data", "synthetic:8", "--image_size", "30"], capsys
    )


def test_an_old_export_is_asked_for_its_size(trained, tmp_path, capsys):
    export = tmp_path / "export"
    shutil.copytree(trained / "export", export)
    config = json.loads((export / "config.json").read_text())
    del config["image_size"]
    (export / "config.json").write_text(json.dumps(config))
    message = error_of(["evaluate", str(export), "--data", "synthetic:8"], capsys)
    assert "does not say on which image size it was trained; give image_size" in message


def test_reconstruct_keeps_transparency(trained, images, tmp_path):
    picture = tmp_path / "grid.png"
    assert main(["reconstruct", str(trained), "--data", str(images), "--out", str(picture), "--num_images", "4"]) == 0
    sheet = Image.open(picture)
    assert sheet.mode == "RGBA" and sheet.size == (4 * 18 + 2, 2 * 18 + 2)
    originals = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(38, 74, 4)[:18]
    assert {0, 255} <= set(originals[..., 3].flatten().tolist())


@pytest.mark.distributed
def test_two_ranks_train_with_the_flags_of_train_vae(images, tmp_path):
    flags = [*SMALL, "--image_folder", str(images), "--out", str(tmp_path / "run")]
    config = ["--deepspeed", "--deepspeed_config", str(ROOT / "deepspeed_configs" / "zero1.json")]
    result = torchrun(["-m", "vqdist", "train", "dvae", *flags, *config])
    assert "8 steps on deepspeed, 64 images" in result.stdout  # 57 images, 2 ranks x 4 at a time
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000008" / "manifest.json").read_text())
    assert (manifest["world_size"], manifest["backend"]) == (2, "deepspeed")
