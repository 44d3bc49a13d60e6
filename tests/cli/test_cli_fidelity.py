"""`vqdist statistics` and `vqdist fidelity`, and a reference in `vqdist evaluate`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import torchrun
from torch import nn

from vqdist.cli import main
from vqdist.data.dataset import ImageDataset

DATA, OTHERS = "synthetic:30", "synthetic:18"


class Means(nn.Module):
    """Six numbers of an image: mean and deviation of each colour."""

    def forward(self, images):
        return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with an extractor, and images as pictures and as an .npz."""
    folder = tmp_path_factory.mktemp("fidelity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(Means()).save(str(folder / "features.pt"))
    dataset = ImageDataset(OTHERS, 16, augment=False)
    (folder / "pictures").mkdir()
    arrays = []
    for index in range(len(dataset)):
        pixels = (dataset[index].permute(1, 2, 0) * 255).round().byte().numpy()
        arrays.append(pixels)
        from PIL import Image

        Image.fromarray(pixels).save(folder / "pictures" / f"{index:03}.png")
    np.savez(folder / "samples.npz", arr_0=np.stack(arrays))
    return folder


@pytest.fixture
def vqdist(folder, capsys):
    """Run a command with the extractor, and give what it prints."""

    def run(*arguments: str, code: int = 0) -> str:
        options = ["--features", str(folder / "features.pt"), "--trust_features", "true", "--batch_size", "7"]
        assert main([*arguments, *options]) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return run


def test_statistics_are_worth_the_images(folder, vqdist, tmp_path):
    path = tmp_path / "ref.npz"
    assert vqdist("statistics", "--data", DATA, "--image_size", "16", "--out", str(path)) == f"{path}\n"
    samples = str(folder / "pictures")
    with_file = json.loads(vqdist("fidelity", samples, "--reference", str(path)))
    with_images = json.loads(vqdist("fidelity", samples, "--reference", DATA))
    protocols = with_file.pop("protocol"), with_images.pop("protocol")
    assert with_file == pytest.approx(with_images, rel=1e-6)
    assert with_file.keys() == {"fid", "kid", "kid_std", "precision", "recall", "samples"}
    assert protocols[0]["images"] == with_file["samples"] == 18
    assert protocols[0]["reference_hash"] != protocols[1]["reference_hash"]
    assert protocols[0]["features_hash"] == protocols[1]["features_hash"]


def test_a_file_of_images_is_the_folder_of_them(folder, vqdist):
    numbers = [
        json.loads(vqdist("fidelity", str(folder / name), "--reference", DATA)) for name in ("pictures", "samples.npz")
    ]
    hashes = [of.pop("protocol")["data_hash"] for of in numbers]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6) and hashes[0] != hashes[1]


@pytest.mark.distributed
def test_two_ranks_see_what_one_sees(folder, vqdist):
    arguments = ["fidelity", str(folder / "samples.npz"), "--reference", DATA]
    one = json.loads(vqdist(*arguments))
    options = ["--features", str(folder / "features.pt"), "--trust_features", "true", "--batch_size", "7"]
    two = json.loads(torchrun(["-m", "vqdist", *arguments, *options]).stdout)
    assert two.pop("protocol") == one.pop("protocol") and two == pytest.approx(one, rel=1e-6)


MISTAKES = [
    (["fidelity", "{samples}", "--reference", "nowhere.npz"], "there is no file nowhere.npz"),
    (["fidelity", "nowhere", "--reference", DATA], "nowhere"),
    (["fidelity", "{ref}", "--reference", DATA, "--image_size", "16"], "holds statistics but no images"),
    (["statistics", "--data", DATA, "--out", "ref.pt"], "give one that ends in .npz"),
    (["statistics", "--data", DATA, "--out", "ref.npz", "--keep", "2"], "there are 2 images in --keep (0 keeps none)"),
    (["statistics", "--data", "synthetic:2", "--out", "ref.npz"], "there are 2 images in --data"),
    (["fidelity", "{ref}", "--reference", "{ref}"], "holds statistics but no images"),
    (["fidelity", "{samples}", "--reference", DATA, "--image_size", "8"], "holds images of [16, 16] pixels"),
    (["fidelity", "{samples}", "--reference", DATA, "--image_size", "0"], "image_size 0"),
    (["fidelity", "{samples}", "--reference", DATA, "--num_workers", "-1"], "num_workers -1 are not possible"),
]


@pytest.mark.parametrize("arguments, pattern", MISTAKES)
def test_a_mistake_is_one_line(arguments, pattern, folder, vqdist, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(6), sigma=np.eye(6))
    places = {"samples": folder / "samples.npz", "ref": tmp_path / "ref.npz"}
    said = vqdist(*(argument.format(**places) for argument in arguments), code=2).splitlines()
    assert len(said) == 1 and pattern in said[0]
