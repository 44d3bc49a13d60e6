"""The command line as people use it: the lines of the README, every launcher, evaluate, reconstruct, and mistakes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from launching import ROOT, free_port, run, torchrun, vqdist
from PIL import Image

from vqdist.errors import UserError
from vqdist.models.quantizers import QUANTIZERS

README = (ROOT / "README.md").read_text()
DIGITS = ROOT / "launch" / "recipes" / "digits_vqgan.yaml"
SMALL = (
    "--data digits --image_size 16 --data.num_workers 0 --model.dim 16 --model.layers 2 --model.channels 1 "
    "--model.perceptual none --model.codebook_size 64 --model.discr_layers 2 --trainer.batch_size 8 "
    "--trainer.num_train_steps 3"
).split()


FIRST_LINE = (
    "train vqgan --data digits --image_size 32 --model.dim 16 --model.layers 2 --model.channels 1 "
    "--model.perceptual none --trainer.batch_size 16"
).split()


def readme_lines(program: str) -> list[str]:
    """Return the README's indented lines that start this program."""
    return [line.strip() for line in README.splitlines() if re.match(rf"    {program}\b", line)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a short run of what a newcomer types, with fewer codes; started for real."""
    out = tmp_path_factory.mktemp("runs") / "a"
    vqdist(*FIRST_LINE, *"--trainer.num_train_steps 5 --model.codebook_size 1024 --out".split(), str(out), warm=False)
    return out


def test_train_writes_a_run_folder(trained):
    assert {path.name for path in trained.iterdir()} == {
        *("best.json", "checkpoints", "config.json", "events.jsonl", "export", "metrics.jsonl", "results")
    }
    assert (trained / "results" / "step_00000005.png").stat().st_size > 1000
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 5 and last["valid/images"] == 500


@pytest.mark.nightly
def test_the_first_line_as_it_stands(tmp_path):
    """With the 65,536 codes of the default, whose entropy loss takes a minute."""
    vqdist(*FIRST_LINE, *"--trainer.num_train_steps 20 --out".split(), str(tmp_path / "a"), timeout=500)
    assert json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20


def test_evaluate_prints_one_json_object(trained):
    result = vqdist("evaluate", str(trained), "--data", "synthetic:40")
    numbers = json.loads(result.stdout)
    measures = ["l1", "psnr", "psnr_per_image", "ssim", "ssim_luma", "codebook_usage", "codebook_perplexity", "images"]
    assert list(numbers) == [*measures, "protocol"]
    kept = json.loads((trained / "evaluations.jsonl").read_text().splitlines()[-1])
    assert kept.pop("step") > 0 and kept == numbers
    assert numbers["protocol"]["images"] == 40 and numbers["protocol"]["data"] == "synthetic:40"
    assert numbers["images"] == 40
    assert 0 < numbers["l1"] < 1 and 0 < numbers["codebook_usage"] < 1


def test_an_export_alone_says_its_image_size(trained, capsys):
    from vqdist.cli import main

    for folder in (trained, trained / "export"):
        assert main(["evaluate", str(folder), "--data", "synthetic:40"]) == 0
    of_run, of_export = map(json.loads, capsys.readouterr().out.splitlines())
    assert of_export == of_run


@pytest.mark.distributed
def test_evaluate_on_two_ranks_gives_the_numbers_of_one(trained):
    arguments = ["evaluate", str(trained), "--data", "synthetic:33", "--batch_size", "8"]
    one = json.loads(vqdist(*arguments).stdout)
    two = json.loads(torchrun(["-m", "vqdist", *arguments]).stdout)
    assert two.pop("protocol") == one.pop("protocol")
    assert two == pytest.approx(one, rel=1e-4)


def test_reconstruct_draws_pairs(trained, tmp_path):
    picture = tmp_path / "grid.png"
    vqdist("reconstruct", str(trained), "--data", "digits", "--out", str(picture), "--num_images", "4")
    assert Image.open(picture).size == (4 * 34 + 2, 2 * 34 + 2)


def test_the_same_command_again_resumes(tmp_path):
    first = vqdist("train", "vqgan", *SMALL, "--out", str(tmp_path / "run"))
    assert "resumed" not in first.stderr
    again = vqdist("train", "vqgan", *SMALL, "--trainer.num_train_steps", "5", "--out", str(tmp_path / "run"))
    assert "step_00000003: step 3 of 5" in again.stderr
    assert "5 steps on local" in again.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("line", [*readme_lines("torchrun"), *readme_lines("accelerate launch")])
def test_launcher_lines_of_the_readme(line, tmp_path):
    command = shlex.split(line)
    command[command.index("--out") + 1] = str(tmp_path / "run")
    if command[0] == "torchrun":
        command[1:1] = ["--master_port", str(free_port())]
    result = run([*command, "--trainer.num_train_steps", "4"])
    assert re.search(r"4 steps on (accelerate|deepspeed), 256 images", result.stdout)  # 2 ranks x 32 images x 4 steps
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["world_size"] == 2


@pytest.mark.distributed
@pytest.mark.parametrize("flag", ["--num_accelerators", "--num_gpus"])
def test_deepspeed_launcher(flag, tmp_path):
    config = str(ROOT / "deepspeed_configs" / "zero1.json")
    command = ["deepspeed", flag, "2", "--master_port", str(free_port()), "--module", "vqdist", "train", "vqgan"]
    backend = ["--backend", "deepspeed", "--deepspeed_config", config, "--out", str(tmp_path / "run")]
    result = run([*command, *SMALL, *backend])
    assert "3 steps on deepspeed, 48 images" in result.stdout


def test_python_of_the_readme(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "nested").mkdir(parents=True)
    for index in range(40):
        colour = (index * 6, 255 - index * 6, 90)
        Image.new("RGB", (40, 36), colour).save(tmp_path / "images" / "nested" / f"{index:02d}.PNG")
    names: dict = {"images": torch.rand(2, 1, 32, 32)}
    exec(code, names)
    assert names["codes"].shape == (2, 64)
    assert names["images"].shape == (16, 1, 32, 32)
    assert "'recon_loss'" in capsys.readouterr().out


def test_print_config_can_be_read_back(tmp_path):
    printed = vqdist("train", "vqgan", *SMALL, "--out", "x", "--print_config").stdout
    config = yaml.safe_load(printed)
    assert config["data"]["folder"] == "digits" and config["trainer"]["batch_size"] == 8 and config["out"] == "x"
    (tmp_path / "config.yaml").write_text(printed)
    again = vqdist("train", "vqgan", "--config", str(tmp_path / "config.yaml"), "--print_config").stdout
    assert yaml.safe_load(again) == config


def test_command_line_goes_before_the_file(tmp_path):
    arguments = [
        "--config",
        str(DIGITS),
        "--trainer.lr",
        "0.5",
        "--model.vq_kwargs.decay",
        "0.7",
        "--print_config",
    ]
    config = yaml.safe_load(vqdist("train", "vqgan", *arguments).stdout)
    assert config["trainer"]["lr"] == 0.5
    assert config["model"]["vq_kwargs"]["decay"] == 0.7
    assert config["model"]["vq_kwargs"]["codebook_dim"] == 16


def test_help_explains_every_option():
    text = " ".join(vqdist("train", "vqgan", "--help").stdout.split())
    length = "Optimizer steps of the whole run; or give epochs. (a whole number or null; default: null, or as so far"
    assert length in text
    assert "Images of one micro-batch of one process. (a whole number; default: 2048 / image_size" in text
    assert "channels of the first convolution of vqdist's own networks; a multiple of `encdec_resnet_groups`" in text
    names = ", ".join(f"`{name}`" for name in QUANTIZERS)
    assert f"Names: {names}; --model.quantizer.help NAME" in text and "`multiscale_vq`, `gradient_vq`" in text
    without_help = re.findall(r"--((?:data|model|trainer)\.\w+) \S+ \((?:an?|true) ", text)
    assert without_help == []


MISTAKES = {
    "no command": (["trian"], "there is no command 'trian'; nearest: train"),
    "no model": (["train", "vqgn"], "there is no model 'vqgn'; nearest: vqgan"),
    "typo": (
        ["train", "vqgan", *SMALL, "--trainer.bach_size", "4"],
        "--trainer.bach_size; nearest: trainer.batch_size",
    ),
    "no out": (["train", "vqgan", *SMALL], "--out is missing"),
    "not a number": (["train", "vqgan", *SMALL, "--trainer.batch_size", "ten", "--out", "x"], "trainer.batch_size"),
    "no folder": (["train", "vqgan", *SMALL, "--data", "/no/such", "--out", "x"], "/no/such"),
    "image size": (
        ["train", "vqgan", *SMALL, "--image_size", "30", "--out", "x"],
        "image_size 30 is not a multiple of 4",
    ),
    "batch": (
        ["train", "vqgan", *SMALL, "--trainer.batch_size", "9999", "--out", "x"],
        "one optimizer step takes 9999",
    ),
    "horovod": (["train", "vqgan", *SMALL, "--backend", "horovod", "--out", "x"], "backend 'accelerate' does its job"),
    "fp16": (["train", "vqgan", *SMALL, "--trainer.precision", "fp16", "--out", "x"], "use bf16"),
    "no run": (["evaluate", "/no/run", "--data", "digits"], "no such run, export or file: /no/run"),
    "vgg": (
        ["train", "vqgan", *SMALL, "--model.perceptual", "/no/vgg16.pth", "--out", "x"],
        "/no/vgg16.pth",
    ),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    from vqdist.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vqdist: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_unknown_key_of_a_file_is_named_with_the_nearest(capsys, tmp_path):
    from vqdist.cli import main

    path = tmp_path / "config.yaml"
    path.write_text(DIGITS.read_text().replace("batch_size:", "batch_sise:"))
    assert main(["train", "vqgan", "--config", str(path), "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "batch_sise" in error and "nearest: trainer.batch_size" in error


@pytest.mark.distributed
def test_two_processes_never_train_two_models(tmp_path):
    result = torchrun(
        ["-m", "vqdist", "train", "vqgan", *SMALL, "--backend", "local", "--out", str(tmp_path / "run")], check=False
    )
    assert result.returncode != 0
    said = "backend 'local' under a launcher of 2 processes would train 2"
    # both make the mistake and rank 0 says it; the other one only if rank 0 is slow to start
    assert re.search(f"vqdist: error: (rank 1: )?{said}", result.stderr)
    assert result.stderr.count(f"vqdist: error: {said}") <= 1


WHOLE = '{"class_path": "my_data.Squares", "init_args": {"count": 24}}'


@pytest.mark.parametrize(
    "arguments, folder",
    {
        "a name": (["--data", "digits"], "digits"),
        "a dictionary": (["--data", WHOLE], json.loads(WHOLE)),
        "a dictionary without a class": (["--data.folder", '{"spec": 3}'], {"spec": 3}),
        "an alias and a piece": (
            ["--data", "my_data.Squares", "--data.folder.count", "3"],
            {"class_path": "my_data.Squares", "init_args": {"count": 3}},
        ),
        "a piece before its alias": (
            ["--data.folder.count", "3", "--data", WHOLE],
            {"class_path": "my_data.Squares", "init_args": {"count": 3}},
        ),
        "a piece of the file's": (
            ["--data.folder.width", "3"],
            {"class_path": "my_data.Circles", "init_args": {"size": 8, "width": 3}},
        ),
        "another class for the file's": (
            ["--data.folder.class_path", "my_data.Squares"],
            {"class_path": "my_data.Squares", "init_args": {"size": 8}},
        ),
    }.values(),
)
def test_a_part_on_the_command_line_replaces_or_changes_that_of_a_file(arguments, folder, tmp_path):
    """Under its own name and under an alias; two dictionaries are never mixed."""
    from vqdist.cli.train import train_options

    file = tmp_path / "run.yaml"
    file.write_text("data: {folder: {class_path: my_data.Circles, init_args: {size: 8}}, image_size: 16}\n")
    rest = ["--config", str(file), "--trainer.batch_size", "2", "--model.dim", "16", "--out", "run"]
    assert train_options("vqgan", [*arguments, *rest]).data.folder == folder


def test_two_names_of_a_part_must_agree():
    from vqdist.cli.train import train_options

    with pytest.raises(UserError, match="--data a and --data.folder b contradict each other"):
        train_options("vqgan", ["--data", "a", "--data.folder", "b", "--data.folder.count", "3", "--out", "run"])
