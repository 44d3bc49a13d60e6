"""Five quantizers in one network, and one quantizer in three networks, on emoji of 64 pixels: equal steps, two seeds.

    python -m benchmarks.emoji --data emoji64.tar

The quantizers are those of `benchmarks.quantizers`, and so is the first network. A run that has its line in
runs/results/emoji.jsonl is not made again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks import record
from benchmarks.quantizers import NETWORK, QUANTIZERS
from benchmarks.worker import count_parameters
from vqdist import VQGanVAE, VQGanVAETrainer
from vqdist.evaluation import evaluate_reconstruction
from vqdist.objectives import LPIPS

LINES = record.ROOT / "runs" / "results" / "emoji.jsonl"
SEEDS = (0, 1)
NARROW = {"ch": 16, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "groups": 16}
# by name: where it is from; each makes 16 x 16 features of an image of 64 pixels
NETWORKS = {
    "taming": "LlamaGen's, with 16 channels in place of 128",
    "magvit2": "Open-MAGVIT2's, with 16 channels in place of 128 and one block in place of four",
    "conv": "muse-maskgit-pytorch's, with width 32",
}
IN_ALL_NETWORKS = "fsq"


def cases() -> list[tuple[str, str, int]]:
    """Return network, quantizer and seed of each run."""
    pairs = [("taming", quantizer) for quantizer in QUANTIZERS]
    pairs += [(network, IN_ALL_NETWORKS) for network in NETWORKS if network != "taming"]
    return [(network, quantizer, seed) for seed in SEEDS for network, quantizer in pairs]


def build_vae(network: str, quantizer: str, seed: int) -> VQGanVAE:
    """Return the tokenizer of a case. In one network, encoders and decoders begin alike."""
    width, arguments, _ = QUANTIZERS[quantizer]
    encoders: dict[str, dict[str, Any]] = {
        "taming": {**NETWORK, "embed_dim": width},
        "magvit2": {**NARROW, "z_channels": width},
        "conv": {"width": 32, "layers": 2},
    }
    decoders: dict[str, dict[str, Any]] = {"taming": NETWORK, "magvit2": NARROW, "conv": encoders["conv"]}
    torch.manual_seed(seed)
    return VQGanVAE(
        encoder={"class_path": network, "init_args": encoders[network]},
        decoder={"class_path": network, "init_args": decoders[network]},
        quantizer={"class_path": quantizer, "init_args": arguments},
        terms=[{"class_path": "reconstruction", "init_args": {"kind": "l2", "weight": 4.0}}],
        use_gan=False,
    )


def lpips(weights: Path | None) -> LPIPS:
    """Return LPIPS on SqueezeNet; without a file with weights at random, and without linear layers."""
    if weights is not None:
        return LPIPS(weights, net="squeeze")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LPIPS(torchvision.models.squeezenet1_1(weights=None).state_dict(), net="squeeze", linear=False)


def trained(case: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train a case, and return the numbers of its validation images, its size and its speed."""
    network, quantizer, seed = case[:3]
    vae = build_vae(network, quantizer, seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        VQGanVAETrainer(
            vae,
            folder=f"wds:{options.data}" if options.data.endswith(".tar") else options.data,
            image_size=64,
            valid_frac=0.1,
            batch_size=options.batch_size,
            num_train_steps=options.steps,
            num_workers=0,
            lr=1e-3,
            adam_betas=[0.9, 0.95],
            max_grad_norm=1.0,
            warmup_steps=options.steps // 10,
            use_ema=False,
            seed=seed,
            backend="local",
            results_folder=folder,
            save_results_every=0,
            save_model_every=0,
            validate_every=0,
        ) as trainer,
    ):
        seconds = []
        for _ in range(options.steps):
            began = time.process_time()
            trainer.train_step()
            seconds.append(time.process_time() - began)
        measured = evaluate_reconstruction(
            trainer.main_engine.module,
            trainer.valid_batches(),
            trainer.backend,
            image_size=64,
            distances={"lpips": lpips(options.lpips).distances},
        )
    size = count_parameters([vae.autoencoder])
    return {**measured, "parameters": size, "images_per_cpu_second": options.batch_size * len(seconds) / sum(seconds)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("--data", required=True, help="a folder or a .tar of images, or another source of vqdist")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lpips", type=Path, help="torchvision's weights of squeezenet1_1; by default at random")
    return parser.parse_args()


def main() -> None:
    """Train what has no line yet, and write the numbers of all."""
    options = parse_arguments()
    torch.set_num_threads(1)
    keys = [[*case, options.steps, options.batch_size] for case in cases()]
    rows = record.once_each(LINES, keys, lambda case: trained(case, options))
    numbers = {"steps": options.steps, "batch_size": options.batch_size, "own_weights": options.lpips is not None}
    print(record.write("emoji", {**numbers, "rows": rows}))


if __name__ == "__main__":
    main()
