"""An own tracker: a table of one number."""

from vqdist import Sink


class Table(Sink):
    """Write one number of every step into a file of the run.

    Args:
        run_folder: of the run; vqdist passes it.
        number: which.
    """

    def __init__(self, run_folder, number: str = "recon_loss"):
        self.file = (run_folder / "table.csv").open("a")
        self.number = number

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.number in values:
            self.file.write(f"{step},{values[self.number]}\n")

    def close(self) -> None:
        self.file.close()
