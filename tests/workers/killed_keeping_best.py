"""Run by test_kill.py: a training that keeps its best checkpoint, in a process that is killed.

usage: killed_keeping_best.py N FOLDER

It is killed at its Nth change of files, counted from the first step on. With N 0 nothing is killed, and the
number of such moments is printed at the end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from scenarios import build_trainer
from workers.killed_at_event import is_change

PSNR = {1: 10.0, 2: 14.0, 3: 12.0, 4: 15.0, 5: 11.0, 6: 9.0, 7: 8.0}
OPTIONS = {"keep_best": "valid/psnr", "keep_checkpoints": 1, "save_model_every": 3, "validate_every": 1}


def main() -> None:
    victim, folder = int(sys.argv[1]), Path(sys.argv[2])
    trainer = build_trainer(folder, quantizer="vq", model={"use_gan": False}, num_train_steps=7, **OPTIONS)
    trainer.evaluate = lambda: {"psnr": PSNR[trainer.step]}
    trainer.save_pictures = lambda path: None
    events = 0

    def count(name: str, arguments: tuple) -> None:
        nonlocal events
        if is_change(name, arguments):
            events += 1
            if events == victim:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    trainer.train()
    trainer.close()
    if not victim:
        print(f"changes: {events}", flush=True)


if __name__ == "__main__":
    main()
