"""Search for the command's defaults: small VQGANs, one option changed at a time. docs/defaults.md has the result.

    python -m benchmarks.defaults crops FOLDER_OF_PICTURES crops/
    python -m benchmarks.defaults search --data emoji=FOLDER --data photographs=crops/ --out search.jsonl
    python -m benchmarks.defaults table --out search.jsonl

A run is one line of the file, and a run that has its line is not made again: a search that was ended goes on where it
was. Every value is said, so the defaults that came of the search do not change what it measures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

Options = Mapping[str, Any]

# the command of a user who trains his first tokenizer, without a perceptual loss: its weights may not be had
BASE = {
    "data.num_workers": 0,
    "data.image_size": 64,
    "data.augment": True,
    "model.dim": 32,
    "model.layers": 3,
    "model.discr_layers": 4,
    "model.perceptual": "none",
    "model.quantizer": "vq",
    "model.codebook_size": 512,
    "trainer.batch_size": 8,
    "trainer.lr": 1e-3,
    "trainer.max_grad_norm": 1.0,
    "trainer.ema_beta": 0.995,
    "trainer.save_results_every": 0,
    "trainer.save_model_every": 0,
    "trainer.check_ranks_every": 0,
}
# options of the codebook, changed one by one
CODEBOOK = {
    "codebook_dim": 16,
    "decay": 0.9,
    "threshold_ema_dead_code": 2,
    "kmeans_init": True,
    "use_cosine_sim": True,
    "commitment_weight": 1.0,
}
# those of the two players
PLAYERS = {
    "trainer.adversarial_weight": 0.1,
    "trainer.discriminator_warmup_steps": 50,
    "trainer.adversarial_ramp_steps": 100,
    "trainer.discr_lr": None,
    "trainer.discr_max_grad_norm": 1.0,
    "trainer.apply_grad_penalty_every": 4,
}
ALONE = {"model.use_gan": False}
# of the command where nothing but the images and the number of steps is said
COMMAND = {**PLAYERS, "model.vq_kwargs": {**CODEBOOK, "codebook_dim": 32}}
BETAS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
# of the defaults before this search, those of the constructors
BEFORE = {"codebook_dim": 256, "decay": 0.8, "threshold_ema_dead_code": 0}


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        stage: of the search.
        label: of the row, unique in its stage.
        options: of `vqdist train vqgan`, by dotted name.
        start: step at which the discriminator joins; half of the steps if None.
        betas: decays of further averages to measure at the end.
        branches: whether it goes on from the first half of the stage's centre, with which it is equal until then.
    """

    stage: str
    label: str
    options: Options
    start: int | None = None
    betas: tuple[float, ...] = ()
    branches: bool = False


