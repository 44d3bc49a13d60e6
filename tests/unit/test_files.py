"""Small files of a run, an export and stored codes: one that is none, by its size or kind, is one line."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from vqdist.cli import main
from vqdist.encoding import _write_array
from vqdist.errors import UserError
from vqdist.export import is_whole
from vqdist.files import LARGEST_SMALL, METRICS, CannotWrite, lines_of_metrics, read_json, read_small, write_json
from vqdist.manifest import read_manifest
from vqdist.models.pretrained import load_model_of_any_type

HUGE = 2**31  # bytes, none of them on the disk


def huge(path: Path) -> Path:
    path.touch()
    os.truncate(path, HUGE)
    return path


READERS = {
    "config.json": load_model_of_any_type,
    "manifest.json": read_manifest,
    "codes.json": lambda folder: read_json(folder / "codes.json"),
    "config.yaml": lambda folder: main(["train", "dvae", "--config", str(folder / "config.yaml")]),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_too_large_is_not_read(tmp_path, name, capsys):
    huge(tmp_path / name)
    (tmp_path / "model.safetensors").touch()
    tracemalloc.start()
    try:
        READERS[name](tmp_path)
        said = capsys.readouterr().err
    except UserError as error:
        said = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{tmp_path / name} has {HUGE:,} bytes" in said and "are the most" in said
    assert peak < HUGE / 8


def test_a_record_that_is_too_large_is_none(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    huge(tmp_path / "export.json")
    assert is_whole(tmp_path)  # as an export from before there were records


def test_the_most_bytes_are_read_and_no_more(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": "b"})
    size = path.stat().st_size
    assert len(read_small(path, size)) == size and size < LARGEST_SMALL
    with pytest.raises(UserError, match=f"has {size} bytes, and {size - 1} are the most"):
        read_small(path, size - 1)


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="is a pipe, socket or device"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="is a pipe, socket or device"):
        read_json(Path("/dev/zero"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_codes_that_do_not_fit_on_the_disk_name_their_file(tmp_path):
    (tmp_path / "codes_00000.npy").symlink_to("/dev/full")
    with pytest.raises(CannotWrite, match=r"codes_00000.npy cannot be written: No space left on device"):
        _write_array(tmp_path / "codes_00000.npy", np.zeros(2**16, dtype=np.int64))


def test_log_lines_are_read_one_at_a_time(tmp_path):
    path = huge(tmp_path / METRICS)  # a line of nothing but zeros
    with path.open("ab") as file:
        file.write(b'\n{"step": 1}\n{"step": 2}')
    tracemalloc.start()
    with path.open("rb") as file:
        assert [line["step"] for _, line in lines_of_metrics(file)] == [1, 2]
    assert tracemalloc.get_traced_memory()[1] < HUGE / 64
    tracemalloc.stop()
