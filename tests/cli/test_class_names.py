"""Classes by name, from the folder that a prior is trained on to evaluation, stored codes and samples."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from scenarios import build_ar_trainer
from source_files import message_of

from vqdist.cli import main
from vqdist.data.codes import CodeDataset
from vqdist.models.pretrained import load_model_of_any_type

GREYS = {"9": 40, "10": 120, "bee": 200}


def folders(folder, names, count=4):
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (16, 16), (GREYS.get(name, 0) + number,) * 3).save(folder / name / f"{number}.png")
    return str(folder)


def train(run, images, **options):
    trainer = build_ar_trainer(run, folder=images, valid_frac=0.0, batch_size=4, num_train_steps=1, **options)
    trainer.train()
    trainer.close()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    train(folder / "run", folders(folder / "images", ["9", "10", "bee"]), model={"num_classes": 3})
    return folder / "run"


def test_names_stand_in_the_run_and_the_export(run):
    names = ["10", "9", "bee"]
    assert json.loads((run / "config.json").read_text())["data"]["classes"] == names
    assert json.loads((run / "export/config.json").read_text())["class_names"] == names
    assert load_model_of_any_type(run / "export").class_names == names


def evaluated(run, images, capsys):
    code = main(["evaluate", str(run), "--data", images])
    return code, capsys.readouterr()


def numbers_of(printed) -> dict[str, float]:
    """Return what evaluate printed, without the protocol, which names the images."""
    numbers = json.loads(printed.out)
    assert numbers.pop("protocol")["images"] > 0
    return numbers


def test_evaluation_goes_by_name(run, tmp_path, capsys):
    """The same pictures beside a class that is missing: its absence changes no number of the others."""
    code, said = evaluated(run, folders(tmp_path / "two", ["9", "bee"]), capsys)
    assert code == 0 and "vqdist: warning: no images of 1 of 3 classes: '10'" in said.err
    whole = folders(tmp_path / "whole", ["9", "bee"])
    (tmp_path / "whole/10").mkdir()
    assert numbers_of(evaluated(run, whole, capsys)[1]) == numbers_of(said)
    code, said = evaluated(run, folders(tmp_path / "other", ["9", "dog"]), capsys)
    assert (
        code == 2 and "the images have the class 'dog', which the model does not know; it knows '10', '9'" in said.err
    )


def test_images_to_validate_on_have_the_classes_of_those_to_train_on(tmp_path):
    """By name: their folders alone would number them anew."""
    images = folders(tmp_path / "images", ["9", "10", "bee"])
    options = {"folder": images, "valid_frac": 0.05, "batch_size": 4, "model": {"num_classes": 3}}
    valid = folders(tmp_path / "valid", ["9", "bee"])
    trainer = build_ar_trainer(tmp_path / "run", **options, valid=valid)
    assert [trainer.data.valid.label(index) for index in range(8)] == [1] * 4 + [2] * 4
    assert trainer.model.class_names == ["10", "9", "bee"]
    wasps = folders(tmp_path / "others", ["9", "wasp"])
    message = message_of(lambda: build_ar_trainer(tmp_path / "other", **options, valid=wasps))
    assert "the images have the class 'wasp', which the model does not know" in message


def test_samples_of_a_name(run, tmp_path, capsys):
    drawn = []
    for given in ("9", "1", "bee"):
        out = tmp_path / f"{given}.png"
        assert main(["sample", str(run), "--num", "2", "--class", given, "--out", str(out)]) == 0
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    capsys.readouterr()
    assert main(["sample", str(run), "--num", "2", "--class", "dog", "--out", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert "class dog is asked for; the model knows 0 to 2, by name '10', '9', 'bee'" in said


def test_a_resumed_run_counts_as_it_began(tmp_path):
    images = folders(tmp_path / "images", ["9", "10"])
    trainer = train(tmp_path / "run", images, model={"num_classes": 2})
    assert trainer.model.class_names == ["9", "10"]
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["data"]["classes"]  # as before names were kept, when 10 came first
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    resumed = train(tmp_path / "run", images, model={"num_classes": 2})
    assert resumed.model.class_names == ["10", "9"]


def test_stored_codes_have_names(run, tmp_path, capsys):
    images = folders(tmp_path / "images", ["bee", "10"])
    assert main(["encode", str(run / "export/tokenizer"), "--data", images, "--out", str(tmp_path / "codes")]) == 0
    codes = CodeDataset(tmp_path / "codes")
    assert codes.class_names == ["10", "bee"] and [codes.label(index) for index in (0, 7)] == [0, 1]
    codes.use_classes(["9", "bee", "10"])
    assert [codes.label(index) for index in (0, 7)] == [2, 1]
    assert "the images have the class 'bee', which" in message_of(codes.use_classes, ["10"])
    capsys.readouterr()
    code = main(["evaluate", str(run), "--data", f"codes:{tmp_path / 'codes'}"])
    stored = capsys.readouterr()
    assert code == 0 and "no images of 1 of 3 classes: '9'" in stored.err
    assert numbers_of(evaluated(run, images, capsys)[1]) == numbers_of(stored)


@pytest.mark.parametrize(
    ("key", "value"), [("image_size", 32), ("code_side", 8), ("scales", [1, 2]), ("num_levels", 2), ("channels", 1)]
)
def test_a_manifest_that_contradicts_the_tokenizer_is_refused(run, tmp_path, capsys, key, value):
    images = folders(tmp_path / "images", ["bee", "10"])
    assert main(["encode", str(run / "export/tokenizer"), "--data", images, "--out", str(tmp_path / "codes")]) == 0
    path = tmp_path / "codes/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", f"codes:{tmp_path / 'codes'}"]) == 2
    said = capsys.readouterr().err
    assert f"{path} is damaged: its {key} is" in said
