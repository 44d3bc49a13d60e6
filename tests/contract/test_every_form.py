"""RUN, EXPORT, FILE and a name on the Hub mean the same to every command and function that takes a model."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.hub_mixin as hub_mixin
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from vqdist import Tokenizer, VQGanVAE
from vqdist.cli import main
from vqdist.models import pretrained

FIXTURE = Path(__file__).parent.parent / "data" / "parity" / "llamagen_vq" / "weights.safetensors"
SIZE = ("--image_size", "16")
FORMS = ("run", "run/", "run/export", "export", "relative", "file.pt", "folder", "hub")
ON_HUB = "someone/tokenizer"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with one tokenizer in every form, of which the run has trained the decoder alone."""
    folder = tmp_path_factory.mktemp("forms")
    found = load_file(FIXTURE)
    torch.save({"model": found}, folder / "file.pt")
    (folder / "folder").mkdir()
    save_file(found, folder / "folder" / "model.safetensors")
    (folder / "folder" / "config.json").write_text(json.dumps({"codebook_size": 24, "codebook_l2_norm": True}))
    assert main(["convert", str(folder / "file.pt"), *SIZE, "--out", str(folder / "export")]) == 0
    train = ["--init_from", str(folder / "export"), "--data", "synthetic:8", *SIZE, "--trainer.freeze"]
    rest = ["encoder,quantizer", "--model.use_gan", "false", "--steps", "1", "--batch_size", "2"]
    assert main(["train", "vqgan", *train, *rest, "--model.perceptual", "none", "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def place(made, monkeypatch):
    """Give the name of a form, on a Hub that has one repository, from the folder that relative names begin at."""

    def download(repo_id, filename, **_):
        if not (made / "export" / filename).is_file() or repo_id != ON_HUB:
            raise LocalEntryNotFoundError(f"no {filename}")
        return str(made / "export" / filename)

    for module in (pretrained, hub_mixin):
        monkeypatch.setattr(module, "hf_hub_download", download)
    monkeypatch.chdir(made)
    names = {"hub": ON_HUB, "relative": "export"}
    return lambda form: names.get(form, f"{made}/{form}")


def codes_of(name: str | Path) -> torch.Tensor:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Tokenizer.from_pretrained(name, 16).encode(images)


@pytest.mark.parametrize("form", FORMS)
def test_functions_take_every_form(form, place, made):
    expected = codes_of(made / "export")
    assert torch.equal(codes_of(place(form)), expected)
    if form != "hub":  # a path as an object, too
        assert torch.equal(codes_of(Path(place(form))), expected)
    assert VQGanVAE.from_pretrained(place(form)).codebook_size == 24


@pytest.mark.parametrize("form", FORMS)
def test_commands_take_every_form(form, place, made, tmp_path, capsys):
    images = ("--data", "synthetic:8")
    assert main(["evaluate", place(form), *images, *SIZE]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["images"] == 8 and 0 < numbers["codebook_usage"] <= 1
    assert main(["reconstruct", place(form), *images, *SIZE, "--out", str(tmp_path / "grid.png")]) == 0
    assert main(["encode", place(form), *images, *SIZE, "--out", str(tmp_path / "codes")]) == 0
    assert main(["encode", str(made / "export"), *images, *SIZE, "--out", str(tmp_path / "expected")]) == 0
    found, expected = (np.load(next((tmp_path / one).glob("*.npy"))) for one in ("codes", "expected"))
    assert np.array_equal(found, expected)
    assert main(["convert", place(form), "--to", "llamagen", "--out", str(tmp_path / "back.pt")]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_training_takes_every_form(form, place, tmp_path):
    rest = ["--data", "synthetic:8", "--steps", "1", "--batch_size", "2"]
    if form != "hub":
        first = ["--init_from", place(form), *SIZE, "--model.use_gan", "false", "--model.perceptual", "none"]
        assert main(["train", "vqgan", *first, *rest, "--out", str(tmp_path / "tokenizer")]) == 0
    prior = ["--tokenizer", place(form), "--model.dim", "32", "--model.depth", "1", "--model.heads", "2"]
    if form in ("file.pt", "folder"):  # of 256 pixels, as published: too many codes to train on here
        assert Tokenizer.from_pretrained(place(form)).image_size == 256
        return
    assert main(["train", "prior", *prior, *rest, "--out", str(tmp_path / "prior")]) == 0
    sample = ["--tokenizer", place(form), "--num", "1", "--out", str(tmp_path / "one.png")]
    assert main(["sample", str(tmp_path / "prior"), *sample]) == 0


MISTAKES = {
    "nowhere": "no such run, export or file",
    "begun": "has no export/ yet; train it to its first checkpoint",
    "empty": "has no config.json; expected a folder that save_pretrained wrote, as RUN/export",
}


@pytest.mark.parametrize("command", ["evaluate", "reconstruct", "encode", "sample", "convert"])
@pytest.mark.parametrize("place", MISTAKES)
def test_mistakes_have_the_same_words(command, place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text(json.dumps({"model": {}, "trainer": {"image_size": 16}}))
    more = {"sample": [], "convert": ["--to", "llamagen", "--out", str(tmp_path / "out")]}
    images = ["--data", "digits", *(["--out", str(tmp_path / "codes")] if command == "encode" else [])]
    assert main([command, str(tmp_path / place), *more.get(command, images)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(tmp_path / place) in line and MISTAKES[place] in line
