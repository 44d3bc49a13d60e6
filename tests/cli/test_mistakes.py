"""Mistakes of people with files and folders: each mistake ends with one line that helps."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vqdist.cli import main
from vqdist.tracking import JsonlSink

SMALL = (
    "train vqgan --data synthetic:40 --image_size 16 --data.num_workers 0 --model.dim 16 --model.layers 2 "
    "--model.perceptual none --model.codebook_size 64 --model.discr_layers 2 --trainer.batch_size 8 "
    "--trainer.num_train_steps 2 --out"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return a finished run, to be copied and broken."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main([*SMALL, str(run)]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def error_of(arguments: list[str], capsys) -> str:
    """Return the last line on standard error of a command that must end with exit code 2 and without a traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vqdist: error: ") and not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    "content, line, said",
    [
        ("data:\n  folder: digits\n  image_size: [1, 2\ntrainer: {}\n", 4, "no YAML: expected ',' or ']'"),
        ("data:\n\tfolder: digits\n", 2, "no YAML: found character"),
        ("# a list\n- 1\n- 2\n", 2, "options by name are expected"),
        (
            "data:\n  folder: digits\n  image_size: big\n",
            3,
            "data.image_size big is not possible; give a whole number",
        ),
        (
            "data:\n  folder: digits\ntrainer:\n  lr: 1e-4\n  batch_size: many\n",
            5,
            "trainer.batch_size many is not possible; give a whole number",
        ),
        ("data:\n  folder: digits\n\n  imagesize: 16\n", 4, "there is no option data.imagesize; nearest: "),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_line(content, line, said, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    message = error_of(["train", "dvae", "--config", str(path), "--out", str(tmp_path / "run")], capsys)
    assert message.startswith(f"vqdist: error: {path}, line {line}: ") and said in message
    assert "unicode string" not in message


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_configuration_is_a_regular_file(kind, tmp_path, capsys):
    """Nobody may ever write into a pipe, and its reader would wait for ever."""
    path = tmp_path / "a.yaml" if kind == "pipe" else Path(os.devnull)
    if kind == "pipe":
        os.mkfifo(path)
    assert main(["train", "vqgan", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    assert f"configuration {path} is a pipe, socket or device; give a regular file" in capsys.readouterr().err


def test_a_mistake_on_the_command_line_blames_no_file(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  folder: digits\n  image_size: 16\n")
    arguments = ["train", "dvae", "--config", str(path), "--data.image_size", "big", "--out", str(tmp_path / "run")]
    assert str(path) not in error_of(arguments, capsys)


@pytest.mark.parametrize("rate", [["--trainer.lr", "1e38"], ["--trainer.lr", "1e300"], ["--trainer.discr_lr", "1e38"]])
def test_a_rate_beyond_float32_is_one_line(rate, tmp_path, capsys):
    message = error_of([*SMALL, str(tmp_path / "run"), *rate], capsys)
    assert "beyond float32 with a learning rate of" in message or "is inf at step" in message, message


def test_a_full_disk_names_the_file_and_the_checkpoint_that_the_run_goes_on_from(tmp_path, capsys, monkeypatch):
    """Log lines end at a disk that is full after the first checkpoint."""
    run, log = tmp_path / "run", JsonlSink.log

    def full_after_a_step(sink, step, values):
        if step == 2:
            sink.file = tmp_path / "full"
            sink.file.symlink_to("/dev/full")
        log(sink, step, values)

    monkeypatch.setattr(JsonlSink, "log", full_after_a_step)
    options = ["--trainer.save_model_every", "1", "--trainer.log_every", "1"]
    message = error_of([*SMALL, str(run), *options], capsys)
    assert f"{tmp_path}/full cannot be written: No space left on device" in message
    assert f"the same command goes on from {run}/checkpoints/step_00000001" in message


def test_the_run_folder_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "file cannot be written: File exists" in error_of([*SMALL, str(tmp_path / "file")], capsys)
    assert "cannot be written: Not a directory" in error_of([*SMALL, str(tmp_path / "file" / "run")], capsys)


def test_the_run_folder_lies_in_the_images(tmp_path, capsys):
    for index in range(20):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / f"{index}.png")
    message = error_of([*SMALL, str(tmp_path / "run"), "--data", str(tmp_path)], capsys)
    assert "lies in the folder of the images" in message
    assert not (tmp_path / "run").exists()


def test_images_that_changed_since_the_run_began(tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for index in range(40):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(images / f"{index}.png")
    assert main([*SMALL, str(out), "--data", str(images)]) == 0
    images = images.rename(tmp_path / "moved")
    assert main([*SMALL, str(out), "--data", str(images)]) == 0  # the same images elsewhere are the same images
    (images / "7.png").unlink()
    assert "data.images: " in error_of([*SMALL, str(out), "--data", str(images)], capsys)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"trainer": {}}'])
def test_config_json_that_is_none(run, capsys, content):
    (run / "config.json").write_text(content)
    assert str(run / "config.json") in error_of([*SMALL, str(run)], capsys)
    evaluate = ["evaluate", str(run), "--data", "synthetic:8"]
    if content in ("{", "[]"):
        assert str(run / "config.json") in error_of(evaluate, capsys)
    else:  # says no size, and the export does
        assert main(evaluate) == 0


@pytest.mark.parametrize("content", ["{", "{}"])
def test_manifest_that_is_none(run, capsys, content):
    (run / "checkpoints" / "step_00000002" / "manifest.json").write_text(content)
    assert "no checkpoint of" in (message := error_of([*SMALL, str(run)], capsys)) and "manifest.json" in message


def test_a_run_whose_checkpoints_are_gone_says_that_it_begins_again(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert main([*SMALL, str(run)]) == 0
    assert "holds a run without a complete checkpoint; it starts at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["trainer", "model", "data"])
def test_config_json_with_an_empty_part(run, capsys, part):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, part: None}))
    assert "is not of a run of vqdist; give another run folder" in error_of([*SMALL, str(run)], capsys)


@pytest.mark.parametrize("allowed", ["true", "false"])
def test_a_run_of_another_kind_of_model(run, capsys, allowed):
    """Said before anything else that differs, and whatever the flag."""
    dvae = "train dvae --data synthetic:40 --image_size 16 --num_layers 2 --hidden_dim 8 --batch_size 8".split()
    arguments = [*dvae, "--out", str(run), "--trainer.allow_config_change", allowed]
    before = (run / "config.json").read_text()
    message = error_of(arguments, capsys)
    assert message.endswith(
        f"{run} holds a run of a model of type 'vqgan' and this one is 'dvae'; give another run folder"
    )
    assert (run / "config.json").read_text() == before


def test_a_run_from_before_the_type_was_written(run, capsys):
    config = json.loads((run / "config.json").read_text())
    assert config.pop("model_type") == "vqgan"
    (run / "config.json").write_text(json.dumps(config))
    assert main([*SMALL, str(run), "--trainer.num_train_steps", "3"]) == 0
    assert "step 2 of 3" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["model_type"] == "vqgan"


def test_another_network_under_the_same_flag(run, capsys):
    before = (run / "config.json").read_text()
    message = error_of(
        [*SMALL, str(run), "--model.dim", "32", "--trainer.allow_config_change", "true"],
        capsys,
    )
    assert "holds another network than this configuration builds" in message and "size mismatch" in message
    assert (run / "config.json").read_text() == before
    assert main([*SMALL, str(run)]) == 0  # as it was, it goes on


def test_a_finished_run_with_fewer_steps_says_so(run, capsys):
    assert main([*SMALL, str(run), "--trainer.num_train_steps", "1"]) == 0
    assert "this run is past num_train_steps 1" in capsys.readouterr().err


def test_a_finished_run_with_fewer_epochs_says_so(tmp_path, capsys):
    """38 images to train on, 8 at a time: 2 epochs end in the middle of the tenth batch."""
    arguments = [*SMALL, str(tmp_path / "run"), "--trainer.num_train_steps", "null", "--trainer.epochs"]
    assert main([*arguments, "2"]) == 0
    assert main([*arguments, "2"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*arguments, "1.5"]) == 0
    assert "this run is past epochs 1.5, at 2.105 of them; nothing is trained" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_evaluate_of_a_broken_export(run, capsys, name):
    (run / "export" / name).write_bytes((run / "export" / name).read_bytes()[:40])
    assert "holds no model that can be loaded" in error_of(["evaluate", str(run), "--data", "synthetic"], capsys)


def test_files_are_readable_as_the_umask_says(finished):
    umask_file = finished / "metrics.jsonl"
    for name in ("export/model.safetensors", "checkpoints/step_00000002/ema.safetensors"):
        assert (finished / name).stat().st_mode == umask_file.stat().st_mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "RUN", "--data", "synthetic", "--batch_size", "0"], "batch_size 0"),
        (["evaluate", "RUN", "--data", "synthetic", "--num_workers", "-1"], "num_workers -1"),
        (["evaluate", "RUN", "--data", "synthetic", "--image_size", "0"], "image_size 0 is not a multiple of 4"),
        (["evaluate", "RUN"], "missing: --data"),
        (["reconstruct", "RUN", "--data", "synthetic", "--out", "x.jpg"], "ends in .png"),
        (["reconstruct", "RUN", "--data", "synthetic", "--num_images", "0"], "num_images 0"),
        (["reconstruct", "RUN", "--data", "synthetic", "--batch_size", "4"], "there is no option --batch_size"),
        ([*SMALL, "RUN", "--lrr", "1"], "nearest: lr"),
        ([*SMALL, "RUN", "--trainer.lr", ".inf"], "lr inf is not possible"),
        ([*SMALL, "RUN", "--trainer.use_ema", "false", "--trainer.ema_beta", "0.9"], "because use_ema is false"),
        ([*SMALL, "RUN", "--model.use_gan", "false", "--trainer.discr_lr", "1"], "the model has no discriminator"),
        ([*SMALL, "RUN", "--model.encoder", "my_nets." + "e" * 100_000], "characters)...e"),
        ([*SMALL, "RUN", "--trainer.lr", "n" * 100_000], "characters)..."),
        ([*SMALL, "RUN", "--trainer." + "o" * 100_000, "3"], "characters)..."),
        ([*SMALL, "RUN", "--model.encdec_resnet_groups", "0"], "encdec_resnet_groups 0"),
        ([*SMALL, "RUN", "--model.encdec_layer_mults", "[0,1]"], "encdec_layer_mults [0, 1]"),
        ([*SMALL, "RUN", "--model.encdec_num_resnet_blocks", "-1"], "encdec_num_resnet_blocks [0, -1]"),
    ],
)
def test_values(run, capsys, arguments, message):
    assert message in error_of([str(run) if word == "RUN" else word for word in arguments], capsys)


def test_the_command_line_goes_before_the_file_wherever_it_stands(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    with pytest.raises(SystemExit):
        main([*SMALL, "x", "--seed", "3", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    assert "seed: 3" in capsys.readouterr().out


def test_a_file_that_is_no_text(tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00binary")
    error_of(["train", "vqgan", "--config", str(tmp_path / "config.yaml")], capsys)


def test_an_environment_that_no_launcher_wrote(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE=two" in error_of([*SMALL, str(tmp_path / "run")], capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert "but not RANK and MASTER_ADDR and MASTER_PORT" in error_of([*SMALL, str(tmp_path / "run")], capsys)


def test_accelerate_kwargs_with_a_typo(tmp_path, capsys):
    arguments = [*SMALL, str(tmp_path / "run"), "--backend", "accelerate"]
    kwargs = ["--trainer.accelerate_kwargs", json.dumps({"split_batch": True})]
    assert "no argument 'split_batch'; nearest: split_batches" in error_of([*arguments, *kwargs], capsys)
