"""Image tokenizers, whatever is inside: images to codes and back.

`TokenizerNetwork` is the side that trainers and metrics see: the network that an engine trains and EMA averages.
`Tokenizer` is the side that everybody else sees: whole images in [0, 1], codes in one row.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from vqdist.errors import UserError, an
from vqdist.models.pretrained import load_model_of_any_type
from vqdist.parts import import_path
from vqdist.sizes import ImageSize, image_size_of, pixels, sides_of

BATCH_OF = "vqdist.data.inputs.batch_of"
PIL_IMAGES = "vqdist.data.inputs.pil_images"
"""Between batches and what people have at hand: models do not know where data come from."""


class TokenizerNetwork(nn.Module, ABC):
    """Encoder, codes and decoder in one network.

    Attributes:
        channels: of the images.
        codebook_size: number of codes (of each level).
        num_levels: codes per position.
        scales: sides of the token maps of a multi-scale network, the finest last; None where there is one map only.
            A network that has them has a `quantizer`, a `vqdist.models.quantizers.MultiScaleQuantizer`.
    """

    quantizer: Any  # see `scales`
    if TYPE_CHECKING:  # attributes or properties of each network

        @property
        def channels(self) -> int: ...

        @property
        def codebook_size(self) -> int: ...

        @property
        def num_levels(self) -> int: ...

        @property
        def scales(self) -> tuple[int, ...] | None: ...

    else:
        scales = None

    @abstractmethod
    def tokenize(self, image: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> codes (b, h', w'), or (b, h', w', q) with q levels.

        With `scales`, the maps of all scales in a row: (b, L), L the sum of their sides squared.
        """

    @abstractmethod
    def detokenize(self, ids: Tensor) -> Tensor:
        """Codes as `tokenize` gives them -> images (b, c, h, w), in [0, 1] but for overshoot."""

    def first_name(self, name: str) -> str:
        """Return how a tensor was called when codes were first stored: their tokenizer's fingerprint has its name."""
        return name

    def makes_codes(self, name: str) -> bool:
        """Return whether the codes of images may depend on the tensor of this name; by default on each."""
        return True

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, c, h, w) in [0, 1] -> what their codes say of them, and the codes."""
        ids = self.tokenize(image)
        return self.detokenize(ids), ids

    # the names are VAR's: idxBl is a list with the codes (b, p * p) of each scale, p its side, the coarsest first

    def img_to_idxBl(self, imgs: Tensor) -> list[Tensor]:
        """Images (b, c, h, w) in [0, 1] -> the codes (b, p * p) of each scale."""
        sides = self._require_scales()
        return list(self.tokenize(imgs).split([side**2 for side in sides], dim=1))

    def idxBl_to_var_input(self, idxBl: Sequence[Tensor]) -> Tensor:
        """Codes of the scales, or of the first ones, -> what predicts each scale but the first.

        Returns:
            (b, n, d) float32: for each scale from the second to the one after the last that is given, the features
            that the codes before it add up to, at its size; n is the sum of p * p over these, L - L_1 for all scales.
        """
        self._require_scales()
        return self.quantizer.next_scale_inputs(torch.cat(list(idxBl), dim=1))

    def idxBl_to_img(self, idxBl: Sequence[Tensor]) -> Tensor:
        """Codes of the scales, or of the first ones, -> images (b, c, h, w) in [0, 1]."""
        self._require_scales()
        return self.detokenize(torch.cat(list(idxBl), dim=1)).float().clamp(0, 1)

    def _require_scales(self) -> tuple[int, ...]:
        if self.scales is None:
            raise UserError("this tokenizer codes images at one scale; train one with quantizer multiscale_vq")
        return self.scales


class TokenizerModel(Protocol):
    """A model that is saved and loaded, and whose `network` is a `TokenizerNetwork`; see `PretrainedModel`."""

    model_type: ClassVar[str]
    image_size: ImageSize | None
    resample: str
    buffers_are_live: bool
    begun_from: dict[str, Any] | None

    @property
    def network(self) -> TokenizerNetwork:
        """Return the part of the model that reconstructs images."""

    def check_image_size(self, size: ImageSize) -> None:
        """Raise `UserError` if images of this size cannot be encoded."""

    def code_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        """Return the shape of the codes of an image of this size."""

    def save_pretrained(self, save_directory: str | Path) -> Any:
        """Write config.json and model.safetensors."""


class Tokenizer(nn.Module):
    """Images to codes and back, through the averaged weights of any model of vqdist.

    A batch (b, c, h, w) in [0, 1] must have the tokenizer's size. Other images may have any: `preprocess` makes a
    batch of PIL images, paths, arrays, and lists of these.

    ```python
    tokenizer = vqdist.Tokenizer.from_pretrained("runs/a")
    codes = tokenizer.encode(["cat.jpg", Image.open("dog.png")])  # (2, n)
    cat, dog = tokenizer.to_pil(tokenizer.decode(codes))
    ```

    Args:
        model: a `VQGanVAE`, `DiscreteVAE`, or any other whose `network` is a `TokenizerNetwork`.
        image_size: side of the images in pixels, or (height, width) of images that are not square; by default the
            size that the model was trained on.
    """

    def __init__(self, model: TokenizerModel, image_size: ImageSize | None = None):
        super().__init__()
        image_size = model.image_size if image_size is None else image_size
        if image_size is None:
            raise UserError(
                "the model does not say on which image size it was trained; give image_size, or make an export that "
                "says it: vqdist convert FILE --image_size PIXELS --out EXPORT"
            )
        image_size = image_size_of(image_size)
        model.check_image_size(image_size)
        self._model = [model]  # in a list, so that only the network is a part of this module
        self.network = model.network.eval()
        self.image_size = image_size
        self.code_shape = model.code_shape(image_size)

    def __repr__(self) -> str:
        """Return one line; `print(tokenizer.network)` shows the layers."""
        levels = f" x {self.num_levels}" if self.num_levels > 1 else ""
        maps = " + ".join(f"{side} x {side}" for side in self.network.scales or ())
        codes = (maps or " x ".join(map(str, self.code_shape))) + levels
        colours = f"{self.channels} channel{'s' if self.channels > 1 else ''}"
        model = type(self._model[0]).__name__
        return f"Tokenizer({model}, {pixels(self.image_size)}, {colours}, {codes} codes of {self.codebook_size})"

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, image_size: ImageSize | None = None, *, fingerprint: str | None = None, **kwargs
    ) -> Tokenizer:
        """Return the tokenizer of a run, in a folder that `save_pretrained` wrote, or in a repository on the Hub.

        Args:
            name_or_path: the run, folder or repository.
            image_size: see `Tokenizer`.
            fingerprint: of the tokenizer that codes or a prior were made with. An older vqdist exported an average of
                the codebook, which is put right on load: with this fingerprint it stays as it is.
            **kwargs: see `PretrainedModel.from_pretrained`.
        """
        if fingerprint is not None:
            exported = cls.from_pretrained(name_or_path, image_size, mend=False, **kwargs)
            if exported.fingerprint() == fingerprint or exported._model[0].buffers_are_live:
                return exported
        model = load_model_of_any_type(name_or_path, **kwargs)
        if not isinstance(getattr(model, "network", None), TokenizerNetwork):
            raise UserError(
                f"{name_or_path} holds {an(type(model).__name__)}, which is no image tokenizer; give a run of one, as "
                "of vqgan or dvae"
            )
        model.discriminator_file = None  # codes and images need none
        return cls(cast(TokenizerModel, model), image_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model with `save_pretrained`, so that `from_pretrained` gives this tokenizer back."""
        (model,) = self._model
        model.image_size = self.image_size
        model.save_pretrained(folder)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the weights and the image size: equal if two tokenizers make the same codes of images."""
        return self._digest(("quantizer", "encoder", "decoder"), self.network.state_dict())

    def codes_fingerprint(self) -> str:
        """SHA-256 (hex) of all that makes codes, without the decoder.

        Two tokenizers make the same codes if it is equal: one whose decoder alone was trained keeps its codes.
        """
        coders = {name: one for name, one in self.network.state_dict().items() if self.network.makes_codes(name)}
        return self._digest(("quantizer", "encoder"), coders)

    @property
    def source_of_training(self) -> str | None:
        """Name of the file, export or run whose weights training began from, if any."""
        begun = self._model[0].begun_from
        return None if begun is None else str(begun.get("path"))

    def keeps_codes_of_source(self) -> bool | None:
        """Return whether the codes are still those of the weights that training began from, or None if it is unknown.

        They are where the decoder alone was trained. Compared are fingerprints of codes of images of the size that it
        was trained on.
        """
        begun = self._model[0].begun_from or {}
        if not isinstance(begun.get("codes"), str):
            return None
        size = image_size_of(begun.get("image_size", self.image_size))
        return begun["codes"] in Tokenizer(self._model[0], size)._codes_fingerprints()

    def makes_codes_of(self, fingerprint: Any) -> bool:
        """Return whether this tokenizer makes the codes of the one whose `codes_fingerprint` this is.

        It does as well where it kept the codes of the one that its training began from.
        """
        if fingerprint == self.codes_fingerprint():
            return True
        begun = self._model[0].begun_from or {}
        size = image_size_of(begun.get("image_size", self.image_size))
        return fingerprint == begun.get("codes") and size == self.image_size and self.keeps_codes_of_source() is True

    def _codes_fingerprints(self) -> set[str]:
        """Return the fingerprint of codes as it is now, and as it was while it did not say all of the quantizer."""
        coders = {name: one for name, one in self.network.state_dict().items() if self.network.makes_codes(name)}
        return {self._digest(("quantizer", "encoder"), coders, said=said) for said in ("traits", "traits_of_before")}

    def _digest(self, parts: Sequence[str], tensors: Mapping[str, Tensor], *, said: str = "traits") -> str:
        digest = hashlib.sha256(str(self.image_size).encode())
        if self.network.scales is not None:
            digest.update(str(self.network.scales).encode())
        for part in parts:
            module = getattr(self.network, part, None)
            digest.update(str(getattr(module, said, getattr(module, "traits", ""))).encode())
        named = {self.network.first_name(name): tensor for name, tensor in tensors.items()}
        for name, tensor in sorted(named.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def model_type(self) -> str:
        """Which kind of model this is the tokenizer of, see `PretrainedModel.model_type`."""
        return self._model[0].model_type

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.network.channels

    @property
    def codebook_size(self) -> int:
        """Number of codes (of each level)."""
        return self.network.codebook_size

    @property
    def num_levels(self) -> int:
        """Codes per position."""
        return self.network.num_levels

    @property
    def code_side(self) -> int | None:
        """Codes along each side of a square map; None of codes in a row, and of maps that are not square."""
        return self.code_shape[0] if len(self.code_shape) == 2 and len(set(self.code_shape)) == 1 else None

    @property
    def num_codes(self) -> int:
        """Positions of an image, over all scales: the length of its row of codes."""
        if self.network.scales is not None:
            return sum(side**2 for side in self.network.scales)
        return math.prod(self.code_shape)

    @property
    def resample(self) -> str:
        """Filter of every resize, as in the run."""
        return self._model[0].resample

    @property
    def device(self) -> torch.device:
        """The device of the weights, to which batches go."""
        return next(self.network.parameters()).device

    def preprocess(self, images: Any) -> Tensor:
        """Return images of any size as a batch, resized and cropped as those that the tokenizer was trained on.

        Args:
            images: PIL images; paths; arrays (h, w), (h, w, c), or (c, h, w) where the last axis is no number of
                channels; tensors (c, h, w); batches of arrays or tensors; or lists of all of these. Bytes reach from
                0 to 255, floats from 0 to 1. Floats of the right size are taken as they are.

        Returns:
            (b, c, h, w) float32 in [0, 1], on the device of the weights.

        Raises:
            UserError: one is no image, or there are none.
        """
        options = {"image_size": self.image_size, "channels": self.channels, "resample": self.resample}
        return import_path(BATCH_OF)(images, **options).to(self.device)

    def to_pil(self, images: Tensor) -> list[Any]:
        """Return images (b, c, h, w) in [0, 1], as `decode` and `reconstruct` give them, as PIL images."""
        return import_path(PIL_IMAGES)(images)

    def _batch(self, images: Any) -> Tensor:
        """Return a batch as it is, and anything else as `preprocess` makes it one."""
        return images if isinstance(images, Tensor) else self.preprocess(images)

    def encode(self, images: Any) -> Tensor:
        """Images -> codes (b, n), or (b, n, q) with q levels; rows of the picture in turn.

        With scales, the rows of the coarsest map come first.

        Args:
            images: (b, c, h, w) in [0, 1] of the tokenizer's size, or what `preprocess` takes.

        Raises:
            UserError: the images are others than the tokenizer is for, or it gave codes that do not exist.
        """
        codes = self.unchecked_codes(self._batch(images))
        check_codes(codes, self.network)
        return codes

    @torch.no_grad()
    def unchecked_codes(self, images: Tensor) -> Tensor:
        """Return what `encode` does without a look at the codes, which would wait for the device."""
        height, width = sides_of(self.image_size)
        if images.ndim != 4 or images.shape[1:] != (self.channels, height, width):
            expected = f"(batch, {self.channels}, {height}, {width})"
            raise UserError(f"images of shape {tuple(images.shape)} were given; {expected} is expected")
        check_pixels(images)
        ids = self.network.tokenize(images)
        if self.network.scales is not None or len(self.code_shape) == 1:
            return ids
        return rearrange(ids, "b h w ... -> b (h w) ...")

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Codes (b, n), or (b, n, q) with q levels, -> images (b, c, h, w) in [0, 1]."""
        row = (self.num_codes, self.num_levels) if self.num_levels > 1 else (self.num_codes,)
        if indices.shape[1:] != row:
            expected = f"(batch, {', '.join(map(str, row))})"
            raise UserError(f"codes of shape {tuple(indices.shape)} were given; {expected} is expected")
        if bool(((indices < 0) | (indices >= self.codebook_size)).any()):
            raise UserError(
                f"codes from {int(indices.min())} to {int(indices.max())} were given; there are {self.codebook_size}"
            )
        ids = indices
        if self.network.scales is None and len(self.code_shape) == 2:
            ids = rearrange(indices, "b (h w) ... -> b h w ...", h=self.code_shape[0])
        return self.network.detokenize(ids).float().clamp(0, 1)

    def reconstruct(self, images: Any) -> Tensor:
        """Return what is left of images in their codes: (b, c, h, w) in [0, 1].

        Args:
            images: see `encode`.
        """
        return self.decode(self.encode(images))

    def forward(self, images: Any) -> Tensor:
        """Return `reconstruct` of images."""
        return self.reconstruct(images)

    @torch.no_grad()
    def img_to_idxBl(self, imgs: Any) -> list[Tensor]:
        """See `TokenizerNetwork.img_to_idxBl`; images as for `encode`."""
        return self.network.img_to_idxBl(self._batch(imgs))

    @torch.no_grad()
    def idxBl_to_var_input(self, idxBl: Sequence[Tensor]) -> Tensor:
        """See `TokenizerNetwork.idxBl_to_var_input`."""
        return self.network.idxBl_to_var_input(idxBl)

    @torch.no_grad()
    def idxBl_to_img(self, idxBl: Sequence[Tensor]) -> Tensor:
        """See `TokenizerNetwork.idxBl_to_img`."""
        return self.network.idxBl_to_img(idxBl)