@dataclass
class Search:
    """Runs that are made once, and their lines.

    Attributes:
        out: the file.
        halves: folder of the first halves of runs, by data, seed and steps.
        done: keys of the runs that have a line.
    """

    out: Path
    halves: Path
    done: set[tuple[Any, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.done = {_key(row) for row in read_rows(self.out)}

    def run(self, setting: Setting, data: tuple[str, str], seed: int, steps: int) -> None:
        """Train one setting and write its line, unless the file has it."""
        name, images = data
        row = {"stage": setting.stage, "label": setting.label, "data": name, "seed": seed, "steps": steps}
        if _key(row) in self.done:
            return
        began = time.perf_counter()
        half = self._half(images, seed, steps, name) if setting.branches else None
        row |= train(setting, images, seed, steps, half=half)
        row["seconds"] = round(time.perf_counter() - began, 1)
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.done.add(_key(row))
        print(json.dumps(row), flush=True)

    def _half(self, images: str, seed: int, steps: int, name: str) -> Path:
        folder = self.halves / f"{name}_{seed}_{steps}"
        if not folder.is_dir():
            train_half(PLAYERS, images, seed, steps, folder)
        return folder


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("stage", "label", "data", "seed", "steps"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a search, in the order in which they were made."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# ----------------------------------------------------------------------------------------- the settings


def settings() -> Iterator[Setting]:
    """Yield every setting of the search, stage by stage."""
    yield from _codebooks()
    yield from _rates()
    yield from _players()
    yield from _averages()
    yield from _quantizers()


def _codebooks() -> Iterator[Setting]:
    changes: dict[str, Options] = {
        "as in the constructor": BEFORE,
        "centre": {},
        "codebook_dim 8": {"codebook_dim": 8},
        "codebook_dim 32": {"codebook_dim": 32},
        "codebook_dim 256": {"codebook_dim": 256},
        "decay 0.8": {"decay": 0.8},
        "decay 0.99": {"decay": 0.99},
        "threshold_ema_dead_code 0": {"threshold_ema_dead_code": 0},
        "threshold_ema_dead_code 1": {"threshold_ema_dead_code": 1},
        "kmeans_init false": {"kmeans_init": False},
        "use_cosine_sim false": {"use_cosine_sim": False},
    }
    for label, change in changes.items():
        yield Setting("codebook", label, {**ALONE, "model.vq_kwargs": {**CODEBOOK, **change}})


def _rates() -> Iterator[Setting]:
    for dim in (16, 32, 64):
        for lr in (1e-4, 3e-4, 1e-3, 3e-3):
            yield Setting("rate", f"dim {dim}, lr {lr:g}", {**ALONE, "model.dim": dim, "trainer.lr": lr})


def _players() -> Iterator[Setting]:
    changes: dict[str, Options] = {
        "without discriminator": ALONE,
        "as in the constructor": {
            "trainer.adversarial_weight": 1.0,
            "trainer.discriminator_warmup_steps": 0,
            "trainer.adversarial_ramp_steps": 0,
            "trainer.discr_max_grad_norm": None,
        },
        "centre": {},
        "adversarial_weight 0.03": {"trainer.adversarial_weight": 0.03},
        "adversarial_weight 0.3": {"trainer.adversarial_weight": 0.3},
        "adversarial_weight 1": {"trainer.adversarial_weight": 1.0},
        "without warm-up": {"trainer.discriminator_warmup_steps": 0},
        "without warm-up and ramp": {
            "trainer.discriminator_warmup_steps": 0,
            "trainer.adversarial_ramp_steps": 0,
        },
        "discr_lr lr / 5": {"trainer.discr_lr": 2e-4},
        "discr_max_grad_norm null": {"trainer.discr_max_grad_norm": None},
        "apply_grad_penalty_every 0": {"trainer.apply_grad_penalty_every": 0},
    }
    for label, change in changes.items():
        if change is ALONE:
            yield Setting("players", label, change)
        else:
            yield Setting("players", label, {**PLAYERS, **change}, branches=True)
    yield Setting("players", "discriminator_start 0", PLAYERS, start=0)
    for dim in (8, 32):
        wider = {"model.vq_kwargs": {**CODEBOOK, "codebook_dim": dim}}
        yield Setting("players", f"codebook_dim {dim}", {**PLAYERS, **wider})


def _averages() -> Iterator[Setting]:
    yield Setting("average", "decays of one run", COMMAND, start=0, betas=BETAS)


def _quantizers() -> Iterator[Setting]:
    sizes = {"lfq": (65_536, 1_024), "fsq": (65_536, 1_024), "vq": (1_024, 512)}
    for name, counts in sizes.items():
        for codes in counts:
            own = {"model.quantizer": name, "model.codebook_size": codes}
            yield Setting("quantizer", f"{name}, {codes:,} codes", {**COMMAND, **own}, start=0)


# ----------------------------------------------------------------------------------------- one run


def train(setting: Setting, images: str, seed: int, steps: int, half: Path | None = None) -> dict[str, Any]:
    """Train a setting, and return what its row holds: numbers in the middle, at the end, and over the run.

    Args:
        setting: of the row.
        images: as `--data` takes them.
        seed, steps: of the run.
        half: run folder of its first half, which stays as it is.
    """
    folder = Path(tempfile.mkdtemp(prefix="vqdist-defaults-"))
    try:
        if half is not None:
            shutil.copytree(half, folder / "run")
        trainer = _trainer(setting.options, images, seed, steps, folder / "run", setting.start)
        try:
            return _trained(trainer, setting.betas, folder / "run" / "metrics.jsonl")
        finally:
            trainer.close()
    finally:
        shutil.rmtree(folder)


def train_half(options: Options, images: str, seed: int, steps: int, folder: Path) -> None:
    """Train the first half of a run, up to its checkpoint, and leave its folder."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer = _trainer({**options, "trainer.save_model_every": steps // 2}, images, seed, steps, partial)
    for step, _ in trainer.steps():
        if step == steps // 2:
            break
    trainer.close()
    partial.rename(folder)


def _trainer(options: Options, images: str, seed: int, steps: int, run: Path, start: int | None = None) -> Any:
    from vqdist.cli.models import model_entry
    from vqdist.cli.train import make_trainer, train_options

    options = {**BASE, "model.vq_kwargs": CODEBOOK, **options, "out": str(run), "data.folder": images, "seed": seed}
    options |= {"trainer.num_train_steps": steps, "trainer.validate_every": steps // 2}
    if options["model.quantizer"] != "vq":
        del options["model.vq_kwargs"]
    options |= {"trainer.allow_config_change": True}
    if images == "digits":
        options |= {"data.image_size": 32, "model.channels": 1, "model.discr_layers": 3, "data.augment": False}
    if not options.get("model.use_gan", True):
        del options["model.discr_layers"]
    else:
        options["trainer.discriminator_start"] = steps // 2 if start is None else start
    arguments = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()
    ]
    return make_trainer(model_entry("vqgan"), train_options("vqgan", arguments))


def _trained(trainer: Any, betas: tuple[float, ...], metrics: Path) -> dict[str, Any]:
    from vqdist.trainers.average import MovingAverage

    averages = {
        beta: MovingAverage(trainer.networks.main, beta=beta, update_after_step=0, update_every=1) for beta in betas
    }
    for _ in trainer.steps():
        for average in averages.values():
            average.update()
    row = _numbers([json.loads(line) for line in metrics.read_text().splitlines()], trainer.num_train_steps)
    if betas:
        row["psnr_live"] = _psnr(trainer, None)
        row["psnr_by_beta"] = {str(beta): _psnr(trainer, average.ema_model) for beta, average in averages.items()}
    return row


def _psnr(trainer: Any, network: Any) -> float:
    from vqdist.evaluation import evaluate_reconstruction

    size = trainer.config.image_size
    with trainer.networks.main.whole(network) as whole:
        numbers = evaluate_reconstruction(whole, trainer.valid_batches(), trainer.backend, image_size=size)
    return round(numbers["psnr"], 3)


def _numbers(lines: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    valid = {line["step"]: line for line in lines if "valid/psnr" in line}
    half, end = valid[steps // 2], valid[steps]
    row = {
        "psnr_half": round(half["valid/psnr"], 2),
        "psnr": round(end["valid/psnr"], 2),
        "perplexity": round(end["valid/codebook_perplexity"], 1),
        "usage": round(end["valid/codebook_usage"], 3),
    }
    for name in ("adversarial_weight", "discriminator_grad_norm"):
        seen = [line[name] for line in lines if line.get(name) is not None]
        if seen:
            row[name] = round(statistics.median(seen), 3)
    return row


# ----------------------------------------------------------------------------------------- pictures and tables


def cut_crops(pictures: Path, folder: Path, side: int = 64) -> int:
    """Cut pictures into squares that do not overlap, each at full and at half size; return how many."""
    from PIL import Image

    folder.mkdir(parents=True)
    count = 0
    for path in sorted(path for path in pictures.iterdir() if path.is_file()):
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
        for scale in (1, 2):
            window = side * scale
            for top in range(0, whole.height - window + 1, window):
                for left in range(0, whole.width - window + 1, window):
                    crop = whole.crop((left, top, left + window, top + window))
                    crop.resize((side, side), Image.Resampling.BICUBIC).save(
                        folder / f"{path.stem}_{scale}_{top:04d}_{left:04d}.png"
                    )
                    count += 1
    return count


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the rows as one Markdown table for each stage and number of steps; seeds stand side by side."""
    parts = []
    for stage, steps in dict.fromkeys((row["stage"], row["steps"]) for row in rows):
        chosen = [row for row in rows if (row["stage"], row["steps"]) == (stage, steps)]
        parts.append(f"{stage}, {steps} steps\n\n{_table(chosen)}")
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    data = list(dict.fromkeys(row["data"] for row in rows))
    lines = [
        "| | " + " | ".join(f"{name}: PSNR | perplexity" for name in data) + " |",
        "| --- |" + " --- |" * 2 * len(data),
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        cells = []
        for name in data:
            seeds = sorted((r for r in rows if (r["label"], r["data"]) == (label, name)), key=lambda r: r["seed"])
            cells += [", ".join(f"{r[key]:g}" for r in seeds) for key in ("psnr", "perplexity")]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    crops = commands.add_parser("crops", help="cut pictures into squares of 64 pixels")
    crops.add_argument("pictures", type=Path)
    crops.add_argument("folder", type=Path)
    search = commands.add_parser("search", help="train what has no line yet")
    search.add_argument(
        "--data", action="append", required=True, metavar="NAME=IMAGES", help="may be given several times"
    )
    search.add_argument("--out", type=Path, required=True, help="the lines, JSON")
    search.add_argument(
        "--only",
        nargs="+",
        metavar="STAGE[:LABEL]",
        help="of codebook, rate, players, average, quantizer, in this order",
    )
    search.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    search.add_argument("--one_seed_each", action="store_true", help="the first seed with the first images, and so on")
    search.add_argument("--steps", type=int, default=300)
    table = commands.add_parser("table", help="print the lines as tables")
    table.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.command == "crops":
        print(f"{cut_crops(arguments.pictures, arguments.folder)} crops")
    elif arguments.command == "table":
        print(tables(read_rows(arguments.out)))
    else:
        _search(arguments)
    return 0


def _search(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    search = Search(arguments.out, arguments.out.with_suffix(".halves"))
    data = [cast(tuple[str, str], tuple(given.split("=", 1))) for given in arguments.data]
    pairs = [(images, seed) for seed in arguments.seeds for images in data]
    if arguments.one_seed_each:
        pairs = list(zip(data, arguments.seeds, strict=True))
    wanted = [arguments.only] if arguments.only is None else [name.split(":", 1) for name in arguments.only]
    for only in wanted:
        for setting in settings():
            if only is None or (setting.stage == only[0] and only[-1] in (setting.label, only[0])):
                for images, seed in pairs:
                    search.run(setting, images, seed, arguments.steps)


if __name__ == "__main__":
    raise SystemExit(main())
