"""Curves as SVG, drawn once or live in a notebook; the pages of results and costs are those of their programs."""

from __future__ import annotations

import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
from scenarios import build_trainer

from benchmarks import costs, record, results
from vqdist import LivePlot
from vqdist.tracking import curves
from vqdist.tracking.curves import curves_svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """Return the points of the curves of a picture, in pixels."""
    drawn = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in drawn]


def test_a_curve_goes_from_corner_to_corner():
    (line,) = lines_of(curves_svg({"a": [(0, 1.0), (5, 2.0), (10, 3.0)]}, width=640, height=300))
    assert line[0] == (62.0, 274.0) and line[-1] == (628.0, 26.0)  # within the margins; up is less
    assert line[1] == ((62.0 + 628.0) / 2, (274.0 + 26.0) / 2)


def test_curves_share_their_axes_and_have_names():
    svg = curves_svg({"low <b>": [(1, 0.0), (2, 0.0)], "high": [(1, 4.0), (2, 4.0)]}, "a & b")
    low, high = lines_of(svg)
    assert low[0][1] > high[0][1] and low[0][0] == high[0][0]
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"low <b>", "high", "a & b", "0", "4"} <= set(texts)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(3, 1.0)],
        [(1, math.nan), (2, math.inf)],
        [(1, 2.0), (2, 2.0)],
        [(1, 1e20)],
        [(1, 5.0), (2, 5 + 1e-15)],
        [(1, -1.7e308), (2, 1.7e308), (3, 1.0)],
        [(0, 0.0), (1, 5e-324)],
    ],
)
def test_few_equal_and_infinite_numbers_are_drawn(points):
    svg = curves_svg({"a": points})
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg.replace("information", "")


def test_a_long_curve_is_thinned_to_its_end():
    (line,) = lines_of(curves_svg({"a": [(step, step) for step in range(100_001)]}))
    assert len(line) <= 1002 and line[-1] == (628.0, 26.0)


@pytest.mark.parametrize("low, high", [(0, 1), (-3.7, 12), (1e-6, 2e-6), (0.99, 1.01), (0, 1e9), (5, 5.0001)])
def test_ticks_are_few_and_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-9 * abs(low) <= found[0] and found[-1] <= high + 1e-9 * abs(high)


def test_ticks_of_any_range_are_few_within_and_at_equal_distances():
    """Of 5000 ranges at random, and of those whose length is near a step of the rule."""
    random = np.random.default_rng(0)
    lows = random.normal(size=5000) * 10.0 ** random.integers(-6, 7, 5000)
    lengths = np.abs(lows) * 10.0 ** random.uniform(-6, 6, 5000)
    ranges = [*zip(lows.tolist(), (lows + lengths).tolist(), strict=True)]
    ranges += [(1, 1 + part * 10**power) for power in range(4) for part in np.linspace(0.9, 61, 200).tolist()]
    ranges += [(1, 56), (0, 0.3), (0.1, 0.7), (-1e290, 1e290), (0, 1e-280)]
    for low, high in ranges:
        found = ticks(low, high)
        assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high, (low, high, found)
        distances = np.diff(found)
        assert np.allclose(distances, distances[0], rtol=1e-6, atol=0), (low, high, found)
        mantissa = float(f"{distances[0]:.3e}".split("e")[0])
        assert mantissa in (1, 2, 5), (low, high, found)
    assert ticks(0, 0.3) == [0, 0.1, 0.2, 0.3]  # as they are written, not 0.30000000000000004


class Shown:
    """A display of IPython."""

    def __init__(self):
        self.pictures: list[str] = []

    def __call__(self, drawn, display_id: bool):
        assert display_id is True
        self.update(drawn)
        return self

    def update(self, drawn) -> None:
        self.pictures.append(drawn._repr_html_())


