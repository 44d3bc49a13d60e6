"""LPIPS, version 0.1 (arXiv 1801.03924): weighted squared differences of normalised features of a frozen network.

With y the image in [-1, 1] less a shift over a scale, and f_k the features of slice k divided by their norm over
channels, the distance of two images is the sum over k of the mean over positions of lin_k . (f_k - f'_k)^2. Shapes:
`b` batch, `c` channel, `h w` image.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.losses import at_least_float32
from vqdist.names import unknown
from vqdist.objectives.base import Term
from vqdist.objectives.frozen import HoldsFrozen, Scaling, check_pair, download_weights, read_weights
from vqdist.schedules import Weight

# for images in [-1, 1]; in [0, 1] they are nearly ImageNet's mean and deviation
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10  # beside the norm of features


@dataclass(frozen=True)
class Net:
    """A network of torchvision whose features LPIPS compares.

    Attributes:
        name: torchvision's function.
        weights: its enumeration of weights.
        ends: where the slices end in `features`, behind a ReLU.
        smallest: side of the smallest image, in pixels.
    """

    name: str
    weights: str
    ends: tuple[int, ...]
    smallest: int


NETS = {
    "vgg": Net("vgg16", "VGG16_Weights", (4, 9, 16, 23, 30), 16),
    "alex": Net("alexnet", "AlexNet_Weights", (2, 5, 8, 10, 12), 31),
    "squeeze": Net("squeezenet1_1", "SqueezeNet1_1_Weights", (2, 5, 8, 10, 11, 12, 13), 17),
}


class LPIPS(HoldsFrozen, Term):
    """The LPIPS distance as a term, and on its own: `LPIPS(weights="vgg16.pth")(recon, image)`.

    Its networks are frozen, always in eval mode (dropout is off), and hidden: see `HoldsFrozen`. Convolutions run in
    the ambient precision, the rest in float32. Images are in [0, 1].

    Args:
        weights: a file with torchvision's weights of the network (.pth, .safetensors), or with an LPIPS module, whose
            own linear layers are taken then; in Python also a state dict; null downloads torchvision's, once.
        net: `vgg`, `alex` or `squeeze`.
        linear: a file with the linear layers; true takes the published ones, which torchmetrics brings; false sums
            over channels in their place.
        weight, reference, name: see `Term`.
    """

    def __init__(
        self,
        weights: str | Path | Mapping[str, Tensor] | None = None,
        *,
        net: str = "vgg",
        linear: bool | str | Path | Mapping[str, Tensor] = True,
        weight: Weight = 1.0,
        reference: bool = False,
        name: str = "lpips",
    ):
        super().__init__(weight, reference=reference, name=name)
        if net not in NETS:
            raise unknown("net of LPIPS", net, NETS)
        self.net = net
        self.min_image_size = NETS[net].smallest
        self.hide(_network(weights, net, linear))

    @property
    def network(self) -> LPIPSNetwork:
        """The frozen network."""
        (network,) = self._hidden
        assert isinstance(network, LPIPSNetwork)
        return network

    def check_image_size(self, size: int) -> None:
        if size < self.min_image_size:
            raise too_small(size, self.net)

    def distances(self, recon: Tensor, image: Tensor) -> Tensor:
        """Return the distance of each reconstruction from its image, (b,) float32.

        Args:
            recon: (b, c, h, w), nominally in [0, 1]; c is 1 (repeated to three), 3, or 4 (alpha is left out).
            image: the same shape, in [0, 1].
        """
        check_pair(recon, image)
        if min(image.shape[-2:]) < self.min_image_size:
            raise too_small(min(image.shape[-2:]), self.net)
        return torch.stack(self.network(recon, image)).sum(dim=0)

    def forward(self, recon: Tensor, image: Tensor, out: Any = None) -> Tensor:
        return self.distances(recon, image).mean()


class LPIPSNetwork(nn.Module):
    """Two images (b, c, h, w) in [0, 1] -> the contribution of each slice to their distance, (b,) each.

    Args:
        slices: parts of the network, in their order.
        linear: weights of the channels of each slice, (c,); None for ones.
    """

    def __init__(self, slices: list[nn.Sequential], linear: list[Tensor] | None):
        super().__init__()
        # of 2 * image - 1: written so that images stay in [0, 1]
        shift = tuple((value + 1) / 2 for value in SHIFT)
        self.scaling = Scaling(shift, tuple(value / 2 for value in SCALE))
        self.slices = nn.ModuleList(slices)
        self.linear = nn.ParameterList([] if linear is None else linear)

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the features of each slice, (b, c, h', w')."""
        features, value = [], self.scaling(image)
        for part in self.slices:
            value = part(value)
            features.append(value)
        return features

    def forward(self, recon: Tensor, image: Tensor) -> list[Tensor]:
        of_slices = []
        for index, pair in enumerate(zip(self.features(recon), self.features(image), strict=True)):
            ours, theirs = map(_normalised, at_least_float32(*pair))
            difference = (ours - theirs).square()
            if len(self.linear):
                difference = difference * self.linear[index].to(difference.dtype).view(1, -1, 1, 1)
            of_slices.append(difference.sum(dim=1).mean(dim=(1, 2)))
        return of_slices


