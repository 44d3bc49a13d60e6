"""Decoder-only training that begins from the file of each family: resumed to the bit, on two ranks, codes kept.

Run by torchrun, this file is the worker.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun
from scenarios import QUIET, largest_difference, weights_of
from test_fine_tuning import CRITIC
from torch import Tensor

from vqdist import Tokenizer, VQGanVAETrainer
from vqdist.cli import main

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
FIXTURES = Path(__file__).parent.parent / "data" / "parity"
# families with a decoder, and the side of the images in pixels
SIDES = {
    "taming_vqgan": 16,
    "taming_gumbel": 16,
    "llamagen_vq": 16,
    "var_vqvae": 16,
    "ibq": 16,
    "diffusers_vqmodel": 16,
    "open_magvit2": 16,
    "maskgit_vqgan": 16,
    "titok_rgb": 32,
    "titok_stage2": 16,
    "muse_vqgan": 16,
}
STEPS = 3
DRAWS = ("taming_gumbel",)  # noise of each rank's own: two ranks are not one process
TRAINING: dict[str, Any] = {**QUIET, "num_train_steps": STEPS, "optimizer": "sgd", "lr": 0.02, "use_ema": False}
TRAINING |= {"adaptive_weight": False, "adversarial_weight": 0.3, "apply_grad_penalty_every": 0}
TRAINING |= {"freeze": ["encoder", "quantizer"], "folder": "synthetic:32"}


def file_of(family: str) -> Path:
    own = FIXTURES / family / "vae.0.pt"
    return own if own.is_file() else FIXTURES / family / "weights.safetensors"


def begun(family: str, folder: Path, **options: Any) -> VQGanVAETrainer:
    """Return a trainer of the decoder of a family's fixture, with its configuration."""
    place = {"init_from": str(file_of(family)), "peer_config": str(FIXTURES / family / "config.json")}
    model = {"perceptual": "none", "discriminator": CRITIC}
    return VQGanVAETrainer(
        model, **{**TRAINING, **place, "image_size": SIDES[family], "results_folder": str(folder), **options}
    )


def trained(family: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Return the weights after three steps, the last of them in a run that is resumed."""
    for steps in (2, STEPS):
        trainer = begun(family, folder, num_train_steps=steps, **options)
        trainer.train()
        weights = weights_of(trainer)
        if "RANK" not in os.environ:
            trainer.close()
    return weights


def codes_of(tokenizer: Tokenizer, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return tokenizer.encode(torch.rand(6, 3, side, side, generator=generator))


@pytest.mark.parametrize("family", SIDES)
def test_a_resumed_run_is_a_whole_one_and_every_code_is_kept(family, tmp_path, capsys):
    whole = begun(family, tmp_path / "whole", batch_size=4)
    start = weights_of(whole)
    whole.train()
    after = weights_of(whole)
    whole.close()
    cut = trained(family, tmp_path / "cut", batch_size=4)
    assert cut.keys() == after.keys() and all(torch.equal(after[name], one) for name, one in cut.items())
    moved = {name for name in after if not torch.equal(after[name], start[name])}
    of_generator = {name for name in moved if name.startswith("generator.")}
    assert of_generator and all(name.startswith("generator.decoder.") for name in of_generator)
    side = SIDES[family]
    config = FIXTURES / family / "config.json"
    before = Tokenizer.from_pretrained(file_of(family), side, peer_config=config)
    tuned = Tokenizer.from_pretrained(tmp_path / "cut")
    codes = codes_of(before, side)
    assert torch.equal(codes_of(tuned, side), codes) and len(codes.unique()) > 1
    assert tuned.codes_fingerprint() == before.codes_fingerprint() and tuned.keeps_codes_of_source() is True
    assert tuned.fingerprint() != before.fingerprint()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("one")
    return {family: trained(family, folder / family, batch_size=8) for family in SIDES}


@pytest.mark.nightly
def test_two_ranks_are_one_process(tmp_path, reference):
    torchrun([__file__, str(tmp_path)], timeout=600)
    found = torch.load(tmp_path / "results.pt")
    assert found.keys() == reference.keys()
    for family in SIDES:
        if family not in DRAWS:
            difference, tensor = largest_difference(reference[family], found[family])
            # rounding: the mean of two ranks' halves is summed in another order, and Adam divides small by small
            assert difference <= 1e-5, f"{family}: {tensor} differs by {difference}"
        tuned = Tokenizer.from_pretrained(tmp_path / family)
        assert tuned.keeps_codes_of_source() is True


def test_stored_codes_serve_a_tuned_tokenizer_from_end_to_end(tmp_path, capsys):
    """Convert, encode, tune the decoder, measure, and train a prior on the codes of before."""
    data = ["--data", "synthetic:24"]
    export, codes, run, prior = (str(tmp_path / name) for name in ("export", "codes", "run", "prior"))
    source, config = str(file_of("taming_vqgan")), str(FIXTURES / "taming_vqgan" / "config.json")
    assert main(["convert", source, "--peer_config", config, "--out", export]) == 0
    assert main(["encode", export, *data, "--out", codes, "--image_size", "16"]) == 0
    tune = ["--init_from", export, "--image_size", "16", "--out", run, "--data.num_workers", "0"]
    tune += ["--model.perceptual", "none", "--model.use_gan", "false", "--trainer.batch_size", "4"]
    tune += ["--trainer.num_train_steps", "2", "--trainer.freeze", "encoder,quantizer"]
    assert main(["train", "vqgan", *data, *tune]) == 0
    capsys.readouterr()
    assert main(["evaluate", run, *data]) == 0
    told = capsys.readouterr()
    assert "codes unchanged from export" in told.err and '"codes_unchanged": true' in told.out
    small = ["--model.dim", "16", "--model.depth", "1", "--model.heads", "2", "--model.dim_head", "32"]
    options = ["--tokenizer", run, "--out", prior, "--trainer.batch_size", "4", "--trainer.num_train_steps", "1"]
    assert main(["train", "prior", "--data", f"codes:{codes}", *options, *small, "--data.num_workers", "0"]) == 0
    assert main(["evaluate", prior, "--data", f"codes:{codes}"]) == 0
    again = [*data, "--out", str(tmp_path / "free"), *tune[:4], *tune[6:-2]]
    assert main(["train", "vqgan", *again]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "free"), *data]) == 0
    told = capsys.readouterr()
    assert "other codes than export" in told.err and '"codes_unchanged": false' in told.out
    options[1], options[3] = str(tmp_path / "free"), str(tmp_path / "none")
    assert main(["train", "prior", "--data", f"codes:{codes}", *options, *small, "--data.num_workers", "0"]) == 2
    assert "were made by the tokenizer" in capsys.readouterr().err


def worker() -> None:
    folder = Path(sys.argv[1])
    found = {family: trained(family, folder / family, batch_size=4, backend="accelerate") for family in SIDES}
    if os.environ["RANK"] == "0":
        torch.save(found, folder / "results.pt")


if __name__ == "__main__":
    worker()
