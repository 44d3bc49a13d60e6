"""`vqdist evaluate` of models that predict codes, and with a feature extractor.

Its numbers are compared with ones worked out here from the models; its options, ranks and mistakes are tried."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import start_ranks, torchrun
from scenarios import build_dvae, build_prior, build_var, build_vq_ar
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from varied_codes import vary_codes

from vqdist import DiscreteVAE, ImageDataset, Tokenizer
from vqdist.backends.local import LocalBackend
from vqdist.cli import main
from vqdist.cli.measuring import GeneratorRun
from vqdist.drawing import draw_numbers
from vqdist.encoding import CodeWriter
from vqdist.evaluation.extractors import load_extractor
from vqdist.evaluation.features import Features
from vqdist.evaluation.fidelity import fidelity as fidelity_of
from vqdist.models.pretrained import load_model_of_any_type
from vqdist.sampling import DrawOptions

IMAGES = 40
DATA = f"synthetic:{IMAGES}"
PREDICTION = ["nll", "bits_per_code", "perplexity", "accuracy"]
RECONSTRUCTION = ["l1", "psnr", "psnr_per_image", "ssim", "ssim_luma", "codebook_usage", "codebook_perplexity"]
FIDELITY = ["fid", "kid", "kid_std", "precision", "recall", "samples"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return a folder with one exported model of each kind, and a feature extractor."""
    folder = tmp_path_factory.mktemp("runs")
    models = {
        "dvae": vary_codes(build_dvae()),
        "prior": build_prior(num_classes=10),
        "classless": build_prior(num_classes=0),
        "var": build_var(num_classes=10),
        "vq_ar": build_vq_ar(),
    }
    for name, model in models.items():
        model.image_size = 16
        model.save_pretrained(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(nn.Sequential(nn.AvgPool2d(8), nn.Flatten())).save(str(folder / "features.pt"))
    return folder


@pytest.fixture
def evaluate(runs, capsys):
    """Evaluate a run of `runs` by the command line and give its JSON object."""

    def run(name: str, *options: str, data: str = DATA) -> dict[str, float]:
        assert main(["evaluate", str(runs / name), "--data", data, *options]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        numbers = json.loads(line)
        assert {"data_hash", "pixels"} <= numbers.pop("protocol").keys()
        return numbers

    return run


def images_and_labels() -> tuple[Tensor, Tensor]:
    dataset = ImageDataset(DATA, 16, augment=False)
    return torch.stack(list(dataset)), torch.tensor([dataset.label(index) for index in range(IMAGES)])


def features(runs: Path) -> list[str]:
    """Return the options of the feature extractor."""
    return ["--features", str(runs / "features.pt"), "--trust_features", "true"]


def fidelity(generated: Tensor, real: Tensor) -> dict[str, float]:
    return fidelity_of(Features(generated), Features(real))


def features_of(runs: Path, images: Tensor) -> Tensor:
    return load_extractor(str(runs / "features.pt"), channels=3, image_size=16, trust_code=True)(images)


# --------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("name", ["prior", "classless", "var", "vq_ar"])
def test_likelihood_and_accuracy_of_the_codes(name, runs, evaluate):
    numbers = evaluate(name, "--batch_size", "16")  # the last batch is smaller
    model = load_model_of_any_type(runs / name)
    images, labels = images_and_labels()
    with torch.no_grad():
        out = model(*model.inputs(images, labels if model.num_classes else torch.zeros_like(labels)))
    nll = cross_entropy(out.logits.transpose(1, 2), out.indices, reduction="none")
    hits = (out.logits.argmax(dim=-1) == out.indices).double()
    assert numbers["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert numbers["bits_per_code"] == pytest.approx(nll.mean().item() / math.log(2), rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(nll.mean().item()), rel=1e-5)
    assert numbers["accuracy"] == pytest.approx(hits.mean().item())
    assert numbers["images"] == IMAGES
    if name == "var":
        for number, (of_scale, hit) in enumerate(zip(nll.split((1, 4, 16), 1), hits.split((1, 4, 16), 1)), start=1):
            assert numbers[f"nll_scale_{number}"] == pytest.approx(of_scale.mean().item(), rel=1e-5)
            assert numbers[f"accuracy_scale_{number}"] == pytest.approx(hit.mean().item())


def test_the_classes_of_the_images_are_told_to_the_model(runs, evaluate, tmp_path):
    model = build_prior(num_classes=10)
    before = evaluate("prior")["nll"]
    with torch.no_grad():
        model.start.weight.copy_(model.start.weight.roll(1, dims=0))
    model.save_pretrained(tmp_path / "other")
    assert evaluate(str(tmp_path / "other"))["nll"] != pytest.approx(before, rel=1e-6)


def test_only_vq_ar_is_measured_as_a_tokenizer_too(runs, evaluate):
    numbers = evaluate("vq_ar")
    assert numbers.keys() == {*PREDICTION, *RECONSTRUCTION, "images"}
    model = load_model_of_any_type(runs / "vq_ar")
    images, _ = images_and_labels()
    recon = Tokenizer(model).decode(Tokenizer(model).encode(images))
    assert numbers["l1"] == pytest.approx((recon - images).abs().mean().item(), rel=1e-4)
    assert evaluate("prior").keys() == {*PREDICTION, "images"}


def test_stored_codes_have_the_numbers_of_their_images(runs, evaluate, tmp_path):
    tokenizer = Tokenizer.from_pretrained(runs / "prior" / "tokenizer")
    writer = CodeWriter(
        tokenizer, ImageDataset(DATA, 16, augment=False), tmp_path / "codes", batch_size=8, shard_size=16
    )
    writer.write(LocalBackend(device="cpu"))
    assert evaluate("prior", data=f"codes:{tmp_path / 'codes'}") == pytest.approx(evaluate("prior"), rel=1e-6)


# --------------------------------------------------------------------------------------------- samples


def drawn_features(runs: Path, name: str, count: int, seed: int = 0, **options: float) -> Tensor:
    """Features of the samples that evaluate should draw: sample i has the class of image i * IMAGES // count."""
    model = load_model_of_any_type(runs / name)
    labels = images_and_labels()[1][[number * IMAGES // count for number in range(count)]]
    labels = model.labels(labels if model.num_classes else None, count)
    options = DrawOptions(**{**model.draw_defaults, **options})
    return features_of(runs, draw_numbers(model, range(count), labels, options, seed=seed))


@pytest.mark.parametrize("name", ["prior", "classless", "var", "vq_ar"])
def test_fidelity_of_the_samples(name, runs, evaluate):
    numbers = evaluate(name, *features(runs), "--num_samples", "30", "--batch_size", "7")
    assert set(FIDELITY) <= numbers.keys() and numbers["samples"] == 30
    expected = fidelity(drawn_features(runs, name, 30), features_of(runs, images_and_labels()[0]))
    assert {key: numbers[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert ("rfid" in numbers) == (name == "vq_ar")


def test_draw_options_are_obeyed(runs, evaluate):
    arguments = [*features(runs), "--num_samples", "24"]
    real = features_of(runs, images_and_labels()[0])
    seen = {evaluate("prior", *arguments)["fid"]}
    given = [("temperature", 0.5), ("top_k", 3), ("top_p", 0.4), ("min_p", 0.8), ("cfg", 3.0), ("seed", 5)]
    for option, value in given:
        found = evaluate("prior", *arguments, f"--{option}", str(value))["fid"]
        expected = fidelity(drawn_features(runs, "prior", 24, **{option: value}), real)["fid"]
        assert found == pytest.approx(expected, rel=1e-3)
        seen.add(found)
    assert len(seen) == 1 + len(given)


def test_a_thousand_samples_unless_said(runs, evaluate):
    assert evaluate("vq_ar", *features(runs))["samples"] == 1000


@pytest.mark.parametrize("given", [("--lpips", "vgg"), ("--round_pixels", "true"), ("--round_pixels", "false")])
def test_a_model_that_reconstructs_nothing_takes_no_options_of_it(given, runs, capsys):
    assert main(["evaluate", str(runs / "prior"), "--data", DATA, *given]) == 2
    assert f"{given[0]} is given but a Prior reconstructs no images" in capsys.readouterr().err


def test_samples_of_a_prior_are_rounded(runs, capsys):
    options = ["evaluate", str(runs / "prior"), "--data", DATA, *features(runs), "--num_samples", "24"]
    found = {}
    for rounding in ("false", "down"):
        assert main([*options, "--round_pixels", rounding]) == 0
        found[rounding] = json.loads(capsys.readouterr().out)
    assert found["down"]["protocol"]["pixels"] == "8 bits, truncated"
    assert found["down"]["fid"] != found["false"]["fid"] and found["down"]["nll"] == found["false"]["nll"]


@pytest.mark.parametrize("count", [10, 100, 250])
def test_samples_have_the_classes_of_the_data_in_any_order(count):
    """Also of a source that is sorted by class, whose first images are all of one."""
    labels = [0] * 50 + [1] * 30 + [2] * 20
    run = GeneratorRun(SimpleNamespace(), build_prior(num_classes=3), _Labelled(labels), None)
    run.num_samples = count
    assert run.sample_labels().bincount().tolist() == [count // 2, count * 3 // 10, count // 5]


class _Labelled:
    """A dataset of which only the labels are there."""

    def __init__(self, labels: list[int]):
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return self.labels[index]


# --------------------------------------------------------------------------------------------- reconstructions


def test_fid_of_a_tokenizers_reconstructions(runs, evaluate):
    numbers = evaluate("dvae", *features(runs))
    assert numbers.keys() == {*RECONSTRUCTION, "images", "rfid", "rkid", "rprecision", "rrecall"}
    images, _ = images_and_labels()
    tokenizer = Tokenizer.from_pretrained(runs / "dvae")
    recon = tokenizer.decode(tokenizer.encode(images))
    expected = fidelity(features_of(runs, recon), features_of(runs, images))
    assert numbers["rfid"] == pytest.approx(expected["fid"], rel=1e-3)
    assert numbers["rkid"] == pytest.approx(expected["kid"], rel=1e-3)
    for name in ("precision", "recall"):
        assert numbers[f"r{name}"] == pytest.approx(expected[name], abs=0.06)
    assert evaluate("dvae").keys() == {*RECONSTRUCTION, "images"}


def test_images_are_reconstructed_once_for_all_numbers(runs, evaluate, monkeypatch):
    calls = []
    reconstruct = DiscreteVAE.reconstruct

    def counted(network, image):
        calls.append(len(image))
        return reconstruct(network, image)

    monkeypatch.setattr(DiscreteVAE, "reconstruct", counted)
    assert "rfid" in evaluate("dvae", *features(runs), "--batch_size", "16")
    assert sum(calls) == IMAGES


def broken_among(folder: Path, broken: Sequence[int]) -> str:
    folder.mkdir()
    dataset = ImageDataset("synthetic:8", 32, augment=False)
    for index in range(8):
        dataset.source.image(index).save(folder / f"{index}.png")
    for index in broken:
        (folder / f"{index}.png").write_bytes(b"broken")
    return str(folder)


def test_broken_images_are_said_once_however_often_they_are_read(runs, tmp_path, capsys):
    folder = broken_among(tmp_path / "images", [4])
    arguments = ["evaluate", str(runs / "vq_ar"), "--data", folder, *features(runs), "--num_samples", "8"]
    assert main([*arguments, "--on_bad_image", "skip"]) == 0
    out, err = capsys.readouterr()
    assert err.count("skipped an image that cannot be decoded") == 1 and "4.png" in err
    assert json.loads(out)["images"] == 8


@pytest.mark.distributed
def test_broken_images_of_two_ranks_count_together(runs, tmp_path):
    """One of eight may be broken, and each of two ranks meets one of its own."""
    folder = broken_among(tmp_path / "images", [0, 5])
    arguments = ["evaluate", str(runs / "dvae"), "--data", folder, "--on_bad_image", "skip", "--batch_size", "1"]
    jobs = start_ranks(["-m", "vqdist", *arguments], tmp_path / "logs")
    assert [job.wait(120) for job in jobs] == [2, 2]
    assert "2 of 8 images" in jobs[0].printed and "Traceback" not in jobs[0].printed + jobs[1].printed


# --------------------------------------------------------------------------------------------- ranks


@pytest.mark.distributed
@pytest.mark.parametrize("name, samples", [("var", "37"), ("vq_ar", "6")])
def test_two_ranks_give_the_numbers_of_one(name, samples, runs, evaluate):
    """Of an odd number of images, of an odd number of batches of samples, and of so few that one rank has none."""
    options = [*features(runs), "--batch_size", "8", "--num_samples", samples]
    one = evaluate(name, *options, data="synthetic:33")
    arguments = ["evaluate", str(runs / name), "--data", "synthetic:33", *options]
    two = json.loads(torchrun(["-m", "vqdist", *arguments]).stdout)
    assert two.pop("protocol")["samples"] == int(samples)
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)


# --------------------------------------------------------------------------------------------- mistakes


MISTAKES = {
    "too few samples": ("prior FEATURES --num_samples 3", "there are 3 samples .*; give at least 4"),
    "too few images": ("prior FEATURES --data synthetic:3", "there are 3 images in --data .*; give at least 4"),
    "no such extractor": (
        "prior --features absent",
        "--features absent is neither a file nor a known network",
    ),
    "a program": ("prior PROGRAM", "features.pt is a TorchScript program, which can .*; give --trust_features true"),
    "trust in nothing": ("prior --trust_features true", "--trust_features true is given but --features is not"),
    "samples without features": ("prior --num_samples 9", "--num_samples 9 is given but samples are drawn for --feat"),
    "a seed without features": ("prior --seed 0", "--seed 0 is given but samples are drawn for --features only"),
    "top_k without features": ("vq_ar --top_k 4", "--top_k 4 is given but samples are drawn for --features only"),
    "samples of a tokenizer": ("dvae FEATURES --num_samples 9", "--num_samples 9 is given but .* draws no samples"),
    "cfg of a tokenizer": ("dvae FEATURES --cfg 2", "--cfg 2.0 is given but .*dvae is a tokenizer"),
    "cfg without classes": ("classless FEATURES --cfg 2", "cfg 2 is given but the model knows no classes"),
    "temperature": ("prior FEATURES --temperature -1", "temperature -1.0 is not possible"),
    "image size": ("prior --image_size 32", "image_size 32 is given but the model is for 16"),
    "no labels": ("prior --data IMAGES", "the model knows 10 classes but there are images without a label"),
    "labels of others": ("few --data synthetic:50", r"have the label \d but the model knows the classes 0 to 1"),
    "codes for vq_ar": (
        "vq_ar --data codes:x",
        "a VQImageAutoregressiveAutoencoder makes its codes itself; give",
    ),
    "codes for features": ("prior FEATURES --data codes:x", "--features looks at images, and codes:x holds none"),
    "no codes": ("prior --data codes:absent", "there are no codes in absent"),
    "codes for a tokenizer": ("dvae --data codes:absent", "no folder and no data source 'codes:absent'"),
    "batch size": ("prior --batch_size 0", "batch_size 0 and num_workers 0 are not possible"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, runs, tmp_path, capsys):
    line, expected = MISTAKES[name]
    line = line.replace("PROGRAM", f"--features {runs / 'features.pt'}")
    run, *options = line.replace("FEATURES", " ".join(features(runs))).split()
    if run == "few":
        build_prior(num_classes=2).save_pretrained(runs / "few")
    if "IMAGES" in options:
        options[options.index("IMAGES")] = str(tmp_path)
        ImageDataset("synthetic:1", 32).source.image(0).save(tmp_path / "a.png")
    data = [] if "--data" in options else ["--data", DATA]
    assert main(["evaluate", str(runs / run), *data, *options]) == 2
    out, err = capsys.readouterr()
    (said,) = err.splitlines()
    assert out == "" and said.startswith("vqdist: error: ")
    assert re.search(expected, said), said


def test_codes_of_another_tokenizer_are_refused(runs, tmp_path, capsys):
    tokenizer = Tokenizer.from_pretrained(runs / "dvae")
    dataset = ImageDataset("synthetic:4", 16, augment=False)
    CodeWriter(tokenizer, dataset, tmp_path, batch_size=4, shard_size=4).write(LocalBackend(device="cpu"))
    assert main(["evaluate", str(runs / "prior"), "--data", f"codes:{tmp_path}"]) == 2
    assert "were made by the tokenizer" in capsys.readouterr().err
