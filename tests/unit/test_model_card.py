"""The card of an export: metric index, protocol, cost and picture; words of its owner stay."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from scenarios import build_trainer, build_vae

from vqdist.cli import main
from vqdist.export import NUMBERS_BEGIN, NUMBERS_END
from vqdist.files import EVENTS, METRICS
from vqdist.model_card import PICTURE, carry_card, write_card

OPTIONS = {"num_train_steps": 4, "save_model_every": 2, "log_every": 1}


def trained(folder: Path, **options) -> Path:
    with build_trainer(folder, **{**OPTIONS, **options}) as trainer:
        trainer.train()
    return folder


def index(folder: Path) -> dict[tuple[str, str], float]:
    """Return the metric index of a card: by data and measure."""
    results = ModelCard((folder / "README.md").read_text()).data.eval_results
    return {(found.dataset_name, found.metric_type): found.metric_value for found in results or []}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("carded") / "run")


def test_the_card_of_a_run_says_what_was_measured_and_what_it_took(run):
    last = [line for line in lines(run) if "valid/psnr" in line][-1]
    found = index(run / "export")
    assert found["synthetic:64", "psnr"] == last["valid/psnr"] and ("synthetic:64", "images") not in found
    card = (run / "export" / "README.md").read_text()
    (validated,) = {one.dataset_split: one for one in ModelCard(card).data.eval_results}.values()
    start = json.loads((run / EVENTS).read_text().splitlines()[0])
    assert validated.dataset_split == "validation" and validated.dataset_args == start["validation"]
    assert validated.dataset_args["images"] == 16 and "## Protocol of the validation" in card
    per_step = start["images_per_step"]
    assert f"- {4 * per_step:,} images seen in 4 steps" in card
    seconds = sum(per_step / line["images_per_second"] for line in lines(run) if "images_per_second" in line)
    assert f"- {seconds / 3600:.3g} CPU hours of training steps (cpu, " in card
    picture = (run / "results" / "step_00000004.png").read_bytes()
    assert f"]({PICTURE})" in card and (run / "export" / PICTURE).read_bytes() == picture
    assert "license" not in card and str(run.parent) not in card


def test_an_evaluation_comes_with_its_protocol(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--data", "synthetic:8"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert index(run / "export")["synthetic:8", "psnr"] == measured["psnr"]
    card = ModelCard((run / "export" / "README.md").read_text())
    protocol = next(one.dataset_args for one in card.data.eval_results if one.dataset_name == "synthetic:8")
    assert protocol == measured["protocol"]
    assert f"| data_hash | {measured['protocol']['data_hash']} |" in card.text
    before = (run / "export" / "README.md").read_text()
    write_card(run, run / "export")  # nothing is there twice
    assert (run / "export" / "README.md").read_text() == before


def test_words_of_the_owner_stay_and_numbers_of_other_weights_go(tmp_path):
    run = trained(tmp_path / "run")
    card = run / "export" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: cc-by-4.0\n", 1) + "\nOf my cat.\n")
    carried = tmp_path / "new"
    carried.mkdir()
    carry_card(run / "export", carried)
    said = (carried / "README.md").read_text()
    assert "license: cc-by-4.0" in said and "Of my cat." in said
    assert "model-index" not in said and "Weights of step" not in said
    trained(run, num_train_steps=6, allow_config_change=True)
    said = card.read_text()
    assert "license: cc-by-4.0" in said and "Of my cat." in said and said.count("Weights of step 6.") == 1
    assert "step 4" not in said and index(run / "export")


def test_a_card_without_the_comments_is_left_alone(tmp_path):
    run = trained(tmp_path / "run")
    card = run / "export" / "README.md"
    card.write_text("# Mine\n")
    trained(run, num_train_steps=6, allow_config_change=True)
    assert card.read_text() == "# Mine\n"


@pytest.mark.parametrize("broken", [f"---\na: [\n---\n{NUMBERS_BEGIN}\n{NUMBERS_END}\n".encode(), b"\xff"])
def test_a_card_that_cannot_be_read_is_a_warning(tmp_path, broken, capsys):
    run = trained(tmp_path / "run")
    (run / "export" / "README.md").write_bytes(broken)
    capsys.readouterr()
    trained(run, num_train_steps=6, allow_config_change=True)
    assert (run / "export" / "README.md").read_bytes() == broken
    said = [line for line in capsys.readouterr().err.splitlines() if "the card of" in line]
    assert len(said) == 1 and "mend it" in said[0] and "Traceback" not in said[0]


def written_run(folder: Path, config: dict | None = None, **files: list[dict]) -> Path:
    """Write the lines of a run, and the export of its step 30 with a bare card; return the card, written."""
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export = folder / "export"
    export.mkdir()
    (export / "export.json").write_text('{"step": 30}')
    (export / "config.json").write_text(json.dumps(config or {}))
    (export / "README.md").write_text(f"# Model\n{NUMBERS_BEGIN}\n{NUMBERS_END}\n")
    write_card(folder, export)
    return export / "README.md"


def test_hours_are_those_of_all_processes_by_device(tmp_path):
    def start(step: int, images: int, processes: int, device: str) -> dict:
        said = {"step": step, "event": "resume" if step else "start", "images": images, "images_per_step": 100}
        return {**said, "processes": processes, "environment": {"device": device}}

    starts = [start(0, 0, 2, "H100, CUDA 13"), start(10, 1000, 2, "H100, CUDA 13"), start(20, 2000, 4, "A100")]
    metrics = [{"step": step, "images_per_second": 5.0} for step in (10, 20, 30)]
    card = written_run(tmp_path, events=starts, metrics=metrics).read_text()
    assert "- 3,000 images seen in 30 steps" in card
    # 2 x 10 steps of 100 images at 5 a second on 2 processes, then 10 on 4
    assert (
        "- 0.222 GPU hours of training steps (H100, CUDA 13)" in card
        and "- 0.222 GPU hours of training steps (A100)" in card
    )
    assert "model-index" not in card


NAMED = {"data": "/home/me/imagenet/val", "data_hash": "5c", "images": 50_000, "reference": "/home/me/ref.npz"}


def test_a_validation_has_the_set_and_the_protocol_of_its_own_start(tmp_path):
    other = {**NAMED, "data": "elsewhere"}
    starts = [
        {"step": 0, "event": "start", "validation": other},
        {"step": 10, "event": "resume", "validation": {**NAMED, "features": "/home/me/inception.pth"}},
        {"step": 30, "event": "resume", "validation": other},  # its validations come later
    ]
    card = written_run(tmp_path, events=starts, metrics=[{"step": 30, "valid/rfid": 2.5, "valid/images": 50_000}])
    (found,) = ModelCard(card.read_text()).data.eval_results
    assert (found.dataset_name, found.dataset_split, found.metric_value) == ("val", None, 2.5)
    said = {"data": "val", "data_hash": "5c", "images": 50_000, "reference": "ref.npz", "features": "inception.pth"}
    assert found.dataset_args == said and "/home/me" not in card.read_text() and "elsewhere" not in card.read_text()


def test_a_run_from_before_events_said_it_has_a_share_of_its_own_images(tmp_path):
    starts = [{"step": 0, "event": "start"}]
    card = written_run(tmp_path, events=starts, metrics=[{"step": 30, "valid/psnr": 20.0}])
    (found,) = ModelCard(card.read_text()).data.eval_results
    assert (found.dataset_name, found.dataset_split) == ("the run's own images", "validation")


def test_a_validation_and_an_evaluation_of_one_set_keep_their_own_protocols(tmp_path):
    starts = [{"step": 0, "event": "start", "validation": {**NAMED, "pixels": "float"}}]
    evaluated = {"step": 30, "rfid": 2.25, "protocol": {**NAMED, "pixels": "8 bits"}}
    metrics = [{"step": 30, "valid/rfid": 2.5}]
    card = written_run(tmp_path, events=starts, metrics=metrics, evaluations=[evaluated])
    found = {one.metric_value: one for one in ModelCard(card.read_text()).data.eval_results}
    assert {one.dataset_name for one in found.values()} == {"val"}
    assert {value: one.dataset_args["pixels"] for value, one in found.items()} == {2.5: "float", 2.25: "8 bits"}


@pytest.mark.parametrize(
    ("classes", "task"), [(10, "conditional-image-generation"), (0, "unconditional-image-generation")]
)
def test_a_model_that_knows_classes_draws_images_of_them(tmp_path, classes, task):
    evaluated = {"step": 30, "nll": 5.0, "fid": 9.0, "protocol": NAMED}
    options = {"metrics": [{"step": 30, "valid/nll": 5.5}], "evaluations": [evaluated]}
    card = written_run(tmp_path, {"num_classes": classes}, **options)
    assert {one.task_type for one in ModelCard(card.read_text()).data.eval_results} == {task}


def test_a_set_that_is_named_by_options_has_no_paths_in_the_card(tmp_path):
    data = str({"source": "my.module:Images", "path": "/home/me/pictures/", "index": "/home/me/a b/index.csv"})
    evaluated = {"step": 30, "psnr": 20.0, "protocol": {**NAMED, "data": data}}
    card = written_run(tmp_path, metrics=[], evaluations=[evaluated]).read_text()
    assert "/home" not in card and "a b/" not in card and "index.csv" in card and "my.module:Images" in card


HOSTILE = f"crop\n{NUMBERS_END}\n# Mine | <script>x</script> ![](http://a.b/c.png) `{NUMBERS_BEGIN}\u2028---\n\x1b[2J"


@pytest.mark.parametrize("place", ["reference_view", "name", "data", "measure", "device", "validation"])
def test_words_of_others_stay_in_their_cell(tmp_path, place):
    """A file of statistics may hold any words, and a card is written again and again."""
    said = {**NAMED, **({place: HOSTILE} if place in ("reference_view", "data") else {})}
    evaluated = {"step": 30, "psnr": 20.0, **({HOSTILE: 1.0} if place == "measure" else {})}
    evaluated["protocol"] = {**said, **({HOSTILE: "x"} if place == "name" else {})}
    start = {"step": 0, "event": "start", "images": 0, "images_per_step": 10, "processes": 1}
    start["environment"] = {"device": HOSTILE if place == "device" else "cpu"}
    start["validation"] = {**NAMED, **({"view": HOSTILE} if place == "validation" else {})}
    metrics = [{"step": 30, "images_per_second": 5.0}, {"step": 30, "valid/psnr": 21.0}]
    card = written_run(tmp_path, events=[start], metrics=metrics, evaluations=[evaluated])
    text = card.read_text()
    assert text.count(NUMBERS_BEGIN) == text.count(NUMBERS_END) == 1 and text.endswith(f"{NUMBERS_END}\n")
    head, _, block = text.partition(NUMBERS_BEGIN)
    assert "<script>" not in block and "\n# Mine" not in text and "![](" not in block and "\x1b" not in text
    rows = [line for line in block.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 4}  # of two columns, and of three
    assert len(ModelCard(text).data.eval_results) == 2 + (place == "measure")
    write_card(tmp_path, card.parent)
    assert card.read_text() == text


def test_options_of_a_model_stay_in_their_cell():
    model = build_vae(quantizer="lfq")
    model.configuration = lambda: {"perceptual": "lpips:a|b`c"}
    (row,) = [line for line in str(model.generate_model_card()).splitlines() if "perceptual" in line]
    assert row == '| perceptual | `"lpips:a\\|b\\u0060c"` |'
