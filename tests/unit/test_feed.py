"""Training that gets no images: a failing storage, too many broken files, a hang. It is saved, and said in a line."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
from PIL import Image
from scenarios import build_trainer

from vqdist.checkpoint import complete_steps
from vqdist.data.files import StorageError
from vqdist.data.sources import Source
from vqdist.errors import UserError
from vqdist.stopping import Stopped
from vqdist.trainers.stop_request import FAULT


class Failing(Source):
    """Grey images; from the so-manieth reading on, each does something else. One step reads four."""

    def __init__(self, after: int, act):
        self.after, self.act, self.read = after, act, 0

    def __len__(self):
        return 40

    def image(self, index):
        self.read += 1
        if self.read > self.after:
            self.act()
        return Image.new("RGB", (16, 16), (6 * index,) * 3)

    def fingerprint(self):
        return "0" * 64


def trainer_of(tmp_path, act, *, after=10, **options):
    settings = {"folder": Failing(after, act), "valid_frac": 0.0, "num_train_steps": 6, **options}
    return build_trainer(tmp_path / "run", **settings)


def raising(error):
    def act():
        raise error

    return act


SYSTEM = [OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE)]


@pytest.mark.parametrize(
    "error", [*SYSTEM, MemoryError("no memory"), OSError(errno.ENOMEM, "Cannot allocate")], ids=str
)
@pytest.mark.parametrize("on_bad_image", ["raise", "skip"])
def test_a_failure_of_the_system_is_no_bad_image(tmp_path, error, on_bad_image):
    """Two steps are trained, of four images each, and saved."""
    trainer = trainer_of(tmp_path, raising(error), on_bad_image=on_bad_image)
    with pytest.raises(UserError, match="cannot read the image .*a failure of the storage or of the system") as raised:
        trainer.train()
    assert isinstance(raised.value.__cause__, StorageError) and "on_bad_image" not in str(raised.value)
    assert f"; step 2 is saved in {tmp_path}/run" in str(raised.value)
    assert complete_steps(tmp_path / "run/checkpoints") == [2]


def test_a_failure_in_a_loader_process_is_the_same(tmp_path):
    trainer = trainer_of(tmp_path, raising(SYSTEM[0]), on_bad_image="skip", num_workers=1)
    with pytest.raises(UserError, match="cannot read the image .*; step 2 is saved"):
        trainer.train()
    assert complete_steps(tmp_path / "run/checkpoints") == [2]
    assert multiprocessing.active_children() == []


def test_a_loader_process_that_is_killed_costs_no_step(tmp_path):
    trainer = trainer_of(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL), num_workers=1)
    with pytest.raises(UserError, match=r"loader process \d+ was killed by SIGKILL.*; step 2 is saved"):
        trainer.train()
    assert complete_steps(tmp_path / "run/checkpoints") == [2]


def test_before_the_first_step_nothing_is_saved(tmp_path):
    trainer = trainer_of(tmp_path, raising(SYSTEM[0]), after=2)
    with pytest.raises(StorageError):
        trainer.train()
    assert complete_steps(tmp_path / "run/checkpoints") == []


@pytest.mark.parametrize("error", [ZeroDivisionError("a mistake of its author"), KeyError("name")])
def test_any_error_of_a_source_is_raised_as_it_is_after_saving(tmp_path, error):
    with pytest.raises(type(error)):
        trainer_of(tmp_path, raising(error)).train()
    assert complete_steps(tmp_path / "run/checkpoints") == [2]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_breaks_off_the_wait_for_images(tmp_path, num_workers, number):
    trainer = trainer_of(tmp_path, lambda: time.sleep(600), num_workers=num_workers)
    threading.Timer(3.0, os.kill, (os.getpid(), number)).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        trainer.train()
    assert time.monotonic() - began < 10 and complete_steps(tmp_path / "run/checkpoints") == [2]


def test_a_loop_that_is_left_while_a_rank_has_no_images_ends_alike(tmp_path):
    """Ranks may learn of it in a validation of the step after which the body breaks."""
    trainer = trainer_of(tmp_path, raising(SYSTEM[0]), after=100)
    loop = trainer.steps()
    next(loop)
    trainer.stop.number = FAULT  # of another rank
    with pytest.raises(UserError, match=r"has no images to train on: .*; step 1 is saved"):
        loop.close()
    assert complete_steps(tmp_path / "run/checkpoints") == [1]


class Validation(Source):
    """Grey images, which cannot be read in a validation from the so-manieth reading on."""

    def __init__(self, after: int, error: Exception):
        self.after, self.error, self.read = after, error, 0

    def __len__(self):
        return 8

    def image(self, index):
        self.read += 1
        if self.read > self.after:
            raise self.error
        return Image.new("RGB", (16, 16), (6 * index,) * 3)

    def fingerprint(self):
        return "1" * 64


def validated(tmp_path, after, error=SYSTEM[0], **options):
    source = Validation(after, error)
    settings = {"valid": source, "valid_frac": 0.05, "validate_every": 2, "num_train_steps": 6, **options}
    trainer = build_trainer(tmp_path / "run", folder="synthetic:40", **settings)
    if not settings.get("save_results_every"):
        trainer.save_pictures = lambda path: None
    return trainer, source


@pytest.mark.parametrize("after", [0, 7, 8 + 7])  # its first image, its last, and that of the second validation
def test_a_validation_that_cannot_read_costs_no_step(tmp_path, after):
    trainer, source = validated(tmp_path, after)
    step = 2 if after < 8 else 4
    with pytest.raises(UserError, match=rf"cannot read the image .*; step {step} is saved in {tmp_path}/run"):
        trainer.train()
    assert complete_steps(tmp_path / "run/checkpoints") == [step]
    trainer.close()
    trainer, source = validated(tmp_path, 10**6)
    assert trainer.step == step and trainer.train()["images"] == 8
    lines = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert [line["step"] for line in lines if "valid/psnr" in line] == [2, 4, 6]  # that which failed is made up for


@pytest.mark.parametrize("workers", [0, 1])
def test_the_last_validation_that_cannot_read_costs_no_step(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("vqdist.trainers.data.SMALL", 0)  # so that a process loads them
    trainer, _ = validated(tmp_path, 3, validate_every=0, num_workers=workers)
    with pytest.raises(UserError, match="cannot read the image .*; step 6 is saved"):
        trainer.train()
    assert complete_steps(tmp_path / "run/checkpoints") == [6]


def test_a_picture_that_cannot_be_read_costs_no_step(tmp_path):
    options = {"validate_every": 0, "save_results_every": 3, "num_images_save": 2}
    trainer, _ = validated(tmp_path, 0, **options)
    with pytest.raises(UserError, match="cannot read the image .*; step 3 is saved"):
        trainer.train()
    assert complete_steps(tmp_path / "run/checkpoints") == [3]
    trainer.close()
    trainer, _ = validated(tmp_path, 10**6, **options)
    trainer.train()
    pictures = sorted(path.name for path in (tmp_path / "run/results").glob("*[0-9].png"))
    assert pictures == ["step_00000003.png", "step_00000006.png"]


def test_a_validation_outside_of_a_loop_raises_what_it_meets(tmp_path):
    trainer, _ = validated(tmp_path, 0)
    with pytest.raises(StorageError):
        trainer.evaluate()
    trainer, _ = validated(tmp_path / "other", 0, RuntimeError("a mistake of its author"))
    with pytest.raises(RuntimeError, match="a mistake of its author"):
        trainer.run_evaluation()


def test_nothing_is_read_beyond_the_last_step(tmp_path):
    trainer = trainer_of(
        tmp_path, raising(SYSTEM[0]), after=12, num_train_steps=3, num_images_save=1, save_results_every=0
    )
    trainer.save_pictures = lambda path: None
    trainer.train()
    assert trainer.step == 3


def images(folder, count, *, bad=()):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number % 256,) * 3).save(folder / f"{number:03}.png")
    for number in bad:
        (folder / f"{number:03}.png").write_bytes(b"no image")
    return str(folder)


QUICK = {"valid_frac": 0.0, "on_bad_image": "skip", "batch_size": 4, "num_train_steps": 30, "log_every": 1}


def test_a_vanished_storage_ends_the_run_though_images_are_skipped(tmp_path):
    folder = images(tmp_path / "images", 200)
    trainer = build_trainer(tmp_path / "run", folder=folder, **QUICK)
    steps = trainer.steps()
    next(steps)
    for number in range(190):
        (tmp_path / "images" / f"{number:03}.png").unlink()
    with pytest.raises(UserError, match=r"3 of 200 images cannot be decoded .*max_bad_frac 0.01 allows 2 .*is saved"):
        list(steps)
    assert complete_steps(tmp_path / "run/checkpoints") != []


@pytest.mark.parametrize(("share", "ends"), [(0.01, True), (0.05, False)])
def test_the_share_of_broken_images_is_limited_and_counted(tmp_path, share, ends):
    folder = images(tmp_path / "images", 100, bad=(3, 40, 77, 98))
    trainer = build_trainer(tmp_path / "run", folder=folder, max_bad_frac=share, **QUICK)
    if ends:
        with pytest.raises(UserError, match=r"2 of 100 images cannot be decoded .*allows 1 to be skipped"):
            trainer.train()
    else:
        trainer.train()
        counted = [json.loads(line).get("skipped_images") for line in open(tmp_path / "run/metrics.jsonl")]
        assert counted == sorted(counted) and counted[-1] == 4  # 120 images are more than all


def test_broken_images_of_the_last_validation_end_no_run(tmp_path):
    folder = images(tmp_path / "images", 20)
    options = {**QUICK, "folder": folder, "valid_frac": 0.05, "num_train_steps": 2, "validate_every": 2}
    trainer = build_trainer(tmp_path / "run", valid=images(tmp_path / "valid", 8, bad=(3, 5)), **options)
    trainer.save_pictures = lambda path: None
    assert trainer.train()["images"] == 8
    assert complete_steps(tmp_path / "run/checkpoints") == [2]


@pytest.mark.parametrize(("bad", "ends"), [((3, 20, 40), True), ((3, 20), False)])
def test_broken_images_of_an_own_validation_are_a_share_of_its_own(tmp_path, bad, ends):
    """The limits are 8 of 200 images to train on and 2 of 50 to validate on."""
    settings = {**QUICK, "num_train_steps": 4, "validate_every": 2, "max_bad_frac": 0.04, "num_images_save": 1}
    settings |= {"folder": images(tmp_path / "images", 200, bad=range(6)), "valid_frac": 0.05}
    trainer = build_trainer(tmp_path / "run", valid=images(tmp_path / "valid", 50, bad=bad), **settings)
    trainer.save_pictures = lambda path: None
    if ends:
        with pytest.raises(UserError, match=r"3 of 50 images cannot be decoded .*allows 2 .*; step 2 is saved"):
            trainer.train()
        trainer.close()
        trainer = build_trainer(tmp_path / "run", valid=str(tmp_path / "valid"), **settings)
        assert len(trainer.report.bad_images.of_valid.names) == 3  # the resumed run knows them
    else:
        trainer.train()
        last = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")][-2]
        assert last["skipped_images"] == len(trainer.report.bad_images.all_names()) >= len(bad)


def test_one_broken_image_of_few_is_skipped(tmp_path):
    folder = images(tmp_path / "images", 12, bad=(3,))
    build_trainer(tmp_path / "run", folder=folder, **{**QUICK, "num_train_steps": 4}).train()


def test_a_resumed_run_counts_on(tmp_path):
    folder = images(tmp_path / "images", 20, bad=(3,))
    settings = {"folder": folder, **QUICK, "save_model_every": 5}
    build_trainer(tmp_path / "run", **{**settings, "num_train_steps": 5}).train()
    trainer = build_trainer(tmp_path / "run", **{**settings, "num_train_steps": 6})
    trainer.train()
    counted = [json.loads(line).get("skipped_images") for line in open(tmp_path / "run/metrics.jsonl")]
    assert counted[-2:] == [1, 1]
