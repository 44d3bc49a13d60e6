"""A manifest is believed only whole: whatever is changed in one, the checkpoint counts as damaged and is said to."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import build_dvae_trainer, train_steps, weights_of

from vqdist.errors import UserError
from vqdist.manifest import FIRST_KEYS, MANIFEST, checksum_of, read_manifest, sealed

CONTENT = {
    "step": 12,
    "position": 48,
    "world_size": 1,
    "backend": "local",
    "global_batch": {"batch_size": 4, "grad_accum_every": 1, "images": 4},
    "validation_broken_off": False,
    "files": {"ema.safetensors": {"bytes": 10, "sha256": "0" * 64}, "generator/a": {"bytes": 1, "sha256": "1" * 64}},
}
NEEDED = ("position", "world_size", "backend")


def first_version(content: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest that was written before there were checksums of it."""
    return {name: value for name, value in content.items() if name in FIRST_KEYS}


def written(folder: Path, content: Any, name: str = "step_00000012") -> Path:
    """Write a checkpoint's folder with this manifest."""
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refused(folder: Path, content: Any) -> str:
    """Return the line in which this manifest is refused."""
    with pytest.raises(UserError) as error:
        read_manifest(written(folder, content), NEEDED)
    assert "\n" not in str(error.value) and MANIFEST in str(error.value)
    return str(error.value)


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every entry of nested objects."""
    if not isinstance(content, dict):
        return []
    below = [[(*path, name), *places(value, (*path, name))] for name, value in content.items()]
    return list(itertools.chain.from_iterable(below))


def changed(content: dict, path: tuple, change: Callable[[dict, str], None]) -> dict:
    """Return a copy in which the entry at this path is changed."""
    content = copy.deepcopy(content)
    holder = content
    for name in path[:-1]:
        holder = holder[name]
    change(holder, path[-1])
    return content


def other(value: Any) -> Any:
    """Return a value of the same type, near to this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return f"{value[:-1]}x" if isinstance(value, str) else {**value, "new": 1}


def set_other(holder: dict, name: str) -> None:
    holder[name] = other(holder[name])


def rename(holder: dict, name: str) -> None:
    holder[f"{name}s"] = holder.pop(name)


def remove(holder: dict, name: str) -> None:
    del holder[name]


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    content = sealed(CONTENT)
    assert read_manifest(written(tmp_path, content), NEEDED) == content
    assert read_manifest(written(tmp_path, json.dumps(content, indent=2, sort_keys=True)), NEEDED) == content
    assert read_manifest(written(tmp_path, content, "anywhere"), NEEDED) == content  # as `Trainer.save(path)` does
    assert read_manifest(written(tmp_path, first_version(content)), NEEDED) == CONTENT
    oldest = {name: value for name, value in CONTENT.items() if name in {"step", "files", *NEEDED}}
    assert read_manifest(written(tmp_path, oldest), NEEDED) == oldest


@pytest.mark.parametrize("change", [set_other, rename, remove])
@pytest.mark.parametrize("path", places(sealed(CONTENT)), ids=".".join)
def test_no_entry_can_be_changed(tmp_path, path, change):
    assert "is damaged (" in refused(tmp_path, changed(sealed(CONTENT), path, change))


def test_an_entry_more_is_no_entry_of_it(tmp_path):
    assert "its own checksum differs" in refused(tmp_path, {**sealed(CONTENT), "note": 1})
    assert "unknown entry 'note' and no checksum" in refused(tmp_path, {**CONTENT, "note": 1})


@pytest.mark.parametrize("name", ["step", "files", *NEEDED])
def test_without_a_checksum_no_needed_entry_can_be_renamed(tmp_path, name):
    for change in (rename, remove):
        assert f"it has no {name!r}" in refused(tmp_path, changed(CONTENT, (name,), change))


WRONG = {
    "step": [-1, 12.0, "12", None, True, [12], 2**63],
    "position": [-1, 48.0, "48", None, False, {}, 10**30],
    "world_size": [0, -1, 1.0, "1", None, True],
    "backend": [1, None, ["local"]],
    "validation_broken_off": [0, "false", None],
    "global_batch": [None, 4, [], {}, {"batch_size": 4}, {**CONTENT["global_batch"], "more": 1}]
    + [{**CONTENT["global_batch"], name: value} for name in CONTENT["global_batch"] for value in (0, "4", 4.0, None)],
    "files": [None, {}, [], "a", {"a": 1}, {"a": {}}, {"a": {"bytes": -1, "sha256": ""}}, {"a": {"bytes": 1}}]
    + [{name: {"bytes": 1, "sha256": "0" * 64}} for name in ("", "/etc/hostname", "../a", "a/../../b")],
}


