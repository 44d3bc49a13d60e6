"""Numbers are kept with what they were measured on, and put side by side only where that is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vqdist import protocol
from vqdist.cli import main

PROTOCOL = {"vqdist": "1", "data": "a", "data_hash": "00", "images": 10, "pixels": "float"}


def test_protocols_differ_by_what_changes_a_number():
    moved = {**PROTOCOL, "vqdist": "2", "data": "/elsewhere/a"}
    assert protocol.differences(PROTOCOL, moved) == {}
    fewer = {**moved, "images": 9, "reference_hash": "r"}
    assert protocol.differences(PROTOCOL, fewer) == {"images": (10, 9), "reference_hash": (None, "r")}


def test_each_number_is_compared_by_the_choices_of_its_own_kind():
    both = {**PROTOCOL, "pixels": "8 bits", "samples_pixels": "8 bits, truncated", "samples": 10}
    drawn = {**PROTOCOL, "pixels": "8 bits, truncated", "samples": 10}
    assert protocol.differences_of("fid", both, drawn) == {}
    assert protocol.differences_of("psnr", both, drawn) == {"pixels": ("8 bits", "8 bits, truncated")}
    assert protocol.differences_of("psnr", both, {**both, "samples_pixels": "float", "split": "validation"}) == {}
    scores = [{"inception_score_over": "1", "samples_inception_score_over": over} for over in ("10", "5000 images")]
    assert protocol.differences_of("ris", *scores) == {}
    assert protocol.differences_of("is", *scores) == {"inception_score_over": ("10", "5000 images")}


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Return two runs that have logged a step."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "vqgan"}')
        (folder / "metrics.jsonl").write_text('{"step": 5, "recon_loss": 0.5}\n')
    return folders


def reported(runs: list[Path], capsys) -> str:
    assert main(["report", *map(str, runs)]) == 0
    return capsys.readouterr().out


def test_the_last_evaluation_stands_in_the_report(runs, capsys):
    assert "evaluate" not in reported(runs, capsys)
    for step, rfid in ((5, 9.5), (8, 7.25)):
        protocol.keep(runs[0], step, {"rfid": rfid, "psnr": None, protocol.KEY: PROTOCOL})
    rows = {row.split("  ")[0]: row.split() for row in reported(runs, capsys).splitlines()}
    assert rows["evaluate/rfid"][1:] == ["7.25"] and rows["evaluated at step"][3:] == ["8"]
    protocol.keep(runs[1], 5, {"rfid": 3.0, protocol.KEY: {**PROTOCOL, "data": "elsewhere"}})
    (row,) = [line.split() for line in reported(runs, capsys).splitlines() if "rfid" in line]
    assert row == ["evaluate/rfid", "7.25", "3"]


def test_numbers_of_other_protocols_are_not_put_side_by_side(runs, capsys):
    protocol.keep(runs[0], 5, {"rfid": 7.25, protocol.KEY: PROTOCOL})
    protocol.keep(runs[1], 5, {"rfid": 3.0, protocol.KEY: {**PROTOCOL, "images": 9, "reference_hash": "\x1b[2J"}})
    shown = reported(runs, capsys)
    assert "evaluate/" not in shown and "\x1b" not in shown
    assert f"the evaluations of {runs[0]} and {runs[1]} cannot be compared: images 10 and 9, reference_hash" in shown


def test_torn_lines_are_passed_over(runs, capsys):
    protocol.keep(runs[0], 5, {"rfid": 7.25, protocol.KEY: PROTOCOL})
    with open(runs[0] / protocol.EVALUATIONS, "ab") as file:
        file.write(b'\xff\n{"step": 6, "rfid": 1}\n{"step": 7, "rf')
    assert protocol.last_of(runs[0])["rfid"] == 7.25 and "7.25" in reported(runs, capsys)
    assert json.dumps(protocol.last_of(runs[0])[protocol.KEY])
