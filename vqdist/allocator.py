"""The settings by which this process gets memory from the system."""

from __future__ import annotations

import ctypes
import os

import torch


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU with glibc: keep freed memory for the next step instead of giving it back, up to 2 GiB.

    By default every large tensor is a mapping of its own, whose pages the system clears anew each time. Where
    glibc's own variables are set, nothing changes.
    """
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if device.type != "cpu" or told or mallopt is None:
        return
    trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
    for largest in (2**30, 2**25):  # newer and older versions
        if mallopt(mmap_threshold, largest):
            mallopt(trim_threshold, 2**31 - 1)
            return
