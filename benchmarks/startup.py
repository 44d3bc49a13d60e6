"""How long a launch takes: seconds from the command to the end of the first step, on two processes, caches warm.

The model is the smallest there is, so what is measured is the launcher, imports, the meeting of the ranks, and the
checks before the first step; of a resume also the checks of a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, Row, environment, torchrun

TRAIN = [
    *"-m vqdist train dvae --data synthetic:64 --image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8".split(),
    *"--emb_dim 8 --num_resnet_blocks 0 --batch_size 4 --data.num_workers 0 --data.valid_frac 0".split(),
    *"--trainer.log_every 1 --trainer.save_results_every 0 --trainer.validate_every 0".split(),
]
BACKENDS = {
    "accelerate": ["--backend", "accelerate"],
    "ZeRO 2": ["--backend", "deepspeed", "--deepspeed_config", str(ROOT / "deepspeed_configs" / "zero2.json")],
}
TIMEOUT = 300.0  # seconds


def steps_logged(folder: Path) -> int:
    """The last step in a run's lines of numbers, or 0."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # a last line without its end is not whole
    return json.loads(lines[-1])["step"] if lines else 0


def seconds_until(step: int, folder: Path, options: list[str]) -> float:
    """Start a training on two processes, wait until it has made this step, and tell it to stop.

    Raises:
        RuntimeError: it ended before, or took too long.
    """
    command = torchrun([*TRAIN, "--out", str(folder), "--trainer.num_train_steps", "1000000", *options])
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **pipes)
    try:
        while steps_logged(folder) < step:
            if process.poll() is not None or time.perf_counter() - began > TIMEOUT:
                raise RuntimeError(f"{' '.join(command)} made no step {step}")
            time.sleep(0.01)
        taken = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return taken


def start_and_resume(options: list[str]) -> tuple[float, float]:
    """Seconds until the first step of a new run, and until the next one when it is resumed."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = seconds_until(1, run, options)
        saved = steps_logged(run)
        return start, seconds_until(saved + 1, run, options)


def run(quick: bool = False) -> list[Row]:
    """Rows of the table; the first launch of each backend fills the caches and is not counted."""
    rows = []
    for name, options in BACKENDS.items():
        pairs = [start_and_resume(options) for _ in range(2 if quick else 4)][1:]
        for what, numbers in zip(("start", "resume"), zip(*pairs, strict=True), strict=True):
            detail = f"from {min(numbers):.1f} to {max(numbers):.1f} s in {len(numbers)} launches"
            rows.append(Row(f"{name}: {what} on 2 processes", statistics.median(numbers), "s", detail=detail))
    return rows
