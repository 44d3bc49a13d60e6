"""The page of `vqdist report` in a real browser: what a mouse, keys and controls do, and what hostile texts do not."""

from __future__ import annotations

import io
import json
import threading

import numpy as np
import pytest
from PIL import Image
from test_reports import HOSTILE, SAID, falling, page_of_runs, run_at, two_runs, validated  # noqa: F401

from browser.chromium import DESKTOP, PHONE, Browser
from vqdist.reports.record import RunRecord
from vqdist.reports.server import open_server

LOSS = '.card[data-name="loss"]'
RANGE = "document.getElementById('charts').dataset.range"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(two_runs, tmp_path) -> str:  # noqa: F811
    page_of_runs(two_runs, tmp_path / "a.html")
    return f"file://{tmp_path / 'a.html'}"


def colours(raw: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(raw)) as picture:
        return np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)


def choose(browser: Browser, selector: str, value: str, event: str = "change") -> None:
    browser.value(
        f"(() => {{ const box = document.querySelector({selector!r}); box.value = {value!r}; "
        f"box.dispatchEvent(new Event({event!r})); }})()"
    )
    browser.settle()


def height(browser: Browser) -> list[float]:
    browser.place(f"{LOSS} canvas")
    return [float(one) for one in browser.value(f"document.querySelector({LOSS!r}).dataset.y").split()]


def test_a_drag_zooms_all_curves_and_a_double_click_shows_the_whole_run(browser, page):
    browser.open(page)
    assert browser.value(RANGE) == "whole"
    before = height(browser)
    browser.drag(f"{LOSS} canvas", 0.5, 0.9)
    first, last = map(float, browser.value(RANGE).split())
    assert 1 < first < 13 and first < last < 20
    assert height(browser)[1] < before[1] / 2  # 1 / step falls
    browser.click(f"{LOSS} canvas", clicks=2)
    assert browser.value(RANGE) == "whole" and height(browser) == before
    assert browser.complaints() == []


def test_keys_zoom_move_and_show_the_whole_run(browser, page):
    browser.open(page)
    browser.value(f"document.querySelector('{LOSS} canvas').focus()")
    browser.press("+")
    first, last = map(float, browser.value(RANGE).split())
    assert last - first == pytest.approx(19 / 2)
    browser.press("ArrowRight")
    assert float(browser.value(RANGE).split()[0]) > first
    browser.press("Escape")
    assert browser.value(RANGE) == "whole"


def test_a_log_scale_and_the_axis_can_be_chosen(browser, two_runs, tmp_path):  # noqa: F811
    for run in two_runs:
        start = {"step": 0, "event": "start", "images": 0, "images_per_step": 8}
        (run / "events.jsonl").write_text(json.dumps(start) + "\n")
    page_of_runs(two_runs, tmp_path / "a.html")
    browser.open(f"file://{tmp_path / 'a.html'}")
    assert height(browser)[0] < 0.05
    browser.click("#log")
    low, high = height(browser)
    assert 0.03 < low < 0.05 and 1 < high < 1.3
    assert browser.value("[...document.getElementById('x').options].map((one) => one.value)") == ["step", "images"]
    choose(browser, "#x", "images")
    browser.value(f"document.querySelector('{LOSS} canvas').focus()")
    browser.press("+")
    first, last = map(float, browser.value(RANGE).split())
    assert last - first == pytest.approx(8 * 19 / 2)


def test_a_number_that_was_measured_otherwise_has_a_note(browser, tmp_path):
    runs = [validated(tmp_path / name, (0, {**SAID, "features_hash": name})) for name in ("a", "b")]
    page_of_runs(runs, tmp_path / "a.html")
    browser.open(f"file://{tmp_path / 'a.html'}")
    note = "document.querySelector('.card[data-name=\"valid/{}\"] .note').textContent"
    browser.place('.card[data-name="valid/rfid"] canvas')
    said = "a and b cannot be compared: features_hash a and b"
    assert browser.value(note.format("rfid")) == said and browser.value(note.format("psnr")) == ""
    numbers = browser.value("document.getElementById('numbers').innerText")
    assert "valid/rfid *" in numbers and f"* valid/rfid of {said}" in numbers and "valid/psnr *" not in numbers
    browser.click("#runs input")
    browser.place('.card[data-name="valid/rfid"] canvas')
    assert browser.value(note.format("rfid")) == ""  # of one run there is nothing to compare
    assert browser.complaints() == []


def test_the_sliders_show_the_pictures_and_the_codes_of_a_step(browser, page):
    browser.open(page)
    shown = "[...document.querySelectorAll('#{} figcaption')].map((one) => one.textContent)"
    assert browser.value(shown.format("pictures")) == ["a, step 20", "b, step 20"]
    choose(browser, "#pictures input[type=range]", "0", "input")
    assert browser.value(shown.format("pictures")) == ["a, step 5", "b, step 5"]
    assert browser.value("[...document.querySelectorAll('#pictures img')].every((one) => one.naturalWidth > 10)")
    browser.value("document.querySelector('#codes input[type=range]').focus()")
    browser.press("ArrowLeft")
    assert browser.value(shown.format("codes"))[0] == "a, step 10: 15 of 16 codes in use"


