"""Numbers of the same features by vqdist and by others: torch-fidelity, torchmetrics, clean-fid and ADM's formulas."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vqdist.conventions import OF_5000, SHUFFLED, TEN, WHOLE
from vqdist.evaluation.extractors import FeatureExtractor, load_extractor
from vqdist.evaluation.features import Features, Moments
from vqdist.evaluation.fidelity import (
    fidelity,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from vqdist.evaluation.networks import in_8_bits
from vqdist.evaluation.references import ReferenceFile

SIZES = {"few": (20, 25, 32), "many": (300, 250, 8), "one of both": (20, 300, 32)}


def features(rows: int, width: int, seed: int) -> Tensor:
    """Return features as a network gives them: not negative, and not alike in scale."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=rng, dtype=torch.float64)
    return (torch.randn(rows, width, generator=rng, dtype=torch.float64) @ mixing + 0.3 * seed).relu()


@pytest.fixture(params=SIZES)
def sets(request) -> tuple[Tensor, Tensor]:
    generated, real, width = SIZES[request.param]
    return features(generated, width, 1), features(real, width, 2)


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(Moments.of(first), Moments.of(second))


# ------------------------------------------------------------------------------------------- torch-fidelity


def test_fid_is_that_of_torch_fidelity(sets):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(part) for part in sets]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert distance(*sets) == pytest.approx(expected, rel=1e-6)


def test_moments_of_a_file_are_worth_the_features(sets):
    """Without factors, and with a covariance of too low a rank."""
    first, second = map(Moments.of, sets)
    bare = [Moments(moments.mean, moments.covariance) for moments in (first, second)]
    expected = frechet_distance(first, second)
    for one in (bare, [bare[0], second], [first, bare[1]]):
        assert frechet_distance(*one) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kept", [True, False], ids=["all kernels at once", "kernels of each subset"])
def test_kid_is_that_of_torch_fidelity(kept, sets, monkeypatch):
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    monkeypatch.setattr("vqdist.evaluation.fidelity.LARGEST_GRAM", 2**30 if kept else 0)
    monkeypatch.setattr("vqdist.evaluation.fidelity.KID_SUBSET_SIZE", 18)
    expected = kid_features_to_metric(*sets, kid_subsets=100, kid_subset_size=18, verbose=False)
    found = kernel_distance(*sets)
    assert found["kid"] == pytest.approx(expected[KEY_METRIC_KID_MEAN], rel=1e-9)
    assert found["kid_std"] == pytest.approx(expected[KEY_METRIC_KID_STD], rel=1e-9)


def test_precision_and_recall_are_those_of_torch_fidelity(sets):
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    options = {"prc_neighborhood": 3, "prc_batch_size": 64, "save_cpu_ram": True, "verbose": False}
    expected = prc_features_to_metric(*sets, **options)
    found = precision_and_recall(*sets)
    assert found["precision"] == pytest.approx(expected[KEY_METRIC_PRECISION], abs=1e-6)
    assert found["recall"] == pytest.approx(expected[KEY_METRIC_RECALL], abs=1e-6)


