"""A disk that is full at each phase: one line names the file, and with room the run ends as an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from campaign import (
    PATIENCE,
    SEED,
    TRAIN,
    content_of,
    differences,
    error_of,
    finish,
    next_logs,
    side_by_side,
    start,
    undisturbed,
)
from launching import start_ranks

pytestmark = pytest.mark.distributed
ROOM = 64 * 2**20  # bytes, more than anything here takes


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """Within this context a folder is a file system of so many bytes."""
    folder.mkdir()
    options = f"size={size // 4096 * 4096}"
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder]).returncode:
        pytest.skip("to fill a disk takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def make_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={ROOM}", folder], check=True)


def size_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(3000)
def test_a_run_on_disks_of_every_size(tmp_path, tried):
    """From one that holds nothing to one that holds all but a little: each is full at another file."""
    whole = undisturbed(tmp_path)
    most = size_of(tmp_path / "undisturbed")
    sizes = [4096, 8192, *(random.Random(f"{SEED} disk {number}").randrange(12_288, most) for number in range(28))]

    def attempt(case: tuple[int, int]) -> str:
        number, size = case
        folder = tmp_path / f"disk_{number}"
        with disk(folder, size):
            (job,) = start(folder / "run", beside=folder)
            code = job.wait(PATIENCE)
            if code == 0:  # old checkpoints went before the new ones came
                return "fits"
            line = error_of(job)
            assert code == 2 and "No space left on device" in line and str(folder) in line, f"{size}: {line}"
            complete = sorted(path.parent for path in folder.glob("run/checkpoints/*/manifest.json"))
            complete = [path for path in complete if path.suffix != ".partial"]
            if complete:
                assert str(complete[-1]) in line, line
            make_room(folder)
            finish(folder / "run", beside=folder)
            assert differences(folder / "run", whole) == [], line
        return line.split(str(folder))[1].split()[0]

    seen = side_by_side(attempt, enumerate(sizes))
    phases = sorted({name.replace("/run/", "").split("/")[0] for name in seen} - {"fits"})
    print(seen)
    tried(
        "a disk of a random size that a run fills",
        len(seen) - seen.count("fits"),
        f"one line that names the file (of {', '.join(phases)}) and the newest checkpoint; with room all end as an "
        "undisturbed run, to the bit",
    )


@pytest.mark.timeout(1200)
def test_codes_and_samples_on_disks_that_are_full(tmp_path, tried):
    """`encode` and `sample` name the file; with room the same command gives what one on a large disk gives."""
    finish(tmp_path / "run")
    prior = [*"-m vqdist train prior --data synthetic:64 --model.dim 32 --model.depth 1 --model.heads 2".split()]
    prior += [*"--model.dim_head 32 --trainer.batch_size 4 --trainer.num_train_steps 2 --data.num_workers 0".split()]
    (job,) = start_ranks(
        [*prior, "--tokenizer", str(tmp_path / "run"), "--out", str(tmp_path / "prior")],
        next_logs(tmp_path / "prior"),
        ranks=1,
    )
    assert job.wait(PATIENCE) == 0, job.printed[-3000:]
    commands = {
        "codes": ["encode", str(tmp_path / "run"), "--data", "synthetic:3000", "--shard_size", "500"],
        "samples": ["sample", str(tmp_path / "prior"), "--num", "40", "--batch_size", "4"],
    }
    filled = 0
    for name, command in commands.items():
        (job,) = start_ranks(
            ["-m", "vqdist", *command, "--out", str(tmp_path / name)], next_logs(tmp_path / name), ranks=1
        )
        assert job.wait(PATIENCE) == 0, job.printed[-3000:]
        whole, most = content_of(tmp_path / name), size_of(tmp_path / name)
        for number in range(4):
            folder = tmp_path / f"{name}_{number}"
            with disk(folder, most * number // 4 + 4096):
                arguments = ["-m", "vqdist", *command, "--out", str(folder / "out")]
                (job,) = start_ranks(arguments, next_logs(folder), ranks=1)
                if job.wait(PATIENCE):
                    line = error_of(job)
                    assert "No space left on device" in line and str(folder) in line, line
                    filled += 1
                make_room(folder)
                (job,) = start_ranks(arguments, next_logs(folder), ranks=1)
                assert job.wait(PATIENCE) == 0, job.printed[-3000:]
                assert differences(folder / "out", whole) == []
    assert filled >= 6
    tried(
        "a disk that `encode` or `sample --out FOLDER` fills",
        filled,
        "one line that names the file; with room the same command gives the same files",
    )


@pytest.mark.timeout(1200)
def test_a_limit_of_the_size_of_files(tmp_path, tried):
    """That of `ulimit -f`: the first file that is larger is named, whichever phase writes it."""
    limits = [1024, 4096, 16_384, 65_536, 131_072, 262_144]
    worker = tmp_path / "limited.py"
    worker.write_text(
        "import resource, sys\n"
        "from vqdist.cli import main\n"
        "size = int(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    seen = []
    for size in limits:
        out = tmp_path / f"run_{size}"
        (job,) = start_ranks([str(worker), str(size), *TRAIN, "--out", str(out)], tmp_path / f"logs_{size}", ranks=1)
        code = job.wait(PATIENCE)
        if code:
            assert code == 2 and str(out) in error_of(job), job.printed[-3000:]
            seen.append(size)
        shutil.rmtree(out)
    assert len(seen) >= 3
    tried("a limit of the size of files (`ulimit -f`)", len(seen), "one line that names the file")
