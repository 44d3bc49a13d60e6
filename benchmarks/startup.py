"""The CPU seconds of a start over those of `import torch`, and the seconds of a launch on two processes.

Starts are measured in turns with `import torch`, so that a busy machine slows both. The model is the smallest there
is, so a launch is the launcher, imports, the meeting of the ranks, and the checks before the first step. A resume is
also the checks of a checkpoint. Caches are warm.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
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
TORCH, ADAM = "import torch", "import torch; torch.optim.Adam([torch.zeros(1, requires_grad=True)])"
COMMAND = "import sys; from vqdist.cli import main; sys.exit(main({arguments!r}.split()))"
MISSPELT = "train vqgan --data digits --image_size 32 --out RUN --trainer.batch_size 4 --trainer.epoch 2"
MODEL = "dim=16, layers=1, codebook_size=16, use_vgg_and_gan=False, quantizer='vq', vq_kwargs={'kmeans_init': False}"
SAVE = f"from vqdist import VQGanVAE; VQGanVAE({MODEL}).save_pretrained(FOLDER)"
TRAINING = (
    f"import torch; from vqdist import VQGanVAE, VQGanVAETrainer; vae = VQGanVAE({MODEL})\n"
    "torch.optim.Adam(vae.parameters())"
)
ENCODING = (
    "import torch; from vqdist import Tokenizer\nTokenizer.from_pretrained(FOLDER, 8).encode(torch.rand(1, 3, 8, 8))"
)
# code, what it is compared with, and the bound of the ratio
STARTS = {
    "vqdist --help": (COMMAND.format(arguments="--help"), TORCH, 0.5),
    "vqdist train vqgan --help": (COMMAND.format(arguments="train vqgan --help"), TORCH, 0.5),
    "a misspelt option": (COMMAND.format(arguments=MISSPELT), TORCH, 0.5),
    "trainer, model and Adam": (TRAINING, ADAM, 1.2),
    "a tokenizer's encode": (ENCODING, TORCH, 2.0),
}
TIMEOUT = 300.0  # seconds


def steps_logged(folder: Path) -> int:
    """Return the last step in a run's log lines, or 0."""
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


def cpu_seconds(code: str) -> float:
    """CPU seconds of a new interpreter that runs this code, which may end as a command does for a mistake."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    if "Traceback" in done.stderr:
        raise RuntimeError(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows_of_starts(rounds: int) -> list[Row]:
    """Return the median CPU seconds of each start over those of what it is compared with, taken in turns."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cpu_seconds(SAVE.replace("FOLDER", repr(folder)))
        taken: dict[str, list[float]] = {}
        for _ in range(rounds):
            for code in {TORCH, ADAM, *(code for code, _, _ in STARTS.values())}:
                taken.setdefault(code, []).append(cpu_seconds(code.replace("FOLDER", repr(folder))))
        for what, (code, base, bound) in STARTS.items():
            seconds, under = statistics.median(taken[code]), statistics.median(taken[base])
            over = "import torch" if base is TORCH else "import torch and an Adam"
            detail = f"{seconds:.2f} against {under:.2f} s of CPU, medians of {rounds}"
            rows.append(Row(f"{what} / {over}", seconds / under, at_most=bound, detail=detail))
    return rows


def run(quick: bool = False) -> list[Row]:
    """Rows of the table; the first launch of each backend fills the caches and is not counted."""
    rows = rows_of_starts(1 if quick else 3)
    for name, options in BACKENDS.items():
        pairs = [start_and_resume(options) for _ in range(2 if quick else 4)][1:]
        for what, numbers in zip(("start", "resume"), zip(*pairs, strict=True), strict=True):
            detail = f"from {min(numbers):.1f} to {max(numbers):.1f} s in {len(numbers)} launches"
            rows.append(Row(f"{name}: {what} on 2 processes", statistics.median(numbers), "s", detail=detail))
    return rows
