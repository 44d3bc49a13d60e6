"""The discrete VAE of DALL-E (arXiv 2102.12092), with the networks and names of DALLE-pytorch.

An encoder gives each position logits over the codes; training draws a relaxed one-hot from them (Gumbel-softmax) and
decodes the mixture of code vectors that it weighs. Shapes: `b` batch, `c` channel, `h w` image, `h' w'` positions
(image / 2 ** num_layers), `n` = h' * w', `v` codes, `d` codebook dimension.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist import losses, sampling
from vqdist.errors import UserError
from vqdist.models.arguments import check_channels, check_whole_numbers
from vqdist.models.pretrained import PretrainedModel
from vqdist.models.published.files import read_torch
from vqdist.models.tokenizer import TokenizerNetwork, check_image_size, check_images
from vqdist.names import unknown
from vqdist.options import is_whole
from vqdist.sizes import ImageSize, image_size_of, sides_of

KL_REDUCTIONS = ("mean", "dalle")
DEFAULT_NORMALIZATION = ((0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.0))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with ReLU, a 1x1 convolution, and the input added."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class LogitEncoder(nn.Sequential):
    """Convolutions of which the last, 1x1, is applied as the linear layer that it is at every position.

    So (b, c, h, w) -> (b, h', w', v): codes last in memory, where softmax and products with the codebook are fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        for module in self[:-1]:
            x = module(x)
        to_logits = cast(nn.Conv2d, self[-1])
        return F.linear(rearrange(x, "b d h w -> b h w d"), to_logits.weight.flatten(1), to_logits.bias)


