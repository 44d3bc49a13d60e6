"""Each file of a checkpoint, a run and an export, damaged in four ways: noticed in one line, or healed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from campaign import (
    PATIENCE,
    SEED,
    content_of,
    differences,
    error_of,
    finish,
    side_by_side,
    start,
)

from vqdist import VQGanVAE
from vqdist.errors import UserError

pytestmark = pytest.mark.distributed


def truncated(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(1, len(content))])


def flipped(path: Path, chance: random.Random) -> None:
    """One bit of one byte."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def emptied(path: Path, _chance: random.Random) -> None:
    path.write_bytes(b"")


def removed(path: Path, _chance: random.Random) -> None:
    path.unlink()


DAMAGES = [truncated, flipped, emptied, removed]


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """One that was killed before its last checkpoint was complete, with those of steps 8 and 10, and its end."""
    folder = tmp_path_factory.mktemp("runs")
    finish(folder / "whole")
    shutil.copytree(folder / "whole", folder / "half")
    shutil.rmtree(folder / "half" / "checkpoints" / "step_00000012")
    return folder / "half", folder / "whole"


@pytest.mark.timeout(3000)
def test_each_file_of_a_run(tmp_path, tried, runs):
    """It goes on to the end of the undamaged run, or ends at once with one line; nothing else is trained.

    Of the log and the pictures nobody reads what is older than the checkpoint, so they themselves may stay damaged. A
    model card is people's to edit.
    """
    half, whole = runs
    expected = content_of(whole)
    assert expected.keys() > {"checkpoints/step_00000012/manifest.json", "export/model.safetensors", "config.json"}

    def attempt(case: tuple[str, int]) -> str:
        name, number = case
        damage = DAMAGES[number]
        out = tmp_path / f"{name.replace('/', '_')}_{damage.__name__}"
        shutil.copytree(half, out)
        damage(out / name, random.Random(f"{SEED} {name} {number}"))
        (job,) = start(out)
        code = job.wait(PATIENCE)
        words = f"{name} {damage.__name__}"
        assert "Traceback" not in job.printed, f"{words}\n{job.printed[-4000:]}"
        if code == 2:
            assert name.rpartition("/")[2] in error_of(job) or "config.json" in name, f"{words}: {error_of(job)}"
            seen = "refused"
        else:
            assert code == 0, f"{words}\n{job.printed[-4000:]}"
            history = [name] if name.startswith(("metrics.jsonl", "results/")) or name.endswith("README.md") else []
            assert differences(out, expected, but=history) == [], words
            seen = "healed"
        shutil.rmtree(out)
        return seen

    names = files_in(half)
    of_newest = [name for name in names if "step_00000010" in name or not name.startswith("checkpoints/")]
    cases = [(name, number) for name in of_newest for number in range(len(DAMAGES))]
    seen = side_by_side(attempt, cases)
    tried(
        f"each of {len(of_newest)} files of a run truncated, flipped, emptied, removed; then resumed",
        len(cases),
        f"{seen.count('healed')} end as the undamaged run, to the bit; {seen.count('refused')} refused in one line",
    )


@pytest.mark.timeout(3000)
def test_each_file_of_the_export_of_a_finished_run(tmp_path, tried, runs):
    """Read as it is, it says so or gives the right weights; the run's own command makes it anew."""
    _, whole = runs
    expected = content_of(whole)
    right = VQGanVAE.from_pretrained(whole / "export").saved_part().state_dict()
    cases = [(name, number) for name in files_in(whole / "export") for number in range(len(DAMAGES))]

    def attempt(case: tuple[str, int]) -> str:
        name, number = case
        damage = DAMAGES[number]
        words = f"{name} {damage.__name__}"
        out = tmp_path / f"{name}_{damage.__name__}"
        shutil.copytree(whole, out)
        damage(out / "export" / name, random.Random(f"{SEED} export {name} {number}"))
        seen = "read"
        try:
            found = VQGanVAE.from_pretrained(out / "export").saved_part().state_dict()
            assert all(torch.equal(found[key], value) for key, value in right.items()), words
        except UserError as error:
            assert "\n" not in str(error)
            seen = "refused"
        finish(out)
        but = ["export/README.md"]  # which people edit
        assert differences(out, expected, but=but) == [], words
        shutil.rmtree(out)
        return seen

    seen = [attempt(case) for case in cases]
    tried(
        f"each of {len(cases) // len(DAMAGES)} files of an export truncated, flipped, emptied, removed",
        len(cases),
        f"{seen.count('refused')} refused in one line, {seen.count('read')} give the right weights; the run's own "
        "command, started again at its end, mends all",
    )
