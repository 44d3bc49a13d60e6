"""Sinks of numbers and pictures: the file that is the source of truth, TensorBoard, W&B and the sheets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from launching import run
from PIL import Image
from scenarios import build_dvae_trainer

from vqdist import DiscreteVAE, Sink
from vqdist.cli import main
from vqdist.errors import UserError
from vqdist.tracking import Tracker, check_trackers, make_sheet, memory_gb, save_bars, save_sheet


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tracker(folder: Path, *parts: str | dict | Sink, resumed_step: int = 0) -> Tracker:
    return Tracker(folder, list(parts), {"lr": 0.1}, resumed_step)


def sink_of(tracking: Tracker) -> Sink:
    """Return the only sink of a tracker."""
    ((_, sink),) = tracking.sinks
    return sink


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


ODD_LINES = [
    b"\xff\xfe\x00 not text",
    b'{"step": 1, "lo',
    b"[" * 200_000,
    b'{"step": 1, "a": ' + b"[" * 200_000,
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 1, "a": ' + b"9" * 5000 + b"}",
    b'{"step": true}',
    b'{"step": "1"}',
    b'{"step": 1e400}',
    b"\x00" * 100,
    b"",
    b"{}",
    b"[1]",
    '{"step": 1, "a": "\ud800"}'.encode("utf-8", "surrogatepass"),
    b'{"step": 1, "a": "' + b" " * 2**21 + b'"}',
    b'{"step": 1, "a": "' + b" " * (2**20 - 21) + b'"}  ',
]


@pytest.mark.parametrize("odd", ODD_LINES, ids=range(len(ODD_LINES)))
@pytest.mark.parametrize("end", [b"\n", b""])
def test_lines_that_no_run_has_written_are_passed_over(tmp_path, capsys, odd, end):
    first, second = b'{"step": 1, "loss": 1.0}\n', b'{"step": 2, "valid/psnr": 2.0}\n'
    (tmp_path / "config.json").write_text('{"model_type": "dvae"}')
    (tmp_path / "metrics.jsonl").write_bytes(first + odd + b"\n" + second + odd + end)
    assert main(["report", str(tmp_path)]) == 0
    assert "valid/psnr" in capsys.readouterr().out
    tracking = tracker(tmp_path, resumed_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == first + second
    tracking.log(3, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_line_that_the_resumed_run_had_written_is_not_written_again(tmp_path):
    first = tracker(tmp_path)
    first.log(2, {"loss": 0.5})
    first.log(2, {"valid/psnr": 20.0, "valid/l1": float("nan")})
    noting = Noting()
    second = tracker(tmp_path, noting, resumed_step=2)
    second.log(2, {"valid/l1": float("nan"), "valid/psnr": 20.0})
    assert len(lines(tmp_path)) == 2 and noting.told == []
    second.log(2, {"valid/other": 1.0})
    second.log(3, {"valid/psnr": 21.0, "valid/l1": 0.0})
    assert [entry[1] for entry in noting.told] == [2, 3] and len(lines(tmp_path)) == 4


@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_finished_run_that_is_started_again_leaves_its_lines_as_they_are(tmp_path, every):
    options = {"num_train_steps": 2, "validate_every": every}
    numbers = build_dvae_trainer(tmp_path, **options).train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = build_dvae_trainer(tmp_path, **options)
    assert again.train() == numbers and again.step == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    # killed between its last checkpoint and its last validation
    kept = [line for line in before.splitlines(keepends=True) if not (b"valid/" in line and b'"step": 2' in line)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(kept))
    build_dvae_trainer(tmp_path, **options).train()
    made_again = (tmp_path / "metrics.jsonl").read_bytes()
    assert _without_times(made_again) == _without_times(before)


def _without_times(written: bytes) -> list[dict]:
    """Return the lines but for the time of validations."""
    lines = map(json.loads, written.splitlines())
    return [{k: v for k, v in line.items() if k not in ("valid/seconds", "valid/time_share")} for line in lines]


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
    """Return the last histogram that TensorBoard holds after one of these counts."""
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
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for name, value in {**settings, "WANDB_DATA_DIR": str(home), "WANDB_CACHE_DIR": str(home)}.items():
        monkeypatch.setenv(name, value)
    return home


def test_wandb_writes_an_offline_run(tmp_path, offline):
    tracking = tracker(tmp_path, "wandb")
    run = sink_of(tracking).run
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
    """Yield what is in a .wandb file: LevelDB's log format, 7 bytes of W&B's first, of protocol buffers."""
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
    assert files.keys() == {"config.json", "export.json", "model.safetensors", "README.md", "pictures.png"}
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
        kept.append(Path(sink_of(tracking).run.dir).parent / "model" / "model.safetensors")
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
    trainer.config = dataclasses.replace(trainer.config, num_train_steps=3)
    trainer.train()
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3]


def test_without_wandb_an_artifact_goes_nowhere(tmp_path):
    tracker(tmp_path).artifact(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- whose W&B run it is


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """Return what `wandb.init` is asked for, without starting anything."""
    calls: list[dict] = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(id=options.get("id"), offline=True)

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("wandb.init", init)
    return calls


def test_the_id_of_a_wandb_run_is_random_and_kept_in_the_run_folder(tmp_path, asked):
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        tracker(tmp_path / folder, "wandb")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    tracker(tmp_path / "a", "wandb", resumed_step=0)  # another run at an old path
    first, again, other, anew = [options["id"] for options in asked]
    assert first == again and len({first, other, anew}) == 3
    assert json.loads((tmp_path / "a" / "wandb.json").read_text()) == {"id": anew}
    (tmp_path / "a").rename(tmp_path / "c")
    tracker(tmp_path / "c", "wandb", resumed_step=7)
    assert asked[-1]["id"] == anew  # a run that was moved


@pytest.mark.parametrize("prefix", ["", "offline-"])
@pytest.mark.parametrize("kept", [None, "", "{", "[]", '{"id": 3}', '{"id": ""}'])
def test_runs_from_before_ids_were_kept_continue(tmp_path, asked, prefix, kept):
    """Their id was a hash of the path, and stands in the names of the folders that W&B made."""
    for name in ("run-20250101_000000-older", f"{prefix}run-20260101_000000-0f3a-b2", "latest-run", "run-x"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    if kept is not None:
        (tmp_path / "wandb.json").write_text(kept)
    tracker(tmp_path, "wandb", resumed_step=3)
    assert asked[0]["id"] == "0f3a-b2"
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": "0f3a-b2"}


def test_a_wandb_run_has_the_name_of_its_folder_unless_somebody_says_another(tmp_path, asked, monkeypatch):
    folder = tmp_path / "digits"
    folder.mkdir()
    tracker(folder, "wandb")
    assert {key: asked[0][key] for key in ("project", "name", "dir", "resume")} == {
        "project": "vqdist",
        "name": "digits",
        "dir": str(folder),
        "resume": "allow",
    }
    assert asked[0]["config"] == {"lr": 0.1} and not {"entity", "group", "tags"} & asked[0].keys()
    said = {"project": "mine", "entity": "team", "name": "n", "group": "g", "tags": ["a"], "notes": "t", "id": "i"}
    tracker(folder, {"class_path": "wandb", "init_args": {**said, "settings": {"init_timeout": 5}}})
    assert {key: asked[1][key] for key in said} == said and asked[1]["settings"]["init_timeout"] == 5
    for key in ("PROJECT", "NAME", "DIR", "RUN_ID", "RESUME", "ENTITY", "INIT_TIMEOUT"):
        monkeypatch.setenv(f"WANDB_{key}", "9")
    tracker(folder, "wandb")
    assert [asked[2][key] for key in ("project", "name", "dir", "id", "resume")] == ["9"] * 5
    assert "entity" not in asked[2]
    assert "init_timeout" not in asked[2]["settings"]
    tracker(folder, {"class_path": "wandb", "init_args": {"project": "mine"}})
    assert asked[3]["project"] == "mine"


def test_variables_of_the_environment_reach_the_wandb_run(tmp_path, offline, monkeypatch):
    for name, value in {"PROJECT": "p", "ENTITY": "e", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # W&B reads the environment once in a process
    tracking = tracker(tmp_path, "wandb")
    run = sink_of(tracking).run
    assert (run.project, run.entity, run.name, run.group, run.tags) == ("p", "e", "n", "g", ("a", "b"))
    tracking.close()
    wandb.teardown()


# --------------------------------------------------------------------------------------------- failures


class Noting(Sink):
    """Keeps what it is told; raises in the methods of `failing`."""

    def __init__(self, failing: tuple[str, ...] = (), error: Exception | None = None):
        self.failing, self.error, self.told = failing, error or OSError("gone\naway"), []
        if "init" in failing:
            raise self.error

    def _note(self, name, *values):
        self.told.append((name, *values))
        if name in self.failing:
            raise self.error

    def log(self, step, values):
        self._note("log", step, values)

    def picture(self, step, name, rows, path, columns):
        self._note("picture", step, name, tuple(rows.shape), path.name, columns)

    def histogram(self, step, name, counts, path):
        self._note("histogram", step, name, counts.tolist(), path.name)

    def artifact(self, folder):
        self._note("artifact", folder.name)

    def close(self):
        self._note("close")


def tell_everything(tracking: Tracker, folder: Path) -> None:
    tracking.log(1, {"loss": 0.5})
    tracking.picture(1, "reconstructions", torch.rand(2, 2, 3, 8, 8), folder / "one.png", columns=1)
    tracking.histogram(1, "codes", torch.tensor([1, 2]), folder / "codes.png")
    tracking.log(2, {"loss": 0.25})
    tracking.artifact(folder / "export")
    tracking.close()


TOLD = [
    ("log", 1, {"loss": 0.5}),
    ("picture", 1, "reconstructions", (2, 2, 3, 8, 8), "one.png", 1),
    ("histogram", 1, "codes", [1, 2], "codes.png"),
    ("log", 2, {"loss": 0.25}),
    ("artifact", "export"),
    ("close",),
]


def test_an_own_sink_is_told_everything(tmp_path):
    first, second = Noting(), Noting()
    tell_everything(tracker(tmp_path, first, second), tmp_path)
    assert first.told == second.told == TOLD


@pytest.mark.parametrize("method", ["log", "picture", "histogram", "artifact", "close"])
def test_a_sink_that_fails_is_off_from_then_on_and_the_others_are_not(tmp_path, capsys, method):
    broken, whole = Noting((method,)), Noting()
    tell_everything(tracker(tmp_path, broken, whole), tmp_path)
    names = [entry[0] for entry in broken.told]
    first = [entry[0] for entry in TOLD].index(method)
    assert names == [entry[0] for entry in TOLD][: first + 1] + ["close"]
    assert whole.told == TOLD and [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert (tmp_path / "one.png").is_file() and (tmp_path / "codes.png").is_file()
    assert capsys.readouterr().err == (
        "warning: tracker Noting failed and is off from here on (OSError: gone away); training goes on\n"
    )


def test_a_sink_that_changes_the_numbers_changes_its_own_only(tmp_path):
    class Greedy(Noting):
        def log(self, step, values):
            values.clear()

    whole = Noting()
    tracker(tmp_path, Greedy(), whole).log(1, {"loss": 0.5})
    assert whole.told == [("log", 1, {"loss": 0.5})] and lines(tmp_path) == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize(
    "error", [ImportError("no module"), TypeError("Descriptors cannot be created"), UserError("x")]
)
def test_a_sink_that_cannot_start_is_left_out(tmp_path, capsys, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", refuse)
    tracking = tracker(tmp_path, "tensorboard", Noting())
    assert [name for name, _ in tracking.sinks] == ["Noting"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tracker tensorboard cannot start and is left out (") and str(error) in line


def test_tensorboard_that_cannot_be_imported_is_one_line(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard.compat", None)
    assert tracker(tmp_path, "tensorboard").sinks == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "tracker tensorboard cannot start" in line and "training goes on" in line


def test_wandb_that_cannot_be_reached_goes_on_offline(tmp_path, offline, monkeypatch, capsys):
    for name, value in {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()  # W&B reads the environment once in a process
    tracking = tracker(tmp_path, {"class_path": "wandb", "init_args": {"settings": {"init_timeout": 2}}})
    run = sink_of(tracking).run
    assert run.offline and run.id == json.loads((tmp_path / "wandb.json").read_text())["id"]
    tracking.log(1, {"loss": 0.5})
    tracking.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [record.WhichOneof("record_type") for record in records_of_finished_run(file)].count("history") == 1
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "goes on offline" in warnings[0]
    wandb.teardown()


def test_wandb_without_a_key_goes_on_offline(tmp_path, offline, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    tracking = tracker(tmp_path, "wandb")
    assert sink_of(tracking).run.offline
    tracking.close()
    wandb.teardown()
    assert "goes on offline" in capsys.readouterr().err


def test_the_death_of_wandb_is_one_warning(tmp_path, offline, monkeypatch):
    """Its own process is killed in the middle; even at the end there is no traceback."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # of this process, where W&B has run before
    script = (
        "import psutil\n"
        "from pathlib import Path\n"
        "from vqdist.tracking import Tracker\n"
        f"tracking = Tracker(Path({str(tmp_path)!r}), ['wandb'], {{}}, 0)\n"
        "tracking.log(1, {'loss': 0.5})\n"
        "ended = [child for child in psutil.Process().children(recursive=True) if 'wandb' in child.name()]\n"
        "for child in ended:\n"
        "    child.kill()\n"
        "psutil.wait_procs(ended, 10)\n"
        "assert ended\n"
        "for step in (2, 3):\n"
        "    tracking.log(step, {'loss': 0.5})\n"
        "tracking.close()\n"
    )
    (warning,) = run([sys.executable, "-c", script]).stderr.splitlines()
    assert warning.startswith("warning: tracker wandb failed and is off from here on (ConnectionResetError")
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_metrics_that_cannot_be_written_end_the_run(tmp_path):
    tracking = tracker(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: Is a directory"):
        tracking.log(1, {"loss": 0.5})


# --------------------------------------------------------------------------------------------- what may be given


@pytest.mark.parametrize(
    "given, expected",
    [
        ("tensorbord", ["no tracker 'tensorbord'", "nearest: tensorboard", "wandb"]),
        ("test_tracking.Notings", ["test_tracking has no 'Notings'", "Noting"]),
        ("test_tracking.lines", ["lines", "argument"]),
        ("pathlib.Path", ["no Sink", "vqdist.tracking.base.Sink"]),
        ("no_such_module.Sink", ["no module 'no_such_module'"]),
        ({"class_path": "wandb", "init_args": {"projekt": "p"}}, ["no argument 'projekt'", "nearest: project"]),
        ({"class_path": "test_tracking.Noting", "init_args": {"fails": []}}, ["'fails'", "nearest: failing"]),
        ({"class_pth": "wandb"}, ["class_path"]),
        (3, ["tracker int is no Sink"]),
        (None, ["tracker NoneType is no Sink"]),
        (Noting, ["no Sink"]),
    ],
)
def test_a_tracker_that_is_not_possible_is_one_line_before_anything_starts(tmp_path, given, expected):
    with pytest.raises(UserError) as raised:
        build_dvae_trainer(tmp_path / "run", trackers=["wandb", given])
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()
    for words in expected:
        assert words in str(raised.value)


def test_missing_trackers(monkeypatch):
    class Foreign(Sink):
        packages = ("a_package_that_nobody_has",)

    check_trackers([])
    check_trackers(["tensorboard", "wandb", "test_tracking.Noting", Noting()])
    with pytest.raises(UserError, match=r"^tracker 'Foreign' is not installed; install it with pip install a_package"):
        check_trackers([Foreign()])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^tracker 'wandb' is not installed; install it with pip install 'vqdist\[trac"
    ):
        check_trackers(["wandb"])


