"""Models that predict codes: what `ARTrainer` trains and `vqdist sample` draws from.

`AutoregressiveModel` is the whole contract. `SecondStage` adds a frozen tokenizer, which belongs to the model but is
not trained with it: no parameter of it reaches an optimizer, an average, DDP or a checkpoint.

Shapes: `b` batch, `n` codes per image in the order in which they are drawn, `v` codebook size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vqdist.errors import UserError, an
from vqdist.models.pretrained import PretrainedModel, saved_beside
from vqdist.models.tokenizer import Tokenizer
from vqdist.sampling import DrawOptions
from vqdist.sizes import ImageSize


class Prediction(Protocol):
    """Result of the forward pass of an `AutoregressiveModel`, at least; a NamedTuple in each model.

    Attributes:
        logits: (b, n, v) of every code, given the codes before it.
        indices: (b, n) int64, the codes themselves.
    """

    logits: Tensor
    indices: Tensor


class AutoregressiveModel(nn.Module, PretrainedModel, ABC):
    """A network that predicts the codes of an image one after the other; it is trained, averaged and saved as a whole.

    Attributes:
        image_size: side of the images in pixels, or (height, width) of images that are not square.
        channels: of the images.
        codebook_size: number of codes, v.
        num_codes: codes of an image, n: as many numbers are drawn for an image.
        num_classes: classes that images can be asked for; 0 for a model that knows none.
        scale_lengths: numbers of codes that are predicted at once, in order, where they are the scales of an image;
            None for a model that predicts code after code.
        draw_defaults: options of drawing where the user says nothing.
        tokenizer: makes the codes, where that is not a part of the model itself.
    """

    image_size: ImageSize
    num_classes: int = 0
    scale_lengths: tuple[int, ...] | None = None
    draw_defaults: ClassVar[Mapping[str, Any]] = {}
    if TYPE_CHECKING:  # attributes or properties of each model

        @property
        def channels(self) -> int: ...

        @property
        def codebook_size(self) -> int: ...

        @property
        def num_codes(self) -> int: ...

        @property
        def tokenizer(self) -> Tokenizer | None: ...

    else:
        tokenizer = None

    def __repr__(self) -> str:
        """Return one line; `print(*model.children())` shows the layers."""
        classes = [f"{self.num_classes} classes"] if self.num_classes else []
        return self.in_brief(f"{self.num_codes} codes of {self.codebook_size}", *classes)

    @abstractmethod
    def inputs(self, item: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """Return what `forward` takes for images (b, c, h, w) in [0, 1], or the tokenizer's codes (b, n) or (b, n, q).

        Without gradients; called outside the engine.

        Args:
            item: images or codes.
            label: (b,) int64 from 0 to num_classes, where num_classes stands for "no class".
        """

    @abstractmethod
    def loss(self, out: Any, *inputs: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss in float32 (0-d), and its named parts (0-d, `cross_entropy` among them).

        Args:
            out: a `Prediction`, which `forward` gave.
            *inputs: what it took.
            **named: nothing; a model may name its inputs.
        """

    @abstractmethod
    def draw_codes(self, uniform: Tensor, label: Tensor, options: DrawOptions, *, use_cache: bool = True) -> Tensor:
        """Draw the codes of images.

        Args:
            uniform: (b, n) in [0, 1): the randomness of each code.
            label: (b,) int64, as for `inputs`.
            options: how to draw; `cfg` other than 1 needs classes.
            use_cache: keep keys and values of the codes before; false runs the whole sequence for every step, which
                gives the same codes, slowly.

        Returns:
            (b, n) int64.
        """

    @abstractmethod
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (b, n) -> images (b, c, h, w) in [0, 1]."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 64,
        *,
        label: Tensor | int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        **options: Any,
    ) -> Tensor:
        """Draw images; the mode of the model (train or eval) is as before afterwards.

        Args:
            num_samples: how many.
            label: the class of all, or of each (b,); by default none.
            generator: on the CPU, of the draws; by default torch's global one.
            use_cache: see `draw_codes`.
            **options: of `vqdist.sampling.DrawOptions`, over the model's own defaults.

        Returns:
            (num_samples, c, h, w) in [0, 1].
        """
        drawn = DrawOptions(**{**self.draw_defaults, **options})
        if num_samples < 1:
            raise UserError(f"num_samples {num_samples} is not possible; it must be at least 1")
        uniform = torch.rand(num_samples, self.num_codes, generator=generator)
        return self.sample_from(uniform, self.labels(label, num_samples), drawn, use_cache=use_cache)

    @torch.no_grad()
    def sample_from(self, uniform: Tensor, label: Tensor, options: DrawOptions, *, use_cache: bool = True) -> Tensor:
        """Return images (b, c, h, w) in [0, 1]: draw in eval mode on this model's device, then decode."""
        if options.cfg != 1 and not self.num_classes:
            raise UserError(f"cfg {options.cfg:g} is given but the model knows no classes; leave it out")
        training = self.training
        self.eval()
        try:
            codes = self.draw_codes(uniform.to(self.device), label.to(self.device), options, use_cache=use_cache)
            return self.decode_codes(codes).float().clamp(0, 1)
        finally:
            self.train(training)

    def check_label(self, label: int | None) -> int:
        """Return the label of an image; raise `UserError` unless it is one of the classes that the model knows."""
        if label is None or label < 0:
            raise UserError(
                f"the model knows {self.num_classes} classes but there are images without a label; use a source with "
                "labels (a folder with one subfolder a class, for example)"
            )
        if label >= self.num_classes:
            raise UserError(
                f"the images have the label {label} but the model knows the classes 0 to {self.num_classes - 1}; "
                "num_classes must fit"
            )
        return label

    def labels(self, label: Tensor | int | None, count: int) -> Tensor:
        """(count,) int64: the class of all, or of each; `num_classes`, which stands for no class, where it is None."""
        if label is None:
            return torch.full((count,), self.num_classes, device=self.device)
        labels = torch.as_tensor(label, device=self.device)
        if labels.shape not in ((), (count,)):
            raise UserError(
                f"labels of shape {tuple(labels.shape)} are given for {count} images; give one, or one each"
            )
        labels = labels.expand(count)
        if not self.num_classes:
            raise UserError(f"class {label} is asked for but the model knows no classes; leave it out")
        if bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise UserError(f"class {label} is asked for; the model knows 0 to {self.num_classes - 1}")
        return labels


