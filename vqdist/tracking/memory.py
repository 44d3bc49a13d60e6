"""Peak memory of a process, one of the numbers of every log line."""

from __future__ import annotations

import re
from pathlib import Path

import torch


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
