"""The demo's tokenizer in a process of its own, which trains when it is told to: see `benchmarks.busy`.

usage: python -m benchmarks.busy_worker FOLDER   (each line of its standard input is a number of steps)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vqdist.data.cores import share_cores


def process(folder: Path) -> None:
    """Train as `vqdist train` does, so many steps as each line of standard input says, and say how long they took."""
    share_cores()  # as the command, before torch is imported
    from benchmarks.common import ROOT
    from benchmarks.worker import timed
    from vqdist.cli.models import MODELS
    from vqdist.cli.train import make_trainer, train_options

    answers = os.fdopen(os.dup(1), "w")  # the trainer prints as it goes: standard output is for answers alone
    sys.stdout = open(os.devnull, "w")
    recipe = ROOT / "launch" / "recipes" / "digits_vqgan.yaml"
    often = {"save_model_every": 0, "save_results_every": 0, "validate_every": 0}
    options = [word for name, value in often.items() for word in (f"--trainer.{name}", str(value))]
    said = ["--config", str(recipe), "--out", str(folder), "--backend", "local", *options]
    turn = timed(make_trainer(MODELS["vqgan"], train_options("vqgan", said)).train_step)
    turn(5)  # loader processes have started, memory is there
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(int(line))), file=answers, flush=True)
    os._exit(0)  # loader processes need no goodbye


if __name__ == "__main__":
    process(Path(sys.argv[1]))
