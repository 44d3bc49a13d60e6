"""`vqdist report`: a log is read in one pass as json.loads reads it, and becomes a table, small curves and a page."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_tracking import ODD_LINES

from vqdist import protocol
from vqdist.cli import main
from vqdist.errors import UserError
from vqdist.files import lines_of_metrics
from vqdist.reports import history as histories
from vqdist.reports.history import History, thinned
from vqdist.reports.page import data_of
from vqdist.reports.record import RunRecord
from vqdist.reports.server import open_server
from vqdist.reports.table import BLOCKS, PLAIN, sparkline
from vqdist.tracking import Tracker

HOSTILE = "</script><script>document.documentElement.dataset.ready='bad'</script><img src=x onerror=alert(1)>"


def run_at(folder: Path, lines: list[dict] | bytes = b"", **configuration) -> Path:
    """Write a run folder with these log lines."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "vqgan", "trainer": {"lr": 0.1}, "model": {}, "data": {}, **configuration}
    (folder / "config.json").write_text(json.dumps(content))
    raw = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "metrics.jsonl").write_bytes(raw)
    return folder


def history_of(folder: Path) -> History:
    history = History(folder)
    history.read()
    return history


def falling(count: int, **more) -> list[dict]:
    return [{"step": step, "loss": 1 / step, **more} for step in range(1, count + 1)]


