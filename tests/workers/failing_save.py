"""Run by torchrun from test_checkpoint.py: one of two ranks cannot write, and both say so; the next save works.

usage: failing_save.py FOLDER
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from scenarios import build_trainer

from vqdist import completion
from vqdist.backends import state
from vqdist.errors import UserError
from vqdist.trainers.resume import Resume

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(error: Exception, when=lambda *_: True):
    """Return a function that raises, where `when` of its arguments says so."""

    def fail(*arguments, **_options):
        if when(*arguments):
            raise error

    return fail


# where it fails: rank, module, function, stand-in, the words of the rank itself
CASES = {
    "first network": (0, state, "save_file", failing(SafetensorError("No space left")), "No space left"),
    "random state": (1, torch, "save", failing(RuntimeError("unexpected pos 64 vs 0")), "unexpected pos 64 vs 0"),
    "manifest": (0, completion, "write_manifest", failing(FULL), "cannot be written: No space left on device"),
    "export": (0, Resume, "_export", failing(FULL), "export cannot be written: No space left on device"),
}


def main() -> None:
    stage_2 = str(Path(__file__).parents[2] / "deepspeed_configs" / "zero2.json")
    trainer = build_trainer(Path(sys.argv[1]) / "run", backend="deepspeed", deepspeed_config=stage_2)
    trainer.train_step()
    for name, (rank, module, function, stand_in, words) in CASES.items():
        original = getattr(module, function)
        if trainer.backend.rank == rank:
            setattr(module, function, stand_in)
        began = time.monotonic()
        mine = "" if trainer.backend.rank == rank else rf".*\(on rank {rank}\)$"
        with pytest.raises(UserError, match=words + mine):
            trainer.resume.checkpoint()
            trainer.checkpoints.settle()
        setattr(module, function, original)
        assert time.monotonic() - began < 100
        trainer.checkpoints.settle()  # where only the export failed
        trainer.backend.barrier()
        whole = [1] if name == "export" else []
        assert trainer.checkpoints.steps() == whole, name
        assert sorted(path.name for path in trainer.checkpoints.folder.iterdir()) == ["step_00000001"][: len(whole)]
        trainer.backend.barrier()
        print(f"{name}: as expected", flush=True)
    trainer.train_step()
    trainer.resume.checkpoint()
    trainer.checkpoints.settle()
    trainer.backend.barrier()
    assert trainer.checkpoints.steps() == [1, 2]
    trainer.close()


if __name__ == "__main__":
    main()
