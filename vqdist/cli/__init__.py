"""The `vqdist` command. The meaning of an option is written once: at the configuration or the model it belongs to.

`parsing` is what all commands share, `models` the table of what can be trained.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vqdist.cli import convert, encode, evaluate, inspect, recipes, report, sample, statistics, train
from vqdist.cli.loading import rank_of_command
from vqdist.cli.parsing import make_parser, parse, without_local_rank
from vqdist.data.cores import share_cores
from vqdist.errors import PeerLost, RanksDiverged, UserError
from vqdist.leaving import end_with_launcher
from vqdist.names import unknown
from vqdist.stopping import Stopped, UntilTheEnd
from vqdist.version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code.

    It is 0, 2 with one line on standard error for a user's mistake, 69 with one for other ranks that are gone, or 75
    or 130 for a training that a signal stopped. A rank that a signal ended before training gives the others its code.
    With other ranks around, an error ends the process here.
    """
    # before torch is imported: of a rank that is gone its store writes pages of addresses, and peers.py one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    share_cores()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # parts of the user's own; last, so that nothing there hides a package
    end_with_launcher()
    UntilTheEnd.of_process = arguments is None
    try:
        with _accounting_for_errors():
            return _run(without_local_rank(sys.argv[1:] if arguments is None else arguments))
    except PeerLost as error:
        print(f"vqdist: error: {error}", file=sys.stderr)
        return _leave(error.code)
    except (UserError, RanksDiverged) as error:
        return _fail(str(error))
    except KeyboardInterrupt as error:
        if isinstance(error, Stopped):  # rank 0 has said it
            return error.code
        print(
            "vqdist: interrupted; the same command goes on from what was saved, if it saves anything",
            file=sys.stderr,
        )
        return _leave(130, at_once=True)
    except BrokenPipeError:  # whoever read standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be read: the system's words name it
        return _fail(str(UserError(str(error))))  # a path may be of any length


@contextmanager
def _accounting_for_errors() -> Iterator[None]:
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _peers() is not None:
            _peers().account_for(error)
        raise


def _peers():
    """`vqdist.backends.peers`, which imports torch, if anything has imported it; else there are no other ranks."""
    return sys.modules.get("vqdist.backends.peers")


def _leave(code: int, at_once: bool = False) -> int:
    """End the process where others would have to wait for it, or it for the others; at once, for threads too."""
    completion = sys.modules.get("vqdist.completion")
    threads = at_once and completion is not None and completion.is_completing()
    if _peers() is not None and (threads or _peers().in_company()):
        _peers().leave(code)
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"vqdist {__version__}")
        return 0
    command = _command(arguments[0])
    if os.getcwd() not in sys.path:  # modules of a user lie in the folder that the command is started in
        sys.path.append(os.getcwd())
    return command(arguments[1:])


def _overview() -> str:
    lines = "\n".join(f"  {name:<12} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())
    return (
        "usage: vqdist COMMAND [options]\n\n"
        "Distributed training of image tokenizers and autoregressive image models.\n\ncommands:\n"
        f"{lines}\n\n`vqdist COMMAND --help` explains a command; `vqdist --version` prints the version."
    )


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS, "; see `vqdist --help`")
    return COMMANDS[name]


def _fail(message: str) -> int:
    rank = rank_of_command()
    # before the ranks know of each other all make the same mistake and one says it; later it is this one's own
    if rank == 0:
        print(f"vqdist: error: {message}", file=sys.stderr)
    elif _peers() is not None and _peers().in_company():
        print(f"vqdist: error: rank {rank}: {message}", file=sys.stderr)
    else:
        time.sleep(2)  # a launcher ends the others when one exits: if all make this mistake, rank 0 says it
        print(f"vqdist: error: rank {rank}: {message}", file=sys.stderr)
    return _leave(2)


def doctor(arguments: list[str]) -> int:
    """Say what this machine has, what works, and what mends the rest."""
    from vqdist.doctor import run

    parse(make_parser("vqdist doctor", doctor.__doc__ or ""), arguments)
    return run()


COMMANDS = {
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "reconstruct": evaluate.reconstruct,
    "statistics": statistics.statistics,
    "fidelity": statistics.fidelity,
    "encode": encode.encode,
    "sample": sample.sample,
    "convert": convert.convert,
    "models": convert.models,
    "inspect": inspect.inspect,
    "report": report.report,
    "recipes": recipes.recipes,
    "doctor": doctor,
}
