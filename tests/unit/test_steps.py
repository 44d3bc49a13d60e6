"""A for-loop over a training: left by `break`, by an error, with a signal on its way; taken up again; in a script."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from launching import run
from scenarios import build_dvae_trainer, weights_of

from vqdist import DiscreteVAETrainer, uncaught
from vqdist.cli import main
from vqdist.errors import PeerLost
from vqdist.stopping import Stopped, StopSignals
from vqdist.tracking import Sink
from vqdist.trainers.base import Trainer
from vqdist.trainers.steps import left_by_error


def stop_at(step: int, at: int, number: int = signal.SIGTERM) -> bool:
    """Send this process a signal in this step; return whether it is the one."""
    if step == at:
        os.kill(os.getpid(), number)
    return step == at


def saved(trainer: Trainer) -> list[int]:
    return trainer.checkpoints.steps()


def leave_by_break(trainer: Trainer) -> None:
    for step, _ in trainer.steps():
        if stop_at(step, 2):
            break
    raise AssertionError("it went on after the loop")


def leave_by_return(trainer: Trainer) -> int:
    for step, _ in trainer.steps():
        if stop_at(step, 2):
            return step
    raise AssertionError("it was not left")


def call_return(trainer: Trainer) -> None:
    leave_by_return(trainer)
    raise AssertionError("it went on after the call")


def leave_an_enumeration(trainer: Trainer) -> None:
    for count, (step, _) in enumerate(trainer.steps(), 1):
        assert count == step
        if stop_at(step, 2):
            break
    raise AssertionError("it went on after the loop")


def leave_a_slice(trainer: Trainer) -> None:
    for step, _ in itertools.islice(trainer.steps(), 2):
        stop_at(step, 2)
    raise AssertionError("it went on after the loop")


def leave_a_generator_around(trainer: Trainer) -> None:
    for step in (step for step, _ in trainer.steps()):
        if stop_at(step, 2):
            break
    raise AssertionError("it went on after the loop")


@pytest.mark.parametrize(
    "leave", [leave_by_break, call_return, leave_an_enumeration, leave_a_slice, leave_a_generator_around]
)
def test_a_signal_before_a_loop_is_left_saves_and_stops_behind_it(tmp_path, leave):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer = build_dvae_trainer(tmp_path)
    with pytest.raises(Stopped, match="after step 2, which is saved") as error:
        leave(trainer)
    assert error.value.code == 75 and saved(trainer) == [2]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert [step for step, _ in trainer.steps()] == [3, 4]


def test_closing_a_loop_is_leaving_it(tmp_path):
    trainer = build_dvae_trainer(tmp_path)
    loop = trainer.steps()
    stop_at(next(loop)[0], 1)
    with pytest.raises(Stopped):
        loop.close()
    assert saved(trainer) == [1] and next(loop, None) is None
    loop.close()


def test_a_signal_before_an_error_of_the_body_saves_and_stops_the_next_loop(tmp_path):
    trainer = build_dvae_trainer(tmp_path)
    with pytest.raises(KeyError, match="mine"):
        for step, _ in trainer.steps():
            if stop_at(step, 2):
                raise KeyError("mine")
    assert saved(trainer) == [2]
    with pytest.raises(Stopped, match="after step 2"):
        trainer.train()
    assert trainer.train()["images"] == 16 and saved(trainer) == [2, 4]


def test_a_signal_before_an_error_stops_at_the_end_of_the_block(tmp_path):
    with pytest.raises(Stopped, match="after step 1"), build_dvae_trainer(tmp_path) as trainer:
        try:
            for step, _ in trainer.steps():
                if stop_at(step, 1):
                    raise KeyError("mine")
        except KeyError:
            pass
    assert trainer.run.lock is None and saved(trainer) == [1]


def test_a_second_interrupt_of_a_long_body_is_the_end_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignals, "SAME_INTERRUPT", 0.0)
    trainer = build_dvae_trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt) as error:
        for step, _ in trainer.steps():
            stop_at(step, 1, signal.SIGINT)
            stop_at(step, 1, signal.SIGINT)
    assert not isinstance(error.value, Stopped) and saved(trainer) == []
    assert [step for step, _ in trainer.steps()] == [2, 3, 4]


def test_an_error_within_a_step_makes_it_anew(tmp_path):
    """It may be a Ctrl-C in a notebook, or a mistake in a loss that is mended there."""
    trainer, whole = (build_dvae_trainer(tmp_path / name, grad_accum_every=2) for name in ("broken", "whole"))
    backward, calls = trainer.engine.backward, itertools.count(1)

    def interrupted(loss) -> None:
        backward(loss)
        if next(calls) == 3:  # the first micro-batch of the second step has left its gradients
            raise KeyboardInterrupt

    state = torch.get_rng_state()
    trainer.engine.backward = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 1
    trainer.train()
    torch.set_rng_state(state)
    whole.train()
    ours, theirs = weights_of(trainer), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_training_that_goes_on_after_a_stop_has_its_trackers_again(tmp_path):
    class Lines(Sink):
        """A sink that is a list."""

        def __init__(self):
            self.steps, self.closed = [], 0

        def log(self, step, values):
            self.steps.append(step)

        def close(self):
            self.closed += 1

    lines = Lines()
    trainer = build_dvae_trainer(tmp_path, trackers=[lines])
    with pytest.raises(Stopped):
        leave_by_break(trainer)
    assert lines.steps == [1, 2] and lines.closed == 1
    trainer.train()
    assert lines.steps == [1, 2, 3, 4, 4] and lines.closed == 2  # the last is the validation's


class Unreadable:
    """An iterator that raises, as a loader of one's own may."""

    def __iter__(self):
        return self

    def __next__(self):
        raise OSError


