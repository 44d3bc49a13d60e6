"""A classifier of the digits that come with the package, as a feature extractor: a minute's stand-in for Inception.

usage: python -m benchmarks.digit_classifier --out digits.pt
then:  vqdist evaluate RUN --data digits --features digits.pt --trust_features true

FID, KID, precision and recall with these features compare runs on digits; they have nothing to do with published ones.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from vqdist.data.loader import split_indices
from vqdist.data.sources import open_source

IMAGE_SIZE = 28
NUM_CLASSES = 10
NUM_FEATURES = 64
HELD_OUT = 0.2  # of the images


class DigitFeatures(nn.Module):
    """Images (b, c, h, w) in [0, 1], of any size, grey or colour -> features (b, 64) of variance 1."""

    def __init__(self):
        super().__init__()
        self.size = IMAGE_SIZE  # of the module's names, TorchScript sees none
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (IMAGE_SIZE // 4) ** 2, NUM_FEATURES),
            nn.ReLU(),
            nn.BatchNorm1d(NUM_FEATURES, affine=False),  # no feature counts for more than another in a distance
        )

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(dim=1, keepdim=True)
        if grey.shape[2] != self.size or grey.shape[3] != self.size:
            grey = interpolate(grey, size=[self.size, self.size], mode="bilinear", align_corners=False, antialias=True)
        return self.net(grey)


def load_digits(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Digits (n, 1, 28, 28) float32 in [0, 1] and their classes (n,)."""
    source = open_source("digits")
    images = [source.tensor(index, image_size=IMAGE_SIZE, channels=1) for index in indices]
    return torch.stack(images), torch.tensor([source.label(index) for index in indices])


def train(images: Tensor, labels: Tensor, *, epochs: int, batch_size: int = 100) -> nn.Sequential:
    """Features and the linear layer over them, (b, 1, 28, 28) -> logits (b, 10); equal for equal arguments."""
    torch.manual_seed(0)
    classifier = nn.Sequential(DigitFeatures(), nn.Linear(NUM_FEATURES, NUM_CLASSES))
    optimizer = torch.optim.Adam(classifier.parameters())
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(classifier(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose most probable class is theirs."""
    return float((classifier(images).argmax(dim=1) == labels).float().mean())


def save_features(classifier: nn.Sequential, path: Path) -> None:
    """Write the part before the last layer as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces another format, which vqdist does not read
        torch.jit.script(classifier[0].eval()).save(str(path))


def main(arguments: list[str] | None = None) -> None:
    """Train, say how well, and write the features."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digit_classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="TorchScript file to write.")
    parser.add_argument("--epochs", type=int, default=6, help="Times that each of the 8,000 images is looked at.")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"epochs {options.epochs} is not possible; it must be at least 1")
    options.out.parent.mkdir(parents=True, exist_ok=True)  # fail before the work, not after it
    start = time.perf_counter()
    split = split_indices(len(open_source("digits")), valid_frac=HELD_OUT, seed=0)
    classifier = train(*load_digits(split.train.tolist()), epochs=options.epochs)
    found = accuracy(classifier, *load_digits(split.valid.tolist()))
    save_features(classifier, options.out)
    seconds = time.perf_counter() - start
    print(f"{options.out}: {found:.2%} of {len(split.valid)} held-out digits are told right ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
