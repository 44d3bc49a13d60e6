"""Launches twice from one process, as a notebook does; each launch restarts its worker once.

usage: kernel_worker.py FOLDER PORT
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def main() -> None:
    for _ in range(2):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=1,
            run_id="none",
            rdzv_backend="static",
            rdzv_endpoint=f"127.0.0.1:{sys.argv[2]}",
            rdzv_configs={"rank": 0},
            max_restarts=1,
        )
        worker = Path(__file__).with_name("launch_worker.py")
        elastic_launch(config, sys.executable)(str(worker), sys.argv[1])


if __name__ == "__main__":
    main()
