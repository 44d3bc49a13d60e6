"""Writes tests/data/dalle_pytorch: checkpoints of the real DALLE-pytorch, and what it makes of images.

usage: make dalle-checkpoint, which runs this in an environment with dalle-pytorch 1.6.6

For each of `MODELS` a folder with
- vae.pt, as train_vae writes it: {"hparams": arguments of the model, "weights": its state}. It says `channels` only
  with --transparent; grey, for which train_vae has no option, is written likewise.
- expected.pt: {"images": uint8 (b, c, h, w), of which a 255th are the model's images, "codes": (b, n), what
  `get_codebook_indices` gives for them, "recons": (b, c, h, w), what `decode` gives for the codes}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.dalle_worker import import_dalle_pytorch

FOLDER = Path(__file__).resolve().parent / "data" / "dalle_pytorch"
SIZES = {"num_tokens": 24, "codebook_dim": 6, "hidden_dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "rgb": {**SIZES, "image_size": 16, "num_layers": 2, "num_resnet_blocks": 1},
    "rgba": {**SIZES, "image_size": 8, "num_layers": 1, "num_resnet_blocks": 0, "channels": 4},
    "grey": {**SIZES, "image_size": 8, "num_layers": 1, "num_resnet_blocks": 2, "channels": 1},
}
IMAGES = 5
LEAST_CODES = 12
# Between the two likeliest codes' logits at every position: rounding on other machines must not change a code.
MARGIN = 1e-2


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Weights under which the signal keeps its size from layer to layer, and many codes occur."""
    for parameter in model.parameters():
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.normal_(std=scale)
    model.codebook.weight.normal_()
    model.encoder[-1].weight.mul_(4)


@torch.no_grad()
def expected_of(model: nn.Module) -> dict[str, Tensor] | None:
    """Images, codes and reconstructions; none where few codes occur, or rounding might change one."""
    shape = IMAGES, model.channels, model.image_size, model.image_size
    images = torch.randint(256, shape, dtype=torch.uint8)
    best, second = model(images / 255, return_logits=True).topk(2, dim=1).values.unbind(1)
    codes = model.get_codebook_indices(images / 255)
    if codes.unique().numel() < LEAST_CODES or (best - second).min() < MARGIN:
        return None
    return {"images": images, "codes": codes, "recons": model.decode(codes)}


def main() -> None:
    torch.set_num_threads(1)
    package = import_dalle_pytorch()
    for name, hparams in MODELS.items():
        expected, seed = None, 0
        while expected is None:
            torch.manual_seed(seed)
            model = package.DiscreteVAE(**hparams)
            spread(model)
            expected, seed = expected_of(model), seed + 1
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"hparams": hparams, "weights": model.state_dict()}, folder / "vae.pt")
        torch.save(expected, folder / "expected.pt")
        print(f"{folder}: {expected['codes'].unique().numel()} of {model.num_tokens} codes occur")


if __name__ == "__main__":
    main()
