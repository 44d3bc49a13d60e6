"""The export of a run: of which step it says it is, that it is never absent, and that a finished run mends it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scenarios import build_ar_trainer, build_trainer

from vqdist import UserError, export
from vqdist.export import RECORD, exchange, mend_export, write_export
from vqdist.files import sha256_of
from vqdist.models.pretrained import load_model_of_any_type


@pytest.fixture(params=[True, False], ids=["swapped", "renamed"])
def both_ways(request, monkeypatch) -> None:
    """Take a file system that can swap two folders, and one that cannot."""
    if not request.param:
        monkeypatch.setattr(export, "exchange", lambda first, second: False)


def model(content: str) -> Callable[[Path], None]:
    """Return what saves a model of these weights, with a second one beside it."""

    def save(folder: Path) -> None:
        for name in ("model.safetensors", "tokenizer/model.safetensors"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{name} {content}")
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text("a card")

    return save


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_an_export_says_its_step_and_the_checksums_of_its_files(tmp_path, both_ways):
    folder = tmp_path / "export"
    for step in (3, 6):
        write_export(folder, model(str(step)), step)
        record = json.loads((folder / RECORD).read_text())
        assert record["step"] == step
        files = {"config.json", "model.safetensors", "tokenizer/model.safetensors"}
        assert record["files"] == {name: sha256_of(folder / name) for name in files}
        assert f"{step}" in (folder / "model.safetensors").read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_equal_export_stays_with_what_people_wrote_into_it(tmp_path):
    folder = tmp_path / "export"
    write_export(folder, model("a"), 3)
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine, too")
    before = contents(folder)
    write_export(folder, model("a"), 3)
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["export"]


def change(name: str, content: str | None) -> Callable[[Path], None]:
    """Damage of one file of an export: other content, or none."""
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_text(content)


DAMAGES = {
    "removed": shutil.rmtree,
    "a file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
    "a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
    "weights changed": change("model.safetensors", "model.safetensors A"),
    "weights cut": change("model.safetensors", ""),
    "weights removed": change("model.safetensors", None),
    "second model removed": change("tokenizer/model.safetensors", None),
    "configuration changed": change("config.json", "{ }"),
    "no record": change(RECORD, None),
    "record of another step": change(RECORD, '{"step": 2, "files": {}}'),
    "record cut": change(RECORD, '{"step": '),
    "record of nothing": change(RECORD, "[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_is_written_anew(tmp_path, damage, both_ways):
    folder = tmp_path / "export"
    write_export(folder, model("a"), 3)
    expected = contents(folder)
    DAMAGES[damage](folder)
    write_export(folder, model("a"), 3)
    assert contents(folder) == expected and [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_write_that_fails_leaves_the_export_before(tmp_path):
    folder = tmp_path / "export"
    write_export(folder, model("a"), 3)
    before = contents(folder)

    def full(new: Path) -> None:
        model("b")(new)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_export(folder, full, 6)
    assert contents(folder) == before
    mend_export(folder)
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_kill_between_two_renames_is_mended(tmp_path):
    folder, old = tmp_path / "export", tmp_path / "export.old"
    write_export(folder, model("a"), 3)
    expected = contents(folder)
    folder.rename(old)
    model("b")(tmp_path / "export.partial")
    mend_export(folder)
    assert contents(folder) == expected and [path.name for path in tmp_path.iterdir()] == ["export"]
    (folder / RECORD).unlink()  # of a version that wrote none
    folder.rename(old)
    mend_export(folder)
    assert (folder / "model.safetensors").is_file() and not old.exists()


def test_half_an_export_is_not_put_in_place(tmp_path):
    folder, old = tmp_path / "export", tmp_path / "export.old"
    for half in ("config.json", "model.safetensors", "tokenizer/model.safetensors"):
        write_export(folder, model("a"), 3)
        folder.rename(old)
        (old / half).unlink()
        mend_export(folder)
        assert list(tmp_path.iterdir()) == []


def test_a_reader_finds_an_export_at_every_moment(tmp_path):
    folder, done = tmp_path / "export", threading.Event()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot swap two folders")
    write_export(folder, model("0"), 0)
    missed = []

    def read() -> None:
        while not done.is_set():
            try:
                (folder / "model.safetensors").read_bytes()
            except OSError as error:
                missed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 100):
        write_export(folder, model(str(step)), step)
    done.set()
    reader.join()
    assert missed == []


def test_swapping_what_cannot_be_swapped_changes_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    assert not exchange(tmp_path / "a", tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ------------------------------------------------------------------------------------------------- of a run


def stale(folder: Path) -> None:
    """Put the export of the step before in place, as it stays when the run is killed before the last one."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent.parent / "shorter" / "export", folder)


def renamed(folder: Path) -> None:
    folder.rename(folder.with_name("export.old"))


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("kind, average", [("vqgan", True), ("vqgan", False), ("prior", True)])
def test_the_same_command_mends_the_export_of_a_finished_run(tmp_path, kind, average, capsys):
    build = build_trainer if kind == "vqgan" else build_ar_trainer
    options = {"save_model_every": 1, "use_ema": average}
    build(tmp_path / "shorter", num_train_steps=1, **options).train()
    build(tmp_path / "run", num_train_steps=2, **options).train()
    folder = tmp_path / "run" / "export"
    expected = {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()}
    assert json.loads((folder / RECORD).read_text())["step"] == 2
    for damage in (stale, renamed, cut, shutil.rmtree, lambda folder: (folder / RECORD).unlink()):
        damage(folder)
        trainer = build(tmp_path / "run", num_train_steps=2, **options)
        trainer.train()
        assert {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()} == expected
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert not {name for name in names if name.startswith("export.")}
    cut(folder)
    trainer.train()  # in the same process
    assert {path: sha256_of(path) for path in folder.rglob("*") if path.is_file()} == expected
    weights = load_file(folder / "model.safetensors")
    loaded = load_model_of_any_type(folder).saved_part().state_dict()
    assert weights.keys() == loaded.keys() and all(torch.equal(weights[name], loaded[name]) for name in weights)


def test_a_start_removes_what_a_killed_run_left_beside_the_export(tmp_path):
    build_trainer(tmp_path, num_train_steps=1).train()
    for name in ("export.partial", "export.old"):
        shutil.copytree(tmp_path / "export", tmp_path / name)
    build_trainer(tmp_path, num_train_steps=1)
    assert not list(tmp_path.glob("export.*"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/model.safetensors"])
def test_a_flipped_bit_of_a_weight_is_not_loaded(tmp_path, name):
    """Neither of the model's own weights nor of those of the tokenizer within it."""
    prior = build_ar_trainer(tmp_path / "run").model
    folder = tmp_path / "export"
    write_export(folder, prior.save_pretrained, 3)
    assert load_model_of_any_type(folder) is not None
    flip_a_bit(folder / name)
    with pytest.raises(UserError, match=r"is not the file that .*export.json names: it is damaged") as error:
        load_model_of_any_type(folder)
    assert "\n" not in str(error.value)
    (folder / RECORD).unlink()
    assert load_model_of_any_type(folder) is not None


def test_weights_saved_over_an_export_are_their_own(tmp_path):
    prior = build_ar_trainer(tmp_path / "run").model
    folder = tmp_path / "export"
    write_export(folder, prior.save_pretrained, 3)
    with torch.no_grad():
        next(prior.parameters()).add_(1)
    prior.save_pretrained(folder)
    assert not (folder / RECORD).exists()
    found = load_model_of_any_type(folder)
    assert torch.equal(next(found.parameters()), next(prior.parameters()))
