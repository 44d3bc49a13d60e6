"""The decision of launch/slurm/functions.sh at the end of a training, without a Slurm: requeue the job, or fail."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from launching import ROOT, run

from vqdist.stopping import EXIT_REQUEUE, record_stop

FUNCTIONS = ROOT / "launch" / "slurm" / "functions.sh"
REQUEUED = "job 7: back into the queue\nscontrol requeue 7\n"


def finish_training(logs: Path, code: int, *, told: str = "", state: str = "RUNNING") -> tuple[int, str]:
    """Exit code and output of the batch script after its step ended with `code`; Slurm's commands only echo."""
    script = f"""
        squeue() {{ echo {state}; }}
        scontrol() {{ echo "scontrol $*"; }}
        . {FUNCTIONS}
        logs={logs} told={told}
        finish_training {code}
    """
    done = run(["bash", "-uc", script], check=False, timeout=60, SLURM_JOB_ID="7")
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
def stop(tmp_path, monkeypatch):
    """Leave the record of a rank that was stopped, as vqdist does."""
    monkeypatch.setenv("VQDIST_STOP_DIR", str(tmp_path))

    def record(number: int, *, rank: int = 0, step: int | None = None) -> None:
        monkeypatch.setenv("RANK", str(rank))
        record_stop(number, step=step, run=None if step is None else "runs/a")

    return record


def test_the_exit_code_is_that_of_vqdist():
    assert re.findall(r"^EXIT_REQUEUE=(\d+)", FUNCTIONS.read_text(), re.M) == [str(EXIT_REQUEUE)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("told", ["", "yes"])
def test_a_saved_run_goes_back_into_the_queue(tmp_path, stop, number, told):
    """Even where the signal came to a rank alone."""
    stop(number, rank=1, step=123)
    assert finish_training(tmp_path, 1, told=told) == (EXIT_REQUEUE, REQUEUED)


def test_an_interrupt_and_an_end_without_error_do_not(tmp_path, stop):
    stop(signal.SIGINT, step=3)
    assert finish_training(tmp_path, 1, told="yes") == (1, "")
    stop(signal.SIGUSR1, rank=1)  # of an attempt that the launcher has repeated
    assert finish_training(tmp_path, 0) == (0, "")


def test_a_start_is_requeued_where_the_job_was_told(tmp_path, stop):
    """A launcher ends the ranks that are still starting with SIGTERM when one has failed: that job has failed."""
    stop(signal.SIGTERM, rank=3)
    assert finish_training(tmp_path, 1) == (1, "")
    assert finish_training(tmp_path, 1, told="yes") == (EXIT_REQUEUE, REQUEUED)
    (tmp_path / "told_node_1").touch()  # a signal to the step alone
    assert finish_training(tmp_path, 1) == (EXIT_REQUEUE, REQUEUED)


def test_what_slurm_itself_requeues_or_cancels_is_left_to_it(tmp_path, stop):
    stop(signal.SIGTERM, step=3)
    assert finish_training(tmp_path, 1, state="COMPLETING") == (EXIT_REQUEUE, "")


@pytest.mark.parametrize(("code", "told", "requeued"), [(138, "yes", True), (143, "yes", True), (143, "", False)])
def test_of_the_signal_dies_only_what_has_not_started_anything(tmp_path, code, told, requeued):
    expected = (EXIT_REQUEUE, REQUEUED) if requeued else (code, "")
    assert finish_training(tmp_path, code, told=told) == expected


def test_only_fields_count(tmp_path):
    """Sentences in logs and in records, damaged and half written files are nothing."""
    words = "stopped by SIGUSR1 after step 3, which is saved; the same command goes on from there"
    (tmp_path / "rank.log").write_text(words)
    (tmp_path / "stopped_rank_00000.json").write_text(f'{{\n  "run": "{words} \\"exit_code\\": 75"\n}}')
    (tmp_path / "stopped_rank_00001.json").write_text('{\n  "exit_code": 7')
    (tmp_path / "stopped_rank_00002.json.partial").write_text('{\n  "exit_code": 75,\n  "saved": true\n}')
    assert finish_training(tmp_path, 1, told="yes") == (1, "")
