"""Parts that a run leaves as they are, to the bit: weights, statistics, codebooks, and the codes of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import build_trainer, build_vae
from torch import Tensor

from vqdist import Tokenizer, VQGanVAETrainer
from vqdist.cli.train import train_options
from vqdist.errors import UserError
from vqdist.trainers.freezing import frozen_parts

VQ = {"quantizer": "vq", "num_train_steps": 3, "validate_every": 2, "valid_frac": 0.3, "batch_size": 4}
LENGTH = ["--trainer.batch_size", "2", "--trainer.num_train_steps", "1", "--trainer.freeze", "encoder,quantizer"]
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tensors_of(trainer: VQGanVAETrainer, part: str) -> dict[str, Tensor]:
    network = getattr(trainer.model.autoencoder, part)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def check_decoder_alone(folder: Path, **options) -> None:
    """Train with a frozen encoder and a validation in between: its weights and the codebook are as they were."""
    trainer = build_trainer(folder / "run", **VQ, freeze=["encoder"], **options)
    before = {part: tensors_of(trainer, part) for part in ("encoder", "quantizer", "decoder")}
    trainer.train()
    for part, tensors in before.items():
        assert moved(tensors, tensors_of(trainer, part)) == (part == "decoder"), part
    recorded = json.loads((folder / "run" / "config.json").read_text())["trainer"]
    assert recorded["freeze"] == ["encoder", "quantizer"] and recorded["freeze_codebook"] is None
    exported = Tokenizer.from_pretrained(folder / "run" / "export").network.state_dict()
    for part in ("encoder", "quantizer"):
        for name, tensor in before[part].items():
            assert torch.equal(exported[f"{part}.{name}"].cpu(), tensor), name
    again = build_trainer(folder / "run", **VQ, freeze=["encoder", "quantizer"], **options)  # the same run
    assert again.step == 3
    trainer.backend.barrier()


def test_a_decoder_alone_leaves_every_code_as_it_was(tmp_path):
    check_decoder_alone(tmp_path)


@pytest.mark.distributed
def test_a_decoder_alone_on_two_ranks(tmp_path):
    done = torchrun([str(ROOT / "tests" / "workers" / "frozen_worker.py"), str(tmp_path)])
    assert done.stdout.count("as expected") == 2


def test_a_codebook_follows_a_frozen_encoder_where_that_is_said(tmp_path):
    trainer = build_trainer(tmp_path, **VQ, freeze=["encoder"], freeze_codebook=False)
    before = {part: tensors_of(trainer, part) for part in ("encoder", "quantizer")}
    trainer.train()
    assert not moved(before["encoder"], tensors_of(trainer, "encoder"))
    assert moved(before["quantizer"], tensors_of(trainer, "quantizer"))
    assert trainer.config.freeze == ["encoder"]


def test_a_decoder_is_left_alone(tmp_path):
    trainer = build_trainer(tmp_path, **VQ, freeze=["decoder"], model={"use_gan": False})
    before = {part: tensors_of(trainer, part) for part in ("encoder", "quantizer", "decoder")}
    trainer.train()
    for part, tensors in before.items():
        assert moved(tensors, tensors_of(trainer, part)) == (part != "decoder"), part


def test_an_encoder_frozen_in_python_freezes_the_codebook_and_the_run_knows(tmp_path):
    vae = build_vae(quantizer="vq")
    vae.autoencoder.encoder.requires_grad_(False)
    options = {**VQ, "results_folder": str(tmp_path), "image_size": 16, "folder": "synthetic:64", "num_workers": 0}
    trainer = VQGanVAETrainer(vae, **{name: value for name, value in options.items() if name != "quantizer"})
    before = tensors_of(trainer, "quantizer")
    trainer.train()
    assert not moved(before, tensors_of(trainer, "quantizer"))
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["freeze"] == ["encoder", "quantizer"]


def test_another_freezing_is_another_run(tmp_path):
    build_trainer(tmp_path, **VQ, freeze=["encoder"]).train()
    with pytest.raises(UserError, match="freeze"):
        build_trainer(tmp_path, **VQ)


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"freeze": ["encoders"]},
            "freeze names 'encoders', which is no part; give some of encoder, quant",
        ),
        ({"freeze": ["quantizer"]}, "the codebook is to be frozen and the encoder is not"),
        ({"freeze_codebook": True}, "the codebook is to be frozen and the encoder is not"),
        ({"freeze": ["encoder", "decoder"]}, "nothing is left to train"),
        ({"freeze": ["encoder", "quantizer"], "freeze_codebook": False}, "leave one of them out"),
        ({"freeze": ["decoder"]}, "the adaptive weight is made of"),
    ],
)
def test_what_cannot_be_frozen_is_one_line(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        build_trainer(tmp_path, **VQ, **options)


@pytest.mark.parametrize("given", ["encoder,quantizer", ["quantizer, encoder"], "encoder"])
def test_parts_may_be_said_in_one_word(given, tmp_path):
    trainer = build_trainer(tmp_path, **VQ, freeze=given)
    assert trainer.config.freeze == ["encoder", "quantizer"]
    with pytest.raises(UserError, match="freeze names 'encoders', which is no part"):
        build_trainer(tmp_path / "other", **VQ, freeze="encoders,quantizer")


def test_the_command_takes_parts_with_commas(tmp_path):
    options = train_options("vqgan", ["--data", "digits", "--image_size", "16", "--out", str(tmp_path), *LENGTH])
    assert options.trainer.freeze == "encoder,quantizer"


def test_parts_are_named_in_one_order():
    network = build_vae(quantizer="vq").autoencoder
    assert frozen_parts(network, ["quantizer", "encoder"], None) == ["encoder", "quantizer"]
    assert frozen_parts(network, [], None) == []
