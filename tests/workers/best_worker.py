"""Training on two ranks with validations that fall: both agree on the best step, and its weights are kept.

usage: best_worker.py FOLDER   (run by torchrun)
"""

from __future__ import annotations

import sys
from pathlib import Path

from scenarios import LINEAR, build_trainer

PSNR = {1: 10.0, 2: 14.0, 3: 9.0, 4: 8.0}
OPTIONS = {"validate_every": 1, "save_model_every": 1, "keep_checkpoints": None, "lr": 1e-4, **LINEAR}


def run_at(folder: Path, **options):
    """Return a trainer of four steps whose validations are as good as the table says."""
    trainer = build_trainer(folder, **{**OPTIONS, **options})
    trainer.evaluate = lambda: {"psnr": PSNR[trainer.step]}
    return trainer


def main() -> None:
    folder = Path(sys.argv[1])
    trainer = run_at(folder, backend="accelerate", batch_size=2)
    for step, _ in trainer.steps():
        if step == 3:
            break
    resumed = run_at(folder, backend="accelerate", batch_size=2)
    assert (resumed.step, resumed.best.step, resumed.best.value) == (3, 2, 14.0), "on every rank"
    resumed.train()
    assert resumed.best.step == 2 and resumed.best.is_another
    resumed.close()


if __name__ == "__main__":
    main()
