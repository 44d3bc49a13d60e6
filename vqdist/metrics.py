"""Numbers of a run: averages on the device, the quality of reconstructions, and of the prediction of codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, pad

from vqdist.backends.base import Backend
from vqdist.conventions import FLOAT, NEAREST, TRUNCATED
from vqdist.models.multiscale import hits_per_scale
from vqdist.models.tokenizer import TokenizerNetwork, check_range
from vqdist.sizes import ImageSize, sides_of

FEW_CODES = 0.1


class RunningMeans:
    """Means of named 0-d tensors since the last `reset`, kept on the device: adding waits for nothing."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one value of each name; names may differ from call to call."""
        for name, value in values.items():
            value = value.detach().to(torch.float32)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, Tensor]:
        """Return the mean of each name, as 0-d tensors of this rank."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}

    def state(self) -> dict[str, dict]:
        """Return what was added since the last `reset`, for `restore`."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def restore(self, state: Mapping[str, dict] | None) -> None:
        """Go on from what `state` gave; None is a `reset`."""
        self.reset()
        if state is not None:
            self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


class CodeHistogram:
    """Counts of each code's uses, made on the device without waiting for it.

    Levels of a position, each with a codebook of its own, are counted apart; so are scales, which share one.

    Args:
        network: whose codes are counted.
        device: of the codes.

    Attributes:
        few: a sentence where few codes were in use at the last `usage`, else None.
    """

    def __init__(self, network: TokenizerNetwork, device: torch.device):
        self.network = network
        self.codebook_size, self.num_levels, self.scales = network.codebook_size, network.num_levels, network.scales
        parts = self.num_levels if self.scales is None else len(self.scales)
        self.counts = torch.zeros(parts * self.codebook_size, dtype=torch.int64, device=device)
        self.few: str | None = None
        self._range = torch.zeros(2, dtype=torch.int64, device=device)  # from the lowest code to the highest

    def add(self, ids: Tensor) -> None:
        """Count codes (b, h, w) or (b, h, w, q), or (b, L) of scales; -1 is not counted.

        Those that are not in the codebook are noted; `usage` says so.
        """
        if ids.numel():
            lowest, highest = ids.aminmax()
            self._range = torch.stack([self._range[0].minimum(lowest), self._range[1].maximum(highest)])
        if self.scales is not None:
            self.counts += hits_per_scale(ids, self.scales, self.codebook_size).flatten()
        else:
            self.counts += code_histogram(ids, codebook_size=self.codebook_size, num_levels=self.num_levels)

    def usage(self, backend: Backend) -> dict[str, float]:
        """Usage and perplexity of the codebook over all ranks, see `codebook_usage`; every rank calls this.

        With scales also `codebook_usage_scale_I` and `codebook_perplexity_scale_I`, I from 1, of each scale alone;
        with levels the same of `level_I`.

        Afterwards `few` has a warning if that is little.

        Raises:
            UserError: a rank's codes were not all in the codebook.
        """
        ranges = backend.gather(self._range)
        # -1 stands for a level that was left out while training
        least = -1 if self.num_levels > 1 else 0
        check_range(int(ranges[:, 0].min()), int(ranges[:, 1].max()), self.network, least=least)
        counts = backend.sum(self.counts.clone()).cpu()
        drawn = int(counts.sum()) // (self.num_levels if self.scales is None else 1)
        parts = counts.view(-1, self.codebook_size)
        if self.scales is None:
            usage, perplexity = codebook_usage(counts, self.num_levels)
        else:
            usage, perplexity = codebook_usage(parts.sum(dim=0))
        self.few = few_codes(usage, drawn, self.codebook_size)
        kind = "level" if self.scales is None else "scale"
        numbers = {"codebook_usage": usage, "codebook_perplexity": perplexity}
        for number, part in enumerate([] if self.scales is None and len(parts) == 1 else parts, start=1):
            of_part = zip(("usage", "perplexity"), codebook_usage(part), strict=True)
            numbers |= {f"codebook_{name}_{kind}_{number}": value for name, value in of_part}
        return numbers

    def reset(self) -> None:
        """Forget everything."""
        self.counts.zero_()


def code_histogram(ids: Tensor, *, codebook_size: int, num_levels: int = 1) -> Tensor:
    """Return how often each code occurs in (b, h, w) or (b, h, w, q); what is not in the codebook is not counted.

    Returns:
        (num_levels * codebook_size,) int64; the codes of level i begin at i * codebook_size.
    """
    flat = ids.reshape(-1, num_levels)
    offsets = torch.arange(num_levels, device=ids.device) * codebook_size
    known = (flat >= 0) & (flat < codebook_size)
    bins = torch.where(known, flat + offsets, num_levels * codebook_size).flatten()
    counts = torch.zeros(num_levels * codebook_size + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:-1]  # as bincount, which waits for a CUDA device


LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue, of ITU-R BT.601


class ReconstructionMetrics:
    """L1, PSNR, SSIM, codebook usage and perplexity over a set of images that is spread over ranks.

    PSNR and SSIM are those of torchmetrics, which is not imported for them: it would bring torchvision, matplotlib and
    torch._dynamo, which take longer than to import torch.

    Args:
        network: whose codes are counted.
        backend: adds the ranks' numbers.
        image_size: of the images; where a side is below 11 pixels, the window of SSIM shrinks to fit.
        distances: of more measures, by name: pairs of images -> (b,), whose means are given beside the others.
        rounded: whether reconstructions are rounded to 8 bits first, as those that were written to files; or one of
            the values of `vqdist.conventions.PIXELS`.
    """

    def __init__(
        self,
        network: TokenizerNetwork,
        backend: Backend,
        image_size: ImageSize,
        *,
        distances: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
        rounded: bool | str = False,
    ):
        self.backend, self.distances = backend, dict(distances or {})
        self.pixels = rounded if isinstance(rounded, str) else NEAREST if rounded else FLOAT
        smallest = min(sides_of(image_size))
        side = max(1, (smallest - 1) // 2 * 2 - 1)  # odd, with room for the reflection
        self.window = (gaussian_window() if smallest >= 11 else torch.full((side,), 1 / side)).to(backend.device)
        self.codes = CodeHistogram(network, backend.device)
        # sums over images of L1, squared error, PSNR, SSIM, SSIM of luma and the distances, and their number
        self.sums = torch.zeros(6 + len(self.distances), dtype=torch.float64, device=backend.device)

    def update(self, image: Tensor, recon: Tensor, indices: Tensor) -> None:
        """Count a batch: images and reconstructions (b, c, h, w), codes (b, ...)."""
        image, recon = image.to(torch.float32), as_pixels(recon, self.pixels)
        squared = (recon - image).square().mean(dim=(1, 2, 3))
        by_image = [
            (recon - image).abs().mean(dim=(1, 2, 3)),
            squared,
            -10 * squared.double().log10(),
            structural_similarity(recon, image, self.window),
            structural_similarity(luma(recon), luma(image), self.window),
            *(distance(recon, image) for distance in self.distances.values()),
            torch.ones(len(image), device=image.device),
        ]
        self.sums += torch.stack([values.double() for values in by_image]).sum(dim=1)
        self.codes.add(indices)

    def compute(self) -> dict[str, float]:
        """Return the numbers over all ranks' images; every rank calls this and gets the same."""
        *totals, images = self.backend.sum(self.sums.clone()).tolist()
        names = ("l1", "squared", "psnr_per_image", "ssim", "ssim_luma", *self.distances)
        means = dict(zip(names, (total / images if images else math.nan for total in totals), strict=True))
        squared = means.pop("squared")
        psnr = math.inf if squared == 0 else -10 * math.log10(squared)
        numbers = {"l1": means.pop("l1"), "psnr": psnr, **means}
        return {**numbers, **self.codes.usage(self.backend), "images": int(images)}


def as_pixels(image: Tensor, pixels: str) -> Tensor:
    """Return images as float32 in [0, 1], rounded as one of the values of `vqdist.conventions.PIXELS` says."""
    image = image.to(torch.float32).clamp(0, 1)
    if pixels == FLOAT:
        return image
    return ((image * 255).floor() if pixels == TRUNCATED else (image * 255).round()) / 255


def luma(image: Tensor) -> Tensor:
    """Return the brightness (b, 1, h, w) of images (b, c, h, w); grey is its own, alpha is left out."""
    if image.shape[1] < 3:
        return image[:, :1]
    weights = torch.tensor(LUMA, dtype=image.dtype, device=image.device).view(1, 3, 1, 1)
    return (image[:, :3] * weights).sum(dim=1, keepdim=True)


def gaussian_window(side: int = 11, sigma: float = 1.5) -> Tensor:
    """Return the window of SSIM along one axis, (side,), which sums to 1."""
    distance = torch.arange(side) - (side - 1) / 2
    window = torch.exp(-((distance / sigma) ** 2) / 2)
    return window / window.sum()


def structural_similarity(recon: Tensor, image: Tensor, window: Tensor) -> Tensor:
    """Return the SSIM (Wang et al. 2004) of each of b pairs of images with pixels in [0, 1], (b,) float32.

    Args:
        recon, image: (b, c, h, w) float32.
        window: weights along one axis, (k,) with k odd; images are reflected at their edges, as torchmetrics does.
    """
    channels = image.shape[1]
    recon, image = (pad(side, [len(window) // 2] * 4, mode="reflect") for side in (recon, image))
    across, along = window.view(1, 1, 1, -1), window.view(1, 1, -1, 1)
    moments = torch.cat([recon, image, recon * recon, image * image, recon * image]).flatten(0, 1)[:, None]
    moments = conv2d(conv2d(moments, across), along)
    x, y, xx, yy, xy = moments.unflatten(0, (5, -1, channels)).squeeze(3)
    variances = (xx - x * x).clamp(min=0) + (yy - y * y).clamp(min=0)
    luminance = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    structure = (2 * (xy - x * y) + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).mean(dim=(1, 2, 3))


class CodePredictionMetrics:
    """Measures of predicted codes, over all codes of a set of images that is spread over ranks.

    Args:
        num_codes: codes of an image.
        scale_lengths: numbers of codes of the scales of an image, whose numbers are also given one by one; None for a
            model without scales.
        device: of the logits.
        likelihood: also what depends on the likelihood; without it there is the accuracy alone, which costs less.
    """

    def __init__(
        self, num_codes: int, scale_lengths: Sequence[int] | None, device: torch.device, *, likelihood: bool = True
    ):
        self.likelihood = likelihood
        self.scale_lengths = [num_codes] if scale_lengths is None else list(scale_lengths)
        self.sums = torch.zeros(len(self.scale_lengths), 2, dtype=torch.float64, device=device)
        self.images = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Count a batch: logits (b, n, v) of codes (b, n). Waits for no device."""
        hits = logits.argmax(dim=-1) == indices
        nll = torch.zeros_like(hits)
        if self.likelihood:
            nll = cross_entropy(logits.float().transpose(1, 2), indices, reduction="none")
        for number, part in enumerate(torch.stack([nll.double(), hits.double()]).split(self.scale_lengths, dim=2)):
            self.sums[number] += part.sum(dim=(1, 2))
        self.images += len(indices)

    def reset(self) -> None:
        """Forget everything."""
        self.sums.zero_()
        self.images.zero_()

    def compute(self, backend: Backend) -> dict[str, float]:
        """Return the numbers over all ranks' images; every rank calls this and gets the same.

        Returns:
            `nll` (nats per code), `bits_per_code` (nll / ln 2), `perplexity` (exp(nll)),
            `accuracy` (share of codes that are the most probable one); with scales also `nll_scale_I` and
            `accuracy_scale_I`, I from 1.
        """
        totals = backend.sum(torch.cat([self.sums.flatten(), self.images[None]])).tolist()
        images, nlls, hits = int(totals.pop()), totals[0::2], totals[1::2]
        codes = max(1, images) * sum(self.scale_lengths)
        nll = sum(nlls) / codes
        numbers = {
            "nll": nll,
            "bits_per_code": nll / math.log(2),
            "perplexity": math.exp(min(nll, 700.0)),
            "accuracy": sum(hits) / codes,
        }
        if len(self.scale_lengths) > 1:
            for number, length in enumerate(self.scale_lengths):
                numbers[f"nll_scale_{number + 1}"] = nlls[number] / (max(1, images) * length)
                numbers[f"accuracy_scale_{number + 1}"] = hits[number] / (max(1, images) * length)
        return {**numbers, "images": images}


def few_codes(usage: float, drawn: int, codebook_size: int) -> str | None:
    """Return a sentence where less than a tenth of the codes is in use that could be, else None.

    A large codebook is not in use as a whole where few codes were drawn: as many codes as could be are those that so
    many draws give on average if all codes are equally likely.

    Args:
        usage: share of the codes that occur, of each level on average.
        drawn: how many codes were counted, of each level.
        codebook_size: codes of each level.
    """
    possible = -math.expm1(-drawn / codebook_size)
    if usage >= FEW_CODES * possible:
        return None
    used = f"{usage * codebook_size:.0f} of {codebook_size} codes are in use ({drawn} were drawn)"
    return f"{used}; docs/gan.md says which options keep codes alive"


def codebook_usage(histogram: Tensor, num_levels: int = 1) -> tuple[float, float]:
    """Share of the codes that occur, and exp(entropy) of their frequencies, each averaged over the levels.

    Args:
        histogram: how often each code occurs, (num_levels * codebook_size,).
        num_levels: residual levels.
    """
    counts = histogram.view(num_levels, -1).to(torch.float64)
    frequency = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(frequency, frequency).sum(dim=1)
    return float((counts > 0).double().mean()), float(entropy.exp().mean())
