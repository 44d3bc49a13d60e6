"""The parts that a trainer holds, each by itself: progress, networks, run, report, the request to stop."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
from scenarios import build_trainer, build_vae
from torch import nn

from vqdist import UserError
from vqdist.backends.local import LocalBackend
from vqdist.stopping import BrokenOff
from vqdist.trainers.bad_images import BadImages
from vqdist.trainers.config import TrainerConfig
from vqdist.trainers.global_batch import GlobalBatch
from vqdist.trainers.networks import Networks
from vqdist.trainers.progress import Progress
from vqdist.trainers.report import Report
from vqdist.trainers.run import Run
from vqdist.trainers.stop_request import StopRequest

# ------------------------------------------------------------------------------------------------------ networks


def engine(module: nn.Module):
    return LocalBackend().prepare(module, torch.optim.SGD(module.parameters(), lr=1.0), max_grad_norm=None)


class Average:
    """Stands for a moving average: a network of its own, and how often it was updated."""

    def __init__(self, network: nn.Module):
        self.ema_model, self.updates = network, 0

    def update(self) -> None:
        self.updates += 1

    def named_tensors(self):
        return self.ema_model.state_dict().items()


def test_networks_give_the_average_where_there_is_one():
    first, second, averaged = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 2)
    engines = {"generator": engine(first), "discriminator": engine(second)}
    live = Networks(LocalBackend(), engines, None)
    assert live.main is engines["generator"]
    with live.averaged() as network:
        assert network is first
    live.update_average()  # there is none, and nothing happens
    average = Average(averaged)
    both = Networks(LocalBackend(), engines, average)
    with both.averaged() as network:
        assert network is averaged
    both.update_average()
    assert average.updates == 1
    assert list(dict(both.named_tensors())) == [
        *("generator.weight", "generator.bias", "discriminator.weight", "discriminator.bias"),
        *("ema.weight", "ema.bias"),
    ]
    assert {name.rpartition(" ")[2] for name, _ in both.held_tensors()} == {"generator", "discriminator", "average"}


# ------------------------------------------------------------------------------------------------------ run


def config_at(folder, **options) -> TrainerConfig:
    given = {"folder": "digits", "image_size": 16, "batch_size": 4, "num_train_steps": 2, **options}
    return TrainerConfig(results_folder=str(folder), **given)


def test_a_run_locks_its_folder_and_writes_its_configuration(tmp_path):
    run = Run(config_at(tmp_path / "run"), build_vae())
    assert run.told_batch == GlobalBatch(4, 1, 4) and run.lock is None and not run.folder.exists()
    run.identify("ab" * 32)
    run.open(LocalBackend())
    run.write_configuration()
    written = json.loads((run.folder / "config.json").read_text())
    assert written["model_type"] == "vqgan" and written["data"] == {"images": "ab" * 32, "valid": None}
    assert written["trainer"]["batch_size"] == 4 and written["model"]["dim"] == 16
    assert run.lock is not None
    run.close()
    assert run.lock is None


def test_a_run_refuses_another_configuration_and_other_images(tmp_path):
    run = Run(config_at(tmp_path / "run"), build_vae())
    run.identify("ab" * 32)
    run.open(LocalBackend())
    run.write_configuration()
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    run.close()
    Run(config_at(tmp_path / "run", log_every=3, num_train_steps=9), build_vae()).identify("ab" * 32)
    for other, data, key in (
        (config_at(tmp_path / "run", lr=1.0), "ab" * 32, "trainer.lr"),
        (config_at(tmp_path / "run"), "cd" * 32, "data.images"),
    ):
        with pytest.raises(UserError, match=key):
            Run(other, build_vae()).identify(data)
    Run(config_at(tmp_path / "run", lr=1.0, allow_config_change=True), build_vae()).identify("ab" * 32)


def test_the_configuration_is_frozen(tmp_path):
    trainer = build_trainer(tmp_path)
    with pytest.raises(AttributeError):
        trainer.config.lr = 1.0
    assert trainer.config is trainer.run.config
    trainer.close()


# ------------------------------------------------------------------------------------------------------ report


def report_at(folder) -> Report:
    bad_images = BadImages(LocalBackend(), 10, 0.01)
    return Report(LocalBackend(), Progress(), StopRequest(LocalBackend()), folder, bad_images)


def test_the_clock_leaves_out_pauses_and_counts_what_waits_for_data(tmp_path):
    report = report_at(tmp_path)
    with report.paused():
        time.sleep(0.2)
    with report.waiting_for_data():
        time.sleep(0.05)
    report.progress.advance(8)
    numbers = report.speed(8)
    assert numbers["images_per_second"] > 8 / 0.2 and numbers["data_wait"] > 0.5
    report.progress.advance(8)
    assert report.speed(8)["data_wait"] < 0.5  # it began anew


def test_log_lines_hold_means_and_go_to_the_sinks_and_the_function(tmp_path):
    report, told = report_at(tmp_path), []
    report.log({"images_per_second": 1.0})  # on a rank without sinks nothing happens
    report.open([], {})
    report.log_fn = told.append
    for value in (1.0, 3.0):
        report.add({"loss": torch.tensor(value)})
    report.progress.advance(4)
    report.log({**report.mean_numbers(), "images_per_second": 1.0})
    report.close()
    assert told == [{"step": 1, "loss": 2.0, "images_per_second": 1.0}]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.0
    assert report.mean_numbers() == {}


def test_a_validation_that_is_broken_off_is_remembered(tmp_path):
    report = report_at(tmp_path)

    def broken() -> dict[str, float]:
        raise BrokenOff

    assert report.validate(broken) == {} and report.validation_broken_off
    assert report.validate(lambda: {"psnr": 20.0}) == {"psnr": 20.0} and not report.validation_broken_off
    assert report.last_evaluation == (0, {"psnr": 20.0})


# ------------------------------------------------------------------------------------------------------ stop request


def test_a_signal_is_known_until_the_next_training_begins():
    stop = StopRequest(LocalBackend())
    assert stop.asked() == 0 and stop.received == 0
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked() == signal.SIGTERM == stop.number
        with pytest.raises(BrokenOff):
            stop.break_off_if_asked()
        with pytest.raises(BrokenOff), stop.breaking_off():
            pass
    with stop.listening():
        assert stop.asked() == 0
        stop.break_off_if_asked()


# ------------------------------------------------------------------------------------------------------ the loop


def test_steps_is_the_loop_and_may_be_left_and_taken_up_again(tmp_path):
    trainer = build_trainer(tmp_path / "left", num_train_steps=4)
    before = signal.getsignal(signal.SIGTERM)
    for step, numbers in trainer.steps():
        assert step == trainer.step and numbers["recon_loss"].ndim == 0
        if step == 2:
            break
    assert signal.getsignal(signal.SIGTERM) is before and trainer.checkpoints.steps() == []
    assert [step for step, _ in trainer.steps()] == [3, 4]
    assert trainer.checkpoints.steps() == [4] and (tmp_path / "left" / "export").is_dir()
    assert trainer.report.last_evaluation[0] == 4 and trainer.train() == trainer.report.last_evaluation[1]
    whole = build_trainer(tmp_path / "whole", num_train_steps=4)
    whole.train()
    for (name, mine), (_, other) in zip(trainer.named_tensors(), whole.named_tensors(), strict=True):
        assert torch.equal(mine, other), name


def test_an_error_in_the_body_of_the_loop_passes_and_ends_nothing(tmp_path):
    trainer = build_trainer(tmp_path, num_train_steps=3)
    with pytest.raises(KeyError):
        for _ in trainer.steps():
            raise KeyError("mine")
    assert [step for step, _ in trainer.steps()] == [2, 3]