def test_a_body_that_raised_is_told_from_one_that_ended():
    class Watched:
        """An iterator that notes whether an error was on its way."""

        def __init__(self, seen: list):
            self.seen = seen

        def __iter__(self):
            return self

        def __next__(self):
            return 1

        def __del__(self):
            self.seen.append(left_by_error(sys._getframe(1)))

    seen: list[bool] = []
    for _ in Watched(seen):
        break
    with pytest.raises(ZeroDivisionError):
        for one in Watched(seen):
            one / 0
    with pytest.raises(KeyError):
        for _ in Watched(seen):
            raise KeyError
    with pytest.raises(IndexError):
        for one in Watched(seen):
            [][one]
    for _ in zip(range(2), Watched(seen), strict=False):  # which ends while the other goes on
        pass
    with pytest.raises(OSError):  # of a loop in the body
        for _ in Watched(seen):
            for _ in Unreadable():
                pass
    with pytest.raises(OSError):
        for _ in zip(Watched(seen), Unreadable(), strict=False):
            pass
    assert seen == [False, True, True, True, False, True, True]


def test_two_trainings_at_once_share_the_signals_and_give_them_back(tmp_path):
    """Their loops end in the order of their beginning, which no stack of handlers allows."""
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    first, second = (build_dvae_trainer(tmp_path / name, num_train_steps=3) for name in ("first", "second"))
    early, late = first.steps(), second.steps()
    next(early), next(late)
    early.close()
    assert signal.getsignal(signal.SIGTERM) is not before[0]
    os.kill(os.getpid(), signal.SIGTERM)  # of the other, which trains still
    with pytest.raises(Stopped):
        list(late)
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before
    both = zip(first.steps(), second.steps(), strict=True)
    with pytest.raises(Stopped):
        for (_, _), (step, _) in both:
            stop_at(step, 2)
    assert saved(first) == [2] and signal.getsignal(signal.SIGTERM) is not before[0]
    del both
    with pytest.raises(Stopped, match="after step 2"):
        second.train()
    assert signal.getsignal(signal.SIGTERM) is before[0]
    assert first.train()["images"] == second.train()["images"] == 16


