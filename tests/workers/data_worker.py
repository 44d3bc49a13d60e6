"""Two ranks of which one gets no images: it fails, or hangs until a signal. Run by torchrun.

usage: data_worker.py FOLDER KIND
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path

from PIL import Image
from scenarios import build_trainer

from vqdist.checkpoint import complete_steps
from vqdist.data.sources import Source
from vqdist.errors import UserError
from vqdist.stopping import Stopped

KINDS = ("fails", "hangs", "fails first", "fails in a validation")


class Failing(Source):
    """On rank 1, the thirteenth image that is read: that of the fourth step, of four images each; or the first."""

    def __init__(self, kind: str):
        self.kind, self.read = kind, 0

    def __len__(self):
        return 64

    def image(self, index):
        self.read += 1
        if os.environ["RANK"] == "1" and self.read > (0 if self.kind == "fails first" else 12):
            if self.kind == "hangs":
                time.sleep(600)
            raise OSError(errno.EIO, "Input/output error")
        return Image.new("RGB", (16, 16), (3 * index,) * 3)

    def fingerprint(self):
        return "0" * 64


class FailingToValidate(Failing):
    """On rank 1, the last image of its share, so that the other rank has all of its own."""

    def image(self, index):
        if os.environ["RANK"] == "1" and index == 15:
            raise OSError(errno.EIO, "Input/output error")
        return Image.new("RGB", (16, 16), (3 * index,) * 3)

    def __len__(self):
        return 16


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    options = {"folder": Failing(kind), "valid_frac": 0.0, "num_train_steps": 9, "batch_size": 4, "num_workers": 1}
    if kind == "fails in a validation":
        options |= {
            "folder": "synthetic:64",
            "valid_frac": 0.05,
            "valid": FailingToValidate(kind),
            "validate_every": 2,
        }
    trainer = build_trainer(folder / "run", backend="accelerate", **options)
    if kind == "hangs":
        threading.Timer(6.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    try:
        trainer.train()
    except (UserError, Stopped) as error:
        message = getattr(error, "message", str(error))
    steps = complete_steps(folder / "run" / "checkpoints")
    (folder / f"{trainer.backend.rank}.txt").write_text(f"{steps} {time.monotonic() - began < 20} {message}")
    trainer.close()


if __name__ == "__main__":
    main()
