"""Likeness of two sets of images: FID, sFID, KID, IS, precision and recall of the features of both.

Shapes: N images, f features, s spatial features, k classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqdist.conventions import OF_5000, SHUFFLED, TEN
from vqdist.errors import UserError
from vqdist.evaluation.features import Features, Moments
from vqdist.evaluation.references import Reference

NEIGHBOURS = 3  # of precision and recall, as their paper has it
MIN_IMAGES = NEIGHBOURS + 1
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as the paper's authors have it; subsets are smaller where images are fewer
KID_SEED = 2020  # of the draw of subsets, as torch-fidelity has it
LARGEST_GRAM = 2**25  # numbers of a matrix of kernels that is kept
ROWS = 512  # whose distances are computed at once: all are 20 GB for 50,000 images


def fidelity(
    generated: Features, real: Features | Reference, *, coverage: bool = True, splits: str = TEN
) -> dict[str, float]:
    """FID, sFID, KID, IS, precision and recall of generated images, in float64; the same on every rank.

    Args:
        generated: of N images, at least `MIN_IMAGES`.
        real: of as many or more or fewer images, or the statistics of such a set; what those do not hold gives no
            numbers.
        coverage: also precision and recall, which take N * M distances.
        splits: over which the inception score is averaged, one of `vqdist.conventions.SPLITS`.

    Returns:
        `fid`: Frechet distance of the Gaussians fitted to the two sets (arXiv 1706.08500); as few rows as features, or
        fewer, make it too large. `sfid`: the same of spatial features (arXiv 2103.03841). `kid`, `kid_std`: squared
        maximum mean discrepancy with a cubic kernel, mean and standard deviation over 100 subsets of 1000, or of the
        smaller set's size (arXiv 1801.01401); the mean may be a little below 0, the deviation says nothing where a
        subset is nearly the whole. `is`, `is_std`: inception score of the generated images (arXiv 1606.03498), mean
        and standard deviation over the splits; it needs no real images. `precision`: share of the generated images
        that lie within the real ones, nearer to one of them than its third neighbour is; `recall`: share of the real
        ones within the generated (arXiv 1904.06991).
    """
    check_count(len(generated), "samples")
    compared = real if isinstance(real, Features) else real.features
    if compared is not None:
        check_count(len(compared), "images")
    reference = real if isinstance(real, Reference) else Reference.of(real)
    numbers = {"fid": frechet_distance(Moments.of(_finite(generated.features)), reference.moments)}
    spatial = generated.spatial_moments()
    if spatial is not None and reference.spatial is not None:
        numbers["sfid"] = frechet_distance(spatial, reference.spatial)
    if reference.features is not None:
        numbers |= kernel_distance(generated.features, _finite(reference.features))
    if generated.logits is not None:
        numbers |= inception_score(_finite(generated.logits), splits)
    if coverage and reference.features is not None:
        numbers |= precision_and_recall(generated.features, reference.features)
    return numbers


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), m and C the means and covariances of two sets."""
    distance = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    # below 0 only by rounding, of nearly equal sets
    return max(0.0, float(distance - 2 * _trace_of_root(first, second)))


def _trace_of_root(first: Moments, second: Moments) -> Tensor:
    """Return tr (C1 C2)^(1/2), as the singular values of F1' F2 where C = F F'.

    torch-fidelity and torchmetrics ask for the eigenvalues of C1 C2, which is not symmetric. That takes three times as
    long, and a hundred times as long where there are few images.
    """
    if first.factor is not None and second.factor is not None:
        return torch.linalg.svdvals(first.factor.T @ second.factor).sum()
    factor = _factor(second)
    # the squares of those singular values
    return torch.linalg.eigvalsh(factor.T @ first.covariance @ factor).clamp(min=0).sqrt().sum()


