"""Run by torchrun from test_trainer.py: lines and charts of two ranks, undisturbed and resumed.

usage: numbers_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from scenarios import build_dvae_trainer, train_steps
from test_trainer import RESUMED, numbers_of


def main() -> None:
    folder = Path(sys.argv[1])
    straight = build_dvae_trainer(folder / "straight", backend="accelerate", **RESUMED)
    drawn = []
    if straight.is_main:
        histogram = straight.tracker.histogram
        straight.tracker.histogram = lambda step, name, counts, path: (
            drawn.append(int(counts.sum())),
            histogram(step, name, counts, path),
        )
    straight.train()
    train_steps(build_dvae_trainer(folder / "killed", backend="accelerate", **RESUMED), 5)
    resumed = build_dvae_trainer(folder / "killed", backend="accelerate", **RESUMED)
    assert resumed.step == 3
    assert int(resumed.codes.counts.sum()) == 2 * 4 * 16  # since the line of step 1, on this rank alone
    losses = resumed.backend.gather(resumed.report.means.state()["sums"]["loss"])
    assert losses[0] != losses[1], "each rank goes on from its own sums"
    resumed.train()
    if straight.is_main:
        assert drawn == [2 * 4 * 16 * steps for steps in (5, 2)]  # 2 ranks, 4 images of 16 codes
        assert numbers_of(resumed) == numbers_of(straight)
    straight.backend.barrier()
    straight.close()


if __name__ == "__main__":
    main()