def data_in(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def error_of(capsys) -> str:
    said = capsys.readouterr().err.strip()
    assert said.startswith("vqdist: error: ") and "\n" not in said, said
    return said


# ------------------------------------------------------------------------------------------- reading the log


def test_numbers_are_those_of_json(tmp_path):
    """Of 18 characters at most the rest of a fraction is left out: of a value that is less than its 10^-11th."""
    random = np.random.default_rng(1)
    values = [float(f"{sign}{mantissa:.17g}e{power}") for sign, mantissa, power in zip(
        random.choice(["", "-"], 2000), random.uniform(1, 10, 2000), random.integers(-90, 90, 2000), strict=True
    )]  # fmt: skip
    values += [0.0, -0.0, 1.0, -3, 5e-324, 1e22, 1e300, 123456789012345678901234, 10**17, 0.1, -0.25, 1e-7, 2**53]
    values += [float("nan"), float("inf"), -float("inf"), None]
    curve = history_of(run_at(tmp_path, [{"step": n, "a": value} for n, value in enumerate(values)])).curves["a"]
    steps, found = curve.points(10**6)
    finite = {n: value for n, value in enumerate(values) if value is not None and math.isfinite(value)}
    assert steps.astype(int).tolist() == list(finite) and curve.not_finite == 4 and curve.count == len(values)
    for number, value in zip(found.tolist(), finite.values(), strict=True):
        assert number == pytest.approx(value, rel=1e-11, abs=1e-300)


def reference(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the finite numbers of each name, as a line at a time gives them."""
    found: dict[str, list[tuple[int, float]]] = {}
    with open(folder / "metrics.jsonl", "rb") as file:
        for _, line in lines_of_metrics(file):
            step = line.pop("step")
            for name, value in line.items():
                if isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < 1e308:
                    found.setdefault(name, []).append((step, value))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


VALUES = b"1. .5 - -.5 007 -01 1e 1.2.3 +1 true [1] 1} 0 -0.5 1E+2 1e-100".split() + [b"", b"1 ", b'"text"']
BROKEN_LINES = [
    *ODD_LINES,
    *(b'{"step": 4, "loss": %s}' % value for value in VALUES),
    *(b'{"step":4,"loss":2}', b'{"step": 4, "loss": 1, "loss": 2}', b'{"step": 4, "a": {"b": 1}}'),
    *(b'{"step": 4.5, "loss": 1}', b'{"step": 04, "loss": 1}', b'{"step": 4e0, "loss": 1}'),
    *(b'{"step": 4, "\xc3\xa9t\xc3\xa9": 1}', b'{"step": 4, "": 3}', b'{"loss": 3, "step": 7}'),
    *(b'{"step": 4, "loss": 1}{"step": 5, "loss": 2}', b'{"step": 4, "lo\\"ss": 2}'),
]


@pytest.mark.parametrize("odd", BROKEN_LINES, ids=range(len(BROKEN_LINES)))
@pytest.mark.parametrize("block", [64, 2**20])
def test_any_line_is_read_as_one_at_a_time_is(tmp_path, monkeypatch, odd, block):
    monkeypatch.setattr(histories, "BLOCK", block)
    lines = [json.dumps(line).encode() for line in falling(5, lr=1e-5)]
    run_at(tmp_path, b"\n".join([*lines[:3], odd, b'{"step": 3, "valid/psnr": 20}', *lines[3:], odd]))
    curves = history_of(tmp_path).curves
    found = {name: np.array(curve.points(10**6)).T for name, curve in curves.items() if len(curve.points(9)[0])}
    expected = {name: np.array(points, dtype=float) for name, points in reference(tmp_path).items()}
    assert found.keys() == expected.keys()
    for name, points in expected.items():  # in the order of steps, and of values within one
        found[name], points = (each[np.lexsort((each[:, 1], each[:, 0]))] for each in (found[name], points))
        assert found[name].shape == points.shape and np.allclose(found[name], points, rtol=1e-11), name


def test_a_long_curve_is_thinned_and_keeps_its_lowest_highest_and_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(histories, "BLOCK", 5000)
    monkeypatch.setattr(histories, "KEPT", 128)
    values = np.random.default_rng(0).normal(size=20_000)
    values[[7_777, 12_345]] = 50, -60
    run = run_at(tmp_path, [{"step": n, "a": value} for n, value in enumerate(values.tolist())])
    curve = history_of(run).curves["a"]
    steps, found = curve.points(64)
    assert len(steps) <= 64 and curve.count == 20_000 and (np.diff(steps) > 0).all()
    assert (found.max(), found.min()) == (50, -60) and steps[found.argmax()] == 7_777
    assert (steps[0], steps[-1]) == (0, 19_999) and found[0] == pytest.approx(values[0])
    assert curve._held <= 5 * 128 + 5000
    assert 0.4 < (steps < 10_000).mean() < 0.6  # the beginning has as many points as the end


@pytest.mark.parametrize("count", [0, 1, 4, 5, 99, 1000])
def test_thinning_keeps_bounds_of_any_length(count):
    steps = np.arange(count, dtype=float)
    values = np.random.default_rng(count).normal(size=count)
    x, y = thinned(steps, values, 10)
    assert len(x) <= 10 and (count > 10 or len(x) == count)
    if count:
        assert (y.min(), y.max(), x[0], x[-1]) == (values.min(), values.max(), 0, count - 1)


def test_a_run_that_trains_is_read_on_and_one_that_was_cut_anew(tmp_path):
    run = run_at(tmp_path, falling(10))
    history = history_of(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 0.5}\n{"step": 12, "lo')
    history.read(to_the_end=False)
    assert history.lines == 11 and history.trained["step"] == 11 and history.passed_over == 0
    with open(run / "metrics.jsonl", "a") as file:
        file.write('ss": 0.25}\n')
    history.read(to_the_end=False)
    assert history.lines == 12 and history.curves["loss"].points(100)[1][-1] == 0.25
    Tracker(run, [], {}, resumed_step=5)  # a resumed run drops lines of later steps
    history.read(to_the_end=False)
    assert history.lines == 5 and history.trained["step"] == 5


def test_images_and_hours_follow_the_starts_of_a_run(tmp_path):
    """100 steps of 8 images, then a resume at step 50 with 16."""
    run = run_at(tmp_path, [{"step": step, "images_per_second": 2.0} for step in range(10, 101, 10)])
    starts = [(0, "start", 0, 8), (50, "resume", 400, 16)]
    lines = [{"step": s, "event": kind, "images": images, "images_per_step": size} for s, kind, images, size in starts]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = RunRecord(run, "run")
    record.read()
    assert record.history.images_at(np.array([0, 25, 50, 100])).tolist() == [0, 200, 400, 1200]
    steps, hours = record.history.hours.points(100)
    assert steps[-1] == 100 and hours[-1] == pytest.approx(1200 / 2 / 3600)
    (before,) = [run_at(tmp_path / "before", falling(3))]
    (before / "checkpoints" / "step_00000003").mkdir(parents=True)
    (before / "checkpoints" / "step_00000003" / "manifest.json").write_text('{"global_batch": {"images": 32}}')
    older = RunRecord(before, "before")
    older.read()
    assert older.history.images_at(np.array([3])).tolist() == [96]


KINDS_OF_LINES = {
    "one set of keys": {},
    "a number every fourth step": {"gradient_penalty": lambda step: step % 4 == 0},
    "many sets of keys": {f"n{k}": lambda step, k=k: step % (k + 2) == 0 for k in range(5)},
    "lines that are read one at a time": {"\u00e9": lambda step: step % 3 == 0},
}


@pytest.mark.parametrize("kind", KINDS_OF_LINES)
@pytest.mark.parametrize("block", [500, 2**20])
def test_hours_are_those_of_the_steps_whatever_keys_the_lines_have(tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr(histories, "BLOCK", block)
    speeds = np.random.default_rng(0).uniform(1, 100, 200).tolist()
    lines = []
    for step, speed in enumerate(speeds, 1):
        more = {name: 1.0 for name, holds in KINDS_OF_LINES[kind].items() if holds(step)}
        lines += [{"step": step, "images_per_second": speed, **more}] + [{"step": step, "valid/psnr": 1}] * (
            step % 7 == 0
        )
    run = run_at(tmp_path, lines)
    (run / "events.jsonl").write_text('{"step": 0, "event": "start", "images": 0, "images_per_step": 8}\n')
    record = RunRecord(run, "run")
    record.read()
    steps, hours = record.history.hours.points(1000)
    assert steps.tolist() == list(range(1, 201)) and (np.diff(hours) > 0).all()
    assert np.allclose(hours, np.cumsum(8 / np.array(speeds)) / 3600)


def test_the_first_steps_that_are_not_finite_are_kept_in_their_order(tmp_path):
    lines = [{"step": n, "a": float("nan"), **({"b": 1} if n % 4 == 0 else {})} for n in range(1, 301)]
    assert history_of(run_at(tmp_path, lines)).curves["a"].at == list(range(1, 101))


# ------------------------------------------------------------------------------------------- validations


def validated(folder: Path, *starts: tuple[int, dict | None], name: str = "rfid") -> Path:
    """Write a run of 20 steps, validated at each fifth, that started at these steps with these protocols."""
    lines = [{"step": n, f"valid/{name}": 3.0, "valid/psnr": 20.0, "valid/seconds": 1.0} for n in (5, 10, 15, 20)]
    run = run_at(folder, [*falling(4), *lines])
    events = [{"step": step, "event": "resume" if step else "start", "validation": said} for step, said in starts]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


SAID = {"data": "a", "data_hash": "aa", "images": 30, "weights": "live", "features": "x", "features_hash": "f0"}


def differing_lines(capsys, *runs: Path) -> list[str]:
    assert main(["report", *map(str, runs)]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if " of " in line and line.startswith("valid/")]


def test_numbers_of_validations_say_in_what_they_were_measured_otherwise(tmp_path, capsys):
    a = validated(tmp_path / "a", (0, SAID))
    same = validated(tmp_path / "same", (0, {**SAID, "data": "the same elsewhere", "commit": "00"}))
    assert differing_lines(capsys, a, same) == []
    images = validated(tmp_path / "images", (0, {**SAID, "data_hash": "bb", "images": 40}))
    (line,) = differing_lines(capsys, a, same, images)
    assert line == ("valid/rfid, valid/psnr of a and images cannot be compared: data_hash aa and bb, images 30 and 40")
    extractor = validated(tmp_path / "extractor", (0, {**SAID, "features_hash": "f1", "reference_hash": "r"}))
    (line,) = differing_lines(capsys, a, extractor)
    assert line == (
        "valid/rfid of a and extractor cannot be compared: features_hash f0 and f1, reference_hash none and r"
    )
    both = validated(tmp_path / "both", (0, {**SAID, "weights": "averaged", "features_hash": "f1"}))
    first, second = differing_lines(capsys, a, both)
    assert first.startswith("valid/rfid of") and second.startswith("valid/psnr of") and "features" not in second
    # numbers that need no such network, or that one run alone has
    samples = validated(tmp_path / "samples", (0, {**SAID, "samples": 64, "lpips_hash": "l"}), name="lpips")
    assert differing_lines(capsys, a, samples) == []
    others = [validated(tmp_path / f"fid{n}", (0, {**SAID, "samples": n}), name="fid") for n in (8, 9)]
    (line,) = differing_lines(capsys, *others)
    assert line == "valid/fid of fid8 and fid9 cannot be compared: samples 8 and 9"


def test_a_run_that_went_on_with_another_protocol_or_says_none_is_named(tmp_path, capsys):
    changed = validated(tmp_path / "a", (0, SAID), (10, {**SAID, "features_hash": "f1"}), (20, {**SAID, "images": 1}))
    (line,) = differing_lines(capsys, changed)
    assert line == "valid/rfid of a until step 10 and after it cannot be compared: features_hash f0 and f1"
    now = validated(tmp_path / "now", (0, {**SAID, "features_hash": "f1"}))
    assert differing_lines(capsys, changed, now) == [line]  # its last numbers agree
    before = validated(tmp_path / "before", (0, None))
    (line,) = differing_lines(capsys, before, now)
    assert line.startswith("valid/rfid, valid/psnr of now and before may differ: before does not say")
    assert differing_lines(capsys, before, validated(tmp_path / "old")) == []


def test_a_page_has_a_note_at_each_number_that_was_measured_otherwise(tmp_path):
    a = validated(tmp_path / "a", (0, SAID))
    b = validated(tmp_path / "b", (0, {**SAID, "features_hash": HOSTILE}))
    page = page_of_runs([a, b], tmp_path / "a.html")
    (found,) = data_in(page)["differing"]
    assert (found["names"], found["runs"]) == (["valid/rfid"], [0, 1]) and HOSTILE not in page
    assert found["note"].startswith("a and b cannot be compared: features_hash f0 and </script>")


# ------------------------------------------------------------------------------------------- the table


def test_a_curve_in_a_line():
    steps, values = np.arange(1.0, 9.0), np.arange(8.0)
    assert sparkline(steps, values, (1, 8), (0, 7), 8, BLOCKS) == BLOCKS
    assert sparkline(steps, values[::-1], (1, 8), (0, 7), 8, PLAIN) == PLAIN[::-1]
    assert sparkline(steps, values, (1, 15), (0, 7), 15, PLAIN) == PLAIN + PLAIN[-1] + " " * 6  # it ends at step 8
    assert sparkline(steps[:0], values[:0], (1, 8), (0, 7), 8, PLAIN) == " " * 8
    assert len(sparkline(steps, values * 0, (1, 8), (0, 0), 8, PLAIN)) == 8
    huge = np.array([-1.7e308, 1.7e308])
    assert sparkline(np.array([1.0, 2.0]), huge, (1, 2), tuple(huge), 2, PLAIN) == PLAIN[0] + PLAIN[-1]


def test_the_table_is_followed_by_curves_on_one_scale(tmp_path, capsys):
    first, second = run_at(tmp_path / "a", falling(50)), run_at(tmp_path / "b", falling(100, other=3.0))
    assert main(["report", str(first), str(second)]) == 0
    table, _, curves = capsys.readouterr().out.partition("\n\n")
    assert table.splitlines()[0].split() == ["a", "b"]
    rows = {line.split()[0]: line for line in curves.splitlines()}
    assert rows["loss"].endswith("0.01 .. 1") and rows["loss"].isascii() and "#" in rows["loss"]
    assert "from step 1 to 100" in curves and "other" in rows
    assert curves.isascii()


def test_a_terminal_gets_block_characters(tmp_path, monkeypatch, capsys):
    run = run_at(tmp_path / "a", falling(50))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["report", str(run)]) == 0
    assert "█" in capsys.readouterr().out
    monkeypatch.setenv("TERM", "dumb")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.isascii()


# ------------------------------------------------------------------------------------------- the page


class Tags(HTMLParser):
    """The tags of a page, and what any of them would fetch."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [
            value for name, value in attributes if name in ("src", "href") and not value.startswith("data:")
        ]


@pytest.fixture
def two_runs(tmp_path) -> list[Path]:
    """Return two runs with pictures, charts, events and evaluations."""
    runs = [run_at(tmp_path / name, falling(20), trainer={"lr": lr}) for name, lr in (("a", 0.1), ("b", 0.2))]
    for number, run in enumerate(runs):
        tracking = Tracker(run, [], {}, 20)
        for step in (5, 10, 20):
            tracking.picture(step, "reconstructions", torch.rand(2, 2, 3, 8, 8), run / f"results/step_{step:08d}.png")
            tracking.histogram(step, "codes", torch.arange(16), run / f"results/step_{step:08d}_codes.png")
        said = {"data_hash": "00", "images": 10 + number}
        protocol.keep(run, 20, {"rfid": 3.5, protocol.KEY: said})
    return runs


def page_of_runs(runs: list[Path], out: Path) -> str:
    assert main(["report", *map(str, runs), "--html", str(out)]) == 0
    return out.read_text()


def test_a_page_holds_everything_and_fetches_nothing(two_runs, tmp_path, capsys):
    page = page_of_runs(two_runs, tmp_path / "new" / "a.html")
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'a.html'}\n"
    tags = Tags(page)
    assert tags.fetched == [] and tags.tags.count("script") == 2 and "connect-src &#x27;none&#x27;" in page
    data = data_in(page)
    (loss,) = data["curves"]
    assert loss["name"] == "loss" and [points["steps"][-1] for points in loss["runs"]] == [20, 20]
    assert [[picture["step"] for picture in sheets] for sheets in data["pictures"]] == [[5, 10, 20]] * 2
    assert data["pictures"][0][0]["src"].startswith("data:image/png;base64,")
    assert data["charts"][1][2] == {
        "step": 20,
        "codes": 16,
        "total": 120,
        "used": 15,
        "bars": list(range(16)),
        "ranked": list(range(15, -1, -1)),
    }
    differing = [row["name"] for row in data["configuration"] if len(set(row["cells"])) > 1]
    assert differing == ["trainer.lr"]
    assert [one["rows"][1]["cells"] for one in data["evaluations"]] == [["3.5", None], [None, "3.5"]]