def _normalised(features: Tensor) -> Tensor:
    """Features (b, c, h, w) over their norm; where all are 0 the gradient of `vector_norm` is 0 and not NaN."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)


def too_small(size: int, net: str = "vgg") -> UserError:
    """Return the error for images with a side of so many pixels."""
    return UserError(
        f"image_size {size} is too small for LPIPS, whose {NETS[net].name} needs {NETS[net].smallest}; use perceptual "
        "none"
    )


def _network(weights: Any, net: str, linear: Any) -> LPIPSNetwork:
    """Return the network with its weights; raise `UserError` for those that do not fit."""
    source, tensors = _read(weights, net)
    own = _linear_layers(tensors)
    if not isinstance(linear, bool):
        own = _linear_layers(linear if isinstance(linear, Mapping) else _read_file(linear, net))
        if not own:
            raise UserError(
                f"linear {linear!r:.80} of LPIPS holds no linear layers; expected lin0.model.1.weight, ..."
            )
    elif not own:
        own = _linear_layers(published_linear_layers(net))
    layers = _with_weights(net, tensors, source, any_width=bool(own) and bool(_slice_names(tensors)))
    starts = (0, *NETS[net].ends[:-1])
    slices = [layers[start:end] for start, end in zip(starts, NETS[net].ends, strict=True)]
    network = LPIPSNetwork(slices, None if linear is False else own)
    _check_widths(network, source, net)
    return network


def _read(weights: Any, net: str) -> tuple[str, Mapping[str, Tensor]]:
    """Return what the weights are called in messages, and their tensors."""
    if isinstance(weights, Mapping):
        return "the state dict", weights
    if weights is not None:
        return str(weights), _read_file(weights, net)
    import torchvision.models

    enumeration = getattr(torchvision.models, NETS[net].weights).IMAGENET1K_V1
    said = "lpips" if net == "vgg" else f"lpips-{net}"
    return "torchvision", download_weights(enumeration, NETS[net].name, f"--model.perceptual {said}:")


def _read_file(path: str | Path, net: str) -> Mapping[str, Tensor]:
    if not isinstance(path, (str, Path)):
        raise UserError(f"the weights {path!r:.80} of LPIPS are not possible; give a file, or null to download them")
    return read_weights(Path(path).expanduser(), f"lpips:{path}", NETS[net].name)


def published_linear_layers(net: str) -> dict[str, Tensor]:
    """Return the linear layers of version 0.1, which torchmetrics brings."""
    found = importlib.util.find_spec("torchmetrics")
    folders = [] if found is None else found.submodule_search_locations or []
    for folder in folders:
        path = Path(folder) / "functional" / "image" / "lpips_models" / f"{net}.pth"
        if path.is_file():
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    raise UserError(f"torchmetrics does not bring the linear layers of LPIPS for {net}; give their file as `linear`")


def _linear_layers(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the weights of the linear layers, (c,) each, in their order; none where there are none."""
    found = {}
    for name, tensor in tensors.items():
        match = re.search(r"(?:^|\.)lin(\d+)\.model\.\d+\.weight$", name)
        if match:
            found[int(match[1])] = tensor.float().flatten()
    return [found[index] for index in sorted(found)]


def _slice_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an LPIPS module's network, `net.slice1.0.weight`, by the names that torchvision has."""
    matches = {name: re.search(r"(?:^|\.)net\.slices?\.?\d+\.(\d+\..+)$", name) for name in tensors}
    return {match[1]: tensors[name] for name, match in matches.items() if match}


def _with_weights(net: str, tensors: Mapping[str, Tensor], source: str, *, any_width: bool) -> nn.Sequential:
    """Return torchvision's layers up to the last slice with these weights.

    Args:
        net: see `NETS`.
        tensors: by torchvision's names, also without `features.`, or by those of an LPIPS module.
        source: of the weights, for the message.
        any_width: whether layers may be wider or narrower, as those of an LPIPS module with its own linear layers.
    """
    import torchvision.models  # takes seconds to import, and only this needs it

    with torch.device("meta"):  # neither memory nor random numbers for layers that are filled or dropped
        layers = getattr(torchvision.models, NETS[net].name)(weights=None).features[: NETS[net].ends[-1]]
    wanted = layers.state_dict()
    found = _slice_names(tensors) or {name.removeprefix("features."): tensor for name, tensor in tensors.items()}

    def fits(name: str, tensor: Tensor) -> bool:
        given = found.get(name)
        if not isinstance(given, Tensor):
            return False
        return given.shape == tensor.shape or (any_width and given.shape[2:] == tensor.shape[2:])

    missing = [f"features.{name}" for name, tensor in wanted.items() if not fits(name, tensor)]
    if missing:
        raise UserError(
            f"{source} does not hold the weights of {NETS[net].name}: {', '.join(missing[:3])} and "
            f"{max(len(missing) - 3, 0)} more are missing or of another shape; expected the state dict of "
            f"torchvision.models.{NETS[net].name}"
        )
    for layer_name, layer in layers.named_modules():
        for name in list(dict(layer.named_parameters(recurse=False))):
            setattr(layer, name, nn.Parameter(found[f"{layer_name}.{name}"].float(), requires_grad=False))
    return layers


def _check_widths(network: LPIPSNetwork, source: str, net: str) -> None:
    """Raise `UserError` unless each layer takes the channels before it, and there is a linear layer for each slice."""
    side = NETS[net].smallest
    try:
        widths = [features.shape[1] for features in network.features(torch.zeros(1, 3, side, side))]
    except RuntimeError as error:
        raise UserError(f"the layers in {source} do not follow each other ({str(error).splitlines()[0]})") from error
    given = [len(weights) for weights in network.linear]
    if given and given != widths:
        raise UserError(
            f"the linear layers of LPIPS have {given} channels, and the slices of {source} have {widths}; give those "
            "that belong to it"
        )
