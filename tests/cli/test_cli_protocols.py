"""`--protocol NAME` in evaluate, statistics and fidelity: published choices, what is stored, and what differs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import torchrun
from PIL import Image
from scenarios import build_dvae, build_prior, build_vq_ar
from torch import nn
from varied_codes import vary_codes

from vqdist import Tokenizer
from vqdist.cli import main
from vqdist.cli.measuring import GeneratorRun
from vqdist.cli.protocols import Asked
from vqdist.conventions import CONVENTIONS
from vqdist.data.config import View
from vqdist.data.dataset import ImageDataset
from vqdist.export import RECORD
from vqdist.sampling import DrawOptions

COUNT, SIDE = 24, 16


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with pictures of other sizes, models, and an extractor of features and logits of its own."""
    place = tmp_path_factory.mktemp("protocols")
    (place / "pictures").mkdir()
    rng = np.random.RandomState(0)
    for index in range(COUNT):
        small = rng.randint(0, 256, (12, 9, 3)).astype(np.uint8)
        Image.fromarray(small).resize((45, 61 + index % 3)).save(place / "pictures" / f"{index:02}.png")
    models = {"dvae": vary_codes(build_dvae()), "prior": build_prior(num_classes=0), "vq_ar": build_vq_ar()}
    for name, model in models.items():
        model.image_size = SIDE
        model.save_pretrained(place / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(nn.Sequential(nn.AvgPool2d(8), nn.Flatten())).save(str(place / "features.pt"))
    return place


@pytest.fixture
def vqdist(place, capsys):
    """Run a command with the extractor; give its JSON object, its protocol, and what is said besides."""

    def run(command: str, first: str, *options: str) -> tuple[dict, dict, str]:
        features = ["--features", str(place / "features.pt"), "--trust_features", "true", "--batch_size", "7"]
        assert main([command, first, *features, *options]) == 0
        printed = capsys.readouterr()
        numbers = json.loads(printed.out)
        return numbers, numbers.pop("protocol"), printed.err

    return run


def reconstructed(place: Path, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = ImageDataset(str(place / "pictures"), SIDE, augment=False, view=view)
    images = torch.stack(list(dataset))
    tokenizer = Tokenizer.from_pretrained(place / "dvae")
    return images, tokenizer.decode(tokenizer.encode(images)).clamp(0, 1)


ROUNDED = {
    "llamagen": lambda recon: (recon * 255).round() / 255,
    "adm": lambda recon: (recon * 255).floor() / 255,
    "taming": lambda recon: (recon * 255).floor() / 255,
    "titok": lambda recon: (recon * 255).round() / 255,
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_tokenizer_is_measured_by_the_choices_of_a_publication(name, place, vqdist):
    data = ["--data", str(place / "pictures")]
    numbers, protocol, said = vqdist("evaluate", str(place / "dvae"), *data, "--protocol", name)
    convention = CONVENTIONS[name]
    view = View(center=convention.center, resample=convention.resample)
    images, recon = reconstructed(place, view)
    expected = -10 * (ROUNDED[name](recon) - images).square().mean(dim=(1, 2, 3)).log10()
    assert numbers["psnr_per_image"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert protocol["name"] == name and protocol["source"] == convention.source
    assert protocol["pixels"] == convention.reconstructions.pixels and protocol["view"] == view.described()
    differs = protocol["differs"]
    assert differs["images"] == [COUNT, 50_000] and differs["image_size"] == [SIDE, 256]
    assert differs["features"] == ["features.pt", "inception"] and "pixels" not in differs
    assert ("compared_with" in differs) == (name == "adm")  # which has statistics of the training images
    (line,) = said.splitlines()
    assert line.startswith(f"vqdist: this differs from protocol {name}: ") and "images 24 for 50000" in line


def test_an_option_goes_before_the_protocol_and_is_recorded(place, vqdist):
    data = ["--data", str(place / "pictures"), "--protocol", "taming"]
    _, protocol, _ = vqdist("evaluate", str(place / "dvae"), *data, "--round_pixels", "false")
    assert protocol["pixels"] == "float" and protocol["differs"]["pixels"] == ["float", "8 bits, truncated"]
    cut, _, _ = vqdist("evaluate", str(place / "dvae"), *data[:2], "--round_pixels", "down")
    whole, _, _ = vqdist("evaluate", str(place / "dvae"), *data[:2], "--round_pixels", "true")
    assert cut["psnr"] != whole["psnr"] and abs(cut["psnr"] - whole["psnr"]) < 0.5


def test_samples_have_their_own_choices(place, vqdist):
    options = ["--data", str(place / "pictures"), "--protocol", "titok", "--num_samples", "8"]
    numbers, protocol, _ = vqdist("evaluate", str(place / "prior"), *options)
    assert numbers["samples"] == 8 and protocol["pixels"] == "8 bits, truncated"
    assert protocol["differs"]["images"] == [8, 50_000] and protocol["differs"]["compared_with"][0] == "images"
    _, protocol, _ = vqdist("evaluate", str(place / "vq_ar"), *options)
    assert protocol["samples"] == 8 and protocol["name"] == "titok"
    assert (protocol["pixels"], protocol["samples_pixels"]) == ("8 bits", "8 bits, truncated")
    differs = protocol["differs"]
    assert (differs["images"], differs["samples_images"]) == ([COUNT, 50_000], [8, 50_000])
    assert "compared_with" not in differs and differs["samples_compared_with"] == ["images", "statistics"]
    _, protocol, _ = vqdist("evaluate", str(place / "vq_ar"), *options, "--round_pixels", "down")
    assert protocol["pixels"] == "8 bits, truncated" and "samples_pixels" not in protocol
    assert protocol["differs"]["pixels"][0] == "8 bits, truncated" and "samples_pixels" not in protocol["differs"]
    _, protocol, _ = vqdist("evaluate", str(place / "vq_ar"), *options[:2], "--num_samples", "8")
    assert not [name for name in protocol if name.startswith("samples_")]  # both by the same choices


def test_inception_scores_of_reconstructions_and_samples_have_their_own_splits():
    seen = SimpleNamespace(kind="inception", digest="00", widths={"logits": 5}, to=lambda device: None)
    options = SimpleNamespace(data=SimpleNamespace(folder="synthetic:8"), seed=None)
    for name, splits in (("titok", ("1", "5000 images")), ("taming", ("10 shuffled", None))):
        data = ImageDataset("synthetic:8", SIDE, augment=False)
        run = GeneratorRun(options, build_vq_ar(), data, seen, asked=Asked(CONVENTIONS[name]))
        run.num_samples, run.draw_options = 8, DrawOptions()
        said = run.protocol()
        assert (said["inception_score_over"], said.get("samples_inception_score_over")) == splits


def test_statistics_and_fidelity_look_at_images_as_a_publication_does(place, vqdist, tmp_path, capsys):
    size = ["--image_size", str(SIDE), "--protocol", "adm"]
    features = ["--features", str(place / "features.pt"), "--trust_features", "true"]
    path = str(tmp_path / "ref.npz")
    assert main(["statistics", "--data", str(place / "pictures"), "--out", path, *features, *size]) == 0
    assert "image_size 16 for 256" in capsys.readouterr().err
    with np.load(path) as file:
        stored = json.loads(str(file["protocol"]))
        images, _ = reconstructed(place, View(center="adm"))
        rows = nn.functional.avg_pool2d(images, 8).flatten(1).numpy()
        np.testing.assert_allclose(file["mu"], rows.mean(axis=0), rtol=1e-5)
    assert stored["name"] == "adm" and "box filter" in stored["view"]
    numbers, protocol, said = vqdist("fidelity", str(place / "pictures"), "--reference", path, *size)
    assert numbers["fid"] == pytest.approx(0, abs=1e-6) and protocol["reference_view"] == stored["view"]
    assert protocol["reference_images"] == COUNT and protocol["differs"].keys() == {"image_size", "features", "images"}
    assert "images 24 for 50000" in said
    _, plain, said = vqdist("fidelity", str(place / "pictures"), "--reference", path, "--image_size", str(SIDE))
    assert "name" not in plain and said == "" and plain["view"] != stored["view"]


def test_the_size_of_a_publication_is_taken_where_nobody_says_one(place, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(nn.Sequential(nn.AvgPool2d(128), nn.Flatten())).save(str(tmp_path / "features.pt"))
    features = ["--features", str(tmp_path / "features.pt"), "--trust_features", "true", "--protocol", "titok"]
    path = tmp_path / "ref.npz"
    assert main(["statistics", "--data", str(place / "pictures"), "--out", str(path), *features]) == 0
    capsys.readouterr()
    with np.load(path) as file:
        stored = json.loads(str(file["protocol"]))
    assert stored["image_size"] == [256, 256] and stored["differs"].keys() == {"features"}


@pytest.mark.distributed
def test_two_ranks_give_the_numbers_and_the_protocol_of_one(place, vqdist):
    arguments = ["evaluate", str(place / "dvae"), "--data", str(place / "pictures"), "--protocol", "taming"]
    one, protocol, _ = vqdist(*arguments)
    features = ["--features", str(place / "features.pt"), "--trust_features", "true", "--batch_size", "7"]
    done = torchrun(["-m", "vqdist", *arguments, *features])
    two = json.loads(done.stdout)
    assert two.pop("protocol") == protocol and done.stderr.count("this differs from protocol taming") == 1
    assert two == pytest.approx(one, rel=1e-5) and {"rfid", "rkid", "rprecision", "rrecall"} <= two.keys()


def test_weights_and_commit_are_recorded(place, vqdist):
    data = ["--data", str(place / "pictures")]
    _, protocol, _ = vqdist("evaluate", str(place / "dvae"), *data)
    assert "weights" not in protocol and len(protocol.get("commit", "0" * 40).rstrip("+")) == 40
    (place / "dvae" / RECORD).write_text('{"weights": "averaged"}')
    _, protocol, _ = vqdist("evaluate", str(place / "dvae"), *data)
    (place / "dvae" / RECORD).unlink()
    assert protocol["weights"] == "averaged"


MISTAKES = {
    "unknown": (
        ["evaluate", "{dvae}", "--data", "{pictures}", "--protocol", "admm"],
        "no protocol 'admm'; nearest: adm",
    ),
    "rounding": (["evaluate", "{dvae}", "--data", "{pictures}", "--round_pixels", "up"], "round_pixels 'up'"),
    "no extractor": (["fidelity", "{pictures}", "--reference", "{pictures}"], "the option features is missing"),
    "not square": (
        [
            *("evaluate", "{dvae}", "--data", "{pictures}", "--protocol", "adm"),
            *("--image_size", "[16, 8]"),
            *("--features", "{program}"),
            *("--trust_features", "true"),
        ],
        "center adm is of square images but image_size is 16 x 8",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, place, capsys):
    arguments, pattern = MISTAKES[case]
    places = {"dvae": place / "dvae", "pictures": place / "pictures", "program": place / "features.pt"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert pattern in said


@pytest.mark.parametrize("command", ["evaluate", "statistics", "fidelity"])
def test_help_says_the_choices_and_their_sources(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for name, convention in CONVENTIONS.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{name}: ")]
        assert convention.source in line and convention.remains in line
        assert f"pixels in {convention.reconstructions.pixels}" in line and convention.center in line
