"""Models of DALLE-pytorch 1.6.6: their codes and images, from files of the real package (dalle_checkpoint.py)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT

from vqdist import DiscreteVAE, Tokenizer, UserError

DATA = ROOT / "tests" / "data" / "dalle_pytorch"
MODELS = ("rgb", "rgba", "grey")


def content_of(name: str) -> dict:
    return torch.load(DATA / name / "vae.pt", weights_only=True)


def written(folder: Path, content) -> Path:
    torch.save(content, folder / "vae.pt")
    return folder / "vae.pt"


def refusal(path: Path) -> str:
    """Return what is said about a file that cannot be loaded: one line."""
    with pytest.raises(UserError) as caught:
        DiscreteVAE.from_dalle_pytorch(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


@pytest.fixture(params=MODELS)
def checkpoint(request):
    expected = torch.load(DATA / request.param / "expected.pt", weights_only=True)
    return DATA / request.param / "vae.pt", expected["images"] / 255, expected["codes"], expected["recons"]


def test_codes_and_reconstructions_are_the_real_packages(checkpoint):
    path, images, codes, recons = checkpoint
    vae = DiscreteVAE.from_dalle_pytorch(path)
    assert not vae.training
    assert torch.equal(vae.get_codebook_indices(images), codes)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(codes), recons, rtol=0, atol=1e-5)


def test_tokenizer_gives_the_same_codes_and_images_in_0_1(checkpoint):
    path, images, codes, recons = checkpoint
    tokenizer = Tokenizer(DiscreteVAE.from_dalle_pytorch(path))
    assert torch.equal(tokenizer.encode(images), codes)
    means, stds = (
        torch.tensor(part)[: images.shape[1], None, None] for part in ((0.5, 0.5, 0.5, 0), (0.5, 0.5, 0.5, 1))
    )
    torch.testing.assert_close(tokenizer.decode(codes), (recons * stds + means).clamp(0, 1), rtol=0, atol=1e-5)


def test_it_is_exported_like_any_other_model(checkpoint, tmp_path):
    path, images, codes, _ = checkpoint
    DiscreteVAE.from_dalle_pytorch(path).save_pretrained(tmp_path)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path).encode(images), codes)


def test_options_go_over_the_files(tmp_path):
    vae = DiscreteVAE.from_dalle_pytorch(DATA / "rgb" / "vae.pt", straight_through=True, kl_reduction="mean")
    assert vae.straight_through and vae.kl_reduction == "mean"
    weighed = DiscreteVAE.from_dalle_pytorch(DATA / "rgb" / "vae.pt", kl_div_loss_weight=0.1)
    assert weighed.kl_reduction == "dalle"
    assert DiscreteVAE.from_dalle_pytorch(DATA / "rgb" / "vae.pt").kl_reduction == "mean"  # of no KL


def test_an_option_with_a_typo_is_not_the_files_fault():
    message = "^DiscreteVAE has no argument 'straight_trough'; nearest: straight_through$"
    with pytest.raises(UserError, match=message):
        DiscreteVAE.from_dalle_pytorch(DATA / "rgb" / "vae.pt", straight_trough=True)


def test_channels_that_the_file_does_not_say_are_those_of_the_weights(tmp_path):
    content = content_of("rgba")
    del content["hparams"]["channels"]
    assert DiscreteVAE.from_dalle_pytorch(written(tmp_path, content)).channels == 4


def test_further_entries_of_the_file_are_passed_over(tmp_path):
    path = written(tmp_path, {**content_of("rgb"), "version": "1.6.6", "epoch": 3})
    assert DiscreteVAE.from_dalle_pytorch(path).num_tokens == 24


class MakesFolder:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["whole file", "in hparams"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, place, zipped):
    trap = MakesFolder(tmp_path / "trap")
    content = content_of("rgb")
    content["hparams"]["image_size"] = trap
    path = tmp_path / "vae.pt"
    torch.save(trap if place == "whole file" else content, path, _use_new_zipfile_serialization=zipped)
    assert re.search(r"cannot be read as tensors and plain values \(it holds \w+\.mkdir\)$", refusal(path))
    assert not trap.path.exists()
    torch.load(path, weights_only=False)
    assert trap.path.exists()  # it is a trap indeed


def test_numbers_of_numpy_are_refused_by_name(tmp_path):
    content = content_of("rgb")
    content["hparams"]["num_tokens"] = np.int64(24)
    assert "plain values (it holds numpy" in refusal(written(tmp_path, content))


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in refusal(tmp_path / "vae.pt")
    assert "no such file" in refusal(tmp_path)


NOT_OF_TORCH = {
    "empty": (b"", r"\(it is empty\)$"),
    "text": (b"not a\ncheckpoint", r"\(it is text that begins with 'not a checkpoint'\)$"),
    "long text": (b"<html>" + b"a" * 9000, r"\(it is text that begins with '<html>a{34}'\)$"),
    "zip": (b"PK\x03\x04 damaged", r"\((?!it is)"),
    "bytes": (bytes(range(128, 256)), r"\((?!it is)"),
}


@pytest.mark.parametrize("content, found", NOT_OF_TORCH.values(), ids=NOT_OF_TORCH)
def test_a_file_that_is_none_of_torch(tmp_path, content, found):
    path = tmp_path / "vae.pt"
    path.write_bytes(content)
    assert re.search("cannot be read as tensors and plain values " + found, refusal(path))


def test_a_truncated_file(tmp_path):
    path = tmp_path / "vae.pt"
    path.write_bytes((DATA / "rgb" / "vae.pt").read_bytes()[:5000])
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        {"encoder.0.0.weight": torch.zeros(1)},
        torch.zeros(3),
        ["hparams", "weights"],
        {"hparams": {"image_size": 16}},
    ],
    ids=["state", "tensor", "list", "no weights"],
)
def test_a_file_of_torch_that_is_no_vae(tmp_path, content):
    assert "hparams and weights" in refusal(written(tmp_path, content))


def test_the_checkpoint_of_a_whole_dalle(tmp_path):
    content = {"hparams": {"num_text_tokens": 10000, "dim": 512}, "vae_params": {}, "weights": {"a": torch.zeros(1)}}
    assert "num_text_tokens" in refusal(written(tmp_path, content))


@pytest.mark.parametrize(
    "hparams",
    [
        {"num_tokens": 25},
        {"hidden_dim": 8},
        {"num_resnet_blocks": 0},
        {"num_layers": 3},
        {"channels": 1},
        {"codebook_dim": "6"},
        {"num_tokens": 24.0},
        {"num_tokens": None},
        {"normalization": "none"},
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_hparams(tmp_path, hparams):
    content = content_of("rgb")
    content["hparams"] |= hparams
    refusal(written(tmp_path, content))


@pytest.mark.parametrize(
    "hparams",
    [{"num_layers": 10**8}, {"num_resnet_blocks": 10**8}, {"hidden_dim": 10**6}, {"num_tokens": 10**12}],
    ids=str,
)
def test_sizes_are_compared_before_memory_is_taken(tmp_path, hparams):
    content = content_of(MODELS[0])
    refusal(written(tmp_path, {**content, "hparams": {**content["hparams"], **hparams}}))


@pytest.mark.parametrize("part", ["hparams", "weights"])
@pytest.mark.parametrize("value", [None, 3, [1, 2], {"encoder.0.0.weight": 3}, {1: 2}], ids=str)
def test_parts_of_another_kind(tmp_path, part, value):
    refusal(written(tmp_path, {**content_of("rgb"), part: value}))
