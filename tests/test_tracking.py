"""Where numbers and pictures go: the file that is the source of truth, TensorBoard, W&B and the sheets."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scenarios import build_dvae_trainer

from vqdist import DiscreteVAE
from vqdist.errors import UserError
from vqdist.tracking import Tracker, check_trackers, make_sheet, memory_gb, save_bars, save_sheet


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


def histogram_in_tensorboard(folder: Path, counts: torch.Tensor):
    """The last histogram that TensorBoard holds after one of these counts."""
    tracking = tracker(folder, "tensorboard")
    tracking.histogram(7, "codes", counts, folder / "codes.png")
    tracking.close()
    (event,) = events(folder).Histograms("codes")
    assert event.step == 7
    return event.histogram_value


def test_tensorboard_holds_a_histogram_of_codes(tmp_path):
    value = histogram_in_tensorboard(tmp_path, torch.tensor([3, 0, 5, 1]))
    assert (value.min, value.max, value.num) == (0, 4, 9)
    assert (value.bucket_limit, value.bucket) == ([1, 2, 3, 4], [3, 0, 5, 1])
    assert value.sum == 3 * 0.5 + 5 * 2.5 + 3.5  # codes count at the middle of their bar
    assert value.sum_squares == 3 * 0.5**2 + 5 * 2.5**2 + 3.5**2


@pytest.mark.parametrize("number", [512, 1024, 1025, 8192])
def test_neighbours_share_a_bar_where_there_are_more_codes_than_bars(tmp_path, number):
    counts = torch.randint(0, 9, (number,), generator=torch.Generator().manual_seed(0))
    value = histogram_in_tensorboard(tmp_path, counts)
    assert len(value.bucket) <= 512 and value.max == number and value.num == counts.sum()
    edges = [0, *map(int, value.bucket_limit)]
    assert edges[1:] == value.bucket_limit and edges[-1] == number
    assert value.bucket == [int(counts[low:high].sum()) for low, high in zip(edges[:-1], edges[1:])]


def test_tensorboard_forgets_what_will_run_again(tmp_path):
    first = tracker(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.close()
    second = tracker(tmp_path, "tensorboard", resumed_step=1)
    second.log(2, {"loss": 20.0})
    second.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 20.0)]


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """W&B without a network and with a home of its own, which is returned."""
    home = tmp_path / "home"
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path / "wandb")}
    for name, value in {**settings, "WANDB_DATA_DIR": str(home), "WANDB_CACHE_DIR": str(home)}.items():
        monkeypatch.setenv(name, value)
    return home


def test_wandb_writes_an_offline_run(tmp_path, offline):
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


def records(file: Path) -> Iterator:
    """What is in a .wandb file: LevelDB's log format, 7 bytes of W&B's first, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block that has no room for a header
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):  # not written yet
            return
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record, or the last of its parts
            yield Record.FromString(record)
            record = b""


def records_of_finished_run(file: Path) -> list:
    """All of them: W&B's own process still writes an offline run when `finish` has returned."""
    for _ in range(300):
        written = list(records(file))
        if written and written[-1].WhichOneof("record_type") == "exit":
            return written
        time.sleep(0.1)
    pytest.fail(f"{file} has no end after 30 seconds")


def test_wandb_gets_the_trained_model_and_everything_that_was_logged(tmp_path, offline):
    """Of a real training; what is to be uploaded lies in the run's folder and nowhere else."""
    run = tmp_path / "run"
    build_dvae_trainer(run, trackers=["wandb"], num_train_steps=2, save_results_every=1).train()
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    written = records_of_finished_run(file)
    (artifact,) = [record.artifact for record in written if record.WhichOneof("record_type") == "artifact"]
    assert artifact.type == "model" and artifact.name == f"model-{file.stem.removeprefix('run-')}"
    assert artifact.finalize and list(artifact.aliases) == ["latest"]

    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    for entry in artifact.manifest.contents:
        content = files[entry.path].read_bytes()
        assert content == (run / "export" / entry.path).read_bytes() and len(content) == entry.size
        assert b64encode(hashlib.md5(content).digest()).decode() == entry.digest
        assert files[entry.path].is_relative_to(file.parent)
    assert not list(offline.rglob("*.safetensors")) and not list(offline.rglob("staging/*"))
    kept, exported = (DiscreteVAE.from_pretrained(f) for f in (files["config.json"].parent, run / "export"))
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), exported.parameters(), strict=True))

    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in written
        if record.WhichOneof("record_type") == "history"
    ]
    assert [step["_step"] for step in history] == [1, 2]
    for step in history:
        assert {"loss", "temperature", "lr", "codebook_usage"} <= step.keys()
        assert step["reconstructions/_type"] == "image-file"
        assert step["codes/_type"] == "histogram" and step["codes/bins"] == list(range(33))
        assert sum(step["codes/values"]) == 4 * 16  # 4 images of 16 codes
    assert "valid/psnr" in history[-1]


def test_a_run_that_continues_leaves_the_model_of_its_first_part_as_it_is(tmp_path, offline):
    export = tmp_path / "export"
    kept = []
    for weights in (b"first", b"second"):
        export.mkdir(exist_ok=True)
        (export / "model.safetensors").write_bytes(weights)
        tracking = tracker(tmp_path, "wandb")
        tracking.artifact(export)
        kept.append(Path(tracking.wandb.dir).parent / "model" / "model.safetensors")
        tracking.close()
        (export / "model.safetensors").unlink()
        time.sleep(1)  # W&B names the folder by the second
    assert [path.read_bytes() for path in kept] == [b"first", b"second"]


