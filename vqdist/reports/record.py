"""All that a run folder says of a run: numbers, configuration, environment, events, evaluations, pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vqdist import protocol
from vqdist.errors import UserError, printable, shortened
from vqdist.files import CHART_NUMBERS, EVENTS, METRICS, lines_of_metrics, read_json, read_small
from vqdist.reports.history import KEPT, History, Numbers

PICTURE = re.compile(r"step_(\d{1,15})(_codes)?\.png")
LARGEST_AS_IT_IS = 300_000
"""Bytes of a picture that goes into a page as it is; a larger one is made smaller, with some loss."""
LONGEST_SIDE, MOST_PIXELS = 1600, 2**26
MOST_EVENTS, MOST_EVALUATIONS = 300, 50


@dataclass
class Picture:
    """A sheet of pictures, or a bar chart of codes, of one step.

    Attributes:
        step: finished optimizer steps.
        path: of the PNG file.
        numbers: those of a chart, if the file holds them.
    """

    step: int
    path: Path
    numbers: dict[str, Any] | None = None

    def content(self) -> tuple[bytes, str]:
        """Return the bytes for a page, and their type.

        Raises:
            UserError: it is no PNG picture, a damaged one, or too large.
        """
        try:
            raw = read_small(self.path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large pictures, which the next line refuses
                with Image.open(io.BytesIO(raw), formats=["PNG"]) as picture:
                    if picture.width * picture.height > MOST_PIXELS:
                        raise UserError(f"{self.path.name} has {picture.width} by {picture.height} pixels")
                    picture.load()
                    return (raw, "image/png") if len(raw) <= LARGEST_AS_IT_IS else (_smaller(picture), "image/jpeg")
        except UserError:
            raise
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            reason = "no PNG picture" if isinstance(error, UnidentifiedImageError) else _reason(error)
            raise UserError(f"{self.path.name}: {reason}") from error


def _smaller(picture: Image.Image) -> bytes:
    picture = picture.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    out = io.BytesIO()
    picture.save(out, format="jpeg", quality=90)
    return out.getvalue()


def _reason(error: BaseException) -> str:
    return shortened(printable(" ".join(str(getattr(error, "strerror", None) or error).split())), 120)


@dataclass
class RunRecord:
    """A run folder as it is read for a report; `read` may be called again while the run trains.

    Args:
        folder: of the run.
        name: as the report calls it.

    Attributes:
        history: the log lines.
        model: its type.
        options: the configuration by dotted keys, as JSON.
        events: the history by the clock.
        evaluations: numbers of `vqdist evaluate`, each with its protocol.
        problems: a sentence on each thing that could not be read.
    """

    folder: Path
    name: str
    history: History = field(init=False)
    model: str = ""
    options: dict[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (self.folder / METRICS).is_file():
            raise UserError(f"{self.folder} has no {METRICS}; give the folder of a run, as in runs/a")
        self.history = History(self.folder)

    def read(self, *, to_the_end: bool = True) -> None:
        """Read what the folder holds now.

        Raises:
            UserError: the log or the configuration cannot be read, or nothing is logged yet.
        """
        self.problems = []
        self.events = self._lines(EVENTS, "event", str)
        self.evaluations = self._lines(protocol.EVALUATIONS, protocol.KEY, dict)[-MOST_EVALUATIONS:]
        self.history.images_at = images_at(self._pieces())
        self.history.read(to_the_end=to_the_end)
        if not self.history.lines:
            raise UserError(f"{self.history.file} has no log line: the run has not logged a step yet")
        configuration = read_json(self.folder / "config.json")
        self.model = str(configuration.get("model_type", ""))
        self.options = flattened(configuration)
        if self.history.passed_over:
            self.problems.append(f"{self.history.passed_over} lines of {METRICS} are torn or not of a run")

    def _lines(self, name: str, key: str, kind: type) -> list[dict[str, Any]]:
        """Return the lines of a file that have a key of this type; none where there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return []
        try:
            with path.open("rb") as file:
                return [line for _, line in lines_of_metrics(file) if isinstance(line.get(key), kind)]
        except OSError as error:
            self.problems.append(f"{name} cannot be read: {_reason(error)}")
            return []

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The events of a start or a resume."""
        return [event for event in self.events if event["event"] in ("start", "resume")]

    @property
    def last_step(self) -> int:
        """The last step that a log line is of."""
        return max(self.history.trained.get("step", 0), self.history.validated.get("step", 0))

    def validated_on(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """Return what a number of validations was measured on, part by part of the run; nothing where it has none.

        Returns:
            The step after which each part begins, and its protocol, empty where nothing says it.
        """
        curve = self.history.curves.get(name)
        if curve is None or not curve.count:
            return []
        parts: list[tuple[int, dict[str, Any]]] = []
        for start in self.starts:
            said = start.get("validation")
            parts = [part for part in parts if part[0] < start["step"]]
            parts.append((start["step"], said if isinstance(said, dict) else {}))
        if not any(said for _, said in parts):
            return [(0, {})]
        steps, _ = curve.points(KEPT)
        # a start follows the validation of its own step
        places = np.searchsorted([step for step, _ in parts], steps, side="left") - 1
        return [parts[place] for place in np.unique(np.maximum(places, 0))] or parts[-1:]

    def _pieces(self) -> list[tuple[float, float, float]]:
        """Return (step, images until then, images of a step) of each part of the run; none where nothing says it."""
        pieces: list[tuple[float, float, float]] = []
        for start in self.starts:
            numbers = [start["step"], start.get("images"), start.get("images_per_step")]
            if all(map(_is_count, numbers)):
                step, images, size = (float(number) for number in numbers if number is not None)
                pieces = [piece for piece in pieces if piece[0] < step] + [(step, images, size)]
        return pieces or self._piece_of_a_checkpoint()

    def _piece_of_a_checkpoint(self) -> list[tuple[float, float, float]]:
        """Return the same of a run from before there were events, by the manifest of its newest checkpoint."""
        for path in sorted(self.folder.glob("checkpoints/step_*/manifest.json"), reverse=True)[:3]:
            try:
                images = read_json(path)["global_batch"]["images"]
            except (UserError, KeyError, TypeError):
                continue
            if _is_count(images):
                return [(0.0, 0.0, float(images))]
        return []

    def pictures(self, most: int, *, charts: bool = False) -> list[Picture]:
        """Return at most so many sheets, or charts of codes, spread over the run; the first and the last are there."""
        found = {}
        try:
            for path in (self.folder / "results").iterdir():
                match = PICTURE.fullmatch(path.name)
                if match is not None and (match[2] is not None) == charts and path.is_file():
                    found[int(match[1])] = path
        except FileNotFoundError:
            return []
        except OSError as error:
            self.problems.append(f"results cannot be read: {_reason(error)}")
            return []
        steps = sorted(found)
        if len(steps) > most:
            steps = [steps[round(place)] for place in np.linspace(0, len(steps) - 1, most)]
        return [Picture(step, found[step], _numbers_in(found[step]) if charts else None) for step in steps]

    def note_unreadable(self, names: list[str]) -> None:
        """Keep that pictures could not be read."""
        if names:
            said = shortened("; ".join(names), 200)
            self.problems.append(f"{len(names)} pictures cannot be read and are left out: {said}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def images_at(pieces: list[tuple[float, float, float]]) -> Callable[[Numbers], Numbers] | None:
    """Return the number of images as a function of steps (n,), by the parts of a run; None for none."""
    if not pieces:
        return None
    begin, images, size = np.array(sorted(pieces)).T

    def function(steps: Numbers) -> Numbers:
        part = np.maximum(np.searchsorted(begin, steps, side="right") - 1, 0)
        return images[part] + (steps - begin[part]) * size[part]

    return function


def flattened(content: Any, prefix: str = "") -> dict[str, str]:
    """Return the values of nested dictionaries by dotted keys, as JSON."""
    if isinstance(content, dict) and content:
        parts = [flattened(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in content.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: shortened(json.dumps(content), 400)}


def _numbers_in(path: Path) -> dict[str, Any] | None:
    """Return the numbers that a chart of codes holds; None for one from before, or for anything else."""
    try:
        with Image.open(io.BytesIO(read_small(path)), formats=["PNG"]) as picture:
            numbers = json.loads(getattr(picture, "text", {})[CHART_NUMBERS])
    except (OSError, SyntaxError, ValueError, KeyError, EOFError, RecursionError, Image.DecompressionBombError):
        return None
    if not isinstance(numbers, dict) or not all(_is_count(numbers.get(key)) for key in ("codes", "total", "used")):
        return None
    bars = [numbers.get(key) for key in ("bars", "ranked")]
    if not all(isinstance(row, list) and 0 < len(row) <= 1024 and all(map(_is_count, row)) for row in bars):
        return None
    return {key: numbers[key] for key in ("codes", "total", "used", "bars", "ranked")}


def as_data(content: bytes, kind: str) -> str:
    """Return bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
