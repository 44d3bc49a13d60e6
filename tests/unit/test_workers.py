"""Loader processes: the same batches in the same order, and one line for whatever may happen to one of them."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

from vqdist.data import workers
from vqdist.data.dataset import ImageDataset
from vqdist.data.loader import train_loader
from vqdist.data.workers import LoaderLost, Workers
from vqdist.errors import UserError


class Squares:
    """A batch is named by numbers; what a number says to do, it does."""

    def __call__(self, numbers):
        for number in numbers:
            if number == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if number == "leave":
                os._exit(7)
            if number == "hang":
                time.sleep(600)
            if isinstance(number, Exception):
                raise number
        return torch.tensor(numbers).square(), {"names": [str(number) for number in numbers]}


def nothing():
    pass


def loading(batches, *, count=2, prefetch=2, nbytes=1024, **options):
    options = {"set_up": nothing, "describe": str, **options}
    return Workers(Squares(), batches, count=count, prefetch=prefetch, nbytes=nbytes, **options)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("nbytes", [1024, 8], ids=["in shared memory", "through the pipe"])
def test_batches_come_in_their_order(count, nbytes):
    names = [[number] * (number % 3 + 1) for number in range(17)]
    loaded = list(loading(names, count=count, nbytes=nbytes))
    assert [items.tolist() for items, _ in loaded] == [[n * n for n in name] for name in names]
    assert [rest["names"] for _, rest in loaded] == [list(map(str, name)) for name in names]
    assert multiprocessing.active_children() == []


def test_a_batch_stays_what_it_was_when_later_ones_are_read():
    kept = [items for items, _ in loading([[number] for number in range(12)], prefetch=1)]
    assert [int(items) for items in kept] == [number**2 for number in range(12)]


def test_requests_and_replies_longer_than_a_pipe_do_not_wait_for_one_another():
    names = [[number] * 60_000 for number in range(6)]
    signal.alarm(60)  # which ends this process, if they do
    try:
        loaded = list(loading(names, count=1, prefetch=4, nbytes=8))
    finally:
        signal.alarm(0)
    assert [int(items[-1]) for items, _ in loaded] == [number**2 for number in range(6)]


def test_an_endless_stream_is_read_only_as_far_as_it_is_kept_ready():
    asked = []
    stream = loading((asked.append(number) or [number] for number in itertools.count()), prefetch=3)
    taken = iter(stream)
    assert [int(next(taken)[0]) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(asked) == 2 * 3 + 5
    taken.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("die", r"loader process \d+ was killed by SIGKILL, as the system does where memory is short, while it read "),
        ("leave", r"loader process \d+ ended with code 7, while it read "),
    ],
)
def test_a_process_that_ends_is_said_in_one_line(number, expected):
    with pytest.raises(LoaderLost, match=expected) as error:
        list(loading([[0], [1], [number], [3], [4]]))
    assert number in str(error.value) and "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("patience", [None, 0.4])
def test_a_process_that_hangs_is_said_and_given_up(monkeypatch, capsys, patience):
    monkeypatch.setattr(workers, "LOOK", 0.05)
    monkeypatch.setattr(workers, "SLOW", 0.1)
    monkeypatch.setattr(workers, "GIVE_UP", 0.4 if patience is None else 600.0)
    with pytest.raises(LoaderLost, match="gave nothing for 0 minutes while it read .*hang"):
        list(loading([[0], ["hang"]], patience=patience))
    assert capsys.readouterr().err.count("vqdist: warning: waiting for images since") == 1
    assert multiprocessing.active_children() == []


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def test_errors_arrive_as_they_are():
    with pytest.raises(UserError, match="^this file is broken$") as error:
        list(loading([[0], [UserError("this file is broken")]]))
    assert error.value.__cause__ is None
    with pytest.raises(ZeroDivisionError) as raised:
        list(loading([[ZeroDivisionError("by zero")]]))
    assert "in a loader process" in str(raised.value.__cause__)
    assert "in __call__" in str(raised.value.__cause__)


def test_an_error_that_cannot_be_sent_still_ends_the_run():
    with pytest.raises(RuntimeError, match="Unsendable: one"):
        options = {"count": 1, "prefetch": 1, "nbytes": 8, "set_up": nothing, "describe": str}
        list(Workers(raising_unsendable, [[0]], **options))


def raising_unsendable(_batch):
    raise Unsendable("one", "two")


def test_soft_limits_are_raised():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        workers.raise_limit_of_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(before[1], workers.ENOUGH)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_no_descriptors_left_is_one_line(monkeypatch):
    def refused():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(multiprocessing, "Pipe", refused)
    with pytest.raises(LoaderLost, match=r"loader process 1 of 2 cannot be started .*Too many open files"):
        loading([[0]])
    assert multiprocessing.active_children() == []


# ------------------------------------------------------------------------------------------- not forked


@pytest.fixture
def started(monkeypatch):
    """Let processes start in another way within a test, as `multiprocessing.set_start_method` does for good."""

    def start(method: str) -> None:
        context = multiprocessing.get_context(method)
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
        monkeypatch.setattr(multiprocessing, "Pipe", context.Pipe)
        monkeypatch.setattr(multiprocessing, "Process", context.Process)

    return start


class Numbers(torch.utils.data.Dataset):
    """A dataset of somebody's own, with tensors in it."""

    def __init__(self):
        self.pixels = torch.arange(10.0)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return (self.pixels[index] / 10 + torch.rand(1) / 100)[:, None, None].expand(3, 16, 16)


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.nightly)])
def test_processes_that_are_not_forked_load_the_same(started, method):
    started(method)

    def batches(workers: int) -> list[torch.Tensor]:
        loader = train_loader(
            ImageDataset(Numbers(), 16, seed=3),
            torch.arange(10),
            seed=3,
            batch_size=4,
            rank=0,
            world_size=1,
            position=0,
            num_workers=workers,
            pin_memory=False,
            prefetch_factor=2,
        )
        with contextlib.closing(loader):
            return [batch.item for batch in itertools.islice(loader, 3)]

    assert torch.equal(torch.cat(batches(1)), torch.cat(batches(0)))
    assert multiprocessing.active_children() == []


