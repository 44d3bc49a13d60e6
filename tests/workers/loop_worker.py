"""For-loops over a training of two ranks: a signal before `break`, before an error, and a clean beginning after it.

usage: loop_worker.py FOLDER   (run by torchrun)
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from scenarios import build_dvae_trainer, weights_of

from vqdist.stopping import Stopped
from vqdist.trainers.base import Trainer

LENGTH = {"num_train_steps": 6, "backend": "accelerate"}


def signal_of_one(trainer: Trainer, rank: int = 1) -> None:
    """Send a signal to one of the ranks."""
    if trainer.backend.rank == rank:
        os.kill(os.getpid(), signal.SIGTERM)


def leave(trainer: Trainer) -> None:
    for step, _ in trainer.steps():
        if step == 2:
            signal_of_one(trainer)
            break
    raise AssertionError("it went on after the loop")


def main() -> None:
    folder = Path(sys.argv[1])
    trainer = build_dvae_trainer(folder / "left", **LENGTH)
    with pytest.raises(Stopped, match="after step 2, which is saved"):
        leave(trainer)
    trainer.backend.barrier()
    assert trainer.checkpoints.steps() == [2]
    # the next begins clean on both ranks, and a signal before an error of both is acted on by the one after it
    with pytest.raises(KeyError, match="mine"):
        for step, _ in trainer.steps():
            if step == 4:
                signal_of_one(trainer, rank=0)
                raise KeyError("mine")
    assert trainer.step == 4
    with pytest.raises(Stopped, match="after step 4, which is saved"):
        trainer.train()
    # an error that the script catches ends nothing, and the others are told nothing
    with pytest.raises(KeyError):
        for _ in trainer.steps():
            raise KeyError("mine")
    with trainer:
        trainer.train()
        ours = weights_of(trainer)
        whole = build_dvae_trainer(folder / "whole", **LENGTH)
        whole.train()
        theirs = weights_of(whole)
    assert trainer.step == 6 and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert trainer.run.lock is None
    print("as expected", flush=True)


if __name__ == "__main__":
    main()
