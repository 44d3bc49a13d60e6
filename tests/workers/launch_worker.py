"""Started by torchrun, and again when it dies: says of each attempt whether its launch has begun the run in a folder.

usage: launch_worker.py FOLDER   (the first attempt begins it and dies)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vqdist.trainers.overwrite import begun_by_this_launch, mark_begun


def main() -> None:
    folder = Path(sys.argv[1])
    with (folder / "found").open("a") as file:
        file.write(f"{begun_by_this_launch(folder)}\n")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        mark_begun(folder)
        os._exit(1)


if __name__ == "__main__":
    main()
