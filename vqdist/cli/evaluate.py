"""`vqdist evaluate RUN` and `vqdist reconstruct RUN`, for a run of any model that is an image tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vqdist.cli.parsing import make_parser, parse
from vqdist.errors import UserError
from vqdist.files import read_json


def evaluate(arguments: list[str]) -> int:
    """Measure a tokenizer's reconstructions of a set of images; one JSON object on standard output."""
    from vqdist.backends import create_backend
    from vqdist.evaluation import evaluate_reconstruction

    parser = _run_parser("vqdist evaluate", "Measure a run's reconstructions over all images of --data.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images per batch of one process.")
    parser.add_argument("--num_workers", type=int, default=0, help="Loader processes of each rank.")
    parser.add_argument("--backend", type=str, default="auto", help="`auto`, `local`, `accelerate` or `deepspeed`.")
    options = parse(parser, arguments)
    if options.batch_size < 1 or options.num_workers < 0:
        raise UserError(
            f"batch_size {options.batch_size} and num_workers {options.num_workers} are not possible; they must be at "
            "least 1 and 0"
        )
    tokenizer, dataset = _open_run(options)
    backend = create_backend(options.backend)
    network = tokenizer.network.to(backend.device)
    batches = _batches(dataset, options, backend)
    numbers = evaluate_reconstruction(network, batches, backend, image_size=tokenizer.image_size)
    if backend.is_main:
        print(json.dumps(numbers))
    backend.close()
    return 0


def reconstruct(arguments: list[str]) -> int:
    """Draw originals beside their reconstructions: `vqdist reconstruct RUN --data DIR --out grid.png`."""
    import torch

    from vqdist.evaluation import reconstruct as reconstruct_images
    from vqdist.tracking import save_sheet

    parser = _run_parser("vqdist reconstruct", "Draw images of --data beside a run's reconstructions of them.")
    parser.add_argument("--out", type=Path, default=Path("reconstructions.png"), help="PNG file to write.")
    parser.add_argument("--num_images", type=int, default=16, help="Images to draw, the first of --data.")
    options = parse(parser, arguments)
    tokenizer, dataset = _open_run(options)
    count = min(options.num_images, len(dataset))
    if count < 1:
        raise UserError(f"num_images {options.num_images} is not possible; it must be at least 1")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out} is not the name of a PNG file; give one that ends in .png")
    images, skipped = zip(*(dataset.fetch(0, index) for index in range(count)), strict=True)
    images = torch.stack(images)
    for name in sum(skipped, ()):
        print(f"skipped an image that cannot be decoded: {name}", file=sys.stderr)
    save_sheet(torch.stack([images, reconstruct_images(tokenizer.network, images)], dim=1), options.out)
    print(options.out)
    return 0


def _run_parser(program: str, description: str):
    """What `evaluate` and `reconstruct` share: a run, images, and how to load them."""
    parser = make_parser(program, description)
    parser.add_argument("run", type=str, help="Run folder, or a folder that save_pretrained wrote.")
    parser.add_argument("--data.folder", type=str, required=True, help="Images, as for train (short: --data).")
    parser.add_argument(
        "--data.image_size",
        type=int | None,
        default=None,
        help="Side in pixels (short: --image_size); by default the run's.",
    )
    parser.add_argument(
        "--data.on_bad_image", type=str, default="raise", help="`raise` or `skip` (short: --on_bad_image)."
    )
    return parser


def _open_run(options):
    """The exported tokenizer of a run, and its view of the images."""
    from vqdist.data.dataset import ImageDataset
    from vqdist.models.tokenizer import Tokenizer

    run = Path(options.run)
    if not run.is_dir():
        raise UserError(f"no such run folder: {run}")
    folder = run / "export" if (run / "export").is_dir() else run
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{run} has no export/ with config.json and model.safetensors; train it to its first checkpoint"
        )
    size = options.data.image_size
    tokenizer = Tokenizer.from_pretrained(folder, _trained_image_size(run, folder) if size is None else size)
    dataset = ImageDataset(
        options.data.folder,
        tokenizer.image_size,
        channels=tokenizer.channels,
        augment=False,
        on_bad_image=options.data.on_bad_image,
    )
    return tokenizer, dataset


def _trained_image_size(run: Path, export: Path) -> int:
    """What the run's configuration says, or that of an export alone."""
    folder = run if (run / "config.json").is_file() else export
    content = read_json(folder / "config.json")
    size = content.get("trainer", content).get("image_size")
    if size is None:
        raise UserError(f"{run} does not say on which image size it was trained; give --image_size")
    return size


def _batches(dataset, options, backend):
    import torch
    from tqdm import tqdm

    from vqdist.data.loader import valid_loader

    loader = valid_loader(
        dataset,
        torch.arange(len(dataset)),
        batch_size=options.batch_size,
        rank=backend.rank,
        world_size=backend.world_size,
        num_workers=options.num_workers,
    )
    for batch in tqdm(loader, desc="evaluate", unit="batch", disable=not (backend.is_main and sys.stderr.isatty())):
        for name in batch.bad:
            print(f"skipped an image that cannot be decoded: {name}", file=sys.stderr)
        yield batch.item.to(backend.device)
