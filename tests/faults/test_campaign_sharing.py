"""Folders that several use at once, and a process that lasts: no one is in another's way, and nothing grows."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from campaign import PATIENCE, WORKERS, content_of, differences, error_of, next_logs, start, undisturbed
from launching import start_ranks

from vqdist import VQGanVAE

pytestmark = pytest.mark.distributed
PAIRS, READS, STEPS, EVERY = 10, 200, 5000, 250


@pytest.mark.timeout(1800)
def test_two_processes_in_one_folder(tmp_path, tried):
    """One of the two trains, undisturbed; the other names it and ends."""
    whole = undisturbed(tmp_path)
    for number in range(PAIRS):
        out = tmp_path / f"pair_{number}"
        jobs = [start(out)[0] for _ in range(2)]
        codes = [job.wait(PATIENCE) for job in jobs]
        assert sorted(codes) == [0, 2], [job.printed[-3000:] for job in jobs]
        line = error_of(jobs[codes.index(2)])
        assert f"another process writes {out} (process {jobs[codes.index(0)].pid} on " in line, line
        assert differences(out, whole) == []
        shutil.rmtree(out)
    tried("two processes that start in one folder", PAIRS, "one is refused by name, the other's run is undisturbed")


@pytest.mark.timeout(1800)
def test_an_export_is_read_while_it_is_replaced(tmp_path, tried):
    """By a run that exports every step; each read gives the weights of a single step."""
    out = tmp_path / "run"
    (job,) = start(
        out, *"--trainer.num_train_steps 100000 --trainer.save_model_every 1 --trainer.validate_every 0".split()
    )
    while job.poll() is None and not (out / "export" / "export.json").exists():
        os.sched_yield()
    seen = set()
    for _ in range(READS):
        assert job.poll() is None, job.printed[-3000:]
        model = VQGanVAE.from_pretrained(out / "export")
        assert all(bool(value.isfinite().all()) for value in model.state_dict().values() if value.is_floating_point())
        seen.add(
            float(sum(value.double().sum() for value in model.state_dict().values() if value.is_floating_point()))
        )
    job.send(15)
    assert job.wait(PATIENCE) == 75 and len(seen) > 5
    tried("reads of an export that a run replaces at every step", READS, f"none failed; {len(seen)} exports were seen")


@pytest.mark.timeout(3000)
def test_a_long_run_grows_in_nothing(tmp_path, tried):
    """Of 5,000 steps, with checkpoints, validations, pictures, and a loader's process."""
    worker = str(WORKERS / "flat_worker.py")
    (job,) = start_ranks([worker, str(tmp_path), str(STEPS), str(EVERY)], next_logs(tmp_path / "flat"), ranks=1)
    assert job.wait(2400) == 0, job.printed[-3000:]
    rows = json.loads((tmp_path / "measured.json").read_text())
    warm = rows[len(rows) // 4 :]
    memory = torch.tensor([row[1] for row in warm], dtype=torch.float64)
    descriptors, threads = ({row[column] for row in warm} for column in (2, 3))
    half = len(memory) // 2
    growth = float(memory[half:].median() - memory[:half].median())
    print(rows)
    assert len(rows) == STEPS // EVERY and len(descriptors) == 1 and len(threads) == 1, rows
    # of a leak of one image a step it would be 6 MB; what allocators keep comes and goes
    assert growth < 0.01 * float(memory.median()), rows
    tried(
        f"looks at the memory, descriptors and threads of one process in {STEPS:,} steps",
        len(warm),
        f"{descriptors.pop()} descriptors and {threads.pop()} threads at each; memory in the second half of them "
        f"{growth / float(memory.median()):+.2%}",
    )


def test_what_the_campaign_compares_tells_runs_apart(tmp_path):
    """One bit of a weight, a lost line of the log and a file too many are seen."""
    whole = undisturbed(tmp_path)
    out = tmp_path / "undisturbed"
    assert differences(out, whole) == [] and len(whole) > 30
    weights = out / "checkpoints" / "step_00000012" / "ema.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    (out / "export.partial").mkdir()
    (out / "export.partial" / "config.json").touch()
    assert differences(out, whole) == [
        "checkpoints/step_00000012/ema.safetensors",
        "export.partial/config.json",
        "metrics.jsonl",
    ]
    assert content_of(out).keys() - whole.keys() == {"export.partial/config.json"}
