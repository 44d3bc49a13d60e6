"""Five quantizers in one network on the same images: PSNR and use of the codebook, as the table of docs/field.md.

    python -m benchmarks.quantizers --data emoji64.tar

The network is that of LlamaGen's tokenizer, narrower, with 16x16 codes of about 1,024 for an image of 64 pixels.
Images, first weights, loss and rate are the same for all. There is no discriminator: in the recipe
`llamagen_vq16` it joins at step 20,000, long after these runs have ended.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vqdist import VQGanVAE, VQGanVAETrainer, __version__

WIDTH = 64  # of the features where the quantizer does not say it
NETWORK: dict[str, Any] = {"ch": 16, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "groups": 16}
NETWORK |= {"attn_resolutions": [16], "resolution": 64, "z_channels": WIDTH}

# by name: width of the features, what makes the quantizer, and where it is from
QUANTIZERS: dict[str, tuple[int, dict[str, Any], str]] = {
    "gradient_vq": (8, {"codebook_size": 1024, "l2_norm": True}, "LlamaGen: vectors of length 1"),
    "fsq": (4, {"levels": [8, 5, 5, 5]}, "FSQ: 8 x 5 x 5 x 5 levels"),
    "magvit2_lfq": (10, {"codebook_size": 1024}, "Open-MAGVIT2: signs of ten numbers"),
    "ibq": (WIDTH, {"codebook_size": 1024}, "IBQ: a softmax over all codes"),
    "simvq": (WIDTH, {"codebook_size": 1024}, "SimVQ: a fixed codebook, a learnt layer"),
}
NUMBERS = {"psnr": "{:.2f}", "ssim": "{:.3f}", "codebook_usage": "{:.1%}", "codebook_perplexity": "{:.0f}"}


def build_vae(name: str, seed: int) -> VQGanVAE:
    """Return the tokenizer with this quantizer; encoder and decoder begin alike, but for what the width changes."""
    width, arguments, _ = QUANTIZERS[name]
    torch.manual_seed(seed)
    return VQGanVAE(
        encoder={"class_path": "taming", "init_args": {**NETWORK, "embed_dim": width}},
        decoder={"class_path": "taming", "init_args": NETWORK},
        quantizer={"class_path": name, "init_args": arguments},
        terms=[{"class_path": "reconstruction", "init_args": {"kind": "l2", "weight": 4.0}}],
        use_gan=False,
    )


def trained(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train with this quantizer, and return the numbers of the validation images, and the seconds that it took."""
    began = time.perf_counter()
    trainer = VQGanVAETrainer(
        build_vae(name, options.seed),
        folder=f"wds:{options.data}" if options.data.endswith(".tar") else options.data,
        image_size=64,
        valid_frac=0.1,
        batch_size=options.batch_size,
        num_train_steps=options.steps,
        num_workers=0,
        lr=options.lr,
        adam_betas=[0.9, 0.95],
        max_grad_norm=1.0,
        warmup_steps=options.steps // 10,
        use_ema=False,
        seed=options.seed,
        backend="local",
        results_folder=str(folder / name),
        save_results_every=0,
        save_model_every=0,
        validate_every=0,
    )
    with trainer:
        numbers = trainer.train()
    return {**numbers, "seconds": time.perf_counter() - began}


def table(results: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of the table, best PSNR first."""
    lines = ["| quantizer | as in | PSNR | SSIM | codes in use | perplexity |", f"|{' --- |' * 6}"]
    for name in sorted(results, key=lambda name: -results[name]["psnr"]):
        cells = [form.format(results[name][key]) for key, form in NUMBERS.items()]
        lines.append(f"| `{name}` | {QUANTIZERS[name][2]} | {' | '.join(cells)} |")
    return lines


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizers", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder or a .tar of images, or another source of vqdist")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=QUANTIZERS, action="append", help="this one; may be given several times")
    parser.add_argument("--out", type=Path, help="also write all numbers here, as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train with each quantizer in turn, and print the table with its date and command."""
    options = parse_arguments(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    results = {}
    for name in options.only or QUANTIZERS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = trained(name, Path(folder), options)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=2) + "\n")
    command = shlex.join(["-m", "benchmarks.quantizers", *(sys.argv[1:] if arguments is None else arguments)])
    images = int(next(iter(results.values()))["images"])
    print("\n".join(table(results)))
    print(f"\n{options.steps} steps of {options.batch_size}, seed {options.seed}, {images} images to validate on.")
    print(f"{datetime.date.today()}, vqdist {__version__}, torch {torch.__version__}: `python {command}`")


if __name__ == "__main__":
    main()
