"""One side of the comparison of training steps with the demo of genie2-pytorch, see `benchmarks.worker`.

Options: {"side": "genie2" | "vqdist", "digits": FOLDER, "runs": FOLDER, "model": {...}, "trainer": {...}, "threads":
N}

The demo is a script that the package does not hold, so its model and its loop stand here as they are described: the
same parts of the same libraries in the same order, each with the defaults that it leaves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from PIL import Image
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to
from x_transformers import Decoder

from benchmarks.worker import Step, count_parameters, serve


class Demo(nn.Module):
    """The demo's model; its arguments are those of `VQImageAutoregressiveAutoencoder`."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        codebook_size: int,
        decay: float,
        depth: int,
        recon_from_pred_codes_weight: float,
    ):
        super().__init__()
        grid, pixels = image_size // patch_size, patch_size**2
        sizes = {"p": patch_size, "q": patch_size}
        self.num_codes, self.weight = grid**2, recon_from_pred_codes_weight
        self.encoder = nn.Sequential(Rearrange("b 1 (h p) (w q) -> b (h w) (p q)", **sizes), nn.Linear(pixels, dim))
        self.vq = VectorQuantize(dim=dim, codebook_size=codebook_size, decay=decay, rotation_trick=True)
        self.start = nn.Parameter(torch.zeros(dim))
        layers = Decoder(dim=dim, depth=depth, heads=4, attn_dim_head=16, rotary_pos_emb=True, verbose=False)
        self.transformer = nn.Sequential(layers, nn.Linear(dim, dim))
        self.decoder = nn.Sequential(
            nn.Linear(dim, pixels), Rearrange("b (h w) (p q) -> b 1 (h p) (w q)", h=grid, **sizes)
        )

    def predict(self, vectors: Tensor) -> Tensor:
        """Vectors of codes (b, m, d) -> predicted vectors (b, m + 1, d)."""
        return self.transformer(torch.cat([repeat(self.start, "d -> b 1 d", b=len(vectors)), vectors], dim=1))

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss, and its parts."""
        quantized, codes, commit = self.vq(self.encoder(image * 2 - 1))
        predicted = self.predict(quantized[:, :-1])
        logits = -torch.cdist(predicted, self.vq.codebook)
        entropy = F.cross_entropy(rearrange(logits, "b n v -> b v n"), codes)
        rotated = rotate_to(predicted, self.vq.get_codes_from_indices(codes))
        recon = self.weight * self.decoder(rotated) + (1 - self.weight) * self.decoder(quantized)
        recon_loss, ar_commit = F.mse_loss((recon + 1) / 2, image), F.mse_loss(predicted, quantized)
        return entropy + recon_loss + commit + ar_commit, (recon_loss, entropy, commit, ar_commit)

    @torch.no_grad()
    def sample(self, num_samples: int, min_p: float = 0.25, temperature: float = 1.5) -> Tensor:
        """Codes drawn by running the whole sequence for each of them, decoded: (num_samples, 1, h, w)."""
        self.eval()
        codes = torch.empty(num_samples, 0, dtype=torch.long)
        for _ in range(self.num_codes):
            logits = -torch.cdist(self.predict(self.vq.get_codes_from_indices(codes)), self.vq.codebook)[:, -1]
            chances = logits.softmax(dim=-1)
            unlikely = chances < min_p * chances.amax(dim=-1, keepdim=True)
            gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(min=1e-20)))
            drawn = (logits.masked_fill(unlikely, -torch.inf) / temperature + gumbel).argmax(dim=-1, keepdim=True)
            codes = torch.cat([codes, drawn], dim=1)
        return ((self.decoder(self.vq.get_codes_from_indices(codes)) + 1) / 2).clamp(0, 1)


class Files(Dataset):
    """The images of a folder, decoded as the demo decodes MNIST: (1, h, w) in [0, 1]."""

    def __init__(self, folder: str):
        self.paths = sorted(Path(folder).rglob("*.png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return (T.PILToTensor()(image.convert("L")) / 255).float()


def _endless(folder: str, batch_size: int) -> Iterator[Tensor]:
    loader = DataLoader(Files(folder), batch_size, shuffle=True)
    while True:
        yield from loader


def genie2_side(options: dict[str, Any]) -> tuple[Step, dict[str, int]]:
    """Run the loop of the demo's script, without its pictures; it prints the parts of the loss in every step."""
    model, settings = Demo(**options["model"]), options["trainer"]
    batches = _endless(options["digits"], settings["batch_size"])
    optimizer = Adam(model.parameters(), lr=settings["lr"])

    def step() -> None:
        loss, parts = model(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        print(" ".join(f"{part.item():.3f}" for part in parts))

    return step, {"model": count_parameters([model])}


def vqdist_side(options: dict[str, Any]) -> tuple[Step, dict[str, int]]:
    """vqdist's trainer, with every option that costs time at its default."""
    from benchmarks.common import ONLY_STEPS
    from vqdist.models.vq_ar import VQImageAutoregressiveAutoencoder
    from vqdist.trainers.ar import ARTrainer

    model = VQImageAutoregressiveAutoencoder(**options["model"])
    trainer = ARTrainer(
        model,
        folder=options["digits"],
        results_folder=options["runs"],
        num_train_steps=10**6,
        **ONLY_STEPS,
        **options["trainer"],
    )
    return trainer.train_step, {"model": count_parameters([model])}


if __name__ == "__main__":
    torch.manual_seed(0)
    serve({"genie2": genie2_side, "vqdist": vqdist_side})