@pytest.mark.parametrize("splits, shuffle, count", [(TEN, False, 10), (SHUFFLED, True, 10), (WHOLE, False, 1)])
def test_inception_score_is_that_of_torch_fidelity(splits, shuffle, count):
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    logits = features(103, 12, 3)
    expected = isc_features_to_metric(logits, splits=count, shuffle=shuffle)
    found = inception_score(logits, splits)
    assert found["is"] == pytest.approx(expected[KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert found["is_std"] == pytest.approx(expected[KEY_METRIC_ISC_STD], rel=1e-9, abs=1e-12)


# ------------------------------------------------------------------------------------------- torchmetrics


class Given(torch.nn.Module):
    """Looks features up by the first pixel of an image, for torchmetrics."""

    num_features = 8

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[images[:, 0, 0, 0].long() * 256 + images[:, 1, 0, 0].long()]


def _numbers(count: int, start: int = 0) -> Tensor:
    """Return images that say their number."""
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    numbers = torch.arange(start, start + count)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = (numbers // 256).byte(), (numbers % 256).byte()
    return images


def test_fid_and_kid_are_those_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    generated, real = features(300, 8, 1), features(250, 8, 2)
    network = Given(torch.cat([real, generated]))
    fid = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=network, subsets=1, subset_size=250)
    for metric in (fid, kid):
        metric.update(_numbers(250), real=True)
        metric.update(_numbers(300, 250) if metric is fid else _numbers(250, 250), real=False)
    assert distance(generated, real) == pytest.approx(float(fid.compute()), rel=1e-6)
    assert kernel_distance(generated[:250], real)["kid"] == pytest.approx(float(kid.compute()[0]), rel=1e-6)


def test_inception_score_is_that_of_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = features(100, 8, 3)
    metric = InceptionScore(feature=Given(logits), splits=1)
    metric.update(_numbers(100))
    assert inception_score(logits, WHOLE)["is"] == pytest.approx(float(metric.compute()[0]), rel=1e-6)


@pytest.mark.parametrize("rounded", [True, False])
def test_psnr_ssim_and_l1_are_those_of_torchmetrics(rounded):
    from torchmetrics.functional.image import peak_signal_noise_ratio as psnr
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    from vqdist.backends.local import LocalBackend
    from vqdist.metrics import ReconstructionMetrics
    from vqdist.models.quantizers import build_quantizer

    image, recon = (torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    recon = (image + 0.2 * recon).clamp(0, 1)
    quantizer = build_quantizer("lfq", dim=8, codebook_size=4)
    metrics = ReconstructionMetrics(quantizer, LocalBackend(device="cpu"), (24, 20), rounded=rounded)
    metrics.update(image, recon, torch.zeros(1, 1, 1, dtype=torch.int64))
    found = metrics.compute()
    recon = (recon * 255).round() / 255 if rounded else recon
    assert found["psnr"] == pytest.approx(float(psnr(recon, image, data_range=1.0)), rel=1e-5)
    each = psnr(recon, image, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert found["psnr_per_image"] == pytest.approx(float(each), rel=1e-5)
    assert found["ssim"] == pytest.approx(float(ssim(recon, image, data_range=1.0)), rel=1e-3)
    brightness = [(p * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True) for p in (recon, image)]
    assert found["ssim_luma"] == pytest.approx(float(ssim(*brightness, data_range=1.0)), rel=1e-3)
    assert found["l1"] == pytest.approx(float((recon - image).abs().mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------- clean-fid


def test_fid_and_kid_are_those_of_clean_fid(sets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanfid.fid import fid_from_feats
        from cleanfid.fid import kernel_distance as theirs

        first, second = (part.numpy() for part in sets)
        expected = float(np.real(fid_from_feats(first, second)))
    assert distance(*sets) == pytest.approx(expected, rel=1e-4)  # its root of a matrix is of less precision
    size = min(map(len, sets))
    whole = [part[:size] for part in sets]  # one subset, since its draws are of NumPy's global generator
    found = kernel_distance(*whole)["kid"]
    assert found == pytest.approx(theirs(*(part.numpy() for part in whole), num_subsets=1), rel=1e-9)


def test_files_of_clean_fid_are_read(tmp_path):
    generated, real = features(40, 8, 1), features(50, 8, 2)
    np.savez_compressed(tmp_path / "a.npz", mu=real.numpy().mean(axis=0), sigma=np.cov(real.numpy(), rowvar=False))
    np.savez_compressed(tmp_path / "a_kid.npz", feats=real.numpy())
    expected = fidelity(Features(generated), Features(real))
    moments = fidelity(Features(generated), ReferenceFile(tmp_path / "a.npz").reference(8))
    whole = fidelity(Features(generated), ReferenceFile(tmp_path / "a_kid.npz").reference(8))
    assert moments == pytest.approx({"fid": expected["fid"]}, rel=1e-6)
    assert whole == pytest.approx(expected, rel=1e-9)


def test_files_of_torch_fidelity_are_read(tmp_path, monkeypatch):
    """Both kinds that its cache holds, as its own functions write them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torch_fidelity.utils_torch import torch_atomic_save

    generated, real = features(40, 8, 1), features(50, 8, 2)
    torch_atomic_save(fid_features_to_statistics(real), str(tmp_path / "stat.pt"))
    torch_atomic_save(real.float(), str(tmp_path / "features.pt"))
    expected = fidelity(Features(generated), Features(real))
    moments = fidelity(Features(generated), ReferenceFile(tmp_path / "stat.pt").reference(8))
    whole = fidelity(Features(generated), ReferenceFile(tmp_path / "features.pt").reference(8))
    assert moments == pytest.approx({"fid": expected["fid"]}, rel=1e-6)
    assert whole == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_images_for_clean_fid_are_resized_as_it_does(inception):
    from cleanfid.resize import build_resizer

    extractor, seen = inception("inception_clean"), []
    extractor.network.network.Conv2d_1a_3x3.register_forward_hook(lambda _layer, given, _out: seen.append(given[0]))
    for side in (64, 340):
        images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        extractor(images)
        pixels = in_8_bits(images)[0].permute(1, 2, 0).byte().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch.from_numpy(build_resizer("clean")(pixels)).permute(2, 0, 1)
        assert (seen.pop()[0] * 128 + 128 - theirs).abs().max() < 0.05


def test_the_clean_inception_is_the_same_network(inception):
    """At 299 pixels nothing is resized; at others the numbers, and so the hash, are other ones."""
    clean, plain = inception("inception_clean"), inception("inception")
    images = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    for name, expected in plain.outputs(images).items():
        torch.testing.assert_close(clean.outputs(images)[name], expected, rtol=1e-4, atol=1e-4)
    assert clean.digest != plain.digest and clean.kind == "inception_clean"
    assert not torch.allclose(clean(images[..., :64, :64]), plain(images[..., :64, :64]), rtol=1e-3)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Return a function that gives FID's Inception by a name, with weights as they are drawn."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options):
            """Stay as drawn."""

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Bare("bare", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)

    def load(name: str) -> FeatureExtractor:
        return load_extractor(f"{name}:{path}", channels=3, image_size=64)

    return load


# ------------------------------------------------------------------------------------------- the ADM evaluator


def adm_precision_and_recall(reference: np.ndarray, sample: np.ndarray) -> tuple[float, float]:
    """Work out those of arXiv 2105.05233: squared distances, balls up to the third neighbour, not counting itself."""

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a[:, None] - b[None]) ** 2).sum(axis=2)

    radii = [np.sort(squared(of, of), axis=1)[:, 3] for of in (reference, sample)]
    between = squared(sample, reference)
    precision = (between <= radii[0][None, :]).any(axis=1).mean()
    recall = (between <= radii[1][:, None]).any(axis=0).mean()
    return float(precision), float(recall)


def test_precision_and_recall_are_those_of_the_adm_evaluator(sets):
    sample, reference = sets
    expected = adm_precision_and_recall(reference.numpy(), sample.numpy())
    found = precision_and_recall(sample, reference)
    assert (found["precision"], found["recall"]) == pytest.approx(expected, abs=1e-9)
    assert 0 < found["recall"] < 1


def test_inception_score_of_the_adm_evaluator_is_over_parts_of_5000():
    """exp of the mean KL divergence of each part, of softmax without a bias; the last part is shorter."""
    logits = features(12_000, 6, 4).float()
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, len(p), 5000):
        part = p[start : start + 5000]
        kl = (part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    found = inception_score(logits, OF_5000)
    assert found["is"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert found["is"] != pytest.approx(inception_score(logits, TEN)["is"], rel=1e-6)
    assert inception_score(logits[:4000], OF_5000)["is"] == pytest.approx(
        inception_score(logits[:4000], WHOLE)["is"], rel=1e-9
    )


def test_spatial_features_are_those_of_the_adm_evaluator(inception):
    """mixed_6/conv of the graph is the 1x1 branch of the fourth block of 17x17, of which it takes seven channels.

    The evaluator flattens (17, 17, 7), and its published mu_s and sigma_s are in that order.
    """
    extractor, seen = inception("inception"), []
    network = extractor.network.network
    network.Mixed_6c.register_forward_hook(lambda _layer, _given, out: seen.append(out))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    spatial = extractor.outputs(images)["spatial"]
    branch = network.Mixed_6d.branch1x1
    convolved = torch.nn.functional.conv2d(seen[0], branch.conv.weight)
    norm = branch.bn
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1)
    activated = ((convolved - norm.running_mean.view(-1, 1, 1)) * scale + norm.bias.view(-1, 1, 1)).relu()
    written_out = [activated[:, place % 7, place // (7 * 17), place // 7 % 17] for place in range(7 * 17 * 17)]
    torch.testing.assert_close(spatial, torch.stack(written_out, dim=1), rtol=1e-4, atol=1e-4)
    assert [float(spatial[0, place]) for place in (1, 7, 7 * 17)] == pytest.approx(
        [float(activated[0, channel, row, column]) for channel, row, column in ((1, 0, 0), (0, 0, 1), (0, 1, 0))],
        rel=1e-3,
    )


def test_a_reference_batch_of_adm_gives_both_distances_by_its_statistics(tmp_path: Path):
    pooled, spatial, generated = features(60, 8, 1), features(60, 5, 2), (features(40, 8, 3), features(40, 5, 4))
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    statistics = {}
    for name, part in (("", pooled), ("_s", spatial)):
        statistics |= {f"mu{name}": part.numpy().mean(axis=0), f"sigma{name}": np.cov(part.numpy(), rowvar=False)}
    np.savez(tmp_path / "ref.npz", arr_0=images, arr_1=np.arange(9), **statistics)
    numbers = fidelity(Features(*generated), ReferenceFile(tmp_path / "ref.npz").reference(8, 5))
    assert numbers["fid"] == pytest.approx(distance(generated[0], pooled), rel=1e-6)
    assert numbers["sfid"] == pytest.approx(distance(generated[1], spatial), rel=1e-6)
