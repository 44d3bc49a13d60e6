"""The two-stage job on real digits: a prior over stored codes beats what counting codes and pairs of codes can do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqdist import ARTrainer, CodeDataset, Prior, Tokenizer, VQGanVAE, VQGanVAETrainer
from vqdist.cli import main

MARGIN = 0.5
"""Nats per code by which the prior must be better than the best bigram model; it was seen to be 0.88 better."""


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """10,000 digits, encoded by a tokenizer that was trained for a few seconds."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    options = {"codebook_dim": 8, "kmeans_init": True, "threshold_ema_dead_code": 2}
    vae = VQGanVAE(
        dim=16, channels=1, layers=2, quantizer="vq", codebook_size=64, vq_kwargs=options, use_vgg_and_gan=False
    )
    settings = {"batch_size": 32, "num_train_steps": 150, "lr": 2e-3, "num_workers": 0, "ema_beta": 0.9}
    settings |= {"validate_every": 0, "save_results_every": 0, "results_folder": str(folder / "tokenizer")}
    VQGanVAETrainer(vae, folder="digits", image_size=28, **settings).train()
    encode = ["encode", str(folder / "tokenizer"), "--data", "digits", "--out", str(folder / "codes")]
    assert main(encode) == 0
    return folder


def unigram_nll(train: Tensor, valid: Tensor, codebook_size: int, count: float) -> float:
    """Nats per code where each code has its frequency, every one counted `count` times more than it occurs."""
    counts = torch.bincount(train.flatten(), minlength=codebook_size) + count
    return float(-(counts / counts.sum()).log()[valid].mean())


def bigram_nll(train: Tensor, valid: Tensor, codebook_size: int, count: float) -> float:
    """Nats per code where each code has its frequency after the code before it; the first after a code of its own."""
    train, valid = (torch.nn.functional.pad(codes, (1, 0), value=codebook_size) for codes in (train, valid))
    pairs = train[:, :-1] * codebook_size + train[:, 1:]
    counts = torch.bincount(pairs.flatten(), minlength=(codebook_size + 1) * codebook_size) + count
    counts = counts.view(codebook_size + 1, codebook_size)
    return float(-(counts / counts.sum(dim=1, keepdim=True)).log()[valid[:, :-1], valid[:, 1:]].mean())


def test_the_prior_beats_unigrams_and_bigrams_of_the_codes(codes, tmp_path):
    tokenizer = Tokenizer.from_pretrained(codes / "tokenizer")
    torch.manual_seed(0)
    prior = Prior(tokenizer, dim=64, depth=2, heads=2, dim_head=32, num_classes=10)
    settings = {"batch_size": 64, "num_train_steps": 250, "lr": 3e-3, "lr_schedule": "cosine", "warmup_steps": 20}
    settings |= {"ema_beta": 0.95, "validate_every": 0, "save_results_every": 0, "num_images_save": 4}
    folder = f"codes:{codes / 'codes'}"
    trainer = ARTrainer(prior, folder=folder, num_workers=0, results_folder=str(tmp_path), **settings)
    nll = trainer.train()["nll"]
    stored = CodeDataset(codes / "codes")
    rows = torch.stack([stored.fetch(0, index)[0] for index in range(len(stored))])
    train, valid = rows[trainer.split.train], rows[trainer.split.valid]
    # the counts that smooth each model are the best for it, chosen on what it is measured on
    smoothing = (0.01, 0.1, 0.3, 1.0, 3.0)
    unigram = min(unigram_nll(train, valid, tokenizer.codebook_size, count) for count in smoothing)
    bigram = min(bigram_nll(train, valid, tokenizer.codebook_size, count) for count in smoothing)
    assert bigram < unigram
    assert nll < bigram - MARGIN, f"prior {nll:.3f}, bigram {bigram:.3f}, unigram {unigram:.3f} nats per code"
