"""docs/results.md and its pictures, of the numbers that benchmarks have written into docs/outputs/results.

python -m benchmarks.results
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.curves import BACKENDS, RESUMED
from benchmarks.emoji import NETWORKS
from benchmarks.quantizers import QUANTIZERS
from vqdist.tracking.curves import curves_svg

PAGE = record.ROOT / "docs" / "results.md"
IMAGES = record.ROOT / "docs" / "images"
SHOWN = ("recon_loss", "discr_loss")
COMPARED = ("recon_loss", "generator_grad_norm", "discr_loss")
TITLES = {"recon_loss": "reconstruction loss of the generator", "discr_loss": "loss of the discriminator"}


def made_by(found: Mapping[str, Any]) -> str:
    """Return by which command numbers were made, on which commit, when, and on what."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"Made by `{found['command']}` on {found['date']}, vqdist at commit `{found['commit']}`, on "
        f"{found['machine']}; {versions}."
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


# --------------------------------------------------------------------------------------- curves


def points(values: list[float | None]) -> list[tuple[float, float]]:
    """Return the points of a curve, from step 1 on."""
    return [(step, value) for step, value in enumerate(values, start=1) if value is not None]


def pictures(runs: Mapping[str, Any]) -> dict[str, str]:
    """Return the pictures by the name of their file."""
    made = {}
    for name in SHOWN:
        by_backend = {title: points(runs[key]["curves"][name]) for key, title in BACKENDS.items()}
        made[f"results_backends_{name}.svg"] = curves_svg(by_backend, f"{TITLES[name]}, by step")
        resumed = runs[RESUMED]
        both = {
            "undisturbed on two ranks": points(runs["ddp"]["curves"][name]),
            f"killed at step {resumed['killed_at']}, resumed on one": points(resumed["curves"][name]),
        }
        made[f"results_resumed_{name}.svg"] = curves_svg(both, f"{TITLES[name]}, by step")
    return made


def differences_by_backend(runs: Mapping[str, Any], up_to: list[int]) -> str:
    """Return the table of the largest differences from one process, up to some steps."""
    rows = [
        [title, *(", ".join(f"{value:.0e}" for value in runs[key]["difference"][name]) for name in COMPARED)]
        for key, title in BACKENDS.items()
        if key != "local"
    ]
    steps = ", ".join(map(str, up_to))
    return table(["backend, two ranks", *(f"{name}, up to step {steps}" for name in COMPARED)], rows)


def of_curves(found: Mapping[str, Any]) -> str:
    """Return the two sections on curves."""
    numbers, runs = found["numbers"], found["numbers"]["runs"]
    resumed, batch = runs[RESUMED], numbers["global_batch"]
    shown = "\n".join(f"![{TITLES[name]} on seven backends](images/results_backends_{name}.svg)" for name in SHOWN)
    again = "\n".join(f"![{TITLES[name]}, killed and resumed](images/results_resumed_{name}.svg)" for name in SHOWN)
    up_to = numbers["up_to"]
    told = "; ".join(
        f"{name} {', '.join(f'{value:.0e}' for value in resumed['difference'][name])}" for name in COMPARED
    )
    return f"""## One run on every backend

A small VQGAN on digits of 28 pixels, {numbers["steps"]} steps of {batch} images, whose discriminator joins at step
{numbers["joins"]}. Backend local is one process with batches of {batch}, every other one two ranks with {batch // 2}
each. The gradient penalty is off, since no sharded backend has it.

{shown}

The largest difference from one process, as a share of the number's largest value:

{differences_by_backend(runs, up_to)}

Each backend adds in another order, in float32, so the last digits differ. Two players against each other enlarge
that: from the step at which the discriminator joins, numbers of a step differ visibly, and the course of the losses
does not. Weights after a few steps are compared by tests, to 1e-6: see [Support](support.md).

{made_by(found)}

## Killed and resumed on another number of ranks

The same run on two ranks by DDP: both are killed (SIGKILL) at step {resumed["killed_at"]}. One process goes on from
the checkpoint of step {resumed["resumed_from"]}, with two micro-batches a step:

{again}

The largest differences from the run that was not disturbed, as shares of the largest values, up to step
{", ".join(map(str, up_to))}: {told}. Up to the checkpoint the two are the same run, and from there on the sums are
those of one process.

{made_by(found)}
"""


# --------------------------------------------------------------------------------------- emoji