def check_codes(codes: Tensor, network: TokenizerNetwork) -> None:
    """Raise `UserError` unless a network's codes are whole numbers of its codebook; waits for the device."""
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise UserError(f"{_maker_of_codes(network)} gave codes of {codes.dtype}; expected whole numbers, torch.int64")
    if codes.numel():
        lowest, highest = torch.stack(codes.aminmax()).tolist()
        check_range(lowest, highest, network)


def check_range(lowest: int, highest: int, network: TokenizerNetwork, *, least: int = 0) -> None:
    """Raise `UserError` unless codes that reach from `lowest` to `highest` are those of a network's codebook."""
    if lowest < least or highest >= network.codebook_size:
        raise UserError(
            f"{_maker_of_codes(network)} gave codes from {lowest} to {highest}; expected 0 to "
            f"{network.codebook_size - 1}, since its codebook_size is {network.codebook_size}: correct one of the two"
        )


def _maker_of_codes(network: TokenizerNetwork) -> str:
    quantizer = getattr(network, "quantizer", None)
    return f"network {type(network).__name__}" if quantizer is None else f"quantizer {type(quantizer).__name__}"


def check_image_size(size: ImageSize, layers: int, option: str) -> None:
    """Raise `UserError` if images of this size cannot be halved so many times; names the option."""
    stride = 2**layers
    for side in dict.fromkeys(sides_of(size)):
        if side % stride or side < stride:
            below = max(0, side - side % stride)
            near = " or ".join(str(near) for near in (below, below + stride) if near > 0)
            raise UserError(f"image_size {side} is not a multiple of {stride} (2 ** {layers} {option}); try {near}")