def test_a_run_can_be_hidden_and_a_curve_found_by_its_name(browser, two_runs, tmp_path):  # noqa: F811
    run_at(two_runs[0], falling(20, other=1.0))
    page_of_runs(two_runs, tmp_path / "a.html")
    browser.open(f"file://{tmp_path / 'a.html'}")
    browser.click("#runs input")
    browser.place(f"{LOSS} canvas")
    label = browser.value(f"document.querySelector('{LOSS} canvas').getAttribute('aria-label')")
    assert "b: last 0.05" in label and "a: last" not in label
    choose(browser, "#filter", "OTH", "input")
    cards = "[...document.querySelectorAll('.card')].filter((one) => one.offsetHeight).map((one) => one.dataset.name)"
    assert browser.value(cards) == ["other"]


def test_the_mouse_shows_the_numbers_below_it(browser, page):
    browser.open(page)
    left, top, width, tall = browser.place(f"{LOSS} canvas")
    browser.mouse("mouseMoved", left + width - 12, top + tall / 2)
    browser.settle()
    said = browser.value(f"document.querySelector('{LOSS} .tip').innerText")
    assert "a 0.05 at step 20" in said and "b 0.05" in said


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_follows_the_colours_of_the_system(browser, page, size, scheme):
    browser.open(page, size, scheme)
    assert browser.value("document.documentElement.scrollWidth") <= size[0]
    pixels = colours(browser.picture())
    ground = np.median(pixels, axis=0)
    assert (ground > 230).all() if scheme == "light" else (ground < 50).all()
    assert (abs(pixels - ground).max(axis=1) > 60).mean() > 0.005  # something is drawn
    browser.click("#theme")
    turned = np.median(colours(browser.picture()), axis=0)
    assert (turned < 50).all() if scheme == "light" else (turned > 230).all()


CONTRAST = """[...document.querySelectorAll('.chip')].slice(0, 8).map((chip) => {
  const numbers = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const ground = getComputedStyle(document.querySelector('.card')).backgroundColor;
  return [numbers(getComputedStyle(chip).color), numbers(ground)];
})"""


def luminance(colour: list[float]) -> float:
    parts = [c / 255 / 12.92 if c <= 10.3 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_stand_out_from_their_ground(browser, tmp_path, scheme):
    """By the 3:1 that WCAG 2 asks of graphics."""
    runs = [run_at(tmp_path / f"run{number}", falling(3)) for number in range(8)]
    page_of_runs(runs, tmp_path / "a.html")
    browser.open(f"file://{tmp_path / 'a.html'}", scheme=scheme)
    pairs = [sorted(map(luminance, pair)) for pair in browser.value(CONTRAST)]
    assert len(pairs) == 8 and min((high + 0.05) / (low + 0.05) for low, high in pairs) >= 3


def test_hostile_texts_stay_texts(browser, tmp_path):
    lines = [{"step": n, HOSTILE: n, "__proto__": n, "constructor": 1} for n in (1, 2)]
    run = run_at(tmp_path / "<b>bold", lines, trainer={HOSTILE: HOSTILE}, model_type=HOSTILE)
    (run / "events.jsonl").write_text(json.dumps({"step": 1, "event": HOSTILE, "message": HOSTILE, "time": HOSTILE}))
    page_of_runs([run], tmp_path / "a.html")
    browser.open(f"file://{tmp_path / 'a.html'}")
    counted = "['script', 'img', 'b'].map((tag) => document.getElementsByTagName(tag).length)"
    assert browser.value(counted) == [2, 0, 0]
    names = browser.value("[...document.querySelectorAll('.card h3')].map((one) => one.textContent)")
    assert set(names) == {HOSTILE, "__proto__", "constructor"}
    assert browser.complaints() == []


def test_no_network_is_used(browser, page):
    browser.events.clear()
    browser.open(page)
    assert browser.requests() == [page]


def test_a_served_page_follows_the_run(browser, two_runs):  # noqa: F811
    records = [RunRecord(run, run.name) for run in two_runs]
    for record in records:
        record.read()
    with open_server(records, 5, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.events.clear()
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        browser.wait("[...document.querySelectorAll('#pictures img')].every((one) => one.naturalWidth > 10)")
        with open(two_runs[0] / "metrics.jsonl", "a") as file:
            file.write('{"step": 2000, "loss": 0.01, "fresh": 1}\n')
        browser.wait("document.getElementById('runs').textContent.includes('2,000')", 30)
        browser.wait("document.querySelector('.card[data-name=fresh]') !== null", 30)
        assert browser.complaints() == []
        server.shutdown()
    browser.wait("document.getElementById('made').textContent.includes('has ended')", 30)
