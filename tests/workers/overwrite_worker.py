"""Started by torchrun, and again when it dies: begins a run anew in a folder, as each attempt finds it.

usage: overwrite_worker.py FOLDER start|training   (where the first attempt dies, on every rank)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from scenarios import build_trainer


def main() -> None:
    folder, dies = Path(sys.argv[1]), sys.argv[2]
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_first and dies == "start":
        os._exit(1)
    with build_trainer(folder, overwrite=True, save_model_every=1, num_train_steps=5) as trainer:
        if trainer.is_main:
            print(f"begins at step {trainer.step}", flush=True)
        for step, _ in trainer.steps():
            if is_first and step == 3:
                trainer.checkpoints.settle()
                os._exit(1)


if __name__ == "__main__":
    main()
