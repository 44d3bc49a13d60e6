"""Shared by the campaign of faults: runs of everything that is saved, their comparison, and errors of one line."""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from launching import ROOT, start_ranks
from safetensors.torch import load_file
from warm import Job

SEED = 20
WORKERS = ROOT / "tests" / "workers"
STEPS = 12
# two players, an average, replaced codes, checkpoints, validations and pictures, none at the same step as all others
TRAIN = [
    *"train vqgan --data synthetic:64 --image_size 16 --data.num_workers 0 --model.dim 16 --model.layers 2".split(),
    *"--model.discr_layers 2 --model.perceptual none --model.quantizer vq --model.codebook_size 16".split(),
    *("--model.vq_kwargs", '{"codebook_dim": 8, "threshold_ema_dead_code": 2}'),
    *"--trainer.batch_size 4 --trainer.save_model_every 2 --trainer.log_every 1 --trainer.validate_every 3".split(),
    *f"--trainer.save_results_every 5 --trainer.num_train_steps {STEPS}".split(),
]
MEASURED = {"images_per_second", "data_wait", "memory_gb", "valid/seconds", "valid/time_share"}  # of each run its own
HOURS = rb"[\d.e-]+ CPU hours"  # of a model card
AT_ONCE = 2  # of what the campaign tries, side by side
PATIENCE = 300.0  # seconds for a run that takes two of a core


def start(
    out: Path, *options: str, ranks: int = 1, program: Sequence[str] = ("-m", "vqdist"), beside: Path | None = None
) -> list[Job]:
    """Start the run of the campaign in this folder, without a launcher; one process or several.

    Args:
        out: the folder of the run.
        options: further ones.
        ranks: processes.
        program: that begins the command.
        beside: the folder beside which the processes' logs lie, by default the run's own.
    """
    command = [*program, *TRAIN, "--out", str(out), *options]
    return start_ranks(command, next_logs(beside or out), ranks=ranks)


_numbers = itertools.count()


def next_logs(out: Path) -> Path:
    """Return a folder of its own beside a run, for what its processes print."""
    return out.with_name(f"{out.name}_logs") / f"{next(_numbers):04d}"


def finish(out: Path, *options: str, ranks: int = 1, beside: Path | None = None) -> list[Job]:
    """Let the run of a folder go on to its end; `start` explains the arguments."""
    jobs = start(out, *options, ranks=ranks, beside=beside)
    codes = [job.wait(PATIENCE) for job in jobs]
    assert codes == [0] * ranks, (codes, [job.printed[-3000:] for job in jobs])
    return jobs


def side_by_side(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Return a function of each item; some run at a time, each of which waits for a process."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(function, items))


# ------------------------------------------------------------------------------------- comparison


def content_of(out: Path) -> dict[str, Any]:
    """Return all that a finished run holds, by file, without what depends on the clock, as its history does."""
    but = (".lock", "events.jsonl")
    paths = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in but)
    return {path.relative_to(out).as_posix(): _content_of_file(path, out) for path in paths}


def _content_of_file(path: Path, out: Path) -> Any:
    if path.suffix == ".safetensors":
        return {name: _bits(tensor) for name, tensor in load_file(path).items()}
    if path.suffix == ".pt":
        return _plain(torch.load(path, weights_only=True))
    if path.name == "metrics.jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    if path.name == "manifest.json" and "checkpoints" in path.parts:
        manifest = json.loads(path.read_text())
        to_come = dict.fromkeys(("validation_broken_off", "picture_broken_off", "sha256"))  # made up for by now
        return {**manifest, "files": sorted(manifest["files"]), **to_come}
    if path.name == "export.json":
        record = json.loads(path.read_text())
        return {**record, "files": sorted(record["files"])}
    content = path.read_bytes().replace(bytes(out), b"OUT")
    return re.sub(HOURS, b"hours", content) if path.name == "README.md" else content


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if name not in MEASURED}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return _bits(value) if isinstance(value, torch.Tensor) else value


def _bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def differences(out: Path, whole: dict[str, Any], *, but: Sequence[str] = ()) -> list[str]:
    """Return the files of a run that are not those of an undisturbed one, to the bit; none where all are equal.

    Args:
        out: the run.
        whole: content of the undisturbed one.
        but: beginnings of paths that are not compared.
    """
    found = content_of(out)
    return sorted(
        name
        for name in found.keys() | whole.keys()
        if not name.startswith(tuple(but)) and found.get(name) != whole.get(name)
    )


def undisturbed(folder: Path, **options: Any) -> dict[str, Any]:
    """Return the content of a run that nobody disturbed."""
    finish(folder / "undisturbed", **options)
    return content_of(folder / "undisturbed")


# ------------------------------------------------------------------------------------- what is said


def error_of(job: Job) -> str:
    """Return the one line of the error that ended a process; fail for a traceback, and for several."""
    printed = job.printed
    assert "Traceback" not in printed, printed[-4000:]
    errors = [line for line in printed.replace("\r", "\n").splitlines() if line.startswith("vqdist: error: ")]
    assert len(errors) == 1, printed[-4000:]
    return errors[0]


def listens(job: Job) -> bool:
    """Return whether a process handles SIGUSR1, as the command does from its first moment on."""
    try:
        status = Path(f"/proc/{job.pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def wait_until(condition: Callable[[], bool], jobs: Sequence[Job], every: float = 0.005) -> None:
    """Return once a condition holds, or one of the processes has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and all(job.poll() is None for job in jobs):
        assert time.monotonic() < deadline, [job.printed[-3000:] for job in jobs]
        time.sleep(every)