@pytest.mark.parametrize("seal", [sealed, first_version])
@pytest.mark.parametrize("name", WRONG)
def test_types_and_ranges_are_checked(tmp_path, name, seal):
    for value in WRONG[name]:
        assert f"is damaged ({name} is not " in refused(tmp_path, seal({**CONTENT, name: value})), value


@pytest.mark.parametrize("seal", [sealed, first_version])
def test_the_step_is_that_of_the_folder(tmp_path, seal):
    path = written(tmp_path, seal(CONTENT), "step_00000009")
    with pytest.raises(
        UserError, match=r"step_00000009/manifest.json is damaged \(it is of step 12\); remove .*_00000009"
    ):
        read_manifest(path)


def test_another_version_is_said(tmp_path):
    content = {name: value for name, value in {**sealed(CONTENT), "version": 3}.items() if name != "sha256"}
    assert "its version is 3, and 2 is expected" in refused(tmp_path, {**content, "sha256": checksum_of(content)})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "12", "{}", "\x00", "[" * 100_000, '{"step": ' + "9" * 5000 + "}"]
)
def test_what_is_no_manifest_is_one_line(tmp_path, text):
    refused(tmp_path, text)


def test_every_cut_is_seen(tmp_path):
    text = json.dumps(sealed(CONTENT), indent=2)
    for end in range(0, len(text), 7):
        refused(tmp_path, text[:end])


# ------------------------------------------------------------------------------------------------- of a run

TAMPERINGS = {
    "position": lambda content: {**content, "position": content["position"] - 8},
    "step": lambda content: {**content, "step": 1},
    "world_size": lambda content: {**content, "world_size": 3},
    "global_batch": lambda content: {**content, "global_batch": {**content["global_batch"], "images": 8}},
    "broken off": lambda content: {**content, "validation_broken_off": True},
    "renamed position": lambda content: changed(content, ("position",), rename),
    "renamed batch": lambda content: changed(content, ("global_batch",), rename),
    "renamed file": lambda content: changed(content, ("files", "ema.safetensors"), rename),
    "no file": lambda content: changed(content, ("files", "ema.safetensors"), remove),
    "no checksum": lambda content: changed(content, ("sha256",), remove),
    "sealed anew for another step": lambda content: sealed({**content, "step": 1}),
    "first version without position": lambda content: changed(first_version(content), ("position",), remove),
}


def test_a_run_takes_the_checkpoint_before_one_that_cannot_be_believed(tmp_path, capsys):
    trainer = build_dvae_trainer(tmp_path, save_model_every=1)
    older = train_steps(trainer, 1)
    train_steps(trainer, 1)
    newest = trainer.checkpoints.latest()
    text = (newest / MANIFEST).read_text()
    tampered = {name: json.dumps(tamper(json.loads(text))) for name, tamper in TAMPERINGS.items()}
    for name, content in {**tampered, "cut": text[:-30], "empty": ""}.items():
        (newest / MANIFEST).write_text(content)
        capsys.readouterr()
        resumed = build_dvae_trainer(tmp_path, save_model_every=1)
        said = capsys.readouterr().err
        assert (resumed.step, resumed.position, resumed.global_batch) == (1, 4, 4), name
        assert all(torch.equal(older[key], tensor) for key, tensor in weights_of(resumed).items()), name
        assert f"warning: {newest / MANIFEST} is" in said and "step_00000001: step 1 of" in said, said
    for manifest in (text, json.dumps(first_version(json.loads(text)))):
        (newest / MANIFEST).write_text(manifest)
        assert build_dvae_trainer(tmp_path).step == 2


def test_a_run_without_another_checkpoint_is_refused_with_one_line(tmp_path):
    trainer = build_dvae_trainer(tmp_path, save_model_every=1, keep_checkpoints=1)
    train_steps(trainer, 1)
    path = trainer.checkpoints.latest() / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "position": 0}))
    with pytest.raises(
        UserError, match=r"no checkpoint of .* can be loaded; .*manifest.json is damaged \(its own"
    ) as error:
        build_dvae_trainer(tmp_path)
    assert "\n" not in str(error.value)
