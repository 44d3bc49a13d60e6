"""The model card of an export, README.md: its metric index, protocol, training cost and picture.

A card is written with the export and belongs to its owner from then on. Only the part between two comments and the
metric index of the head are written anew: at the end of a run, and by `vqdist evaluate`. A card without the comments
stays as it is.
"""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vqdist import protocol
from vqdist.errors import UserError, printable, shortened
from vqdist.export import MODEL_CARD, NUMBERS_BEGIN, NUMBERS_END, RECORD
from vqdist.files import EVENTS, METRICS, lines_of_metrics, read_json, read_small, writing

LARGEST = 2**20  # bytes
VALID, VALIDATION = "valid/", "validation"
COUNTS = ("step", "images", "samples", "seconds", "time_share")  # numbers beside the measures
PICTURE = "pictures.png"
TITLES = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID", "fid": "FID", "is": "Inception score"}
TITLES |= {"kid": "KID", "rkid": "rKID", "sfid": "sFID", "rsfid": "rsFID", "ris": "rIS", "l1": "L1", "nll": "NLL"}
RECONSTRUCTION = ("image-to-image", "Image reconstruction")
GENERATION = ("unconditional-image-generation", "Image generation")
OF_CLASSES = ("conditional-image-generation", "Class-conditional image generation")
LONGEST = 400  # characters of a word in the card that comes from a file or an option


class Cost(NamedTuple):
    """The cost of a training so far.

    Attributes:
        images: that were seen.
        hours: of training steps, by device in words, over all processes.
    """

    images: int
    hours: dict[str, float]


def write_card(run: Path, export: Path) -> None:
    """Bring the numbers of an export's card up to date with its run.

    Raises:
        UserError: the card cannot be read or written.
    """
    path = export / MODEL_CARD
    if not path.is_file() or not (export / RECORD).is_file():
        return
    step = read_json(export / RECORD).get("step")
    text = _read(path)
    if NUMBERS_BEGIN not in text or NUMBERS_END not in text or not isinstance(step, int):
        return
    starts = list(_starts(run))
    validated, cost = _of_metrics(run, step, starts)
    if validated:
        validated[protocol.KEY] = _validation_of(starts, step)
    evaluated = protocol.last_of(run) or {}
    evaluated = evaluated if evaluated.get("step") == step else {}
    picture = _picture(run, step)
    with writing(export / PICTURE):
        if picture is not None and not ((export / PICTURE).is_file() and _same(picture, export / PICTURE)):
            shutil.copyfile(picture, export / PICTURE)
    words = [
        f"Weights of step {step:,}.",
        "",
        *_numbers(validated, evaluated),
        *_protocol(VALIDATION, validated),
        *_protocol("evaluation", evaluated),
        *_cost(cost, step),
    ]
    words += (
        ["## Pictures", "", f"![originals and what the model makes]({PICTURE})", ""] if picture is not None else []
    )
    index = [
        *_results(evaluated, _task(export, evaluated)),
        *_results(validated, _task(export, validated), VALIDATION),
    ]
    written = with_numbers(text, "\n".join(words), index)
    if written != text:
        _write(path, written)


def write_cards(run: Path, exports: Iterable[Path], alert: Callable[[str], None]) -> None:
    """Bring the cards of a run's exports up to date; one that cannot be is told to `alert`: no reason to fail."""
    for export in exports:
        try:
            write_card(run, export)
        except UserError as error:
            alert(f"the card of {export} has no numbers: {error}")


def carry_card(before: Path, new: Path) -> None:
    """Let an export have the words that its owner gave the one before; numbers of other weights are left out.

    Args:
        before: folder of the export in place, if any.
        new: that takes its place.
    """
    path = before / MODEL_CARD
    if path.is_file():
        try:
            _write(new / MODEL_CARD, with_numbers(_read(path), "", []))
        except UserError:  # nobody can say what in it is of other weights
            shutil.copyfile(path, new / MODEL_CARD)


def with_numbers(text: str, words: str, index: list[EvalResult]) -> str:
    """Return a card with these words between its two comments, and this metric index; without them as it is."""
    before, begin, rest = text.partition(NUMBERS_BEGIN)
    _, end, after = rest.partition(NUMBERS_END)
    if not begin or not end:
        return text
    try:
        card = ModelCard(f"{before}{begin}\n{words}{end}{after}", ignore_metadata_errors=True)
        head = cast(ModelCardData, card.data)
        head.eval_results = index or None
        head.model_name = (head.model_name or _title(before)) if index else None
        return str(card)
    except Exception as error:  # of the library that reads the head, which a person may have edited
        said = " ".join(str(error).split())[:200]
        raise UserError(f"the head of the model card cannot be read as YAML ({said}); mend it") from error


def _title(text: str) -> str:
    return next((line[2:].strip() for line in text.splitlines() if line.startswith("# ")), "model")


def _read(path: Path) -> str:
    try:
        return read_small(path, LARGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); mend it, or remove it") from error


