"""The curves of one run of two players on every backend, and of one that is killed and resumed on fewer ranks.

    python -m benchmarks.curves

Backend local is one process with batches of 16, every other two ranks with 8 each: the same global batches. Ranks are
forks of a process that has imported everything. A run whose curves stand in runs/results/curves.jsonl is not made
again.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from vqdist.files import METRICS, lines_of_metrics

LINES = record.ROOT / "runs" / "results" / "curves.jsonl"
STEPS, GLOBAL_BATCH, JOINS = 200, 16, 50
UP_TO = (JOINS, 100, STEPS)  # of differences
KILLED_AFTER, SAVED_EVERY = 130, 50
BACKENDS = {
    "local": "local, one process",
    "ddp": "Accelerate (DDP)",
    "fsdp2": "Accelerate (FSDP2)",
    **{f"zero{stage}": f"DeepSpeed (ZeRO {stage})" for stage in range(4)},
}
NUMBERS = ("recon_loss", "adversarial_loss", "generator_grad_norm", "discr_loss", "discriminator_grad_norm")
RESUMED = "resumed"
MODEL = {"dim": 16, "layers": 2, "channels": 1, "quantizer": "vq", "codebook_size": 64, "perceptual": "none"}
MODEL |= {"discr_layers": 2, "vq_kwargs": {"codebook_dim": 16, "decay": 0.9, "kmeans_init": False}}
TRAINER: dict[str, Any] = {
    "folder": "digits",
    "image_size": 28,
    "augment": False,
    "num_train_steps": STEPS,
    "lr": 1e-3,
    "max_grad_norm": 1.0,
    "discr_max_grad_norm": 1.0,
    "discriminator_start": JOINS,
    "discriminator_warmup_steps": 20,
    "adversarial_weight": 0.1,
    "apply_grad_penalty_every": 0,  # no sharded backend has it
    "log_every": 1,
    "num_workers": 0,
    "validate_every": 0,
    "save_results_every": 0,
    "save_model_every": SAVED_EVERY,
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}
FSDP2 |= {"FSDP_MIN_NUM_PARAMS": "500"}  # so that each of the tiny networks is several blocks


def train(backend: str, ranks: int, folder: Path) -> None:
    """Train this rank's part of a run, from the last checkpoint if there is one."""
    from vqdist import VQGanVAE, VQGanVAETrainer

    options: dict[str, Any] = {"backend": "accelerate"}
    if backend == "local":
        options = {"backend": "local"}
    elif backend.startswith("zero"):
        stage = int(backend.removeprefix("zero"))
        config = record.ROOT / "deepspeed_configs" / f"{backend}.json"
        options = {"backend": "deepspeed", "deepspeed_config": str(config) if stage else None}
    torch.manual_seed(0)
    batch = GLOBAL_BATCH // ranks
    with VQGanVAETrainer(
        VQGanVAE(**MODEL), results_folder=str(folder), batch_size=batch, **TRAINER, **options
    ) as trainer:
        trainer.train()


def fork_ranks(backend: str, ranks: int, folder: Path) -> list[int]:
    """Start the ranks of a run, and return their process ids."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launched = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            if backend != "local":
                os.environ |= {name: str(value) for name, value in launched.items()}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **(FSDP2 if backend == "fsdp2" else {})}
            _end_with(lambda: train(backend, ranks, folder), folder.with_name(f"{folder.name}_{rank}.log"))
        started.append(pid)
    return started


def _end_with(work: Callable[[], None], log: Path) -> None:
    """Do the work of a forked process, which ends here."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int], folder: Path) -> None:
    """Wait for the ranks of a run; raise `RuntimeError` with what rank 0 said if one failed."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        said = "\n".join(path.read_text()[-3000:] for path in sorted(folder.parent.glob(f"{folder.name}_*.log")))
        raise RuntimeError(f"ranks of {folder.name} ended with {codes}\n{said}")


def curves_of(folder: Path) -> dict[str, list[float]]:
    """Return the numbers of every step of a run, by name; nan before the discriminator joins."""
    with (folder / METRICS).open("rb") as file:
        lines = [line for _, line in lines_of_metrics(file)]
    by_step = {line["step"]: line for line in lines if "recon_loss" in line}
    return {name: [by_step[step].get(name, float("nan")) for step in range(1, STEPS + 1)] for name in NUMBERS}


def last_step(folder: Path) -> int:
    """Return the step of the last whole log line, 0 before the first."""
    if not (folder / METRICS).is_file():
        return 0
    with (folder / METRICS).open("rb") as file:
        return max((line["step"] for _, line in lines_of_metrics(file)), default=0)


def undisturbed(backend: str) -> dict[str, Any]:
    """Train on a backend from the first step to the last, and return its curves."""
    ranks = 1 if backend == "local" else 2
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / backend
        wait(fork_ranks(backend, ranks, folder), folder)
        return {"ranks": ranks, "curves": curves_of(folder)}


def killed_and_resumed() -> dict[str, Any]:
    """Train on two ranks by DDP, kill both, go on with one process, and return the curves of the whole."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / RESUMED
        pids = fork_ranks("ddp", 2, folder)
        while last_step(folder) < KILLED_AFTER:
            time.sleep(0.05)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        killed_at = last_step(folder)
        saved = (folder / "checkpoints").glob("step_????????")
        saved_at = max(int(path.name.removeprefix("step_")) for path in saved)
        wait(fork_ranks("local", 1, folder), folder)
        return {"ranks": [2, 1], "killed_at": killed_at, "resumed_from": saved_at, "curves": curves_of(folder)}


def differences(curves: Mapping[str, list[float]], reference: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Return the largest difference of each number up to each step of `UP_TO`, as a share of the largest value."""
    found: dict[str, list[float]] = {}
    for name, values in reference.items():
        pairs = list(zip(curves[name], values, strict=True))
        scale = max((abs(b) for _, b in pairs if b == b), default=1.0)
        found[name] = [max((abs(a - b) for a, b in pairs[:end] if b == b), default=0.0) / scale for end in UP_TO]
    return found


def main() -> None:
    """Make the runs that have no line yet, and write their curves and differences."""
    for name in ("backends.accelerate", "backends.deepspeed", "trainers.vqgan"):  # for all ranks at once
        importlib.import_module(f"vqdist.{name}")
    torch.set_num_threads(1)
    keys = [*BACKENDS, RESUMED]
    rows = record.once_each(LINES, keys, lambda key: killed_and_resumed() if key == RESUMED else undisturbed(key))
    runs = {row.pop("key"): row for row in rows}
    for name, run in runs.items():
        run["difference"] = differences(run["curves"], runs["ddp" if name == RESUMED else "local"]["curves"])
    for run in runs.values():
        run["curves"] = {
            name: [float(f"{value:.5g}") if value == value else None for value in values]
            for name, values in run["curves"].items()
        }
    print(
        record.write(
            "curves", {"steps": STEPS, "global_batch": GLOBAL_BATCH, "joins": JOINS, "up_to": UP_TO, "runs": runs}
        )
    )


if __name__ == "__main__":
    main()