class DiscreteVAE(
    TokenizerNetwork,
    PretrainedModel,
    library_name="vqdist",
    tags=["image-tokenizer", "discrete-vae"],
):
    """An image tokenizer: images to codes and back.

    Save and load with `save_pretrained(folder)`, `DiscreteVAE.from_pretrained(folder or repository)` and
    `push_to_hub(repository)`; `DiscreteVAE.from_dalle_pytorch("vae.pt")` loads what DALLE-pytorch trained.

    Args:
        image_size: side of the images in pixels, or (height, width); multiples of 2 ** num_layers.
        num_tokens: number of codes.
        codebook_dim: dimension of a code's vector.
        num_layers: halvings of the resolution.
        num_resnet_blocks: residual blocks at the lowest resolution, in encoder and decoder each.
        hidden_dim: channels of the convolutions.
        channels: channels of the images: 1 grey, 3 colour, 4 colour and alpha.
        smooth_l1_loss: smooth L1 for the reconstruction instead of the mean squared error.
        temperature: of the relaxed draw where the caller gives none; trainers anneal their own.
        straight_through: decode the hard draw, with the gradient of the soft one.
        reinmax: with straight_through, ReinMax's second-order gradient (arXiv 2304.08612) instead.
        kl_div_loss_weight: weight of KL(codes' distribution || uniform); 0 leaves it out.
        kl_reduction: `mean` over positions, whatever batch and image size; `dalle` sums over them and over the images
            of a micro-batch, as DALLE-pytorch does.
        normalization: means and standard deviations by channel, which turn [0, 1] into what the networks see; null
            leaves images as they are.
    """

    model_type = "dvae"
    channels: int
    image_size: ImageSize
    means: Tensor  # (c, 1, 1), of `norm`
    stds: Tensor
    num_levels = 1

    def __init__(
        self,
        image_size: ImageSize = 256,
        num_tokens: int = 512,
        codebook_dim: int = 512,
        num_layers: int = 3,
        num_resnet_blocks: int = 0,
        hidden_dim: int = 64,
        channels: int = 3,
        smooth_l1_loss: bool = False,
        temperature: float = 0.9,
        straight_through: bool = False,
        reinmax: bool = False,
        kl_div_loss_weight: float = 0.0,
        kl_reduction: str = "mean",
        normalization: Sequence[Sequence[float]] | None = DEFAULT_NORMALIZATION,
    ):
        super().__init__()
        if not isinstance(image_size, (list, tuple)):
            check_whole_numbers(image_size=(image_size, 1))
        image_size = image_size_of(image_size)
        _check_sizes(num_tokens, codebook_dim, num_layers, num_resnet_blocks, hidden_dim, channels)
        _check_draw(temperature, straight_through, reinmax, kl_div_loss_weight, kl_reduction)
        self.image_size = image_size
        self.num_tokens = num_tokens
        self.num_layers = num_layers
        self.channels = channels
        self.smooth_l1_loss = smooth_l1_loss
        self.temperature = temperature
        self.straight_through = straight_through
        self.reinmax = reinmax
        self.kl_div_loss_weight = kl_div_loss_weight
        self.kl_reduction = cast(Literal["mean", "dalle"], kl_reduction)
        self.check_image_size(image_size)
        means, stds = _normalization(normalization, channels)
        self.register_buffer("means", means, persistent=False)  # DALLE-pytorch's checkpoints have no such tensors
        self.register_buffer("stds", stds, persistent=False)
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        self.encoder = build_encoder(channels, hidden_dim, num_layers, num_resnet_blocks, num_tokens)
        self.decoder = build_decoder(channels, hidden_dim, num_layers, num_resnet_blocks, codebook_dim)

    def __repr__(self) -> str:
        """Return one line; `print(vae.encoder)` shows the layers."""
        return self.in_brief(f"{self.num_tokens} codes of dimension {self.codebook.embedding_dim}")

    # ------------------------------------------------------------------------------------- facts

    @property
    def network(self) -> DiscreteVAE:
        """The part that reconstructs images: all of it."""
        return self

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.num_tokens

    @property
    def stride(self) -> int:
        """Pixels per code along each side: 2 ** num_layers."""
        return 2**self.num_layers

    @property
    def num_codes(self) -> int:
        """Codes of an image."""
        return math.prod(self.code_shape(self.image_size))

    def code_shape(self, image_size: ImageSize) -> tuple[int, int]:
        """Shape of the map of codes of images of this size, (h', w')."""
        height, width = sides_of(image_size)
        return height // self.stride, width // self.stride

    def check_image_size(self, size: ImageSize) -> None:
        """Raise `UserError` if images of this size cannot be encoded."""
        check_image_size(size, self.num_layers, "num_layers")

    # ------------------------------------------------------------------------------------- images, logits, codes

    def norm(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> the space that the networks work in."""
        return (images - self.means) / self.stds

    def denorm(self, images: Tensor) -> Tensor:
        """Invert `norm`."""
        return images.to(self.means.dtype) * self.stds + self.means

    def logits(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> logits (b, h', w', v)."""
        check_images(images, self.channels, self.num_layers, "num_layers")
        return self.encoder(self.norm(images))

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> the likeliest codes (b, n), row by row."""
        return self.tokenize(images).flatten(1)

    def tokenize(self, image: Tensor) -> Tensor:
        return self.logits(image).argmax(dim=-1)

    def detokenize(self, ids: Tensor) -> Tensor:
        return self.denorm(self._decode_map(self.codebook(ids)))

    def decode(self, img_seq: Tensor) -> Tensor:
        """Codes (b, n) of square images -> images (b, c, h, w) as the decoder gives them.

        They are, as DALLE-pytorch's, in the space of `norm`; `denorm` brings them to [0, 1], and so does `Tokenizer`.
        """
        side = int(img_seq.shape[1] ** 0.5)
        if side * side != img_seq.shape[1]:
            raise UserError(f"{img_seq.shape[1]} codes do not make a square; give codes of shape (batch, side * side)")
        if bool(((img_seq < 0) | (img_seq >= self.num_tokens)).any()):
            raise UserError(
                f"codes from {int(img_seq.min())} to {int(img_seq.max())} were given; the model has 0 to "
                f"{self.num_tokens - 1}"
            )
        return self._decode_map(self.codebook(rearrange(img_seq, "b (h w) -> b h w", h=side)))

    def _decode_map(self, features: Tensor) -> Tensor:
        """Features (b, h', w', d) -> images (b, c, h, w), normalised."""
        return self.decoder(rearrange(features, "b h w d -> b d h w"))

    # ------------------------------------------------------------------------------------- training

    def noise_shape(self, size: ImageSize) -> tuple[int, int, int]:
        """Shape of one image's noise, (h', w', v), for images of this size."""
        return (*self.code_shape(size), self.num_tokens)

    def forward(
        self,
        img: Tensor,
        return_loss: bool = False,
        return_recons: bool = False,
        return_logits: bool = False,
        temp: float | None = None,
        *,
        noise: Tensor | None = None,
    ):
        """Return a reconstruction from relaxed codes, the loss, or the logits.

        Args:
            img: (b, c, h, w) in [0, 1].
            return_loss: give the loss (0-d) instead of the reconstruction.
            return_recons: give `(loss, reconstruction)` with `return_loss`, `(reconstruction, logits)` with
                `return_logits`.
            return_logits: give the logits (b, v, h', w'), without drawing anything unless `return_recons` is set.
            temp: temperature of the draw; by default `temperature`.
            noise: Gumbel noise (b, h', w', v); by default drawn from torch's global generator.

        Returns:
            Reconstructions (b, c, h, w) are in the space of `norm`, as in DALLE-pytorch.
        """
        if return_loss and return_logits:
            raise UserError("return_loss and return_logits are both set; ask for one of them at a time")
        logits = self.logits(img)
        by_channel = rearrange(logits, "b h w v -> b v h w")
        if return_logits and not return_recons:
            return by_channel
        recon = self._decode_map(self.draw(logits, temp, noise))
        if return_logits:
            return recon, by_channel
        if not return_loss:
            return recon
        loss = self.reconstruction_loss(recon, img)
        if self.kl_div_loss_weight > 0:
            loss = loss + self.kl_div_loss_weight * self.kl_loss(by_channel)
        return (loss, recon) if return_recons else loss

    def draw(self, logits: Tensor, temp: float | None = None, noise: Tensor | None = None) -> Tensor:
        """Logits (b, h', w', v) -> the mixture of code vectors (b, h', w', d) that a relaxed draw weighs."""
        temp = self.temperature if temp is None else temp
        if not 0 < temp < math.inf:
            raise UserError(f"temp {temp} is not possible; it must be above 0 and finite")
        noise = sampling.gumbel_noise(logits.shape, logits.device) if noise is None else noise
        if self.reinmax:
            weights = sampling.reinmax(logits, noise, temp)
        else:
            weights = sampling.gumbel_softmax(logits, noise, temp)
            weights = sampling.straight_through(weights) if self.straight_through else weights
        return weights.to(self.codebook.weight.dtype) @ self.codebook.weight

    def reconstruction_loss(self, recon: Tensor, img: Tensor) -> Tensor:
        """Mean squared error, or smooth L1 with `smooth_l1_loss`, of (b, c, h, w) in the space of `norm`; 0-d.

        Args:
            recon: as `forward` gives it.
            img: in [0, 1].
        """
        return losses.reconstruction_loss(recon, self.norm(img), "smooth_l1" if self.smooth_l1_loss else "l2")

    def kl_loss(self, logits: Tensor) -> Tensor:
        """KL(codes' distribution || uniform) of logits (b, v, h', w'), without its weight; 0-d, nats."""
        return losses.kl_to_uniform(rearrange(logits, "b v h w -> b h w v"), self.kl_reduction)

    # ------------------------------------------------------------------------------------- DALLE-pytorch's files

    @classmethod
    def from_dalle_pytorch(cls, path: str | Path, **options: Any) -> DiscreteVAE:
        """Return the model in a `vae.pt` that DALLE-pytorch 1.6 wrote: {hparams, weights}.

        Nothing is unpickled but tensors and plain values. The file does not say how the model was trained, so losses
        are the defaults; where a `kl_div_loss_weight` is given, it weighs the KL as DALLE-pytorch reduces it.

        Args:
            path: the file.
            **options: arguments of the model over those in the file (`smooth_l1_loss=True`, ...).

        Returns:
            The model in eval mode.
        """
        _refuse_unknown_arguments(cls, options)
        hparams, weights = _read_dalle_pytorch(Path(path).expanduser())
        try:
            channels = weights["encoder.0.0.weight"].shape[1] if "encoder.0.0.weight" in weights else 3
            arguments = {"channels": channels, **hparams, **options}
            reduction = "dalle" if arguments.get("kl_div_loss_weight") else "mean"
            _check_counts(arguments, len(weights), path)
            with torch.device("meta"):  # sizes that the weights do not have take no memory
                cls(**{"kl_reduction": reduction, **arguments}).load_state_dict(weights, assign=True)
            model = cls(**{"kl_reduction": reduction, **arguments})
            model.load_state_dict(weights)
        except (AttributeError, IndexError, TypeError, RuntimeError) as error:
            reason = shorten(str(error), 250, placeholder=" ...")
            raise UserError(
                f"{path} does not hold the weights of a discrete VAE of DALLE-pytorch ({reason})"
            ) from error
        return model.eval()


def _check_counts(arguments: dict[str, Any], tensors: int, path: str | Path) -> None:
    """Raise `UserError` for more layers or blocks than a file has tensors, before the first of them is built."""
    for name in ("num_layers", "num_resnet_blocks"):
        if is_whole(arguments.get(name)) and arguments[name] > tensors:
            raise UserError(f"{path} has {tensors} tensors, too few for {name} {arguments[name]}; it is damaged")


def build_encoder(channels: int, hidden_dim: int, num_layers: int, num_blocks: int, num_tokens: int) -> LogitEncoder:
    """(b, c, h, w) -> logits (b, h', w', v)."""
    widths = [channels, *[hidden_dim] * num_layers]
    modules: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(dim_in, dim_out, 4, stride=2, padding=1), nn.ReLU())
        for dim_in, dim_out in zip(widths[:-1], widths[1:])
    ]
    modules += [ResBlock(hidden_dim) for _ in range(num_blocks)]
    return LogitEncoder(*modules, nn.Conv2d(hidden_dim, num_tokens, 1))


