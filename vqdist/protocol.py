"""The protocol of a number: all that it was measured on. Two numbers are compared only where their protocols agree.

A protocol is a flat dictionary that is written beside the numbers; it says:

- `data`, `data_hash`, `images`: the images as they were named, a hash of the list of their names, and their number.
- `image_size`, `view`: height and width, and how an image comes to them: crop, resize and its filter.
- `pixels`: `float`, or `8 bits` where reconstructions (or samples) are rounded as if they had been written to files.
- `split`: `validation` where the images are a share of those to train on.
- `features`, `features_hash`: the extractor, and a hash of its weights; `inception_score_over`: the splits of IS.
- `reference`, `reference_hash`: the file of statistics in place of the images' own; of those that say it also
  `reference_images` and `reference_view`.
- `samples`, and options of drawing, of a generator.
- `samples_pixels`, `samples_inception_score_over`: of a model that both reconstructs and draws, where its samples are
  measured by other choices than its reconstructions.
- `lpips`, `lpips_hash`: the network of LPIPS, and a hash of its weights.
- `weights`: `averaged` or `live`, as the export says it.
- `name`, `source`, `differs`: the published protocol that was asked for, and in what it was not kept to: by name the
  value here, and the published one.
- `vqdist`, `commit`: version and commit of a checkout. They make no two protocols different.

`vqdist evaluate RUN` adds a line to `evaluations.jsonl` of the run; `vqdist report` reads it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqdist.files import lines_of_metrics, writing
from vqdist.sizes import sides_of
from vqdist.version import __version__

KEY = "protocol"
SAMPLES = "samples_"  # before a choice of samples that is another one for reconstructions
EVALUATIONS = "evaluations.jsonl"
# the program; names of what a hash tells apart; and what follows from the other choices
SAYS_NOTHING = ("vqdist", "commit", "data", "reference", "features", "split", "name", "source", "differs")
OF_EVERY_NUMBER = ("data_hash", "images", "image_size", "view", "pixels", "weights")
OF_SAMPLES = ("fid", "sfid", "kid", "is", "precision", "recall")
"""Measures of drawn images, by the features that an extractor sees; with an r in front those of reconstructions."""


def of_images(dataset: Any, spec: Any) -> dict[str, Any]:
    """Return what the protocol says of a set of images or of stored codes.

    Args:
        dataset: an `ImageDataset` or `CodeDataset`.
        spec: as the user named it.
    """
    said: dict[str, Any] = {**of_program(), "data": str(spec)}
    said |= {"data_hash": dataset.fingerprint()[:16], "images": len(dataset)}
    if hasattr(dataset, "view"):
        said["image_size"] = list(sides_of(dataset.image_size))
        said["view"] = dataset.view.described()
    return said


def of_program() -> dict[str, str]:
    """Return version and commit of vqdist; the commit only of a checkout, with a plus sign where files differ."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {"vqdist": __version__}
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return {"vqdist": __version__}
    return {"vqdist": __version__, "commit": commit.stdout.strip() + ("+" if changed.stdout else "")}


def of_features(extractor: Any, reference: Any, splits: str = "10") -> dict[str, Any]:
    """Return what the protocol says of an extractor and of what is compared with.

    Args:
        extractor: a `FeatureExtractor` or None.
        reference: a `ReferenceFile` or None.
        splits: of inception scores, which some extractors give.
    """
    said: dict[str, Any] = {}
    if extractor is not None:
        said |= {"features": extractor.kind, "features_hash": extractor.digest}
        said |= {"inception_score_over": splits} if "logits" in extractor.widths else {}
    if reference is not None:
        said |= {"reference": str(reference.path), "reference_hash": reference.digest()}
        made = reference.protocol()
        said |= of_making(made)
    return said


def of_making(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file of statistics says of its making, as far as it is a number of images and words of a view."""
    kinds = {"images": int, "view": str}
    return {f"reference_{name}": made[name] for name, kind in kinds.items() if isinstance(made.get(name), kind)}


def telling(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells a protocol from others: no names of what a hash tells apart, and not the program."""
    return {name: value for name, value in said.items() if name not in SAYS_NOTHING}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two protocols say differently, by name; what one does not say at all is None there."""
    first, second = telling(first), telling(second)
    pairs = {name: (first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def differences_of(number: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two protocols say differently of all that a number depends on, as `rfid` does on the extractor."""
    return differences(of_number(number, first), of_number(number, second))


def of_number(number: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a protocol says of all that a number depends on, without names of what a hash tells apart."""
    choices = telling(_choices_of(number, said))
    return {name: value for name, value in choices.items() if _concerns(name, number)}


def _choices_of(number: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return a protocol with the choices of samples in place of those of reconstructions where a number is of them."""
    both = {name: value for name, value in said.items() if not name.startswith(SAMPLES)}
    of_samples = {name.removeprefix(SAMPLES): value for name, value in said.items() if name.startswith(SAMPLES)}
    return {**both, **(of_samples if number in OF_SAMPLES else {})}


def _concerns(name: str, number: str) -> bool:
    """Return whether a number depends on what a protocol says by this name."""
    kinds = {number, number.removeprefix("r")} & {*OF_SAMPLES}
    if name.startswith("lpips"):
        return number == "lpips"
    if name == "inception_score_over":
        return "is" in kinds
    if name.startswith(("features", "reference")):
        return bool(kinds)
    return name in OF_EVERY_NUMBER or number in OF_SAMPLES  # the rest is of drawing samples


def keep(run: Path, step: int, numbers: Mapping[str, Any]) -> None:
    """Add the numbers of an evaluation, with their protocol, to those of a run.

    Raises:
        CannotWrite: the file cannot be written.
    """
    path = run / EVALUATIONS
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **numbers}) + "\n")


def last_of(run: Path) -> dict[str, Any] | None:
    """Return the last evaluation of a run, with its `step` and protocol; None where there is none."""
    path = run / EVALUATIONS
    if not path.is_file():
        return None
    found = None
    with open(path, "rb") as file:
        for _, line in lines_of_metrics(file):
            if isinstance(line.get(KEY), dict):
                found = line
    return found
