"""Writing tensors with safetensors, which refuses those that share storage: in the host's memory, each on its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn


def save_module(module: nn.Module, path: Path) -> None:
    """Write the state dict of a live module as one file, which `safetensors.torch.load_model` reads strictly.

    A tensor with several names, as tied weights have, is written under one of them; the metadata of the file say under
    which. Weights that are views of a larger buffer, as those of ZeRO 1 and 2 are, are copied out of it.

    Raises:
        SafetensorError: the file cannot be written.
    """
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    holders = names_of_holders(tensors)
    kept = {name: tensor for name, tensor in tensors.items() if name not in holders}
    save_file(with_own_storage(kept), path, metadata=holders or None)


def with_own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the host's memory, contiguous; views and those that share storage are copied."""
    own, storages = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        own[name] = value
    return own


def names_of_holders(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, by its name, each tensor whose memory another one covers wholly, with the name of that one."""
    spans = sorted((*_span(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    holders: dict[str, str] = {}
    holder = None  # of the spans so far, the dense one that ends last
    for device, start, negative_end, name in spans:
        if holder is not None and holder[0] == device and -negative_end <= holder[1]:
            holders[name] = holder[2]
        elif -negative_end - start == tensors[name].nbytes:
            holder = device, -negative_end, name
    return holders


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """Device, first byte and minus the last one's successor: of spans that begin together, the longest sorts first."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return str(tensor.device), start, -(start + (last + 1) * tensor.element_size())