def test_evaluations_of_one_protocol_stand_side_by_side(two_runs, tmp_path):
    protocol.keep(two_runs[1], 20, {"rfid": 2.5, protocol.KEY: {"data_hash": "00", "images": 10}})
    tables = data_in(page_of_runs(two_runs, tmp_path / "a.html"))["evaluations"]
    assert [row["cells"] for row in tables[0]["rows"] if row["name"] == "rfid"] == [["3.5", "2.5"]]


def test_no_text_of_a_run_becomes_markup(tmp_path):
    folder = tmp_path / "a<b>&\u202e\udcff"
    lines = [{"step": n, HOSTILE: n, "__proto__": n, "constructor": 1, "a\u2028b": n} for n in (1, 2)]
    run = run_at(folder, lines, trainer={HOSTILE: HOSTILE, "</script>": [1]}, model_type=HOSTILE)
    (run / "events.jsonl").write_text(json.dumps({"step": 1, "event": HOSTILE, "message": HOSTILE, "time": HOSTILE}))
    protocol.keep(run, 1, {HOSTILE: 1.0, protocol.KEY: {HOSTILE: HOSTILE}})
    page = page_of_runs([run], tmp_path / "a.html")
    tags = Tags(page)
    assert tags.tags.count("script") == 2 and "img" not in tags.tags and tags.fetched == []
    assert "\u202e" not in page and HOSTILE not in page
    data = data_in(page)
    assert {curve["name"] for curve in data["curves"]} == {HOSTILE, "__proto__", "constructor", "a\\u2028b"}


