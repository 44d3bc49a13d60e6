"""Used by test_encode.py: the command line, in a process that is killed when it renames a file for the Nth time.

usage: killed_while_encoding.py N ARGUMENTS
"""

import os
import signal
import sys
from pathlib import Path

calls = 0
replace = Path.replace


def killed_at(number):
    """In place of `Path.replace`: the call with this number, from 1, kills the process."""

    def counted(path, target):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    return counted


if __name__ == "__main__":
    from vqdist.cli import main

    Path.replace = killed_at(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
