"""`vqdist train prior`, `sample` and `report` as people use them: classes, guidance, launchers, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import torchrun, vqdist
from PIL import Image
from scenarios import build_prior, build_tokenizer, build_vq_ar

from vqdist import Prior
from vqdist.cli import main
from vqdist.drawing import draw_numbers
from vqdist.sampling import DrawOptions

SMALL = "--model.dim 32 --model.depth 1 --model.heads 1 --model.dim_head 32 --data.num_workers 0".split()
SHORT = "--trainer.num_train_steps 3 --trainer.batch_size 4 --trainer.num_images_save 4".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "export"
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prior(tmp_path_factory) -> Path:
    """Return a prior over three classes whose random weights have opinions."""
    model = build_prior()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    folder = tmp_path_factory.mktemp("prior") / "saved"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory) -> Path:
    """Train over the tokenizer, by the command line."""
    out = tmp_path_factory.mktemp("runs") / "prior"
    train = ["train", "prior", "--tokenizer", str(tokenizer.parent), "--data", "synthetic:64", "--out", str(out)]
    result = vqdist(*train, *SMALL, *SHORT, "--model.num_classes", "10")
    assert "3 steps on local, 12 images" in result.stdout and "samples" in result.stdout
    return out


def call(*arguments: object) -> int:
    """Run the command in this process."""
    return main([str(argument) for argument in arguments])


def one_line(capsys) -> str:
    """Return what was said on standard error, which must be one line."""
    said = capsys.readouterr().err.strip()
    assert said.startswith("vqdist: error: ") and "\n" not in said, said
    return said.removeprefix("vqdist: error: ")


# --------------------------------------------------------------------------------------------- train


def test_a_run_over_a_tokenizer_can_be_sampled_from_and_reported(run, tmp_path, capsys):
    assert {path.name for path in (run / "export").iterdir()} >= {"config.json", "model.safetensors", "tokenizer"}
    assert call("sample", run, "--num", 4, "--class", 7, "--cfg", 1.5, "--out", tmp_path / "a.png") == 0
    assert Image.open(tmp_path / "a.png").size == (2 * 18 + 2, 2 * 18 + 2)
    capsys.readouterr()
    assert call("report", run, run) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert table[0] == ["prior", "prior"]
    assert ["step", "3", "3"] in table
    assert ["valid/nll", *[f"{last['valid/nll']:.4g}"] * 2] in table


def test_mistakes_of_training_are_one_line(tokenizer, prior, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").touch()
    train = ["train", "prior", "--data", "synthetic:64", "--out", tmp_path / "run", *SMALL, *SHORT]
    cases = {
        "--tokenizer is missing; give the run of a tokenizer": train,
        "no such run, export or file: ": [*train, "--tokenizer", "ABSENT"],
        "nowhere; expected a run folder": [*train, "--tokenizer", tmp_path.name + "/nowhere"],
        "has no export/ yet; train it to its first": [*train, "--tokenizer", begun],
        "num_images_save 5000 is not possible; it must be at least 1 and at most 4096": [
            *train,
            "--tokenizer",
            tokenizer,
            "--trainer.num_images_save",
            5000,
        ],
        "holds a Prior, which is no image tokenizer": [*train, "--tokenizer", prior],
        "--image_size is the tokenizer's own; leave it out": [*train, "--tokenizer", tokenizer, "--image_size", 16],
        "dim 0 is not possible": [*train, "--tokenizer", tokenizer, "--model.dim", 0],
    }
    for message, arguments in cases.items():
        assert call(*arguments) == 2
        assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_codes_of_another_tokenizer_are_refused(tokenizer, tmp_path, capsys):
    other = tmp_path / "other"
    build_tokenizer(vq_kwargs={"codebook_dim": 4}).save_pretrained(other)
    assert call("encode", other, "--data", "synthetic:16", "--out", tmp_path / "codes") == 0
    capsys.readouterr()
    train = ["train", "prior", "--data", f"codes:{tmp_path / 'codes'}", *SMALL, *SHORT]
    assert call(*train, "--tokenizer", tokenizer, "--out", tmp_path / "run") == 2
    assert "were made by the tokenizer" in one_line(capsys) and not (tmp_path / "run").exists()
    assert call(*train, "--tokenizer", other, "--out", tmp_path / "codes") == 2
    assert "holds codes that `vqdist encode` wrote" in one_line(capsys)
    assert call(*train, "--tokenizer", other, "--out", tmp_path / "run") == 0
    shard = tmp_path / "codes" / "codes_00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")  # of the same size
    capsys.readouterr()
    assert call(*train, "--tokenizer", other, "--out", tmp_path / "again") == 2
    assert "codes_00000.npy" in one_line(capsys)


# --------------------------------------------------------------------------------------------- sample


@pytest.mark.distributed
def test_one_and_two_ranks_draw_the_same_pictures(prior, tmp_path):
    """20 images in batches of 3: one rank has four batches, the other three, and the last is smaller."""
    options = ["--batch_size", "3", "--seed", "5", "--cfg", "2", "--top_k", "9"]
    vqdist("sample", str(prior), "--num", "20", *options, "--out", str(tmp_path / "one.png"))
    vqdist("sample", str(prior), "--num", "20", *options, "--out", str(tmp_path / "one"))
    worker = ["-m", "vqdist", "sample", str(prior), "--num_images", "20", *options]
    torchrun([*worker, "--out", str(tmp_path / "two.png")])
    torchrun([*worker, "--out", str(tmp_path / "two")])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    names = [f"{number:06d}.png" for number in range(20)]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [*names, "samples.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_every_option_of_a_draw_changes_the_picture(prior, tmp_path):
    plain = tmp_path / "plain.png"
    assert call("sample", prior, "--num", 6, "--out", plain) == 0
    options = ["--class 1", "--cfg 4", "--top_k 1", "--top_p 0.1", "--min_p 0.9", "--temperature 3", "--seed 1"]
    for option in [*options, "--columns 3"]:
        assert call("sample", prior, "--num", 6, *option.split(), "--out", tmp_path / "changed.png") == 0
        assert pixels(tmp_path / "changed.png") != pixels(plain), option


def test_batches_are_of_the_size_that_is_asked_for(prior, tmp_path, monkeypatch):
    sizes = []
    draw_codes = Prior.draw_codes
    monkeypatch.setattr(
        Prior,
        "draw_codes",
        lambda model, uniform, *rest, **named: (
            sizes.append(len(uniform)),
            draw_codes(model, uniform, *rest, **named),
        )[1],
    )
    assert call("sample", prior, "--num", 5, "--batch_size", 2, "--out", tmp_path / "a.png") == 0
    assert sizes == [2, 2, 1]


def test_the_command_draws_what_the_library_draws(prior, tmp_path):
    assert call("sample", prior, "--num", 4, "--seed", 3, "--top_p", 0.9, "--out", tmp_path / "folder") == 0
    model = Prior.from_pretrained(prior)
    images = draw_numbers(model, range(4), torch.tensor([0, 1, 2, 0]), DrawOptions(top_p=0.9), seed=3)
    for number, image in enumerate(images):
        written = torch.tensor(list(Image.open(tmp_path / "folder" / f"{number:06d}.png").tobytes()))
        expected = (image * 255 + 0.5).floor().clamp(0, 255).permute(1, 2, 0).flatten()
        assert torch.equal(written.float(), expected)


def test_a_folder_of_samples_is_gone_on_with_where_it_was_ended(prior, tmp_path, monkeypatch, capsys):
    """A file that is missing, one that a kill cut off, one of which only the beginning of writing is there."""
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    command = ["sample", prior, "--num", 7, "--batch_size", 2, "--seed", 5]
    for folder in (whole, ended):
        assert call(*command, "--out", folder) == 0
    (ended / "000002.png").unlink()
    (ended / "000003.png").rename(ended / "000003.png.partial")
    (ended / "000006.png").write_bytes((whole / "000006.png").read_bytes()[:-20])
    drawn, draw_codes = [], Prior.draw_codes

    def counted(model, uniform, *rest, **named):
        drawn.append(len(uniform))
        return draw_codes(model, uniform, *rest, **named)

    monkeypatch.setattr(Prior, "draw_codes", counted)
    assert call(*command, "--out", ended) == 0 and drawn == [2, 1]
    names = [f"{number:06d}.png" for number in range(7)]
    assert [(ended / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]
    assert call(*command, "--out", ended) == 0 and drawn == [2, 1]  # it is finished


@pytest.mark.parametrize(
    "options, said",
    [
        (["--seed", 6], "seed is 5 there and 6 here"),
        (["--batch_size", 3], "batch_size is 16 there and 3 here"),
        (["--cfg", 2], "cfg is 1.0 there and 2.0 here"),
        (["--class", 1], "class is None there and 1 here"),
    ],
)
def test_samples_of_another_command_are_not_mixed_with(options, said, prior, tmp_path, capsys):
    command = ["sample", prior, "--num", 2, "--seed", 5, "--out", tmp_path / "folder"]
    assert call(*command) == 0
    capsys.readouterr()
    assert call(*command, *options) == 2
    assert f"holds samples of another command ({said}" in one_line(capsys)


def test_samples_of_other_weights_are_not_mixed_with(prior, tmp_path, capsys):
    other = Prior.from_pretrained(prior)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    assert call("sample", prior, "--num", 2, "--out", tmp_path / "folder") == 0
    capsys.readouterr()
    assert call("sample", tmp_path / "other", "--num", 2, "--out", tmp_path / "folder") == 2
    assert "holds samples of another command (weights is" in one_line(capsys)


def test_a_full_disk_names_the_sample_that_cannot_be_written(prior, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "samples.json.partial").touch()
    command = ["sample", prior, "--num", 2, "--out", tmp_path / "folder"]
    assert call(*command) == 0
    (tmp_path / "folder" / "000001.png").unlink()
    (tmp_path / "folder" / "000001.png.partial").symlink_to("/dev/full")
    capsys.readouterr()
    assert call(*command) == 2
    *bar, said = capsys.readouterr().err.splitlines()
    assert said == f"vqdist: error: {tmp_path}/folder/000001.png cannot be written: No space left on device"


def test_mistakes_of_sampling_are_one_line(prior, tokenizer, tmp_path, capsys):
    vq_ar, other = tmp_path / "vq_ar", tmp_path / "other"
    build_vq_ar().save_pretrained(vq_ar)
    build_tokenizer(vq_kwargs={"codebook_dim": 4}).save_pretrained(other)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    (tmp_path / "old.png").touch()
    cases = {
        "is not empty and holds no samples.json: samples would mix with what is there": [prior, "--out", tmp_path],
        "old.png cannot be written": [prior, "--out", tmp_path / "old.png" / "a.png"],
        "takes 715 GiB of memory, over 2; give --out FOLDER": [prior, "--num", 250_000_000],
        "class 3 is asked for; the model knows 0 to 2": [prior, "--class", 3],
        "class 1 is asked for but the model knows no classes": [vq_ar, "--class", 1],
        "cfg 2 is given but the model knows no classes": [vq_ar, "--cfg", 2],
        "num 0 is not possible": [prior, "--num", 0],
        "batch_size 0 is not possible": [prior, "--batch_size", 0],
        "top_p 2.0 is not possible": [prior, "--top_p", 2],
        "is neither the name of a PNG file nor of a folder": [prior, "--out", "samples.jpg"],
        "--columns 2 is of a sheet": [prior, "--columns", 2, "--out", tmp_path / "folder"],
        "holds a VQGanVAE, which makes no images of its own": [tokenizer],
        "has no export/ yet; train it to its first checkpoint": [tmp_path / "begun"],
        "is not the one that the run was trained over": [prior, "--tokenizer", other],
        "has its codebook in itself; leave it out": [vq_ar, "--tokenizer", other],
        "no such run, export or file": [tmp_path / "ABSENT"],
        "nearest: temperature": [prior, "--temprature", 1],
    }
    for message, arguments in cases.items():
        assert call("sample", *arguments) == 2, message
        assert message in one_line(capsys)
    assert call("sample", prior, "--tokenizer", tokenizer, "--num", 1, "--out", tmp_path / "a.png") == 0


def test_mistakes_of_a_report_are_one_line(tmp_path, capsys):
    assert call("report", tmp_path) == 2
    assert "has no metrics.jsonl; give the folder of a run" in one_line(capsys)
    (tmp_path / "metrics.jsonl").write_text("{broken\n")
    assert call("report", tmp_path) == 2
    assert "metrics.jsonl has no log line: the run has not logged a step yet" in one_line(capsys)
    for content, message in (("[1, 2]\n", "has not logged a step yet"), ("", "has not logged a step yet")):
        (tmp_path / "metrics.jsonl").write_text(content)
        assert call("report", tmp_path) == 2
        assert message in one_line(capsys)
