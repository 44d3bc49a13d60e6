"""Run by test_kill.py: the command line, in a process that is killed after step 6, with a checkpoint of step 4."""

import os
import signal
import sys

from vqdist.cli import main
from vqdist.trainers.vqgan import VQGanVAETrainer

train_step = VQGanVAETrainer.train_step


def killed_after_six(trainer):
    if trainer.step == 6:
        trainer.checkpoints.settle()
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(trainer)


VQGanVAETrainer.train_step = killed_after_six
sys.exit(main(sys.argv[1:]))
