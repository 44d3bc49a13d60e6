"""Which tensors of a network a moving average averages, and which it copies."""

from __future__ import annotations

from torch import Tensor, nn


def averaged_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors, by name, that a moving average of the network averages; it copies all others.

    The rule: a parameter that learns by gradient is averaged. Buffers and frozen parameters are copied: a codebook of
    running means (EMA), its counts and flags and the statistics of BatchNorm follow the training by themselves, and
    stand for the network of one moment. A module with a method `is_averaged(name, tensor) -> bool` decides for its
    own tensors instead, see `vqdist.models.quantizers.Quantizer.is_averaged`; of nested ones the innermost decides.

    Args:
        network: the bare network; a tensor with several names has its first.
    """
    named = dict([*network.named_parameters(), *network.named_buffers()])
    averaged = {id(tensor): tensor.requires_grad for tensor in named.values()}
    for module in network.modules():
        decides = getattr(module, "is_averaged", None)
        if decides is not None:
            own = [*module.named_parameters(), *module.named_buffers()]
            averaged |= {id(tensor): bool(decides(name, tensor)) for name, tensor in own}
    return {name: tensor for name, tensor in named.items() if averaged[id(tensor)]}