def build_decoder(
    channels: int, hidden_dim: int, num_layers: int, num_blocks: int, codebook_dim: int
) -> nn.Sequential:
    """(b, d, h', w') -> (b, c, h, w)."""
    modules: list[nn.Module] = []
    if num_blocks:
        modules += [nn.Conv2d(codebook_dim, hidden_dim, 1), *(ResBlock(hidden_dim) for _ in range(num_blocks))]
    widths = [hidden_dim if num_blocks else codebook_dim, *[hidden_dim] * num_layers]
    modules += [
        nn.Sequential(nn.ConvTranspose2d(dim_in, dim_out, 4, stride=2, padding=1), nn.ReLU())
        for dim_in, dim_out in zip(widths[:-1], widths[1:])
    ]
    return nn.Sequential(*modules, nn.Conv2d(hidden_dim, channels, 1))


def _check_sizes(num_tokens, codebook_dim, num_layers, num_resnet_blocks, hidden_dim, channels) -> None:
    check_whole_numbers(
        num_tokens=(num_tokens, 2),
        codebook_dim=(codebook_dim, 1),
        num_layers=(num_layers, 1),
        num_resnet_blocks=(num_resnet_blocks, 0),
        hidden_dim=(hidden_dim, 1),
    )
    check_channels(channels)