def test_a_training_is_drawn_as_it_goes(tmp_path, monkeypatch):
    shown = Shown()
    monkeypatch.setattr(curves, "_display", lambda: shown)
    plot = LivePlot("recon_loss", "discr_loss")
    with build_trainer(tmp_path / "run", num_train_steps=3, log_every=1) as trainer:
        for step, _ in trainer.steps(plot):
            assert len(shown.pictures) == step  # it grows with each log line
    assert [len(line) for line in lines_of(plot.svg().split("</svg>")[0] + "</svg>")] == [3]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert plot.curves["recon_loss"] == [(line["step"], line["recon_loss"]) for line in logged if "recon_loss" in line]
    assert shown.pictures[-1].count("<svg") == 2 and "discr_loss" in shown.pictures[-1]


def test_every_so_many_lines_are_drawn_and_losses_by_default(monkeypatch):
    shown = Shown()
    monkeypatch.setattr(curves, "_display", lambda: shown)
    plot = LivePlot(every=3)
    for step in range(1, 8):
        plot({"step": step, "recon_loss": 1 / step, "lr": 0.1})
    assert len(shown.pictures) == 3 and list(plot.curves) == ["recon_loss"]  # the first line, the third, the sixth


def test_a_display_is_that_of_a_notebook_and_of_no_terminal(monkeypatch):
    ipython = SimpleNamespace(display=SimpleNamespace(display=Shown()))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    for shell, found in (
        (SimpleNamespace(kernel=1), ipython.display.display),
        (SimpleNamespace(), None),
        (None, None),
    ):
        ipython.get_ipython = lambda shell=shell: shell
        assert curves._display() is found


def test_without_a_notebook_nothing_is_displayed(capsys):
    plot = LivePlot()
    plot({"step": 1, "loss": 0.5})
    assert capsys.readouterr().out == "" and plot.curves == {"loss": [(1, 0.5)]}


# ------------------------------------------------------------------------------------------- pages


def test_the_page_of_results_is_that_of_the_numbers():
    assert results.PAGE.read_text(encoding="utf-8") == results.page()
    runs = record.read("curves")["numbers"]["runs"]
    for name, picture in results.pictures(runs).items():
        assert (results.IMAGES / name).read_text(encoding="utf-8") == picture, name


def test_every_number_says_how_it_was_made():
    for name in ("curves", "emoji", "rivals"):
        found = record.read(name)
        assert found["command"].startswith(f"python -m benchmarks.{name}")
        assert re.fullmatch(r"[0-9a-f]{7,}", found["commit"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
        assert found["machine"] and {"python", "torch"} <= found["versions"].keys()


def test_what_was_measured_is_not_measured_again(tmp_path):
    made = []

    def measure(key):
        made.append(key)
        return {"value": key * 2}

    record.once_each(tmp_path / "lines.jsonl", [1, 2], measure)
    rows = record.once_each(tmp_path / "lines.jsonl", [2, 3, 1], measure)
    assert made == [1, 2, 3] and [row["value"] for row in rows] == [4, 6, 2]


ROWS = ["digits_vqgan", "llamagen_vq16", "digits_vq_ar"]
SLOW = [pytest.param(name, marks=pytest.mark.nightly) for name in costs.RECIPES if name not in ROWS]


@pytest.mark.parametrize("name", [*ROWS, *SLOW])
def test_the_costs_of_a_recipe_are_as_counted(name):
    assert costs.row(name) in costs.PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_of_costs_has_every_recipe_and_its_rule():
    text = costs.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(costs.RECIPES)
    assert f"{costs.USED:.0%} of the peak" in text and costs.STATED.keys() <= costs.RECIPES.keys()


def test_operations_are_those_of_the_layers():
    import torch
    from torch import nn

    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5, bias=False)
        )
    found = costs.passed(network, torch.zeros(1, 3, 4, 4, device="meta"))
    assert found.flops == 2 * (16 * 8 * 27 + 128 * 5)
    assert found.saved == 4 * (3 * 16 + 8 * 16)  # the inputs of the two layers
