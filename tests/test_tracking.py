"""Where numbers and pictures go: the file that is the source of truth, TensorBoard, W&B and the sheets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqdist.errors import UserError
from vqdist.tracking import Tracker, check_trackers, make_sheet, memory_gb, save_sheet


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tracker(folder: Path, *names: str, resumed_step: int = 0) -> Tracker:
    return Tracker(folder, list(names), {"lr": 0.1}, resumed_step)


# --------------------------------------------------------------------------------------------- metrics.jsonl


def test_each_call_is_a_line(tmp_path):
    tracking = tracker(tmp_path)
    tracking.log(1, {"loss": 0.5, "lr": 1e-3})
    tracking.log(2, {"valid/psnr": 20.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "lr": 1e-3}, {"step": 2, "valid/psnr": 20.0}]
    tracking.close()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_what_is_no_number_becomes_null(tmp_path):
    values = {"nan": float("nan"), "inf": float("inf"), "minus": float("-inf"), "fine": -2.0}
    tracker(tmp_path).log(3, values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 3,
        "nan": None,
        "inf": None,
        "minus": None,
        "fine": -2.0,
    }


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    first = tracker(tmp_path)
    for step in (1, 2, 3, 4):
        first.log(step, {"loss": float(step)})
    second = tracker(tmp_path, resumed_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    second.log(3, {"loss": 30.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "{", '{"step"', "12", "null", '{"loss": 3.0}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' + torn)
    tracking = tracker(tmp_path, resumed_step=5)
    tracking.log(6, {"loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 6, "loss": 2.0}]


# --------------------------------------------------------------------------------------------- trackers


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard_holds_numbers_and_pictures(tmp_path):
    tracking = tracker(tmp_path, "tensorboard")
    tracking.log(1, {"loss": 0.5, "broken": float("nan")})
    tracking.log(2, {"loss": 0.25})
    tracking.picture(2, "reconstructions", torch.rand(3, 2, 3, 8, 8), tmp_path / "results" / "two.png")
    tracking.close()
    read = events(tmp_path)
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert len(read.Scalars("broken")) == 1
    (picture,) = read.Images("reconstructions")
    with Image.open(tmp_path / "results" / "two.png") as saved:
        assert (picture.width, picture.height) == saved.size and picture.step == 2
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_tensorboard_forgets_what_will_run_again(tmp_path):
    first = tracker(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.close()
    second = tracker(tmp_path, "tensorboard", resumed_step=1)
    second.log(2, {"loss": 20.0})
    second.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    tracking = tracker(tmp_path, "wandb")
    run = tracking.wandb
    tracking.log(1, {"loss": 0.5})
    tracking.picture(1, "reconstructions", torch.rand(2, 2, 3, 8, 8), tmp_path / "one.png")
    tracking.log(2, {"loss": 0.25})
    assert run.offline and run.config["lr"] == 0.1 and run.step == 2
    assert run.summary["loss"] == 0.5  # of step 1: W&B takes a step in when the next one begins, or the run ends
    tracking.close()
    (file,) = tmp_path.glob(f"wandb/offline-run-*/run-{run.id}.wandb")
    assert file.stat().st_size > 0
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/reconstructions*.png"))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_wandb_continues_the_run_of_a_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("wandb.init", lambda **options: asked.append(options["id"]))
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        tracker(tmp_path / folder, "wandb")
    assert asked[0] == asked[1] != asked[2]


def test_unknown_and_missing_trackers(monkeypatch):
    check_trackers([])
    check_trackers(["tensorboard", "wandb"])
    with pytest.raises(UserError, match=r"^tracker 'tensorbord' is not known; choose from tensorboard, wandb$"):
        check_trackers(["wandb", "tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^tracker 'wandb' is not installed; install it with pip install 'vqdist\[trac"
    ):
        check_trackers(["wandb"])


# --------------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize("channels, stored", [(1, 3), (3, 3), (4, 4)])
def test_a_sheet_has_each_image_where_it_belongs(channels, stored):
    shades = torch.arange(10).view(5, 2, 1, 1, 1) / 10  # 5 groups of original | reconstruction
    sheet = make_sheet(shades.expand(5, 2, channels, 6, 6))
    assert sheet.shape == (stored, 3 * 8 + 2, 4 * 8 + 2)  # 2 groups a row, 2 pixels between
    for group in range(5):
        for view in range(2):
            top, left = group // 2 * 8 + 2, (group % 2 * 2 + view) * 8 + 2
            cell = sheet[:, top : top + 6, left : left + 6]
            assert torch.allclose(cell, shades[group, view].expand_as(cell))
    assert bool((sheet[:, :2] == 0.5).all()) and bool((sheet[:, :, :2] == 0.5).all())


def test_a_sheet_is_clamped_and_leaves_its_images_alone():
    rows = torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4).clone()
    sheet = make_sheet(rows, columns=1)
    assert sheet.shape == (3, 8, 14)
    assert bool((sheet[:, 2:6, 2:6] == 0).all()) and bool((sheet[:, 2:6, 8:12] == 1).all())
    assert rows.min() == -1 and rows.max() == 2


def test_a_saved_sheet_appears_whole(tmp_path):
    rows = torch.arange(4).view(2, 2, 1, 1, 1).expand(2, 2, 3, 5, 5) / 5
    path = tmp_path / "deep" / "er" / "sheet.png"
    save_sheet(rows, path, columns=1)
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    saved = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert torch.equal(saved, (make_sheet(rows, columns=1) * 255 + 0.5).to(torch.uint8))


def test_memory_is_that_of_this_process():
    used = memory_gb(torch.device("cpu"))
    assert 0.05 < used < 64
