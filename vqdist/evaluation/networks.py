"""Networks that are known by name: FID's Inception, VGG16, DINOv2, and torchvision's for classes of ImageNet.

Each looks at images as its publication does, and brings its weights from a file; some are downloaded. Shapes: b batch,
h w image, f features, s spatial features, k classes.
"""

from __future__ import annotations

import tempfile
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.evaluation import dinov2
from vqdist.extractor_names import CLASSIFIERS, CLEAN, DINOV2, DINOV2_SIZES, INCEPTION, VGG16
from vqdist.objectives.frozen import IMAGENET_MEAN, IMAGENET_STD, download_weights

SPATIAL_CHANNELS = 7  # of the layer that sFID looks at, as the ADM evaluator has it


class KnownNetwork(nn.Module):
    """Images (b, 1 | 3, h, w) in [0, 1] -> features (b, f); perhaps more that some measures need.

    Attributes:
        kind: its name; what it does to the images first belongs to it. Empty for the weights alone.
    """

    kind: str = ""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return `features` (b, f); where there are any, `spatial` (b, s) for sFID and `logits` (b, k) for IS."""
        return {"features": self(images)}


@dataclass(frozen=True)
class Known:
    """A network by name.

    Attributes:
        build: of its name, a state dict, and what that is called in messages.
        download: returns the state dict where no file is given.
    """

    build: Callable[[str, Mapping[str, Tensor], str], KnownNetwork]
    download: Callable[[str], Mapping[str, Tensor]]


def in_8_bits(images: Tensor) -> Tensor:
    """Images (b, 1 | 3, h, w) in [0, 1] -> (b, 3, h, w) float32, whole numbers to 255."""
    return (images.clamp(0, 1) * 255).round().expand(-1, 3, -1, -1)


class Normalised(nn.Module):
    """Pixels (b, 3, h, w) up to 255 -> less ImageNet's mean, over its deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class Inception(KnownNetwork):
    """Images (b, 1 | 3, h, w) in [0, 1] -> the (b, 2048) pooled features of FID's Inception, from 8-bit pixels.

    Spatial features are the first 7 channels of the first branch of the fourth 17x17 block, which the ADM evaluator
    knows as mixed_6/conv: (b, 2023), by row, then column, then channel, as it flattens them. Logits (b, 1008) lack
    the bias, as in torch-fidelity and the ADM evaluator.
    """

    def __init__(self, kind: str, weights: Mapping[str, Tensor], said: str):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.kind = kind
        with tempfile.TemporaryDirectory() as folder:  # torch-fidelity reads its own form of file only
            own = Path(folder) / "inception.pth"
            torch.save(dict(weights), own)
            wanted = ["2048", "logits_unbiased"]
            try:
                self.network = FeatureExtractorInceptionV3(INCEPTION, wanted, feature_extractor_weights_path=str(own))
            except Exception as error:  # other weights raise almost anything
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"{said} does not hold the weights of FID's Inception ({reason}); give torch-fidelity's file"
                ) from error

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)["features"]

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _layer, _given, out: seen.append(out))
        try:
            features, logits = self.look(in_8_bits(images))
        finally:
            hook.remove()
        spatial = seen[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"features": features, "spatial": spatial, "logits": logits}

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of pixels up to 255, resized as TensorFlow 1 does (bilinear, not antialiased)."""
        return self.network(pixels.to(torch.uint8))


class CleanInception(Inception):
    """The same with the resize of clean-fid (arXiv 2104.11222): bicubic and antialiased, to floating point."""

    LAYERS = (
        *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
        *("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
        *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
    )

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of pixels up to 255."""
        x = (antialiased(pixels, (299, 299), "bicubic").clamp(0, 255) - 128) / 128
        for name in self.LAYERS:
            x = getattr(self.network, name)(x)
        features = x.flatten(1)
        return features, features @ self.network.fc.weight.T


class Vgg16(KnownNetwork):
    """Images (b, 1 | 3, h, w) in [0, 1] -> (b, 4096) features of VGG16's second dense layer, from 8-bit pixels.

    They are those of torch-fidelity's, which would unpickle whatever the file holds.
    """

    def __init__(self, kind: str, weights: Mapping[str, Tensor], said: str):
        super().__init__()
        from torchvision.models import vgg16

        self.kind = kind
        with torch.device("meta"):  # neither memory nor random numbers for layers that are filled
            network = vgg16(weights=None)
        network.classifier = network.classifier[:5]  # without the classes
        self.network = filled(
            network, weights, f"{said} does not hold the weights of VGG16 with its dense layers", kind
        )
        self.normalised = Normalised()

    def forward(self, images: Tensor) -> Tensor:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

        return self.network(self.normalised(resize(in_8_bits(images), size=(224, 224), align_corners=False)))


