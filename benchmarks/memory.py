"""Peak resident memory of the trainer against the bare loop, each in a process of its own.

usage of a process: python -m benchmarks.memory bare|trainer|trainer_ema STEPS
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Row, build_vae, image_batches, peak_mb, run_json

MARGIN = 1.10  # times (the bare loop's peak + one EMA copy)
# Wide enough that weights are what fills the memory, not the libraries.
WIDE = {"dim": 96}


def process(kind: str, steps: int) -> dict[str, float]:
    """Train in this process and say what it took."""
    vae = build_vae(**WIDE)
    batches = image_batches(2)
    weights = sum(t.numel() * t.element_size() for t in vae.autoencoder.state_dict().values()) / 2**20
    if kind == "bare":
        from benchmarks.bare_loop import BareLoop

        step = BareLoop(vae, batches).step
        before = peak_mb()
        for _ in range(steps):
            step()
        return {"peak_mb": peak_mb(), "before_mb": before, "copy_mb": weights}
    from benchmarks.common import build_trainer

    with tempfile.TemporaryDirectory() as folder:
        options = {"backend": "local", "apply_grad_penalty_every": 0, "use_ema": kind == "trainer_ema"}
        trainer = build_trainer(vae, Path(folder), **options)
        before = peak_mb()
        for _ in range(steps):
            trainer.train_step()
        return {"peak_mb": peak_mb(), "before_mb": before, "copy_mb": weights}


def run(quick: bool = False) -> list[Row]:
    """Rows of the table: medians over fresh processes."""
    repeats, steps = (1, 4) if quick else (3, 12)
    seen: dict[str, list[dict[str, float]]] = {"bare": [], "trainer": [], "trainer_ema": []}
    for _ in range(repeats):
        for kind, results in seen.items():
            results.append(run_json([sys.executable, "-m", "benchmarks.memory", kind, str(steps)]))
    peak = {kind: statistics.median(result["peak_mb"] for result in results) for kind, results in seen.items()}
    copy = seen["bare"][0]["copy_mb"]
    start = statistics.median(result["before_mb"] for result in seen["bare"])
    grown = {kind: value - start for kind, value in peak.items()}
    parts = f"one copy {copy:.0f} MiB, libraries and networks before the first step {start:.0f} MiB"
    return [
        Row(
            "trainer with EMA / (bare loop + one EMA copy), peak resident memory",
            peak["trainer_ema"] / (peak["bare"] + copy),
            at_most=MARGIN,
            detail=f"{peak['trainer_ema']:.0f} against {peak['bare']:.0f} + {copy:.0f} MiB; {parts}",
        ),
        Row(
            "trainer without EMA / bare loop, peak resident memory",
            peak["trainer"] / peak["bare"],
            detail=f"{peak['trainer']:.0f} against {peak['bare']:.0f} MiB",
        ),
        Row(
            "the same with EMA, over what libraries and networks hold before the first step",
            grown["trainer_ema"] / (grown["bare"] + copy),
            detail=f"{grown['trainer_ema']:.0f} against {grown['bare']:.0f} + {copy:.0f} MiB",
        ),
    ]


if __name__ == "__main__":
    print(json.dumps(process(sys.argv[1], int(sys.argv[2]))))