def _factor(moments: Moments) -> Tensor:
    """Return F with F F' the covariance."""
    if moments.factor is not None:
        return moments.factor
    factor, singular = torch.linalg.cholesky_ex(moments.covariance)
    if not singular:
        return factor
    values, vectors = torch.linalg.eigh(moments.covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Return `kid` and `kid_std` of features (N, f) and (M, f), see `fidelity`; the subsets are torch-fidelity's.

    Its own function computes in NumPy, which leaves a CUDA device idle, and each kernel anew in each subset.
    """
    generated, real = generated.double(), real.to(generated.device).double()
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    subsets = 1 if len(generated) == len(real) == size else KID_SUBSETS  # there is one subset: the whole
    grams = _grams(generated, real) if max(len(generated), len(real)) ** 2 <= LARGEST_GRAM else None
    rng = np.random.RandomState(KID_SEED)
    found = []
    for _ in range(subsets):
        mine, theirs = (torch.from_numpy(rng.choice(len(part), size, replace=False)) for part in (generated, real))
        mine, theirs = mine.to(generated.device), theirs.to(real.device)
        if grams is None:
            found.append(_discrepancy(*_grams(generated[mine], real[theirs])))
        else:
            places = ((mine, mine), (mine, theirs), (theirs, theirs))
            found.append(_discrepancy(*(gram[a][:, b] for gram, (a, b) in zip(grams, places, strict=True))))
    values = torch.stack(found)
    return {"kid": float(values.mean()), "kid_std": float(values.std(correction=0))}


def _grams(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cubic kernels of rows (N, f) and (M, f): within the first, between both, within the second."""
    pairs = ((first, first), (first, second), (second, second))
    grams = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in pairs)
    return next(grams), next(grams), next(grams)


def _discrepancy(first: Tensor, mixed: Tensor, second: Tensor) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy of m rows each, by their kernels (m, m)."""
    size = len(first)
    within = sum(gram.sum() - gram.trace() for gram in (first, second))
    return within / (size * (size - 1)) - 2 * mixed.mean()


def inception_score(logits: Tensor, splits: str = TEN) -> dict[str, float]:
    """Return `is` and `is_std` of logits (N, k): exp of the mean of KL(p(y|x) || p(y)), over splits.

    Consecutive splits are those of the file, as the ADM evaluator has them. Fewer images than ten make one split.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    logits = logits.cpu()
    parts = logits.split(5000) if splits == OF_5000 else [logits]
    count = 10 if splits in (TEN, SHUFFLED) and len(logits) >= 10 else 1
    scores = [isc_features_to_metric(part, splits=count, shuffle=splits == SHUFFLED) for part in parts]
    if len(scores) == 1:
        return {"is": scores[0][KEY_METRIC_ISC_MEAN], "is_std": scores[0][KEY_METRIC_ISC_STD]}
    means = [score[KEY_METRIC_ISC_MEAN] for score in scores]
    return {"is": float(np.mean(means)), "is_std": float(np.std(means))}


def precision_and_recall(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Return `precision` and `recall` of features (N, f) and (M, f), see `fidelity`.

    torch-fidelity's function computes the distances between both sets twice, and looks for neighbours on the host.
    """
    generated, real = generated.double(), real.to(generated.device).double()
    radii, radii_of_real = _radii(generated), _radii(real)
    covered, precise = torch.zeros(len(real), dtype=torch.bool, device=real.device), 0
    for part, radius in zip(generated.split(ROWS), radii.split(ROWS), strict=True):
        distances = torch.cdist(part, real)
        precise += int((distances <= radii_of_real).any(dim=1).sum())
        covered |= (distances <= radius[:, None]).any(dim=0)
    return {"precision": precise / len(generated), "recall": float(covered.double().mean())}


def _radii(features: Tensor) -> Tensor:
    """Return the distance of each row (N, f) from its third neighbour, (N,); the nearest of all is the row itself."""
    parts = [torch.cdist(part, features).topk(NEIGHBOURS + 1, largest=False).values for part in features.split(ROWS)]
    return torch.cat(parts)[:, NEIGHBOURS]


def check_count(count: int, what: str) -> None:
    """Raise `UserError` if there are too few images of a set to measure its fidelity."""
    if count < MIN_IMAGES:
        raise UserError(
            f"there are {count} {what} but precision and recall look at the third neighbour of each; give at least "
            f"{MIN_IMAGES}"
        )


def _finite(features: Tensor) -> Tensor:
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise UserError(
            f"the features of {broken} of {len(features)} images are not finite; look at the feature extractor, and "
            "at the run's weights"
        )
    return features