def _same(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


# ------------------------------------------------------------------------------------------- what is known of a run


def _of_metrics(run: Path, step: int, starts: list[dict[str, Any]]) -> tuple[dict[str, Any], Cost]:
    """Return the validation of a step, and what the training up to it has taken."""
    validated: dict[str, Any] = {}
    hours: dict[str, float] = {}
    starts, before = [start for start in starts if _counts(start)], 0
    for line in _lines(run / METRICS):
        if line["step"] > step:
            break
        if line["step"] == step and any(name.startswith(VALID) for name in line):
            validated = {name.removeprefix(VALID): value for name, value in line.items()}
        speed, start = line.get("images_per_second"), _last_start(starts, line["step"])
        if speed and start is not None:
            taken = (line["step"] - before) * start["images_per_step"] * start["processes"] / speed / 3600
            hours[_device(start)] = hours.get(_device(start), 0.0) + taken
        before = line["step"] if speed else before
    last = _last_start(starts, step)
    images = 0 if last is None else last["images"] + (step - last["step"]) * last["images_per_step"]
    return validated, Cost(images, hours)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open("rb") as file:
            for _, line in lines_of_metrics(file):
                yield line


def _starts(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the starts and resumptions of a run."""
    return (line for line in _lines(run / EVENTS) if line.get("event") in ("start", "resume"))


def _counts(start: Mapping[str, Any]) -> bool:
    """Return whether a start says how many images a step takes."""
    return all(type(start.get(name)) is int for name in ("images", "images_per_step", "processes"))


def _validation_of(starts: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """Return what the validation of a step was measured on; empty of runs that did not note it yet."""
    said = (_last_start(starts, step) or {}).get("validation")
    return said if isinstance(said, dict) else {}


def _last_start(starts: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """Return the start that made a step: the last one before it."""
    return next((start for start in reversed(starts) if start["step"] < max(step, 1)), None)


def _device(start: Mapping[str, Any]) -> str:
    environment = start.get("environment")
    return str(environment.get("device", "?")) if isinstance(environment, Mapping) else "?"


def _picture(run: Path, step: int) -> Path | None:
    """Return the picture that a run drew at a step, or None."""
    path = run / "results" / f"step_{step:08d}.png"
    return path if path.is_file() else None


# ------------------------------------------------------------------------------------------- words of the card


def _measures(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if type(value) in (int, float) and name not in COUNTS}


def _numbers(validated: Mapping[str, Any], evaluated: Mapping[str, Any]) -> list[str]:
    columns = {VALIDATION: _measures(validated), "evaluation": _measures(evaluated)}
    columns = {title: numbers for title, numbers in columns.items() if numbers}
    if not columns:
        return []
    names = list(dict.fromkeys(name for numbers in columns.values() for name in numbers))
    rows = [
        f"| {TITLES.get(name) or _plain(name)} | "
        + " | ".join(f"{numbers[name]:.4g}" if name in numbers else "" for numbers in columns.values())
        + " |"
        for name in names
    ]
    head = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    return ["## Numbers", "", *head, *rows, ""]


def _protocol(kind: str, found: Mapping[str, Any]) -> list[str]:
    """Return what a validation or an evaluation was measured on."""
    rows = [f"| {_plain(name)} | {_plain(value)} |" for name, value in _said_of(found).items()]
    return [f"## Protocol of the {kind}", "", "| | |", "| --- | --- |", *rows, ""] if rows else []


def _said_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a protocol without paths of this machine: hashes say which files they were."""
    said = dict(found.get(protocol.KEY) or {})
    said |= {name: _name_of(str(said[name])) for name in ("data", "reference", "features") if name in said}
    return {_tame(name): _tame(value) for name, value in said.items()}


def _name_of(given: str) -> str:
    """Return the last part of a path; of a dictionary in words, of each path in it."""
    if given.startswith("{"):
        return re.sub(r"(?<=['\"])[^'\"]*/(?=[^'\"/]+/?['\"])", "", given)
    return Path(given).name or "images"


def _tame(value: Any) -> Any:
    """Return a value with its words on one line, and without the comments that mark a part of the card."""
    if isinstance(value, Mapping):
        return {_tame(name): _tame(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tame(one) for one in value]
    if not isinstance(value, str):
        return value
    return shortened(printable(value), LONGEST).replace("<!--", "< !--").replace("-->", "-- >")


def _plain(value: Any) -> str:
    """Return a value as one line of Markdown that shows it: no HTML, no link or picture, no end of a table's cell."""
    text = shortened(printable(str(value)), LONGEST)
    text = re.sub(r"[\\`*\[\]|]", r"\\\g<0>", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cost(cost: Cost, step: int) -> list[str]:
    if not cost.images:
        return []
    rows = [f"- {cost.images:,} images seen in {step:,} steps"]
    for device, hours in cost.hours.items():
        kind = "CPU" if device.startswith("cpu") else "GPU"
        rows.append(
            f"- {hours:.3g} {kind} hours of training steps ({_plain(device)}); saving and validation are not in them"
        )
    return ["## Training cost", "", *rows, ""]


def _task(export: Path, found: Mapping[str, Any]) -> tuple[str, str]:
    """Return the task of these numbers, as the Hub names it and in words."""
    if not {"nll", "fid"} & found.keys():
        return RECONSTRUCTION
    config = export / "config.json"
    classes = read_json(config).get("num_classes") if config.is_file() else None
    return OF_CLASSES if classes else GENERATION


def _results(found: Mapping[str, Any], task: tuple[str, str], config: str | None = None) -> Iterator[EvalResult]:
    """Yield the entries of the metric index: one a number, each with the protocol as the arguments of its data.

    Args:
        found: numbers and protocol; of runs from before that did not note one, it is a share of the run's own images.
        task: its type and name.
        config: keeps numbers of the same data apart, which the index would put together otherwise.
    """
    said = _said_of(found) or {"data": "the run's own images", "split": VALIDATION, "images": found.get("images")}
    name = str(said.get("data", "images"))
    for metric, value in _measures(found).items():
        yield EvalResult(
            task_type=task[0],
            task_name=task[1],
            dataset_type=name,
            dataset_name=name,
            dataset_config=config,
            dataset_split=said.get("split"),
            dataset_args=said,
            metric_type=_tame(metric),
            metric_name=TITLES.get(metric) or _tame(metric),
            metric_value=value,
        )
