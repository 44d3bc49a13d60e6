"""Started by torchrun: begins runs in a folder, and takes it up again as ranks do that know different things of it.

usage: joined_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from scenarios import build_trainer

from vqdist.backends.environment import rank_of_launcher
from vqdist.trainers import overwrite


def train(name: str, steps: int, **options) -> None:
    trainer = build_trainer(Path(sys.argv[1]), save_model_every=1, num_train_steps=steps, **options)
    print(f"{name} begins at step {trainer.step}\n", end="", flush=True)
    trainer.train()
    trainer.checkpoints.latest()
    trainer.run.lock = trainer.checkpoints.lock = None  # the ranks go on together, so the group stays


def join(*knowing: int) -> None:
    """Let this be a new attempt, of which some ranks are on a host that was there before."""
    overwrite._begun_here.clear()
    overwrite._launched_before = lambda _moment: rank_of_launcher() in knowing


def main() -> None:
    train("first", 1, overwrite=True)
    train("second", 2, overwrite=True)
    join(1)
    train("joined", 3, overwrite=True)
    join(1)
    train("refusing", 4, resume=False)
    join()
    train("strange", 1, overwrite=True)


if __name__ == "__main__":
    main()
