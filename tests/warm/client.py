"""Started by the scripts of `warm.programs()`: asks the server for a process, and ends when that process ends.

usage: client.py SOCKET PROGRAM ARGUMENTS

Signals are passed on, and who kills this process kills the other one with it. Imports no more than it needs: it stands
in for an interpreter many times in a run of the tests.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def main() -> None:
    path, program, *arguments = sys.argv[1:]
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    job = {"program": program, "arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    content = json.dumps(job).encode()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until it is known whom to pass them on to
    socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(content)
    answers = server.makefile()
    pid = int(answers.readline())
    for number in PASSED_ON:
        signal.signal(number, lambda number, _frame: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