class DinoV2(KnownNetwork):
    """Images (b, 1 | 3, h, w) in [0, 1] -> the (b, f) class token of DINOv2, as FD-DINOv2 has it.

    8-bit images are resized to 224 x 224 (bicubic, antialiased) and rounded to 8 bits again, as Pillow does.
    """

    def __init__(self, kind: str, weights: Mapping[str, Tensor], said: str):
        super().__init__()
        size = "vitl14" if kind == DINOV2 else kind.partition("_")[2]
        self.network = dinov2.load(weights, said, size if size in DINOV2_SIZES else None)
        self.kind = f"{DINOV2}_{size}"
        self.normalised = Normalised()

    def forward(self, images: Tensor) -> Tensor:
        pixels = in_8_bits(images)
        for sides in ((images.shape[2], dinov2.SIDE), (dinov2.SIDE, dinov2.SIDE)):  # Pillow rounds after each pass
            pixels = antialiased(pixels, sides, "bicubic").clamp(0, 255).round()
        return self.network(self.normalised(pixels))


class Classifier(KnownNetwork):
    """Images (b, 1 | 3, h, w) in [0, 1] -> what the layer of classes of a torchvision network sees, (b, f).

    8-bit images are resized to the side of the network's published weights, with their filter, and are not cropped.
    """

    def __init__(self, kind: str, weights: Mapping[str, Tensor], said: str):
        super().__init__()
        from torchvision.models import get_model

        self.kind = kind
        options = {"init_weights": False, "transform_input": True} if kind == "inception_v3" else {}
        with torch.device("meta"):
            network = get_model(kind, weights=None, **options)
        parent, _, name = CLASSIFIERS[kind].rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
        self.network = filled(network, weights, f"{said} does not hold the weights of {kind}", kind)
        transforms = _weights_of(kind).transforms.keywords
        self.side, self.filter = transforms["crop_size"], transforms.get("interpolation", "bilinear")
        self.normalised = Normalised()

    def forward(self, images: Tensor) -> Tensor:
        resized = antialiased(in_8_bits(images), (self.side, self.side), getattr(self.filter, "value", self.filter))
        return self.network(self.normalised(resized.clamp(0, 255)))


def antialiased(pixels: Tensor, sides: tuple[int, int], mode: str) -> Tensor:
    """Return images (b, c, h, w) resized to height and width, as Pillow resizes images of floating point."""
    if pixels.shape[2:] == sides:
        return pixels
    return F.interpolate(pixels, size=sides, mode=mode, antialias=True, align_corners=False)


def filled(network: nn.Module, weights: Mapping[str, Tensor], problem: str, name: str) -> nn.Module:
    """Return a network without weights with these, frozen; more of them than it has are left out.

    Raises:
        UserError: some are missing.
    """
    wanted = network.state_dict()
    counters = {key: torch.zeros((), dtype=torch.int64) for key in wanted if key.endswith("num_batches_tracked")}
    tensors = counters | dict(weights)  # files from before torch 0.4.1 have no counters
    missing = [key for key, tensor in wanted.items() if getattr(tensors.get(key), "shape", None) != tensor.shape]
    if missing:
        raise UserError(
            f"{problem} ({missing[0]} is missing or of another shape); expected the state dict of "
            f"torchvision.models.{name}"
        )
    chosen = {key: tensors[key] for key in wanted}
    network.load_state_dict(
        {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in chosen.items()}, assign=True
    )
    return network.requires_grad_(False)


def kind_of(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the network that a state dict is of, if it can be told; others are to be named."""
    fc = weights.get("fc.weight")
    if "Conv2d_1a_3x3.conv.weight" in weights and (fc is None or fc.shape[0] == 1008):
        return INCEPTION
    if dinov2.is_dinov2(weights):
        width = dinov2.published_names(weights)["cls_token"].shape[-1]
        sizes = {of: size for size, (of, _) in DINOV2_SIZES.items()}
        return f"{DINOV2}_{sizes.get(width, width)}"
    first = weights.get("features.0.weight")
    return VGG16 if first is not None and first.shape == (64, 3, 3, 3) else None


def _inception_weights(_: str) -> Mapping[str, Tensor]:
    """Return those in torch's folder of downloads, fetched if they are not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = Path(name).stem.rpartition("-")[2]  # the first digits of its SHA-256
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
            raise UserError(
                f"the weights of {INCEPTION} could not be downloaded from {url} ({error}); put that file at {path}, "
                "or give --features FILE with these weights"
            ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} does not hold the weights of FID's Inception ({reason}); remove it, so that it is downloaded "
            "again"
        ) from error
    return found if isinstance(found, Mapping) else {}


def _weights_of(kind: str):
    from torchvision.models import get_model_weights

    return get_model_weights(kind).IMAGENET1K_V1


def _classifier_weights(kind: str) -> Mapping[str, Tensor]:
    return download_weights(_weights_of(kind), kind, f"--features {kind}:", "")


def _no_download(kind: str) -> Mapping[str, Tensor]:
    size = "vitl14" if kind == DINOV2 else kind.partition("_")[2]
    raise UserError(
        f"--features {kind} needs its weights; give them as {kind}:FILE, the published dinov2_{size}_pretrain.pth or "
        "the model.safetensors of its Hub repository"
    )


KNOWN = {
    INCEPTION: Known(Inception, _inception_weights),
    CLEAN: Known(CleanInception, _inception_weights),
    VGG16: Known(Vgg16, _classifier_weights),
    **{name: Known(DinoV2, _no_download) for name in (DINOV2, *(f"{DINOV2}_{size}" for size in DINOV2_SIZES))},
    **{name: Known(Classifier, _classifier_weights) for name in CLASSIFIERS},
}