def of_emoji(found: Mapping[str, Any]) -> str:
    """Return the section on quantizers and networks."""
    numbers = found["numbers"]
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in numbers["rows"]:
        by_case.setdefault((row["key"][0], row["key"][1]), []).append(row)
    quantizers = [(case, rows) for case, rows in by_case.items() if case[0] == "taming"]
    common = next(case[1] for case in by_case if case[0] != "taming")
    networks = [(case, rows) for case, rows in by_case.items() if case[1] == common]
    head = ["PSNR", "LPIPS" if numbers["own_weights"] else "LPIPS, random features", "codes in use", "images/s"]
    said = [[f"`{case[1]}`", QUANTIZERS[case[1]][2], *cells(rows)] for case, rows in sorted(quantizers, key=best)]
    built = [
        [f"`{case[0]}`", NETWORKS[case[0]], f"{rows[0]['parameters']:,}", *cells(rows)]
        for case, rows in sorted(networks, key=best)
    ]
    lpips = (
        "LPIPS is that on SqueezeNet."
        if numbers["own_weights"]
        else "No weights of a network for LPIPS could be had: the column compares features of a SqueezeNet with\n"
        "weights at random, summed over channels, and is no LPIPS of the literature."
    )
    images = int(numbers["rows"][0]["images"])
    return f"""## Five quantizers and three networks

Emoji of 64 pixels (Noto Emoji), {numbers["steps"]} steps of {numbers["batch_size"]} images at a rate of 0.001, L2
alone, 16 x 16 codes of about 1,024. Numbers are those of {images} images that were held back, of two seeds side by
side. After so few steps the tables say how a tokenizer begins, and not how it ends. {lpips} Images a second are
those of training steps, by the CPU time of one core.

Quantizers in LlamaGen's network with 16 channels in place of 128, best first:

{table(["quantizer", "as in", *head], said)}

Networks with the quantizer `{common}`, best first:

{table(["network", "from", "parameters", *head], built)}

{made_by(found)}
"""


def best(item: tuple[Any, list[dict[str, Any]]]) -> float:
    """Return what sorts a case before those of lower PSNR."""
    return -sum(row["psnr"] for row in item[1]) / len(item[1])


def cells(rows: list[dict[str, Any]]) -> list[str]:
    """Return the numbers of a case; those of its seeds side by side, and the mean of their speeds."""
    forms = {"psnr": "{:.2f}", "lpips": "{:.3f}", "codebook_usage": "{:.1%}"}
    said = [", ".join(form.format(row[name]) for row in rows) for name, form in forms.items()]
    return [*said, f"{sum(row['images_per_cpu_second'] for row in rows) / len(rows):.0f}"]


# --------------------------------------------------------------------------------------- other packages


def of_rivals(found: Mapping[str, Any]) -> str:
    """Return the section on speed and memory."""
    rows = [
        [
            row["rival"],
            row["model"],
            " + ".join(f"{size:,}" for size in row["parameters"].values()),
            " and ".join(f"{speed:.1f}" for speed in row["images_per_cpu_second"]),
            f"{row['cpu_ratio']:.2f}",
            f"{row['wall_ratio']:.2f}",
            " and ".join(f"{peak:.0f}" for peak in row["peak_mib"]),
        ]
        for row in found["numbers"]["rows"]
    ]
    head = ["against", "both train", "parameters", "images a CPU second, vqdist and it", "times as fast, by CPU time"]
    head += ["by the clock", "peak MiB, vqdist and it"]
    return f"""## Speed and memory against other trainers

Each row trains equal networks on the same files, by {found["numbers"]["rounds"]} turns of each side, in two
processes with one thread each. vqdist has no loader processes here, so that all work is in one process on both
sides. The VQGANs have no VGG16, and a gradient penalty in every step, as that package's trainer has it. The demo of
genie2-pytorch is a script outside of its package: `benchmarks/vq_ar_worker.py` has its model and loop. `make bench`
compares more settings, each several times.

{table(head, rows)}

A turn is a few steps on a machine that others use, so ratios move by a tenth.

{made_by(found)}
"""


def page() -> str:
    """Return docs/results.md of what was measured."""
    parts = {"curves": of_curves, "emoji": of_emoji, "rivals": of_rivals}
    sections = [write(found) for name, write in parts.items() if (found := record.read(name)) is not None]
    intro = """# Results

Each number and picture on this page was made by the command beneath it. `make results DATA=emoji64.tar` measures
anew and writes the page. Nothing was measured on a GPU: [Costs of the recipes](costs.md) predicts their hours by a
rule.
"""
    return "\n".join([intro, *sections])


def main() -> None:
    """Write the page and its pictures."""
    found = record.read("curves")
    for name, picture in (pictures(found["numbers"]["runs"]) if found else {}).items():
        (IMAGES / name).write_text(picture, encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(Path(PAGE))


if __name__ == "__main__":
    main()
