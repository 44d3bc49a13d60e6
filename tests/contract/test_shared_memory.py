"""Shared memory and descriptors: little of them is enough, and nothing of a killed run stays in /dev/shm."""

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


SMALL = """
import ctypes, subprocess, sys
from vqdist.cli import main
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000):  # mounts of its own
    sys.exit(77)
for command in ("mount --make-rprivate /", "mount -t tmpfs -o size=2m none /dev/shm"):
    if subprocess.run(command.split()).returncode:
        sys.exit(77)
sys.exit(main(sys.argv[1:]))
"""

FEW = """
import resource, sys
from vqdist.cli import main
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard if hard else resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.exit(main(sys.argv[3:]))
"""

BATCHES_OF_3_MB = [
    *"train dvae --data synthetic:64 --image_size 128 --num_tokens 8 --num_layers 2 --hidden_dim 4".split(),
    *"--emb_dim 4 --num_resnet_blocks 0 --batch_size 16 --trainer.num_train_steps 2 --data.num_workers 2".split(),
    *"--trainer.save_results_every 0".split(),
]


@pytest.mark.distributed
def test_processes_load_images_where_shared_memory_is_small(tmp_path):
    """Of 2 MB, less than a batch: as containers have 64."""
    (tmp_path / "small.py").write_text(SMALL)
    command = [str(tmp_path / "small.py"), *BATCHES_OF_3_MB, "--out", str(tmp_path / "run")]
    (job,) = start_ranks(command, tmp_path, ranks=1)
    code = job.wait(200)
    if code == 77:
        pytest.skip("a /dev/shm of its own takes root")
    assert code == 0, job.printed[-3000:]
    assert last_step(tmp_path / "run") == 2


@pytest.mark.distributed
@pytest.mark.parametrize(("soft", "hard", "codes"), [(24, 0, {0}), (24, 24, {0, 2})])
def test_few_descriptors_are_one_line_or_enough(tmp_path, soft, hard, codes):
    """`ulimit -S -n 24`, which may be raised, and `ulimit -n 24`, which may not."""
    (tmp_path / "few.py").write_text(FEW)
    command = [str(tmp_path / "few.py"), str(soft), str(hard), *BATCHES_OF_3_MB, "--out", str(tmp_path / "run")]
    (job,) = start_ranks(command, tmp_path, ranks=1)
    code, printed = job.wait(200), job.printed
    assert code in codes and "Traceback" not in printed, printed[-3000:]
    if code:
        errors = [line for line in printed.splitlines() if line.startswith("vqdist: error: ")]
        assert len(errors) == 1, printed[-3000:]


def maps_of(pid: int) -> list[str]:
    """Return the names of files that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6]