def test_a_folder_that_is_called_wandb_is_not_wandb(tmp_path, monkeypatch):
    (tmp_path / "a_folder_of_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    class Foreign(Sink):
        packages = ("a_folder_of_runs",)

    with pytest.raises(UserError, match="is not installed"):
        check_trackers([Foreign()])


def test_a_tracker_that_is_given_twice_is_meant_once(tmp_path):
    noting = Noting()
    tracking = tracker(tmp_path, noting, noting, "test_tracking.Noting", "test_tracking.Noting")
    assert [name for name, _ in tracking.sinks] == ["Noting", "test_tracking.Noting"]


def test_a_sink_asks_for_what_it_needs(tmp_path):
    tracking = tracker(tmp_path, "test_tracking.Asking", "test_tracking.asking_for_all", resumed_step=5)
    (_, one), (_, other) = tracking.sinks
    assert one.told == [(tmp_path, 5)] and other.told == [(tmp_path, {"lr": 0.1}, 5)]


class Asking(Noting):
    def __init__(self, resumed_step, run_folder):
        super().__init__()
        self.told.append((run_folder, resumed_step))


def asking_for_all(**facts):
    sink = Noting()
    sink.told.append((facts["run_folder"], facts["config"], facts["resumed_step"]))
    return sink


def test_a_run_with_an_own_sink_records_it_and_resumes(tmp_path):
    noting = Noting()
    build_dvae_trainer(tmp_path, trackers=[noting, "test_tracking.Noting"], num_train_steps=2).train()
    written = json.loads((tmp_path / "config.json").read_text())["trainer"]["trackers"]
    assert written == [{"class_path": "test_tracking.Noting", "given_as_object": True}, "test_tracking.Noting"]
    assert [entry[1] for entry in noting.told if entry[0] == "log"] == [1, 2, 2]
    assert noting.told[-2:] == [("artifact", "export"), ("close",)]
    again = Noting()
    build_dvae_trainer(tmp_path, trackers=[again], num_train_steps=3).train()
    assert [entry[1] for entry in again.told if entry[0] == "log"] == [3, 3]


# --------------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize(("shape", "columns"), [((5, 2, 3, 6, 6), 2), ((3, 1, 1, 6, 4), 2), ((2, 3, 4, 6, 6), 8)])
def test_a_sheet_is_laid_out_as_by_torchvision(shape, columns, tmp_path):
    from torchvision.utils import make_grid, save_image

    rows = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    grid = make_grid(rows.flatten(0, 1), nrow=shape[1] * columns, padding=2, pad_value=0.5)
    assert torch.equal(make_sheet(rows, columns), grid)
    save_sheet(rows, tmp_path / "sheet.png", columns)
    save_image(grid, tmp_path / "grid.png")
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


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
