"""Signals within this process: noted, given back, broken off by, and left at; faults/test_stopping.py sends them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection

import pytest
import torch
from launching import run
from workers.stopping_worker import SCENARIOS

from vqdist.leaving import LeaveAtOnce
from vqdist.stopping import (
    RANKS,
    BrokenOff,
    Stopped,
    StopSignals,
    UntilTheEnd,
    protect_worker,
    record_stop,
    training_flag,
)

CODES = {
    **dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP), 75),
    signal.SIGINT: 130,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_signals_during_validations_saves_and_pictures(tmp_path, scenario):
    scenario(tmp_path, backend="local")


def test_what_one_process_does_alone_is_broken_off():
    with StopSignals() as signals:
        with pytest.raises(BrokenOff), signals.breaking_off():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")
        with pytest.raises(BrokenOff), signals.breaking_off():
            pytest.fail("it began")
        os.kill(os.getpid(), signal.SIGUSR1)  # outside it is noted only
        assert signals.received == signal.SIGUSR1


@pytest.mark.parametrize("number, code", CODES.items())
def test_leaving_at_once(number, code, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("VQDIST_STOP_DIR", str(tmp_path / "records"))
    monkeypatch.setenv("RANK", "12")
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as error, LeaveAtOnce():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert error.value.code == code and signal.getsignal(number) == before
    assert capfd.readouterr().err.startswith(f"vqdist: stopped by {number.name} before training began")
    with LeaveAtOnce():
        pass
    (path,) = (tmp_path / "records").iterdir()
    stop = {"signal": number.name, "exit_code": code, "saved": False, "step": None, "rank": 12, "run": None}
    assert path.name == "stopped_rank_00012.json" and json.loads(path.read_text()) == stop


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"])
def test_a_record_has_the_rank_of_any_launcher(tmp_path, monkeypatch, name):
    for other in RANKS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("VQDIST_STOP_DIR", str(tmp_path))
    monkeypatch.setenv(name, "3")
    record_stop(signal.SIGTERM)
    assert json.loads((tmp_path / "stopped_rank_00003.json").read_text())["rank"] == 3


def test_a_record_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VQDIST_STOP_DIR", str(tmp_path / "file"))
    record_stop(signal.SIGTERM, step=3, run="runs/a")
    warning = capfd.readouterr().err
    assert warning.startswith(f"vqdist: warning: {tmp_path}/file/stopped_rank_00000.json cannot be written")
    assert warning.count("\n") == 1
    monkeypatch.delenv("VQDIST_STOP_DIR")
    record_stop(signal.SIGTERM, step=3, run="runs/a")
    assert capfd.readouterr().err == ""


def test_a_signal_between_the_parts_of_a_command_is_the_trainings_first_and_one_after_it_changes_nothing():
    before = {number: signal.getsignal(number) for number in CODES}
    with UntilTheEnd():
        with LeaveAtOnce():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals() as signals:
            assert signals.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGHUP)
    with StopSignals() as signals:
        assert signals.received == 0
    assert {number: signal.getsignal(number) for number in CODES} == before


class Finalized:
    """An object at whose end a signal comes."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)


def test_a_signal_within_a_finalizer_breaks_off_without_a_word(capfd):
    with StopSignals() as signals:
        with pytest.raises(BrokenOff), signals.breaking_off():
            finalized = Finalized(signal.SIGTERM)
            del finalized
            assert signals.received == signal.SIGTERM  # Python goes on; what was begun ends by itself
            raise BrokenOff
    assert capfd.readouterr().err == ""


def test_a_signal_within_a_finalizer_of_a_start_ends_it():
    code = (
        "import os, signal; from vqdist.leaving import LeaveAtOnce\n"
        "class Finalized:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "with LeaveAtOnce():\n    finalized = Finalized()\n    del finalized\n    print('goes on')\n"
    )
    done = run([sys.executable, "-c", code], check=False, warm=False)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == "vqdist: stopped by SIGTERM before training began; the same command starts again\n"


def test_a_process_that_is_the_command_is_deaf_at_its_end(monkeypatch):
    monkeypatch.setattr(UntilTheEnd, "of_process", True)
    before = {number: signal.getsignal(number) for number in CODES}
    try:
        with UntilTheEnd():
            pass
        for number, code in CODES.items():
            assert signal.getsignal(number) is (signal.SIG_IGN if code == 75 else signal.SIG_DFL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_while_the_handlers_are_set_is_noted(monkeypatch):
    setting = signal.signal

    def set_and_get_one(number, handler):
        before = setting(number, handler)
        if number == signal.SIGTERM and handler == StopSignals._note_all:
            os.kill(os.getpid(), number)
        return before

    monkeypatch.setattr(signal, "signal", set_and_get_one)
    with StopSignals() as signals:
        assert signals.received == signal.SIGTERM


def test_signals_are_noted_and_given_back():
    before = {number: signal.getsignal(number) for number in CODES}
    with StopSignals() as signals:
        assert signals.received == 0
        for number in before:
            os.kill(os.getpid(), number)
            assert signals.received == number
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("context", [StopSignals, LeaveAtOnce])
def test_a_hangup_that_is_ignored_stays_so(context):
    """`nohup` does that; the others that a shell may ignore are heard, since a scheduler sends them on purpose."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGUSR2)}
    try:
        with context():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR2) is not signal.SIG_IGN
            time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_a_worker(training: torch.Tensor, pipe: Connection) -> None:
    protect_worker(training)
    for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGXCPU)
    pipe.send("lives")


def test_a_loader_lives_through_what_its_trainer_is_told_and_passes_its_own_time_limit_on():
    with StopSignals() as signals:
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(target=in_a_worker, args=(training_flag(), theirs))
        worker.start()
        assert ours.poll(30) and ours.recv() == "lives"
        worker.join(30)
        assert worker.exitcode == 0 and signals.received == signal.SIGXCPU


def test_a_second_interrupt_is_immediate_and_a_doubled_one_is_one(monkeypatch):
    monkeypatch.setattr(StopSignals, "SAME_INTERRUPT", 60.0)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # passed on by a launcher
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(StopSignals, "SAME_INTERRUPT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number, code", CODES.items())
def test_a_stop_has_an_exit_code_and_leaves_a_session_alive(number, code):
    stopped = Stopped(number, 7, "runs/a")
    assert stopped.code == code and isinstance(stopped, KeyboardInterrupt) and str(stopped) == stopped.message
    assert stopped.message.startswith(f"stopped by {number.name} after step 7, which is saved")
