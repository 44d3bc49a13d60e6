"""Signals within this process: noted, given back, broken off by, and left at; faults/test_stopping.py sends them."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from workers.stopping_worker import SCENARIOS

from vqdist.stopping import BrokenOff, LeaveAtOnce, Stopped, StopSignals, record_stop


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


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
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


def test_signals_are_noted_and_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with StopSignals() as signals:
        assert signals.received == 0
        for number in before:
            os.kill(os.getpid(), number)
            assert signals.received == number
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_interrupt_is_immediate_and_a_doubled_one_is_one(monkeypatch):
    monkeypatch.setattr(StopSignals, "SAME_INTERRUPT", 60.0)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # passed on by a launcher
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(StopSignals, "SAME_INTERRUPT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_script_that_lets_it_pass_ends_with_the_code(number, code):
    stopped = Stopped(number, 7, "runs/a")
    assert stopped.code == code and isinstance(stopped, SystemExit)
    assert stopped.message.startswith(f"stopped by {number.name} after step 7, which is saved")