def test_a_state_that_is_loaded_in_the_middle_forgets_the_steps_after_it(tmp_path):
    """Numbers and pictures of a step are made again when the run comes there anew."""
    options = {"num_train_steps": 4, "validate_every": 2, "save_results_every": 2, "save_model_every": 2}
    trainer = build_dvae_trainer(tmp_path / "run", **options)
    for step, _ in trainer.steps():
        if step == 3:
            trainer.save(tmp_path / "state")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    weights, numbers = weights_of(trainer), trainer.report.last_evaluation
    trainer.picture_path.unlink()
    trainer.load(tmp_path / "state")
    assert (trainer.report.last_evaluation, trainer.report.pictured) == ((-1, {}), -1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines  # to look at a state is no training
    assert trainer.train() == numbers[1] and trainer.report.last_evaluation == numbers
    assert trainer.picture_path.is_file()
    ours = weights_of(trainer)
    assert all(torch.equal(ours[name], weights[name]) for name in weights)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in lines.splitlines()]


def test_a_trainer_and_a_batch_show_themselves_in_one_line(tmp_path):
    trainer = build_dvae_trainer(tmp_path)
    next(trainer.steps())
    shown = f"DiscreteVAETrainer(DiscreteVAE, step 1 of 4, 48 images, local x1, {tmp_path})"
    assert repr(trainer) == shown
    batch = next(trainer.data.train_batches(trainer.backend, 4, labels=False))
    assert repr(batch) == "Batch(4 x 3 x 16 x 16 float32, places range(4, 8), bad [])"


# ------------------------------------------------------------------------------------------------------ scripts


def script(folder: Path, body: str, **options):
    """Run a script that trains, in a process of its own."""
    head = """
        import os, signal, sys
        from scenarios import build_dvae_trainer
        trainer = build_dvae_trainer(sys.argv[1])
    """
    (folder / "script.py").write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return run([sys.executable, str(folder / "script.py"), str(folder / "run")], check=False, **options)


BREAK = """
    for step, _ in trainer.steps():
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            break
"""


@pytest.mark.parametrize("after", ["", "    print('went on')\n"])
def test_a_script_that_is_stopped_ends_with_the_code_and_one_line(tmp_path, after):
    done = script(tmp_path, BREAK + after)
    lines = [line for line in done.stderr.splitlines() if "stopped by SIGTERM" in line]
    assert done.returncode == 75 and len(lines) == 1 and "Traceback" not in done.stderr and not done.stdout
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json").is_file()


@pytest.mark.nightly
def test_a_real_script_whose_last_statement_is_the_loop_ends_with_the_code(tmp_path):
    done = script(tmp_path, BREAK, warm=False)
    assert done.returncode == 75 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert "stopped by SIGTERM after step 2, which is saved" in done.stderr


def test_the_command_maps_a_stop_to_its_code(tmp_path, monkeypatch, capfd):
    update = DiscreteVAETrainer.update

    def interrupted(self, micro_batches):
        os.kill(os.getpid(), signal.SIGINT)
        return update(self, micro_batches)

    monkeypatch.setattr(DiscreteVAETrainer, "update", interrupted)
    options = "--data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8 --emb_dim 8"
    options += " --num_resnet_blocks 0 --batch_size 4 --trainer.num_train_steps 9 --data.num_workers 0"
    assert main(["train", "dvae", *options.split(), "--out", str(tmp_path)]) == 130
    errors = capfd.readouterr().err
    assert "stopped by SIGINT after step 1, which is saved" in errors and "Traceback" not in errors


def test_at_a_prompt_nothing_ends_the_process(monkeypatch):
    shown = []
    monkeypatch.setattr(uncaught, "_before", lambda *error: shown.append(error[1]))
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    for error in (Stopped(signal.SIGINT, 1, "runs/a"), PeerLost((1,), "lost rank 1"), ValueError("mine")):
        uncaught._end(type(error), error, None)
        assert shown[-1] is error


def test_of_a_script_a_stop_is_its_code_and_other_errors_are_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(uncaught, "_before", lambda *error: shown.append(error[1]))
    stopped, mistake = Stopped(signal.SIGTERM, 1, "runs/a"), ValueError("mine")
    uncaught._end(ValueError, mistake, None)
    with pytest.raises(SystemExit) as end:
        uncaught._end(Stopped, stopped, None)
    assert end.value.code == 75 and shown == [mistake]
