"""Drawing and training of the end-to-end model, against the demo of genie2-pytorch 0.0.21.

The demo is a script outside that package, so `benchmarks.vq_ar_worker` has its model and its loop, made of the same
libraries, which are this environment's own: no other one is needed.

- Drawing: 64 images of 49 codes from random weights of the same sizes, vqdist's `sample` with keys and values kept,
  against itself without, and against the demo, both of which run the whole sequence for each code.
- Training: the demo's settings on the same PNG files of digits; one step is one batch of 32. Each side has its own
  loader and defaults: the demo has neither loader processes nor an EMA, and prints four numbers in every step.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.ancestors import Launch, compare, launch
from benchmarks.common import ROOT, Row, ratio, take_turns
from benchmarks.vq_ar_worker import Demo
from benchmarks.worker import timed
from vqdist.data.sources import open_source
from vqdist.models.vq_ar import VQImageAutoregressiveAutoencoder

RECIPES = ROOT / "launch" / "recipes"
# what the demo's model knows
SHARED = ("patch_size", "dim", "codebook_size", "decay", "depth", "recon_from_pred_codes_weight")
TRAINER = ("batch_size", "lr", "max_grad_norm")
SIDES = {
    "default": {},
    "no loader processes": {"num_workers": 0},
    "no loader processes, no EMA": {"num_workers": 0, "use_ema": False},
}
SAMPLING_TARGET, STEP_TARGET = 8.0, 1.1
NUM_SAMPLES = 64


def recipe(name: str) -> dict[str, dict[str, Any]]:
    """Return the sections of one of vqdist's recipes."""
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def sampling(quick: bool) -> list[Row]:
    """Rows of drawing with the sizes of both recipes."""
    rows = []
    for name in ("digits_vq_ar",) if quick else ("digits_vq_ar", "mnist_vq_ar"):
        settings = recipe(name)
        torch.manual_seed(0)
        size = settings["data"]["image_size"]
        # a k-means start has no codes before the first batch, and how they came about is no matter here
        options = {**settings["model"], "vq_kwargs": {**settings["model"].get("vq_kwargs", {}), "kmeans_init": False}}
        model = VQImageAutoregressiveAutoencoder(image_size=size, **options)
        demo = Demo(image_size=size, **{key: settings["model"][key] for key in SHARED})
        variants = {
            "cached": timed(lambda model=model: model.sample(NUM_SAMPLES)),
            "without its cache": timed(lambda model=model: model.sample(NUM_SAMPLES, use_cache=False)),
            "the demo": timed(lambda demo=demo: demo.sample(NUM_SAMPLES)),
        }
        timings = take_turns(variants, steps=1, rounds=1 if quick else 5, warmup=1)
        for other in ("without its cache", "the demo"):
            detail = (
                f"{timings[other].milliseconds:.0f} against {timings['cached'].milliseconds:.0f} ms; CPU time "
                f"{ratio(timings[other].cpu, timings['cached'].cpu):.2f}"
            )
            what = f"{name}'s sizes: {NUM_SAMPLES} images of {model.num_codes} codes, {other} / cached, time"
            value = ratio(timings[other].wall, timings["cached"].wall)
            bound = SAMPLING_TARGET if other == "the demo" else None
            rows.append(Row(what, value, at_least=bound, detail=detail))
    return rows


def write_digits(folder: Path, count: int) -> None:
    """Digits that come with vqdist as PNG files, which both sides read."""
    folder.mkdir(parents=True)
    source = open_source("digits")
    for index in range(count):
        source.image(index).save(folder / f"{index:05d}.png")


def measure(*, steady: bool, steps: int, rounds: int) -> Launch:
    """Time of a step of the demo's loop and of vqdist's settings, by turns."""
    settings = recipe("mnist_vq_ar")
    size = settings["data"]["image_size"]
    model = {"image_size": size, **{key: settings["model"][key] for key in SHARED}}
    trainer = {key: settings["trainer"][key] for key in TRAINER}
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits", 512)

        def options(side: str, **further: Any) -> dict[str, Any]:
            return {"side": side, "digits": f"{folder}/digits", "model": model, "trainer": {**trainer, **further}}

        sides = {"genie2": (sys.executable, options("genie2"))}
        for name, further in SIDES.items():
            sides[name] = (sys.executable, options("vqdist", backend="local", **further))
        return launch(sides, "benchmarks.vq_ar_worker", steady=steady, steps=steps, rounds=rounds)


def training(quick: bool) -> list[Row]:
    """Rows of a training step."""
    rows = []
    for steady, count in zip((False, True), (1, 0) if quick else (3, 2), strict=True):
        launches = [measure(steady=steady, steps=3, rounds=2 if quick else 6) for _ in range(count)]
        label = "the demo's settings" + (", steady memory" if steady else "")
        for side in SIDES if launches else ():
            target = STEP_TARGET if side == "default" else None
            rows.append(compare(label, launches, side, "genie2", images=32, target=target))
    return rows


def run(quick: bool = False) -> list[Row]:
    """Rows of the table."""
    return [*sampling(quick), *training(quick)]
