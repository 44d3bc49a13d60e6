"""Run by the campaign: a long run of a tiny network, which looks at its own memory, descriptors and threads.

usage: flat_worker.py FOLDER STEPS EVERY   (rows of step, bytes, descriptors and threads go to FOLDER/measured.json)
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from pathlib import Path

from scenarios import build_dvae_trainer

TINY = {"image_size": 8, "num_tokens": 8, "codebook_dim": 4, "num_layers": 1, "num_resnet_blocks": 0, "hidden_dim": 4}


def measured() -> tuple[int, int, int]:
    """Return bytes in memory, open files, and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        pages * resource.getpagesize(),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def main() -> None:
    folder, steps, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    often = {"save_model_every": 250, "validate_every": 250, "save_results_every": 500, "log_every": 10}
    trainer = build_dvae_trainer(
        folder / "run", model=TINY, num_train_steps=steps, image_size=8, batch_size=2, num_workers=1, **often
    )
    rows = []
    for step, _ in trainer.steps():
        if step % every == every // 2:  # between what is done now and then
            trainer.checkpoints.settle()
            rows.append((step, *measured()))
    trainer.close()
    (folder / "measured.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
