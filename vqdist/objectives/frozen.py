"""Shared by the losses that compare features: the frozen network, and its weights from torchvision or from a file."""

from __future__ import annotations

import socket
import urllib.error
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vqdist.errors import UserError, an

# torchvision's weights were trained with these, for images in [0, 1]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PATIENCE = 20.0  # seconds that a server may be silent while weights are downloaded


class HoldsFrozen(nn.Module):
    """A module with a frozen network that is hidden from the module tree.

    The network follows `.to(device)` and stays in eval mode. It shows in no `parameters()`, `state_dict()`, optimizer,
    DDP bucket or checkpoint, wherever the module is kept.
    """

    _hidden: tuple[nn.Module]

    def hide(self, network: nn.Module) -> None:
        """Freeze a network, put it into eval mode, both in place, and hold it."""
        self._hidden = (network.eval().requires_grad_(False),)  # a tuple: nn.Module looks into none

    def _apply(self, fn: Any, recurse: bool = True) -> HoldsFrozen:
        self._hidden[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class Scaling(nn.Module):
    """Images (b, 1 | 3 | 4, h, w) -> their three colours, (image - shift) / scale for each."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: tuple[float, ...], scale: tuple[float, ...]):
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return (three_channels(image).to(self.shift.dtype) - self.shift) / self.scale


def three_channels(image: Tensor) -> Tensor:
    """Return images of three colours: grey is repeated, alpha is left out."""
    channels = image.shape[1]
    if channels not in (1, 3, 4):
        raise UserError(f"the perceptual loss got images with {channels} channels; expected 1, 3 or 4")
    return image.expand(-1, 3, -1, -1) if channels == 1 else image[:, :3]


def check_pair(recon: Tensor, image: Tensor) -> None:
    """Raise `UserError` unless a reconstruction and its image have the same shape."""
    if recon.shape != image.shape:
        raise UserError(
            f"the perceptual loss got a reconstruction of shape {tuple(recon.shape)} and an image of shape "
            f"{tuple(image.shape)}; expected equal shapes"
        )


def download_weights(
    weights: Any, network: str, spec: str, otherwise: str = ", or train without: --model.perceptual none"
) -> dict[str, Tensor]:
    """Return a state dict of torchvision, downloaded once.

    Args:
        weights: a member of torchvision's enumeration of weights.
        network: its name, for the message.
        spec: the option that names a file in its place, but for the path.
        otherwise: what else the message says to do.

    Raises:
        UserError: it cannot be downloaded; the message says how to give a file.
    """
    try:
        with _impatient():
            return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")
    except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
        raise UserError(
            f"the weights of {network} could not be downloaded from {weights.url} ({error}); download them elsewhere "
            f"and give the file with {spec}/path/to/{Path(weights.url).name.partition('-')[0]}.pth{otherwise}"
        ) from error


@contextmanager
def _impatient() -> Iterator[None]:
    """Let a connection fail that is silent, where a firewall drops what is sent; torch.hub would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_weights(path: Path, said: str, network: str) -> dict[str, Tensor]:
    """Return the state dict of a file, .pth or .safetensors; nothing of it but tensors is read.

    Args:
        path: of the file.
        said: the option as it was given.
        network: the name of the network, for the message.

    Raises:
        UserError: there is none, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"{said} names the weights of {network}, and {path} is no file; give a .pth or .safetensors")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        raise _unreadable(path, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
    if not isinstance(weights, Mapping):
        raise _unreadable(path, f"it holds {an(type(weights).__name__)}")
    return dict(weights)


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be read as weights ({reason}); expected a state dict, saved with "
        f"torch.save(model.state_dict(), 'vgg16.pth') or as .safetensors"
    )
