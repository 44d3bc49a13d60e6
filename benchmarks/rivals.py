"""Speed and memory of training against muse-maskgit-pytorch, DALLE-pytorch and the demo of genie2-pytorch.

    python -m benchmarks.rivals

Both sides of a row train equal networks on the same files by turns, each in a process of its own with one thread, as
`benchmarks.muse`, `benchmarks.dalle` and `benchmarks.vq_ar` describe. Here vqdist has no loader processes either, so
that all of each side's work is in one process and its CPU time can be compared. The environments of the packages are
made beside the repository if they are not there, and --muse-python and --dalle-python name others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import dalle, muse, record, vq_ar
from benchmarks.ancestors import ANCESTORS, Launch, interpreter, launch
from benchmarks.common import ratio

THEIRS, OURS = "theirs", "vqdist"
GENIE2 = "demo of genie2-pytorch 0.0.21"


def against_muse(python: str, rounds: int) -> Launch:
    """Train VQGANs by turns; the penalty of the discriminator is in every step of both, as in all of muse's."""

    def options(side: str, **trainer: Any) -> dict[str, Any]:
        return {"side": side, "vgg": "none", "model": muse.MODEL, "trainer": {**muse.TRAINER, **trainer}}

    ours = options("vqdist", backend="local", num_workers=0, apply_grad_penalty_every=1)
    sides = {THEIRS: (python, options("muse")), OURS: (sys.executable, ours)}
    return launch(sides, "benchmarks.muse_worker", steady=False, steps=2, rounds=rounds)


def against_dalle(python: str, rounds: int) -> Launch:
    """Train discrete VAEs by turns."""
    case = dalle.CASES[0]

    def options(side: str, **trainer: Any) -> dict[str, Any]:
        model = {**dalle.SHARED, **case.model}
        return {"side": side, "model": model, "trainer": {**dalle.TRAINER, **trainer}}

    ours = options("vqdist", backend="local", num_workers=0)
    sides = {THEIRS: (python, options("dalle")), OURS: (sys.executable, ours)}
    return launch(sides, "benchmarks.dalle_worker", steady=False, steps=case.steps // 2, rounds=rounds)


def against_genie2(rounds: int) -> Launch:
    """Train the end-to-end model by turns, with the demo's settings."""
    settings = vq_ar.recipe("mnist_vq_ar")
    model = {"image_size": settings["data"]["image_size"], **{key: settings["model"][key] for key in vq_ar.SHARED}}
    trainer = {key: settings["trainer"][key] for key in vq_ar.TRAINER}
    with tempfile.TemporaryDirectory() as folder:
        vq_ar.write_digits(Path(folder) / "digits", 512)

        def options(side: str, **further: Any) -> dict[str, Any]:
            return {"side": side, "digits": f"{folder}/digits", "model": model, "trainer": {**trainer, **further}}

        ours = options("vqdist", backend="local", num_workers=0)
        sides = {THEIRS: (sys.executable, options("genie2")), OURS: (sys.executable, ours)}
        return launch(sides, "benchmarks.vq_ar_worker", steady=False, steps=3, rounds=rounds)


def row(rival: str, model: str, images: int, found: Launch) -> dict[str, Any]:
    """Return the numbers of one comparison.

    Args:
        rival: package and version.
        model: in words.
        images: of a step.
        found: the timings of both sides.
    """
    ours, theirs = found.timings[OURS], found.timings[THEIRS]
    return {
        "rival": rival,
        "model": model,
        "parameters": found.sizes,
        "steps": len(ours.cpu),
        "images_per_cpu_second": [images / statistics.median(side.cpu) for side in (ours, theirs)],
        "cpu_ratio": ratio(theirs.cpu, ours.cpu),
        "wall_ratio": ratio(theirs.wall, ours.wall),
        "peak_mib": [found.peaks[OURS], found.peaks[THEIRS]],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--muse-python", help="interpreter of an environment that has muse-maskgit-pytorch 0.3.5")
    parser.add_argument("--dalle-python", help="interpreter of an environment that has dalle-pytorch 1.6.6")
    return parser.parse_args()


def main() -> None:
    """Compare with each in turn, and write the rows."""
    options = parse_arguments()
    torch.set_num_threads(1)
    package = {name: ancestor.package.replace("==", " ") for name, ancestor in ANCESTORS.items()}
    rows = [
        row(
            package["muse"],
            "VQGAN, 64 pixels",
            16,
            against_muse(interpreter("muse", options.muse_python), options.rounds),
        ),
        row(
            package["dalle"],
            f"discrete VAE, {dalle.CASES[0].label}",
            dalle.BATCH_SIZE,
            against_dalle(interpreter("dalle", options.dalle_python), options.rounds),
        ),
        row(GENIE2, "end-to-end model, digits of 28 pixels", 32, against_genie2(options.rounds)),
    ]
    print(record.write("rivals", {"rounds": options.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