def test_a_run_that_is_turned_off_takes_an_artifact(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    tracking = tracker(tmp_path, "wandb")
    tracking.log(1, {"loss": 0.5})
    tracking.histogram(1, "codes", torch.tensor([1, 2]), tmp_path / "codes.png")
    tracking.artifact(tmp_path / "export")
    tracking.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_an_online_run_uploads_the_folder_itself(tmp_path, monkeypatch):
    """Without a copy in the user's home: the run ends, and waits for the upload, before the folder can change."""

    class OnlineRun:
        id, offline, logged = "abc", False, []

        def log_artifact(self, artifact):
            self.logged.append(artifact)

    run = OnlineRun()
    monkeypatch.setattr("wandb.init", lambda **_: run)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    tracker(tmp_path, "wandb").artifact(tmp_path / "export")
    ((name, entry),) = run.logged[0].manifest.entries.items()
    assert name == "config.json" and Path(entry.local_path) == tmp_path / "export" / "config.json"
    assert entry.skip_cache and run.logged[0].name == "model-abc"


@pytest.mark.parametrize("offline", [True, False])
def test_an_artifact_of_a_run_in_a_relative_folder_is_found_from_anywhere(tmp_path, monkeypatch, offline):
    added = []
    run = SimpleNamespace(id="abc", offline=offline, dir="wandb/run/files", log_artifact=added.append)
    monkeypatch.setattr("wandb.init", lambda **_: run)
    monkeypatch.chdir(tmp_path)
    Path("export").mkdir()
    Path("export/config.json").write_text("{}")
    tracker(Path("."), "wandb").artifact(Path("export"))
    (entry,) = added[0].manifest.entries.values()
    kept = tmp_path / ("wandb/run/model" if offline else "export")
    assert Path(entry.local_path) == kept / "config.json"


def test_closed_trackers_get_nothing_more(tmp_path, offline):
    tracking = tracker(tmp_path, "wandb", "tensorboard")
    tracking.log(1, {"loss": 0.5})
    tracking.close()
    tracking.log(2, {"loss": 0.25})
    tracking.picture(2, "reconstructions", torch.rand(2, 2, 3, 8, 8), tmp_path / "two.png")
    tracking.histogram(2, "codes", torch.tensor([1, 2]), tmp_path / "codes.png")
    tracking.artifact(tmp_path / "absent")
    tracking.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [1]


def test_training_twice_is_no_error(tmp_path, offline):
    trainer = build_dvae_trainer(tmp_path / "run", trackers=["wandb", "tensorboard"], num_train_steps=2)
    numbers = trainer.train()
    assert trainer.train() == numbers and trainer.step == 2
    trainer.config.num_train_steps = 3
    trainer.train()
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3]


def test_without_wandb_an_artifact_goes_nowhere(tmp_path):
    tracker(tmp_path).artifact(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


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


def bars_in(path: Path) -> list[int]:
    """Heights of the dark bars of a chart, which stand on its lower edge."""
    with Image.open(path) as saved:
        picture = np.array(saved)
    dark = picture < 128
    assert set(np.unique(picture)) <= {40, 235} and bool((dark[:-1] <= dark[1:]).all())
    assert bool((dark[:, ::2] == dark[:, 1::2]).all())  # two pixels wide
    return dark.sum(axis=0)[::2].tolist()


def test_a_chart_has_a_bar_for_each_code(tmp_path):
    path = tmp_path / "deep" / "codes.png"
    tracker(tmp_path).histogram(1, "codes", torch.tensor([4, 0, 8, 1, 2000]), path)
    assert bars_in(path) == [1, 0, 1, 1, 128]  # what occurs at all is seen
    tracker(tmp_path).histogram(1, "codes", torch.tensor([4, 0, 8, 1]), path)
    assert bars_in(path) == [64, 0, 128, 16]  # the tallest bar fills the height
    assert [file.name for file in path.parent.iterdir()] == ["codes.png"]


@pytest.mark.parametrize("number, bars", [(512, 512), (513, 257), (1024, 512), (65536, 512)])
def test_a_chart_has_at_most_512_bars(tmp_path, number, bars):
    counts = torch.zeros(number, dtype=torch.int64)
    counts[-1] = 6
    counts[0], counts[1] = 1, 2
    tracker(tmp_path).histogram(1, "codes", counts, tmp_path / "codes.png")
    heights = bars_in(tmp_path / "codes.png")
    assert len(heights) == bars and heights[-1] == 128
    first = [22, 43] if bars == number else [64, 0]  # 1/6 and 2/6 of 128, or both in one bar
    assert heights[:2] == first and sum(heights) == sum(first) + 128


def test_a_chart_of_nothing_is_empty(tmp_path):
    save_bars(np.zeros(3, dtype=np.int64), tmp_path / "codes.png", height=16)
    assert bars_in(tmp_path / "codes.png") == [0, 0, 0]


def test_a_chart_changes_no_counts(tmp_path):
    counts = torch.tensor([1, 2, 3])
    tracker(tmp_path).histogram(1, "codes", counts, tmp_path / "codes.png")
    assert counts.tolist() == [1, 2, 3]


def test_memory_is_that_of_this_process():
    used = memory_gb(torch.device("cpu"))
    assert 0.05 < used < 64
