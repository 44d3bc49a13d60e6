"""Where numbers and pictures go: metrics.jsonl (the source of truth), the console, TensorBoard, Weights & Biases.

Everything here runs on rank 0 only; the trainer makes no `Tracker` on other ranks.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from torchvision.utils import save_image as save_picture

from vqdist.errors import UserError

TRACKERS = ("tensorboard", "wandb")


def check_trackers(names: list[str]) -> None:
    """Raise `UserError` for a tracker that is unknown or not installed."""
    import importlib.util

    for name in names:
        if name not in TRACKERS:
            raise UserError(f"tracker {name!r} is not known; choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker {name!r} is not installed; install it with pip install 'vqdist[tracking]'")


class Tracker:
    """Writes one run's numbers and pictures.

    Args:
        folder: the run folder; `metrics.jsonl` and `results/` are made in it.
        trackers: of `TRACKERS`, besides the file.
        config: the resolved configuration, shown by the trackers.
        resumed_step: numbers of later steps, left by a run that died, are removed from the file.
    """

    def __init__(self, folder: Path, trackers: list[str], config: dict[str, Any], resumed_step: int):
        self.folder = folder
        self.file = folder / "metrics.jsonl"
        _drop_later_steps(self.file, resumed_step)
        self.tensorboard = self.wandb = None
        if "tensorboard" in trackers:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        if "wandb" in trackers:
            import wandb

            options = {"project": "vqdist", "dir": str(folder), "id": _run_id(folder), "resume": "allow"}
            try:
                self.wandb = wandb.init(config=config, **options)
            except Exception as error:  # no key, no network, a setting that it does not take: of many types
                reason = " ".join(str(error).split())
                raise UserError(f"wandb could not start ({reason}); log in, or set WANDB_MODE=offline") from error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and tell the trackers. NaN and infinity become null: JSON has neither."""
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def picture(self, step: int, name: str, rows: Tensor, path: Path, columns: int = 2) -> None:
        """Save a sheet: `rows` (n, k, c, h, w) in [0, 1] gives n groups of k images, `columns` groups in a row."""
        save_sheet(rows, path, columns)
        if self.tensorboard is not None:
            self.tensorboard.add_image(name, make_sheet(rows, columns), step)
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Image(str(path))}, step=step)

    def histogram(self, step: int, name: str, counts: Tensor, path: Path) -> None:
        """Save a bar chart of how often each code occurred: `counts` (v,), several codes a bar if many."""
        bars, edges = _bars(counts)
        save_bars(bars, path)
        if self.tensorboard is not None:
            middles, total = (edges[:-1] + edges[1:]) / 2, bars.sum()
            self.tensorboard.add_histogram_raw(
                name,
                min=0,
                max=len(counts),
                num=total,
                sum=(middles * bars).sum(),
                sum_squares=(middles**2 * bars).sum(),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=bars.tolist(),
                global_step=step,
            )
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Histogram(np_histogram=(bars, edges))}, step=step)

    def artifact(self, folder: Path) -> None:
        """Upload a folder with a model, where the tracker keeps such things (W&B).

        The folder must stay as it is until `close`. An offline run keeps a copy in its own folder for `wandb sync`; by
        itself W&B would refer to one in the user's home.
        """
        if self.wandb is not None:
            import wandb

            if self.wandb.offline:
                kept = Path(self.wandb.dir).parent / "model"
                folder = Path(shutil.copytree(folder, kept, dirs_exist_ok=True))
            folder = folder.resolve()  # `wandb sync` may be started anywhere
            artifact = wandb.Artifact(f"model-{self.wandb.id}", type="model")
            artifact.add_dir(str(folder), skip_cache=True, policy="immutable")
            self.wandb.log_artifact(artifact)

    def close(self) -> None:
        """Flush and close the trackers; what is logged afterwards goes to the file only."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.tensorboard = self.wandb = None


def make_sheet(rows: Tensor, columns: int = 2) -> Tensor:
    """Groups of images (n, k, c, h, w) in [0, 1] -> one picture (c, H, W), `columns` groups beside one another."""
    group = rows.shape[1]
    return make_grid(rows.flatten(0, 1).clamp(0, 1).cpu(), nrow=group * columns, padding=2, pad_value=0.5)


def save_sheet(rows: Tensor, path: Path, columns: int = 2) -> None:
    """Write `make_sheet` as a PNG file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_picture(make_sheet(rows, columns), partial, format="png")
    partial.replace(path)


def save_bars(bars: np.ndarray, path: Path, height: int = 128) -> None:
    """Write counts (n,) as a bar chart, two pixels a bar, that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heights = np.ceil(height * bars / max(1, bars.max())).astype(int)
    picture = np.where(np.arange(height)[::-1, None] < heights[None, :], 40, 235).astype(np.uint8)
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(picture.repeat(2, axis=1)).save(partial, format="png")
    partial.replace(path)


def _bars(counts: Tensor, most: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Counts of codes (v,) summed over neighbours into at most so many bars (n,), and the bars' edges (n + 1,)."""
    numbers = counts.cpu().numpy()
    per_bar = -(-len(numbers) // most)
    bars = np.pad(numbers, (0, -len(numbers) % per_bar)).reshape(-1, per_bar).sum(axis=1)
    return bars, np.minimum(np.arange(len(bars) + 1.0) * per_bar, len(numbers))


def memory_gb(device: torch.device) -> float:
    """Peak memory in GiB: allocated on a CUDA device, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if peak is not None:  # Linux: the system call below would count what the launcher used before it started this
        return int(peak[1]) / 2**20
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _drop_later_steps(file: Path, step: int) -> None:
    """A run killed after its last checkpoint logged steps that will now run again; a torn last line goes as well."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    partial = file.with_name(file.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(file)


def _run_id(folder: Path) -> str:
    import hashlib

    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