def test_what_cannot_be_pickled_is_one_line(started):
    started("spawn")
    dataset = Numbers()
    dataset.transform = lambda image: image
    with pytest.raises(UserError, match=r"^the dataset cannot be handed to loader processes \(\w+: .*lambda") as error:
        Workers(dataset, [[0]], count=2, prefetch=1, nbytes=8, set_up=nothing, describe=str)
    assert "start method spawn pickles it" in str(error.value) and "num_workers 0" in str(error.value)
    assert multiprocessing.active_children() == []


def at_a_prompt(monkeypatch, **names) -> None:
    """Let `__main__` be what it is in a notebook: a module without a file."""
    prompt = types.ModuleType("__main__")
    for name, thing in names.items():
        thing.__module__, thing.__qualname__ = "__main__", name
        setattr(prompt, name, thing)
    monkeypatch.setitem(sys.modules, "__main__", prompt)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_dataset_of_a_notebook_is_one_line(started, monkeypatch, method):
    started(method)
    mine = type("Mine", (Numbers,), {})
    at_a_prompt(monkeypatch, Mine=mine)
    options = {"prefetch": 1, "nbytes": 8, "set_up": nothing, "describe": str}
    with pytest.raises(UserError, match=rf"^Mine is defined in a notebook .*start method {method}\) .*my_data.py"):
        Workers(ImageDataset(mine(), 16), [[0]], count=1, **options)
    workers.refuse_names_of_prompt(ImageDataset(Numbers(), 16))  # of a module


def test_a_function_of_a_notebook_within_a_dataset_of_a_module_is_named(started, monkeypatch):
    started("spawn")

    def brighter(image):
        return image + 0.1

    at_a_prompt(monkeypatch, brighter=brighter)
    dataset = Numbers()
    dataset.transform = brighter
    with pytest.raises(UserError, match=r"^brighter is defined in a notebook or at a prompt"):
        workers.refuse_names_of_prompt(dataset)


@pytest.mark.nightly  # two interpreters that import everything
def test_a_script_without_a_guard_is_told_of_it(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import multiprocessing\n"
        "from vqdist.data.workers import Workers\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        "list(Workers(len, [[0]], count=1, prefetch=1, nbytes=8, set_up=int, describe=str))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert "ended with code 1 before it read anything; with the start method spawn" in last
    assert 'below `if __name__ == "__main__":`' in last