def _check_draw(temperature, straight_through, reinmax, kl_div_loss_weight, kl_reduction) -> None:
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature {temperature} is not possible; it must be above 0 and finite")
    if reinmax and not straight_through:
        raise UserError("reinmax is a gradient for hard draws; set straight_through true as well")
    if not 0 <= kl_div_loss_weight < math.inf:
        raise UserError(f"kl_div_loss_weight {kl_div_loss_weight} is not possible; it must be at least 0 and finite")
    if kl_reduction not in KL_REDUCTIONS:
        raise UserError(f"kl_reduction {kl_reduction!r} is not known; choose one of {', '.join(KL_REDUCTIONS)}")


def _normalization(given: Sequence[Sequence[float]] | None, channels: int) -> tuple[Tensor, Tensor]:
    """Means and standard deviations, (c, 1, 1); those of further channels are left out."""
    if given is None:
        return torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)
    try:
        means, stds = ([float(value) for value in part[:channels]] for part in given)
    except (TypeError, ValueError):  # not two, not lists, not numbers
        means = stds = []
    if len(means) != channels or len(stds) != channels:
        raise UserError(
            f"normalization {given} is not possible; give {channels} means and {channels} standard deviations"
        )
    if not all(math.isfinite(mean) for mean in means):
        raise UserError(f"normalization has the means {means}; each must be a finite number")
    if not all(0 < std < math.inf for std in stds):
        raise UserError(f"normalization has the standard deviations {stds}; each must be above 0 and finite")
    return torch.tensor(means).view(-1, 1, 1), torch.tensor(stds).view(-1, 1, 1)


def _refuse_unknown_arguments(model_class: type, options: dict[str, Any]) -> None:
    known = list(inspect.signature(cast(Any, model_class).__init__).parameters)[1:]
    for name in options:
        if name not in known:
            raise unknown("argument", name, known, of=model_class.__name__)


def _read_dalle_pytorch(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"no such file: {path}; expected a vae.pt of DALLE-pytorch")
    content = read_torch(path, with_inert=False)  # values of numpy would be arguments
    if not isinstance(content, dict) or not {"hparams", "weights"} <= content.keys():
        found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} holds {found}; a vae.pt of DALLE-pytorch holds hparams and weights")
    return content["hparams"], content["weights"]
