"""Run by test_kill.py: the command line, in a process that is killed the second time it commits a checkpoint."""

import os
import signal
import sys

from vqdist import completion
from vqdist.cli import main

calls = 0
write_manifest = completion.write_manifest


def killed_the_second_time(*arguments):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write_manifest(*arguments)


completion.write_manifest = killed_the_second_time
sys.exit(main(sys.argv[1:]))