def test_pictures_that_cannot_be_read_are_left_out_and_named(two_runs, tmp_path, capsys):
    results = two_runs[0] / "results"
    (results / "step_00000005.png").write_bytes(b"<svg onload=alert(1)>")
    raw = (results / "step_00000010.png").read_bytes()
    (results / "step_00000010.png").write_bytes(raw[: len(raw) // 2])
    (results / "step_00000020_codes.png").write_bytes(b"")
    (results / "step_00000030.png").mkdir()
    (results / "step_x.png").write_text("")
    data = data_in(page_of_runs(two_runs, tmp_path / "a.html"))
    assert [picture["step"] for picture in data["pictures"][0]] == [20]
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 2 and all(line.startswith(f"warning: {two_runs[0]}: ") for line in warnings)
    assert "step_00000005.png" in warnings[0] and "step_00000020_codes.png" in warnings[1]


def test_a_large_picture_is_made_smaller_and_many_are_thinned(tmp_path):
    run = run_at(tmp_path / "a", falling(3))
    (run / "results").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (1800, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "results" / "step_00000000.png")
    for step in range(1, 40):
        Image.fromarray(noise[:8, :8]).save(run / "results" / f"step_{step:08d}.png")
    record = RunRecord(run, "a")
    record.read()
    sheets = data_of([record], 10)["pictures"][0]
    assert len(sheets) == 10 and (sheets[0]["step"], sheets[-1]["step"]) == (0, 39)
    assert sheets[0]["src"].startswith("data:image/jpeg") and sheets[1]["src"].startswith("data:image/png")


def test_a_chart_from_before_it_held_its_numbers_is_shown_as_a_picture(two_runs, tmp_path):
    path = two_runs[0] / "results" / "step_00000020_codes.png"
    with Image.open(path) as picture:
        picture.load()
        Image.frombytes(picture.mode, picture.size, picture.tobytes()).save(path)
    charts = data_in(page_of_runs(two_runs, tmp_path / "a.html"))["charts"][0]
    assert charts[-1].keys() == {"step", "src"} and charts[0].keys() > {"bars"}


def test_mistakes_are_one_line(two_runs, tmp_path, capsys):
    run = str(two_runs[0])
    (tmp_path / "notes.html").write_text("mine")
    (tmp_path / "file").write_text("")
    cases = {
        "is a folder; give the name of a file": [run, "--html", str(tmp_path)],
        "is no name of a page; give one that ends in .html": [run, "--html", "-"],
        "is there, and no page of vqdist": [run, "--html", str(tmp_path / "notes.html")],
        "cannot be written": [run, "--html", str(tmp_path / "file" / "a.html")],
        "has no metrics.jsonl": [run, str(tmp_path / "nowhere"), "--html", str(tmp_path / "a.html")],
        "pictures 0 is not possible": [run, "--html", str(tmp_path / "a.html"), "--pictures", "0"],
        "port 70000 is not possible": [run, "--serve", "--port", "70000"],
        "is of --serve": [run, "--port", "8000"],
        "is of the file of --html": [run, "--overwrite"],
    }
    for message, arguments in cases.items():
        assert main(["report", *arguments]) == 2, message
        assert message in error_of(capsys)
    assert (tmp_path / "notes.html").read_text() == "mine" and not (tmp_path / "a.html").exists()
    assert main(["report", run, "--html", str(tmp_path / "notes.html"), "--overwrite"]) == 0
    page_of_runs(two_runs, tmp_path / "notes.html")  # ours is replaced


# ------------------------------------------------------------------------------------------- a server


def test_a_server_shows_what_a_run_logs_meanwhile_and_answers_this_machine_only(two_runs):
    records = [RunRecord(run, run.name) for run in two_runs]
    for record in records:
        record.read()
    with open_server(records, 5, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address
        assert host == "127.0.0.1"

        def get(path: str, **headers: str):
            return urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}{path}", headers=headers))

        def refused(path: str, **headers: str) -> int:
            with pytest.raises(urllib.error.HTTPError) as error:
                get(path, **headers)
            error.value.close()
            return error.value.code

        with get("/") as answer:
            page = answer.read().decode()
        data = data_in(page)
        with get(data["pictures"][0][0]["src"]) as answer:
            assert answer.headers["Content-Type"] == "image/png" and answer.read(4) == b"\x89PNG"
        with get("/data.json") as answer:
            mark = answer.headers["ETag"]
        assert refused("/data.json", **{"If-None-Match": mark}) == 304
        with open(two_runs[0] / "metrics.jsonl", "a") as file:
            file.write('{"step": 21, "loss": 0.125}\n')
        with get("/data.json", **{"If-None-Match": mark}) as answer:
            assert json.loads(answer.read())["curves"][0]["runs"][0]["values"][-1] == 0.125
        assert refused("/", Host="elsewhere.example") == 403
        assert {refused(path) for path in ("/../config.json", "/picture/../../a", "/picture/", "/x")} == {404}
        with pytest.raises(UserError, match=f"port {port} cannot be had"):
            open_server(records, 5, port)
        server.shutdown()


def test_ctrl_c_ends_serving_with_one_line(two_runs):
    command = [sys.executable, "-m", "vqdist", "report", str(two_runs[0]), "--serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    address = process.stdout.readline().split()[0]
    with urllib.request.urlopen(address) as answer:
        assert answer.status == 200
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "vqdist: the report is no longer served\n")


def test_a_report_imports_no_torch(two_runs, tmp_path):
    code = (
        "import sys; from vqdist.cli import main\n"
        f"main(['report', {str(two_runs[0])!r}, '--html', {str(tmp_path / 'a.html')!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