def check_scales(size: ImageSize, shape: Sequence[int], scales: Sequence[int], because: str = "") -> None:
    """Raise `UserError` unless the last scale has the side of the feature map of images of this side (in pixels).

    Args:
        size: of the images.
        shape: of the feature map, (h', w').
        scales: sides of the maps of codes, growing.
        because: where the shape comes from, for the message.
    """
    side = shape[0]
    if len(set(sides_of(size))) != 1:
        raise UserError(
            f"image_size {list(sides_of(size))} is not square, and codes of several scales need it; give one side"
        )
    size = sides_of(size)[0]
    if len(shape) != 2 or scales[-1] != side:
        raise UserError(
            f"v_patch_nums {list(scales)} ends at {scales[-1]} but image_size {size} makes a feature map of "
            f"{' by '.join(map(str, shape))}{because}; end v_patch_nums at {side}, or use image_size "
            f"{scales[-1] * size // side}"
        )


def check_images(images: Tensor, channels: int, layers: int, option: str) -> None:
    """Raise `UserError` unless these are images (b, c, h, w) whose sides can be halved so many times."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise UserError(
            f"images of shape {tuple(images.shape)} were given; (batch, {channels}, height, width) is expected"
        )
    check_pixels(images)
    for side in images.shape[-2:]:
        if side % 2**layers:
            raise UserError(f"image side {side} is not a multiple of {2**layers} (2 ** {layers} {option})")


def check_pixels(images: Tensor) -> None:
    """Raise `UserError` for pixels that are whole numbers: bytes up to 255 would be taken for values up to 1."""
    if not images.is_floating_point():
        raise UserError(f"pixels of type {images.dtype} were given; floating-point numbers in [0, 1] are expected")
