"""TensorBoard: event files in the run folder, for `tensorboard --logdir RUN`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vqdist.tracking.base import Sink
from vqdist.tracking.pictures import group_bars, make_sheet


class TensorBoardSink(Sink):
    """Writes event files into `tensorboard/` of the run folder.

    Args:
        run_folder: of the run.
        resumed_step: TensorBoard hides what was logged for later steps.
        folder: of the event files, in place of the run folder's `tensorboard/`.
        flush_secs: seconds from one write to the next.
    """

    packages = ("tensorboard",)
    extra = "tracking"

    def __init__(self, run_folder: Path, resumed_step: int = 0, *, folder: str | None = None, flush_secs: int = 120):
        from torch.utils.tensorboard import SummaryWriter

        target = run_folder / "tensorboard" if folder is None else Path(folder).expanduser()
        self.writer = SummaryWriter(str(target), purge_step=resumed_step + 1, flush_secs=flush_secs)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add a scalar for each number."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, rows: Tensor, path: Path, columns: int) -> None:
        """Add the sheet as an image."""
        self.writer.add_image(name, make_sheet(rows, columns), step)

    def histogram(self, step: int, name: str, counts: Tensor, path: Path) -> None:
        """Add a histogram in which the codes of a bar count at its middle."""
        bars, edges = group_bars(counts)
        middles, total = (edges[:-1] + edges[1:]) / 2, bars.sum()
        self.writer.add_histogram_raw(
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

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