class CodePrediction(NamedTuple):
    """Result of one pass through a `SecondStage`: a `Prediction` and nothing else."""

    logits: Tensor
    indices: Tensor


class SecondStage(AutoregressiveModel):
    """A model of the codes of a frozen tokenizer, which is saved beside it, in `tokenizer/`.

    Args:
        tokenizer: makes the codes; used without gradients, in eval mode and in float32. Its weights are frozen.
    """

    channels: int
    codebook_size: int

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        if not isinstance(tokenizer, Tokenizer):
            raise UserError(f"the tokenizer is {an(type(tokenizer).__name__)}; give a vqdist.Tokenizer")
        self._held = _Held(tokenizer)
        self.image_size = tokenizer.image_size
        self.channels = tokenizer.channels
        self.codebook_size = tokenizer.codebook_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, on this model's device."""
        return self._held.tokenizer.to(self.device)

    def decode_with(self, tokenizer: Tokenizer) -> None:
        """Let another decoder make images of the codes: that of a tokenizer which makes the same codes.

        Raises:
            UserError: its codes are others, and would mean other pictures.
        """
        if tokenizer.codes_fingerprint() != self.tokenizer.codes_fingerprint():
            raise UserError(
                "the tokenizer is not the one that the model was trained over (weights differ), so codes would mean "
                "other pictures; give that one, or one of which the decoder alone was trained since"
            )
        self._held = _Held(tokenizer)

    def loss(self, out: Prediction, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the codes in nats, the mean over codes and images."""
        loss = cross_entropy(rearrange(out.logits.float(), "b n v -> b v n"), out.indices)
        return loss, {"cross_entropy": loss}

    @torch.no_grad()
    def codes_of(self, item: Tensor) -> Tensor:
        """Images (b, c, h, w), or codes as `Tokenizer.encode` gives them -> those codes."""
        if item.ndim != 4:  # stored codes
            return item
        with torch.autocast(item.device.type, enabled=False):
            if item.device.type == "cpu":
                return self.tokenizer.encode(item)
            return self.tokenizer.unchecked_codes(item)  # in a step nothing waits for the device

    def _save_pretrained(self, save_directory: Path) -> None:
        self._held.tokenizer.save_pretrained(save_directory / "tokenizer")
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any):
        trained_over = cls._config_of_this_type(model_id, kwargs).get("tokenizer")
        beside = saved_beside(model_id, "tokenizer", kwargs)
        kwargs["tokenizer"] = Tokenizer.from_pretrained(beside, fingerprint=trained_over)
        return super()._from_pretrained(model_id=model_id, **kwargs)


class _Held:
    """Keeps the tokenizer out of the module's parameters, and one for all copies of the module (EMA makes one)."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict) -> _Held:
        return self
