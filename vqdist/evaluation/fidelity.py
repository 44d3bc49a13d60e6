"""Likeness of two sets of images: FID, sFID, KID, IS, precision and recall of the features of both.

Shapes: N images, f features, s spatial features, k classes.
"""

from __future__ import annotations

from torch import Tensor

from vqdist.errors import UserError
from vqdist.evaluation.features import Features, Moments
from vqdist.evaluation.references import Reference

NEIGHBOURS = 3  # of precision and recall, as their paper has it
MIN_IMAGES = NEIGHBOURS + 1
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as the paper's authors have it; subsets are smaller where images are fewer
SPLITS = 10  # of IS, as its paper has it


def fidelity(generated: Features, real: Features | Reference, *, coverage: bool = True) -> dict[str, float]:
    """FID, sFID, KID, IS, precision and recall of generated images, in float64; the same on every rank.

    Args:
        generated: of N images, at least `MIN_IMAGES`.
        real: of as many or more or fewer images, or the statistics of such a set; what those do not hold gives no
            numbers.
        coverage: also precision and recall, which take N * M distances.

    Returns:
        `fid`: Frechet distance of the Gaussians fitted to the two sets (arXiv 1706.08500); as few rows as features, or
        fewer, make it too large. `sfid`: the same of spatial features (arXiv 2103.03841). `kid`, `kid_std`: squared
        maximum mean discrepancy with a cubic kernel, mean and standard deviation over 100 subsets of 1000, or of the
        smaller set's size (arXiv 1801.01401); the mean may be a little below 0, the deviation says nothing where a
        subset is nearly the whole. `is`, `is_std`: inception score of the generated images (arXiv 1606.03498), mean
        and standard deviation over ten splits; it needs no real images. `precision`: share of the generated images
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
        numbers |= inception_score(generated.logits)
    if coverage and reference.features is not None:
        numbers |= precision_and_recall(generated.features, reference.features)
    return numbers


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), m and C the means and covariances of two sets."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = [
        {"mu": moments.mean.double().cpu().numpy(), "sigma": moments.covariance.double().cpu().numpy()}
        for moments in (first, second)
    ]
    # below 0 only by rounding, of nearly equal sets
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kernel_distance(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Return `kid` and `kid_std` of features (N, f) and (M, f), see `fidelity`."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    subsets = 1 if len(generated) == len(real) == size else KID_SUBSETS  # there is one subset: the whole
    kid = kid_features_to_metric(
        generated.double(), real.double(), kid_subsets=subsets, kid_subset_size=size, verbose=False
    )
    return {"kid": kid[KEY_METRIC_KID_MEAN], "kid_std": kid[KEY_METRIC_KID_STD]}


def inception_score(logits: Tensor) -> dict[str, float]:
    """Return `is` and `is_std` of logits (N, k): exp of the mean of KL(p(y|x) || p(y)), over ten splits.

    Splits are consecutive, as those of the ADM evaluator, so that the order of the images is that of the file. Fewer
    images than splits make one split.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    splits = SPLITS if len(logits) >= SPLITS else 1
    score = isc_features_to_metric(logits.cpu(), splits=splits, shuffle=False)
    return {"is": score[KEY_METRIC_ISC_MEAN], "is_std": score[KEY_METRIC_ISC_STD]}


def precision_and_recall(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Return `precision` and `recall` of features (N, f) and (M, f), see `fidelity`."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # in parts: all distances at once are 20 GB for 50,000 images
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 512, "save_cpu_ram": True, "verbose": False}
    prc = prc_features_to_metric(generated.double(), real.double(), **options)
    return {"precision": prc[KEY_METRIC_PRECISION], "recall": prc[KEY_METRIC_RECALL]}


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
