"""All that a run says on its way: log lines, the progress bar, validations and pictures."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from vqdist.backends import Backend
from vqdist.errors import printable
from vqdist.metrics import RunningMeans
from vqdist.stopping import BrokenOff
from vqdist.tracking import EventLog, Tracker, environment, memory_gb
from vqdist.trainers.bad_images import BadImages
from vqdist.trainers.measure import VALID
from vqdist.trainers.progress import Progress
from vqdist.trainers.stop_request import FAULT, StopRequest

LINES_OF_FEW = 3
LogFunction = Callable[[dict[str, float]], Any]


class Report:
    """The clock, the means, the bar and the sinks of a run.

    Args:
        backend: rank 0 of it writes and draws.
        progress: of the run.
        stop: breaks off what takes long.
        folder: of the run.
        bad_images: those that could not be decoded.

    Attributes:
        tracker: the sinks, on rank 0 once `open` was called, and until `close`.
        means: of this rank's numbers since the last log line.
        log_fn: called on rank 0 with each log line.
        last_evaluation: step and numbers of the last validation.
        validation_broken_off: whether a signal broke it off; a checkpoint keeps it, and the resumed run validates.
        pictured: step of the last picture.
        logged_at: step of the last log line of this process.
        picture_broken_off: whether a signal kept it from being drawn; kept likewise, and the resumed run draws it.
        warnings: what goes wrong at present, by what it is about.
        validation_protocol: what validations are measured on, for the events of starts; None without validations.
    """

    def __init__(self, backend: Backend, progress: Progress, stop: StopRequest, folder: Path, bad_images: BadImages):
        self.backend = backend
        self.progress = progress
        self.stop = stop
        self.folder = folder
        self.bad_images = bad_images
        self.tracker: Tracker | None = None
        self._closed = False
        self._events: EventLog | None = None
        self._events_to_come: list[dict[str, Any]] = []  # those before `open`
        self.validation_protocol: dict[str, Any] | None = None
        self.means = RunningMeans()
        self.log_fn: LogFunction | None = None
        self.bar: tqdm | None = None
        self.begin_at({})

    def begin_at(self, manifest: Mapping[str, Any]) -> None:
        """Go on from the step of a checkpoint, or from the start: nothing of another step is measured or drawn yet.

        Args:
            manifest: of the checkpoint; empty at the start.
        """
        self.last_evaluation: tuple[int, dict[str, float]] = (-1, {})
        self.validation_broken_off: bool = manifest.get("validation_broken_off", False)
        self.pictured = self.logged_at = -1
        self.picture_broken_off: bool = manifest.get("picture_broken_off", False)
        self.warnings: dict[str, str] = {}
        self._lines_of_few = 0
        self._undrawn = 0  # the signal that broke off the picture that this rank drew
        self._validated = time.perf_counter()  # when the last validation ended, or the run was begun or resumed
        self.restart_clock()

    def open(self, trackers: list[Any], configuration: dict[str, Any]) -> None:
        """Start the sinks on rank 0, after the run has found the step that it goes on from."""
        self._sinks, self._closed = (trackers, configuration), False
        if self.backend.is_main:
            self.tracker = Tracker(self.folder, trackers, configuration, self.progress.step)
            self._events = EventLog(self.folder)
            self._note_start(configuration.get("trainer", {}))
            early, self._events_to_come = self._events_to_come, []
            for said in early:
                self.note(**said)

    def close(self) -> None:
        """Close the sinks."""
        self._closed = True
        if self.tracker is not None:
            self.tracker.close()

    def reopen(self) -> None:
        """Start the sinks again if they were closed, as at a stop, and training goes on; lines of later steps go."""
        if self._closed:
            self.open(*self._sinks)

    def _note_start(self, options: Mapping[str, Any]) -> None:
        """Keep where the run starts or goes on from, and on what."""
        backend, names = self.backend, ("batch_size", "grad_accum_every")
        images = math.prod(options[name] for name in names) if all(map(options.get, names)) else None
        self.note(
            "resume" if self.progress.step else "start",
            backend=backend.title,
            processes=backend.world_size,
            images_per_step=None if images is None else images * backend.world_size,
            images=self.progress.position,
            environment=environment(backend.device),
            validation=self.validation_protocol,
        )

    def note(self, event: str, message: str | None = None, **said: Any) -> None:
        """Keep an event in events.jsonl, on rank 0; those before `open` wait for it.

        Args:
            event: its kind, see `EventLog.note`.
            message: a sentence.
            **said: what else there is to say of it.
        """
        if self._events is not None:
            self._events.note(self.progress.step, event, message=message, **said)
        elif self.backend.is_main:
            self._events_to_come.append({"event": event, "message": message, **said})

    def note_end(self, reason: str | None = None) -> None:
        """Keep that the run has come to its end, unless the sinks are closed and it was known.

        Args:
            reason: of an end before the last step.
        """
        if not self._closed:
            self.note("end", reason)

    def alert(self, message: str) -> None:
        """Say once that something went wrong, and keep it as an event."""
        self.print(f"warning: {message}")
        self.note("warning", message)

    def warn(self, about: str, message: str) -> None:
        """Say that the run goes wrong: once, until it is withdrawn; what was not stands in the summary, too.

        Args:
            about: what goes wrong; of one thing there is one warning.
            message: a sentence.
        """
        if about not in self.warnings:
            self.alert(message)
        self.warnings[about] = message

    def watch_codebook(self, few: str | None) -> None:
        """Warn where few codes were in use on several log lines in a row; the first may be of a codebook that spreads.

        Args:
            few: of a log line, see `metrics.few_codes`.
        """
        self._lines_of_few = 0 if few is None else self._lines_of_few + 1
        if few is None:
            self.withdraw("codebook")
        elif self._lines_of_few >= LINES_OF_FEW:
            self.warn("codebook", few)

    def withdraw(self, about: str) -> None:
        """Forget the warning about something: it is well again."""
        self.warnings.pop(about, None)

    def print(self, message: str) -> None:
        """Say something once: on rank 0, on standard error, above the progress bar."""
        if self.backend.is_main:
            tqdm.write(message, file=sys.stderr)

    # ------------------------------------------------------------------------------------- the clock

    def restart_clock(self) -> None:
        """Measure speed from here on."""
        self._began, self._began_at, self._waited = time.perf_counter(), self.progress.step, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context no time passes for the speed of training."""
        paused = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time within this context as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def speed(self, images_per_step: int) -> dict[str, float]:
        """Return speed, share of the time spent waiting for data, and memory since the last call."""
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        images = images_per_step * (self.progress.step - self._began_at)
        waited = self._waited
        self.restart_clock()
        return {
            "images_per_second": images / elapsed,
            "data_wait": waited / elapsed,
            "memory_gb": memory_gb(self.backend.device),
        }

    # ------------------------------------------------------------------------------------- log lines

    @contextmanager
    def progress_bar(self, total: int) -> Iterator[None]:
        """Show how far the run is of so many steps."""
        with tqdm(
            total=total,
            initial=self.progress.step,
            desc=f"{self.backend.title} x{self.backend.world_size}",
            unit="step",
            dynamic_ncols=True,
            disable=not self.backend.is_main,
            # into a file or a log: a line now and then, not ten a second
            mininterval=0.1 if os.isatty(2) else 10.0,
        ) as self.bar:
            try:
                yield
            finally:
                self.bar = None

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Take in the numbers of one step."""
        self.means.add(numbers)
        if self.bar is not None:
            self.bar.update()

    def mean_numbers(self) -> dict[str, float]:
        """Return the means over ranks and over the steps since the last call; every rank calls this."""
        numbers = self.backend.mean(self.means.means())
        self.means.reset()
        return numbers

    def log(self, numbers: dict[str, float]) -> None:
        """Write a log line, on rank 0."""
        self.logged_at = self.progress.step
        if self.tracker is None:
            return
        self.tracker.log(self.progress.step, numbers)
        if self.bar is not None:
            shown = {name: f"{value:.3g}" for name, value in numbers.items() if name.endswith("loss")}
            self.bar.set_postfix({**shown, "img/s": f"{numbers['images_per_second']:.0f}"}, refresh=False)
        if self.log_fn is not None:
            self.log_fn({"step": self.progress.step, **numbers})

    def note_bad(self, names: list[str], *, of_valid: bool = False) -> None:
        """Name images that could not be decoded and were replaced, each once.

        Args:
            names: of files.
            of_valid: whether they are among the images to validate on.
        """
        for name in (self.bad_images.of_valid if of_valid else self.bad_images).add(names):
            said = f"rank {self.backend.rank}: skipped an image that cannot be decoded: {printable(name)}"
            tqdm.write(said, file=sys.stderr)
            self.note("skipped image", name)

    def print_bad_images(self, most: int = 5) -> None:
        """Say how many images could not be decoded."""
        if names := self.bad_images.all_names():
            listed = sorted(map(printable, names))
            some = ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
            self.print(f"{len(listed)} images could not be decoded and were skipped: {some}")

    # ------------------------------------------------------------------------------------- validation and pictures

    def validate(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Measure, log the numbers as `valid/NAME` with the time that it took, and return them without that.

        Nothing where a signal breaks the validation off, on every rank at the same batch.
        """
        began = time.perf_counter()
        with self.paused():
            self.validation_broken_off = True
            try:
                numbers = evaluate()
            except BrokenOff:
                return {}
            self.validation_broken_off = False
            self.last_evaluation = (self.progress.step, numbers)
            if self.tracker is not None:
                line = {**numbers, **self._time_of_validation(began)}
                self.tracker.log(self.progress.step, {f"{VALID}{name}": value for name, value in line.items()})
        return numbers

    def _time_of_validation(self, began: float) -> dict[str, float]:
        """Return the seconds since then, and their share of those since the validation before, or since the start."""
        ended = time.perf_counter()
        whole, self._validated = ended - self._validated, ended
        return {"seconds": ended - began, "time_share": (ended - began) / max(whole, 1e-9)}

    def draw(self, save_pictures: Callable[[Path], None]) -> None:
        """Draw, unless a rank was asked to stop; every rank calls this and learns whether a signal broke it off."""
        with self.paused():
            self.picture_broken_off, self._undrawn = True, 0
            if self.stop.asked():
                return
            try:
                save_pictures(self.picture_path)
            except BrokenOff:
                self._undrawn = self.stop.received or FAULT
            self.picture_broken_off = bool(self.stop.agree(self._undrawn))
            if not self.picture_broken_off:
                self.pictured = self.progress.step

    def draw_alone(self, draw: Callable[[], object]) -> None:
        """Let rank 0 draw what no other rank waits for: a signal breaks it off at once, or keeps it from beginning."""
        try:
            with self.stop.breaking_off():
                draw()
        except BrokenOff:
            self._undrawn = self.stop.received or FAULT

    @property
    def picture_path(self) -> Path:
        """The path of this step's picture, there or to come."""
        return self.folder / "results" / f"step_{self.progress.step:08d}.png"
