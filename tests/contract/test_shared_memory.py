"""Nothing of a killed run stays in /dev/shm, where DeepSpeed on a CPU keeps a buffer for each rank if it is let."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from launching import last_step, start_ranks

TRAIN = [
    *"-m vqdist train dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --trainer.log_every 1 --trainer.save_results_every 0".split(),
    *"--data.num_workers 0 --trainer.num_train_steps 100000 --trainer.validate_every 0".split(),
]
SHARED = Path("/dev/shm")


@pytest.mark.distributed
@pytest.mark.skipif(not SHARED.is_dir(), reason="this system has no /dev/shm")
@pytest.mark.parametrize("backend", ["deepspeed", pytest.param("accelerate", marks=pytest.mark.nightly)])
def test_killed_ranks_leave_nothing_in_shared_memory(tmp_path, backend):
    """LOCAL_SIZE is what DeepSpeed's launcher says to processes of a single host."""
    before = set(SHARED.iterdir())
    out = tmp_path / "run"
    jobs = start_ranks([*TRAIN, "--backend", backend, "--out", str(out)], tmp_path, LOCAL_SIZE="2")
    deadline = time.monotonic() + 120
    while last_step(out) < 2:
        assert all(job.poll() is None for job in jobs) and time.monotonic() < deadline, [job.printed for job in jobs]
        time.sleep(0.05)
    held = [name for job in jobs for name in maps_of(job.pid) if "allreduce_buffer" in name]
    for job in jobs:
        job.send(signal.SIGKILL)
    assert [job.wait(60) for job in jobs] == [-signal.SIGKILL] * 2
    assert held == []
    # other tests may have files there meanwhile, and remove them
    assert [path.name for path in set(SHARED.iterdir()) - before if path.name.startswith("deepspeed")] == []


def maps_of(pid: int) -> list[str]:
    """Return the names of files that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6]
