"""Run by test_encode.py: the command line, in a process that is killed when it renames a file for the Nth time.

usage: killed_while_encoding.py N ARGUMENTS
"""

import os
import signal
import sys
from pathlib import Path

from vqdist.cli import main

calls = 0
replace = Path.replace


def killed_the_nth_time(path, target):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)


Path.replace = killed_the_nth_time
sys.exit(main(sys.argv[2:]))
