"""The training batches of this rank, read ahead, so that all ranks hear in time of one that has none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from vqdist.backends import Backend
from vqdist.data.loader import Batch
from vqdist.stopping import BrokenOff
from vqdist.trainers.bad_images import BadImages
from vqdist.trainers.progress import Progress
from vqdist.trainers.report import Report
from vqdist.trainers.stop_request import StopRequest

T = TypeVar("T")


class Feed:
    """Reads the batches of the coming steps before these begin.

    A rank that cannot read must not leave the others alone in a step: they would wait in an exchange, and nothing
    could be saved. They hear of a problem one step late (`StopRequest`). So a rank begins a step only when it has its
    batches and those of the step after it, where there are other ranks. A signal breaks the wait for images off.

    Args:
        backend: its ranks train together.
        progress: position of the run.
        stop: tells the other ranks.
        report: counts the time of waiting, and names images that were skipped.
        bad_images: those, and how many there may be.
        open_batches: gives the micro-batches of this rank from a position on.

    Attributes:
        problem: the error that keeps this rank from its next batches, or None.
    """

    def __init__(
        self,
        backend: Backend,
        progress: Progress,
        stop: StopRequest,
        report: Report,
        bad_images: BadImages,
        open_batches: Callable[[int], Generator[Batch, None, None]],
    ):
        self.backend = backend
        self.progress = progress
        self.stop = stop
        self.report = report
        self.bad_images = bad_images
        self.open_batches = open_batches
        self.problem: Exception | None = None
        self._batches: Generator[Batch, None, None] | None = None
        self._held: deque[list[Batch]] = deque()

    def take(self, count: int, images: int) -> list[Batch]:
        """Return the micro-batches of the next step; raise what keeps this rank from them.

        Args:
            count: micro-batches of a step.
            images: of a step, over all ranks.
        """
        if not self._held:
            with self.report.waiting_for_data():
                self._held.append(self._read(count, images))
        return self._held.popleft()

    def read_ahead(self, steps: int, count: int, images: int) -> None:
        """Read as far as the next steps need it, at most so many; an error becomes the `problem`.

        After the last step nothing can be one: too many broken images, which a validation may find, end no run there.
        """
        depth = min(steps, 1 if self.backend.world_size == 1 else 2)
        if self.problem is None and depth > 0:
            try:
                with self.report.waiting_for_data(), self.stop.breaking_off():
                    self.bad_images.check()
                    while len(self._held) < depth:
                        self._held.append(self._read(count, images))
            except BrokenOff:
                self._close()
            except Exception as error:  # of a dataset of one's own it may be any
                self.problem = error
                self._close()
        self.stop.fault = self.problem is not None

    def _read(self, count: int, images: int) -> list[Batch]:
        if self._batches is None:
            self._batches = self.open_batches(self.progress.position + len(self._held) * images)
        batches = []
        for _ in range(count):
            batches.append(next(self._batches))
            self.report.note_bad(batches[-1].bad)
            self.bad_images.check()
        return batches

    @contextmanager
    def noting_problems(self) -> Iterator[None]:
        """Within this context an error of reading other images, as those to validate on, becomes the `problem`.

        The caller lets all ranks break off what they read them for: see `StopRequest`. Outside of a loop, where
        nobody would act on it, the error passes.
        """
        try:
            yield
        except Exception as error:
            if not self.stop.is_listening:
                raise
            self.problem, self.stop.fault = error, True
            self._held.clear()
            self._close()

    def forget(self) -> None:
        """Begin anew at the position of the run, and end the loader processes."""
        self._held.clear()
        self.problem = None
        self._close()

    def _close(self) -> None:
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()


def mark_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item with whether it is the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True
