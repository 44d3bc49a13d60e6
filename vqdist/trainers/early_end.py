"""The end of a run before its last step: by a signal, for want of images, or because ranks are lost."""

from __future__ import annotations

from typing import NoReturn

from vqdist.checkpoint import PATIENCE
from vqdist.errors import UserError
from vqdist.ranks import first_to_say
from vqdist.stopping import Stopped, record_stop
from vqdist.trainers.feed import Feed
from vqdist.trainers.resume import Resume
from vqdist.trainers.stop_request import FAULT, StopRequest


class EarlyEnd:
    """Saves a run that ends early, and raises what says so; every rank calls each method.

    Args:
        stop: the signals.
        feed: the training batches, and what keeps this rank from them.
        resume: the checkpoints, and the run that they are of.
    """

    def __init__(self, stop: StopRequest, feed: Feed, resume: Resume):
        self.stop = stop
        self.feed = feed
        self.resume = resume
        self.run, self.backend = resume.run, resume.backend
        self.progress, self.report = resume.progress, resume.report

    def how_far(self) -> tuple[str, str]:
        """Return how far this run came, and how it goes on, for `PeerLost`."""
        newest, in_doubt = self.resume.checkpoints.latest(PATIENCE), self.resume.checkpoints.in_doubt()
        kept = "there is no complete checkpoint yet" if newest is None else f"the last complete checkpoint is {newest}"
        then = "starts anew" if newest is None else "goes on"
        doubt = f" ({in_doubt.name} was being completed)" if in_doubt is not None else ""
        return f" after step {self.progress.step}", f"{kept}: the same command {then}{doubt}"

    def if_asked(self, *, of: int) -> None:
        """Save and raise `Stopped` once all ranks know that one of them received a signal.

        Args:
            of: steps of the whole run.
        """
        number = self.stop.asked()
        # what is left of a run after its last step is `finish`
        broken_off = self.report.validation_broken_off or self.report.picture_broken_off
        if number and (number == FAULT or self.progress.step != of or broken_off):
            self.stop_now(number)

    def _end_without_data(self) -> NoReturn:
        """Save, and raise what keeps a rank from the images of a coming step; every rank calls this."""
        problem = self.feed.problem
        self.feed.forget()
        if self.progress.step:
            self.resume.checkpoint_unless_saved()
            self.resume.settle()
        self.report.close()
        saved = f"; step {self.progress.step} is saved in {self.run.folder}" if self.progress.step else ""
        rank, reason = first_to_say(self.backend, None if problem is None else str(problem) or type(problem).__name__)
        if problem is None:
            purpose = "validate on" if self.report.validation_broken_off else "train on"
            raise UserError(f"rank {rank} has no images to {purpose}: {reason}{saved}")
        if isinstance(problem, UserError) and saved:
            raise UserError(f"{problem}{saved}") from problem
        raise problem

    def if_put_off(self) -> None:
        """Save and raise `Stopped` on every rank if one has put a signal off."""
        number = self.stop.agree_on_put_off()
        if number:
            self.stop_now(number)

    def leave(self, *, by_all: bool) -> None:
        """Act on a signal that came in the body of the loop, which the body has left now."""
        if by_all:
            number = self.stop.agree(self.stop.received)
            if number:
                self.stop_now(number)
        elif self.stop.received:
            self.stop.put_off()
            if self.backend.world_size == 1:
                self.resume.checkpoint_unless_saved()
                self.resume.settle()

    def stop_now(self, number: int) -> NoReturn:
        """Save, and raise `Stopped`, or what keeps a rank from its images; every rank calls this."""
        if number == FAULT:
            self._end_without_data()
        self.resume.checkpoint_unless_saved()
        self.resume.settle()
        self.report.close()
        record_stop(number, step=self.progress.step, run=str(self.run.folder))
        stopped = Stopped(number, self.progress.step, str(self.run.folder))
        self.report.print(stopped.message)
        self.report.note("stop", stopped.message)
        raise stopped
