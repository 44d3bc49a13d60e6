"""Run by the campaign: the command line, in a process that is killed when it comes to its Nth change of files.

usage: killed_at_event.py N ARGUMENTS

Opened to write, renamed, removed, made: what Python itself does to files. With N 0 nothing is killed, and the number
of such moments is printed at the end.
"""

import os
import signal
import sys

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "os.chmod"}
events = 0


def is_change(name: str, arguments: tuple) -> bool:
    if name == "open":
        mode, flags = arguments[1], arguments[2]
        return bool(flags & (os.O_WRONLY | os.O_RDWR)) or (isinstance(mode, str) and not mode.startswith("r"))
    return name in CHANGES


def count(name: str, arguments: tuple) -> None:
    global events
    if is_change(name, arguments):
        events += 1
        if events == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from vqdist.cli import main

    sys.addaudithook(count)
    code = main(sys.argv[2:])
    if not int(sys.argv[1]):
        print(f"changes: {events}", flush=True)
    sys.exit(code)
