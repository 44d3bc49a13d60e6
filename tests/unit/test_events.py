"""events.jsonl says when a run started, resumed, warned, skipped images and ended; charts hold their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from scenarios import build_dvae_trainer
from test_feed import QUICK, build_trainer, images

from vqdist.errors import UserError
from vqdist.files import CHART_NUMBERS, EVENTS
from vqdist.tracking import EventLog, Tracker
from vqdist.tracking.pictures import chart_numbers


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


def test_an_event_has_its_step_time_and_kind_and_nothing_that_is_none(tmp_path):
    log = EventLog(tmp_path)
    log.note(3, "warning", message="café \udcff", other=None)
    (event,) = events(tmp_path)
    assert event.pop("time").endswith("+00:00")
    assert event == {"step": 3, "event": "warning", "message": "café \udcff"}


@pytest.mark.parametrize("torn", [b'{"step": 1, "ev', b"\xff", b"{}"])
def test_a_torn_last_line_takes_no_other_with_it(tmp_path, torn):
    (tmp_path / EVENTS).write_bytes(b'{"step": 0}\n' + torn)
    EventLog(tmp_path).note(2, "resume")
    lines = (tmp_path / EVENTS).read_bytes().splitlines()
    assert lines[:2] == [b'{"step": 0}', torn] and json.loads(lines[2])["event"] == "resume"


def test_a_file_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    (tmp_path / EVENTS).mkdir()
    log = EventLog(tmp_path)
    log.note(1, "start")
    log.note(2, "end")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path / EVENTS} cannot be written (Is a directory)" in said


def test_a_run_keeps_its_starts_and_its_ends(tmp_path):
    build_dvae_trainer(tmp_path, num_train_steps=2).train()
    build_dvae_trainer(tmp_path, num_train_steps=4).train()
    kept = events(tmp_path)
    assert [(one["step"], one["event"]) for one in kept] == [(0, "start"), (2, "end"), (2, "resume"), (4, "end")]
    start, resume = kept[0], kept[2]
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert start["images_per_step"] == trainer["batch_size"] * trainer["grad_accum_every"] and start["processes"] == 1
    assert (start["images"], resume["images"]) == (0, 2 * start["images_per_step"])
    assert start["environment"]["torch"] == torch.__version__ and "cores" in start["environment"]["device"]


def test_damaged_checkpoints_and_steps_that_are_not_finite_are_kept(tmp_path):
    build_dvae_trainer(tmp_path, num_train_steps=2, save_model_every=1).train()
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    (newest / "manifest.json").write_text("{")
    resumed = build_dvae_trainer(tmp_path, num_train_steps=3, save_model_every=1)
    with torch.no_grad():
        next(iter(resumed.model.parameters())).fill_(float("nan"))
    with pytest.raises(UserError):
        resumed.train()
    kept = events(tmp_path)[2:]
    assert [(one["step"], one["event"]) for one in kept] == [(1, "resume"), (1, "warning"), (2, "error")]
    assert newest.name in kept[1]["message"] and "at step 2" in kept[2]["message"]


def test_skipped_images_are_named(tmp_path):
    folder = images(tmp_path / "images", 20, bad=(3, 4))
    trainer = build_trainer(tmp_path / "run", folder=folder, **{**QUICK, "max_bad_frac": 0.2})
    trainer.train()
    skipped = [one["message"] for one in events(tmp_path / "run") if one["event"] == "skipped image"]
    assert len(skipped) == 2 and set(skipped) == trainer.report.bad_images.all_names()


def test_overwrite_removes_the_history_of_the_run_before(tmp_path):
    build_dvae_trainer(tmp_path, num_train_steps=1).train()
    build_dvae_trainer(tmp_path, num_train_steps=1, overwrite=True).train()
    assert [one["event"] for one in events(tmp_path)] == ["start", "end"]


@pytest.mark.parametrize("codes", [5, 512, 1300])
def test_a_chart_holds_its_numbers(tmp_path, codes):
    counts = torch.arange(codes).flip(0) % 7
    path = tmp_path / "results" / "step_00000003_codes.png"
    Tracker(tmp_path, [], {}).histogram(3, "codes", counts, path)
    with Image.open(path) as picture:
        numbers = json.loads(picture.text[CHART_NUMBERS])
        assert picture.width == 2 * len(numbers["bars"])
    assert numbers == chart_numbers(counts)
    assert (numbers["codes"], numbers["total"], numbers["used"]) == (codes, int(counts.sum()), int((counts > 0).sum()))
    assert sum(numbers["bars"]) == sum(numbers["ranked"]) == numbers["total"] and len(numbers["bars"]) <= 512
    assert numbers["ranked"] == sorted(numbers["ranked"], reverse=True)
    if codes <= 512:
        assert numbers["bars"] == counts.tolist()
