"""The card of an export: metric index, protocol, cost and picture; words of its owner stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from scenarios import build_trainer

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
    assert found["the run's own images", "psnr"] == last["valid/psnr"]
    assert ("the run's own images", "images") not in found
    card = (run / "export" / "README.md").read_text()
    per_step = json.loads((run / EVENTS).read_text().splitlines()[0])["images_per_step"]
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


def test_hours_are_those_of_all_processes_by_device(tmp_path):
    def write(name: str, *rows: dict) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(step: int, images: int, processes: int, device: str) -> dict:
        said = {"step": step, "event": "resume" if step else "start", "images": images, "images_per_step": 100}
        return {**said, "processes": processes, "environment": {"device": device}}

    write(EVENTS, start(0, 0, 2, "H100, CUDA 13"), start(10, 1000, 2, "H100, CUDA 13"), start(20, 2000, 4, "A100"))
    write(METRICS, *({"step": step, "images_per_second": 5.0} for step in (10, 20, 30)))
    export = tmp_path / "export"
    export.mkdir()
    (export / "export.json").write_text('{"step": 30}')
    (export / "README.md").write_text(f"# Model\n{NUMBERS_BEGIN}\n{NUMBERS_END}\n")
    write_card(tmp_path, export)
    card = (export / "README.md").read_text()
    assert "- 3,000 images seen in 30 steps" in card
    # 2 x 10 steps of 100 images at 5 a second on 2 processes, then 10 on 4
    assert (
        "- 0.222 GPU hours of training steps (H100, CUDA 13)" in card
        and "- 0.222 GPU hours of training steps (A100)" in card
    )
    assert "model-index" not in card
