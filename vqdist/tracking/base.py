"""`Sink`: one place that numbers and pictures of a run go to, and the contract of a sink of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from tqdm import tqdm


class Sink:
    """One place that the numbers and pictures of a run go to: every method does nothing until a subclass fills it in.

    ```python
    class Table(vqdist.Sink):
        def __init__(self, run_folder, every=1):  # run_folder is passed in, every comes from init_args
            self.file, self.every = (run_folder / "table.csv").open("a"), every

        def log(self, step, values):
            if step % self.every == 0:
                self.file.write(f"{step},{values.get('loss')}\\n")

        def close(self):
            self.file.close()
    ```

    In YAML it is `trackers: [tensorboard, {class_path: my_sinks.Table, init_args: {every: 10}}]`. The constructor gets
    those of the following that it has a parameter for, once the run has found where it goes on:

    - `run_folder` (Path): the folder of the run, which exists;
    - `config` (dict): the resolved configuration, as in config.json;
    - `resumed_step` (int): the step of the loaded checkpoint, 0 for a new run. Later steps that an earlier part of
      the run has logged are logged again.

    Rank 0 alone builds and calls it. An exception switches the sink off with one warning and never ends training, so a
    sink needs no handling of errors. It should not block: the other ranks wait for rank 0.

    Attributes:
        packages: modules that must be installed; checked before anything starts.
        extra: the optional dependencies of vqdist that bring them, for the message; None outside vqdist.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take in the numbers of a step; some may be NaN or infinite. A step may come in several parts."""

    def picture(self, step: int, name: str, rows: Tensor, path: Path, columns: int) -> None:
        """Take in n groups of k images.

        Args:
            step: finished optimizer steps.
            name: what they show, as "reconstructions".
            rows: (n, k, c, h, w) float in [0, 1].
            path: PNG file of `pictures.make_sheet(rows, columns)`, which is there already.
            columns: groups in a row of the sheet.
        """

    def histogram(self, step: int, name: str, counts: Tensor, path: Path) -> None:
        """Take in how often each code occurred.

        Args:
            step: finished optimizer steps.
            name: what is counted, as "codes".
            counts: (v,) whole numbers.
            path: PNG file of the bar chart, which is there already.
        """

    def artifact(self, folder: Path) -> None:
        """Take in the folder of the exported model; it stays as it is until `close`."""

    def close(self) -> None:
        """Flush and close, at the end of the run or when the sink is switched off; nothing is called afterwards."""


def warn(message: str) -> None:
    """Write one line of warning to standard error, above the progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """Return type and text of an error on one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__
