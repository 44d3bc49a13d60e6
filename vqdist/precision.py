"""The arithmetic of float32 on a CUDA device, the same for training and for every command that uses a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(device: torch.device, allowed: bool = True) -> None:
    """Let matrix products and convolutions on a CUDA device round to TensorFloat-32, or not; nothing elsewhere."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed  # torch allows it from the start: false must be said, too


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Within this context neither matrix products nor convolutions round to TensorFloat-32."""
    try:
        matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set per backend through torch.backends, which torch lets nobody mix with this
        yield
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
