"""FID, KID, precision and recall against their formulas; feature extractors; features that are spread over ranks."""

from __future__ import annotations

import os
import pickle
import re
import urllib.error
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import digit_classifier
from vqdist import UserError
from vqdist.backends.local import LocalBackend
from vqdist.data.sources import open_source
from vqdist.evaluation.extractors import FeatureExtractor, load_extractor
from vqdist.evaluation.features import Features, FeatureSet, Moments
from vqdist.evaluation.fidelity import check_count, frechet_distance, inception_score
from vqdist.evaluation.fidelity import fidelity as fidelity_of


def gaussian(rows: int, width: int, *, seed: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def with_moments(mean: Tensor, covariance: Tensor, *, rows: int = 400, seed: int) -> Tensor:
    """Rows whose sample mean and covariance (over rows - 1) are exactly these."""
    rows_of = gaussian(rows, len(mean), seed=seed)
    rows_of -= rows_of.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(rows_of.T.cov()), rows_of.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def fidelity(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Of two sets whose features alone are known."""
    return fidelity_of(Features(generated), Features(real))


def frechet(first: Tensor, second: Tensor) -> float:
    return frechet_distance(Moments.of(first), Moments.of(second))


def root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


# --------------------------------------------------------------------------------------------- the numbers


def test_fid_of_gaussians_with_diagonal_covariances():
    """|m1 - m2|^2 + sum (s1 - s2)^2, worked out by hand."""
    means = torch.tensor([[1.0, 0.0, -2.0], [0.0, 2.0, -2.0]], dtype=torch.float64)
    variances = torch.tensor([[1.0, 4.0, 9.0], [4.0, 4.0, 1.0]], dtype=torch.float64)
    first, second = (with_moments(means[i], variances[i].diag(), seed=i) for i in (0, 1))
    assert frechet(first, second) == pytest.approx((1 + 4 + 0) + (1 + 0 + 4), rel=1e-9)


def test_fid_of_gaussians_is_the_closed_formula():
    """The trace of (C1 C2)^(1/2) is that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric."""
    mixing = [gaussian(5, 5, seed=seed) for seed in (2, 3)]
    means = [gaussian(1, 5, seed=seed)[0] for seed in (4, 5)]
    c1, c2 = (matrix @ matrix.T + 0.1 * torch.eye(5) for matrix in mixing)
    expected = (means[0] - means[1]).square().sum() + (c1 + c2 - 2 * root(root(c1) @ c2 @ root(c1))).trace()
    features = [with_moments(mean, c, seed=seed) for mean, c, seed in zip(means, (c1, c2), (6, 7), strict=True)]
    assert frechet(*features) == pytest.approx(float(expected), rel=1e-7)
    assert frechet(*features) == pytest.approx(frechet(*reversed(features)), rel=1e-7)


def kid_by_hand(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x y / f + 1)^3, by loops (arXiv 1801.01401)."""

    def mean_kernel(xs: Tensor, ys: Tensor, same: bool) -> float:
        pairs = [(x, y) for i, x in enumerate(xs) for j, y in enumerate(ys) if not (same and i == j)]
        return sum(float((x @ y / len(x) + 1) ** 3) for x, y in pairs) / len(pairs)

    mixed = mean_kernel(first, second, False)
    return mean_kernel(first, first, True) + mean_kernel(second, second, True) - 2 * mixed


def test_kid_of_two_small_sets_is_the_formula_over_all_of_them():
    first, second = gaussian(12, 4, seed=0), gaussian(12, 4, seed=1, mean=0.5)
    numbers = fidelity(first, second)
    assert numbers["kid"] == pytest.approx(kid_by_hand(first, second), rel=1e-9)
    assert numbers["kid_std"] == pytest.approx(0, abs=1e-9)  # every subset is the whole set


def test_kid_of_sets_of_unequal_size_is_the_mean_over_subsets():
    first, second = gaussian(40, 4, seed=0), gaussian(20, 4, seed=1, mean=1.0)
    numbers = fidelity(first, second)
    assert numbers["kid_std"] > 0
    assert numbers["kid"] == pytest.approx(kid_by_hand(first, second), abs=3 * numbers["kid_std"])


def precision_by_hand(generated: Tensor, real: Tensor) -> float:
    """Share of the generated rows that are nearer to a real one than its third neighbour is (arXiv 1904.06991)."""
    radii = [sorted(float((a - b).norm()) for b in real)[3] for a in real]  # 0 is the row itself
    hits = [any(float((g - r).norm()) <= radius for r, radius in zip(real, radii, strict=True)) for g in generated]
    return sum(hits) / len(hits)


def test_precision_and_recall_are_their_definitions():
    generated, real = gaussian(25, 3, seed=0, mean=0.8), gaussian(40, 3, seed=1)
    numbers = fidelity(generated, real)
    assert 0 < numbers["precision"] < 1 and 0 < numbers["recall"] < 1
    assert numbers["precision"] == pytest.approx(precision_by_hand(generated, real), abs=1e-6)
    assert numbers["recall"] == pytest.approx(precision_by_hand(real, generated), abs=1e-6)


def test_few_kinds_of_good_images_are_precise_but_recall_little():
    real = gaussian(100, 2, seed=0)
    collapsed = fidelity(gaussian(100, 2, seed=1, std=0.05), real)
    scattered = fidelity(gaussian(100, 2, seed=1, std=30), real)
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.1
    assert scattered["precision"] < 0.1 and scattered["recall"] > 0.9


def test_equal_sets_are_alike():
    features = gaussian(700, 8, seed=0)  # more than are compared at once
    numbers = fidelity(features, features.flip(0))
    assert numbers["fid"] == pytest.approx(0, abs=1e-9)
    assert numbers["precision"] == numbers["recall"] == 1
    assert abs(numbers["kid"]) < 0.05


def test_sets_that_lie_apart_have_nothing_in_common():
    features = gaussian(50, 8, seed=0)
    numbers = fidelity(features + 100, features)
    assert numbers["precision"] == numbers["recall"] == 0
    assert numbers["fid"] == pytest.approx(8 * 100**2, rel=1e-6)
    assert numbers["kid"] > 1e6


def test_fewer_images_than_features_have_a_fid_all_the_same():
    features = gaussian(10, 30, seed=0)
    assert fidelity(features, features)["fid"] == pytest.approx(0, abs=1e-4)
    assert fidelity(features + 1, features)["fid"] == pytest.approx(30, abs=1e-3)


def score_by_hand(logits: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) (arXiv 1606.03498)."""
    p = logits.double().softmax(dim=1)
    marginal = p.mean(dim=0)
    return float((p * (p.log() - marginal.log())).sum(dim=1).mean().exp())


def test_inception_score_is_the_mean_over_ten_consecutive_splits():
    logits = gaussian(50, 7, seed=0, std=2.0)
    scores = torch.tensor([score_by_hand(part) for part in logits.split(5)], dtype=torch.float64)
    numbers = inception_score(logits)
    assert numbers["is"] == pytest.approx(float(scores.mean()), rel=1e-9)
    assert numbers["is_std"] == pytest.approx(float(scores.std(correction=0)), rel=1e-9)
    assert inception_score(logits[:9])["is"] == pytest.approx(score_by_hand(logits[:9]), rel=1e-9)


def test_sfid_is_the_distance_of_spatial_features_in_any_order():
    """The ADM evaluator flattens (h, w, channel), torch (channel, h, w): a Frechet distance knows no order."""
    maps = [gaussian(40, 2 * 3 * 3, seed=seed).view(40, 2, 3, 3) for seed in (0, 1)]
    pooled = [gaussian(40, 4, seed=seed) for seed in (2, 3)]
    ours = fidelity_of(*(Features(pool, spatial.flatten(1)) for pool, spatial in zip(pooled, maps, strict=True)))
    theirs = frechet(*(spatial.permute(0, 2, 3, 1).flatten(1) for spatial in maps))
    assert ours["sfid"] == pytest.approx(theirs, rel=1e-9) and ours["fid"] == pytest.approx(frechet(*pooled))


def test_fid_is_that_of_the_matrix_root():
    """The distance of pytorch-fid, clean-fid and the ADM evaluator: with a root of the product of the covariances."""
    first, second = gaussian(50, 6, seed=0), gaussian(60, 6, seed=1, mean=0.3)
    c1, c2 = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eig(c1 @ c2)
    product_root = (vectors @ values.sqrt().diag() @ torch.linalg.inv(vectors)).real
    torch.testing.assert_close(product_root @ product_root, c1 @ c2)
    trace = (c1 + c2 - 2 * product_root).trace()
    expected = (first.mean(dim=0) - second.mean(dim=0)).square().sum() + trace
    assert frechet(first, second) == pytest.approx(float(expected), rel=1e-8)


def test_float32_features_are_compared_in_float64():
    generated, real = gaussian(30, 4, seed=0, mean=1e4).float(), gaussian(30, 4, seed=1, mean=1e4).float()
    assert fidelity(generated, real) == fidelity(generated.double(), real.double())


@pytest.mark.parametrize("rows", [(3, 10), (10, 3)])
def test_too_few_images_are_refused(rows):
    with pytest.raises(UserError, match=r"there are 3 (samples|images) .*; give at least 4"):
        fidelity(*(gaussian(count, 4, seed=0) for count in rows))
    check_count(4, "images")


def test_features_that_are_not_finite_are_refused():
    broken = gaussian(10, 4, seed=0)
    broken[2:4, 1] = float("nan")
    with pytest.raises(UserError, match="the features of 2 of 10 images are not finite"):
        fidelity(broken, gaussian(10, 4, seed=0))


# --------------------------------------------------------------------------------------------- ranks


class OneOf(LocalBackend):
    """One of several ranks that run one after the other; what they gather is whole the second time."""

    def __init__(self, rank: int, world_size: int, shares: dict[int, Tensor]):
        super().__init__(device="cpu")
        self.rank, self.world_size, self.shares = rank, world_size, shares

    def gather(self, tensor: Tensor) -> Tensor:
        self.shares[self.rank] = tensor
        assert len({share.shape for share in self.shares.values()}) == 1
        return torch.stack([self.shares.get(rank, tensor) for rank in range(self.world_size)])


@pytest.mark.parametrize(
    "total, block, world_size", [(10, 1, 3), (10, 4, 2), (3, 4, 2), (8, 4, 2), (9, 2, 4), (7, 3, 1)]
)
def test_features_come_back_in_order_from_any_number_of_ranks(total, block, world_size):
    images = torch.arange(total * 12.0).view(total, 3, 2, 2) / (total * 12)
    extractor = FeatureExtractor(nn.Flatten(), "flat", channels=3, image_size=2)
    shares: dict[int, Tensor] = {}
    sets = [FeatureSet(extractor, OneOf(rank, world_size, shares), total, block=block) for rank in range(world_size)]
    for number, part in enumerate(images.split(block)):
        sets[number % world_size].add(part)
    for features in sets:
        features.over_ranks()
    for features in sets:
        assert torch.equal(features.over_ranks().features, images.flatten(1))


# --------------------------------------------------------------------------------------------- extractors


class Reshaped(nn.Module):
    """Gives images in another shape."""

    def __init__(self, shape: list[int]):
        super().__init__()
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(self.shape)


def script(network: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network).save(str(path))
    return str(path)


def load(spec: str, *, channels: int = 3, image_size: int = 8, trust_code: bool = True) -> FeatureExtractor:
    return load_extractor(spec, channels=channels, image_size=image_size, trust_code=trust_code)


class DroppingOut(nn.Module):
    """Features that are random in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(images.flatten(1), 0.5, self.training)


def test_a_torchscript_file_is_an_extractor_in_eval_mode(tmp_path, recwarn):
    extractor = load(script(DroppingOut(), tmp_path / "features.pt"))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(extractor(images), images.flatten(1)) and extractor.width == 192
    linear = load(script(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), tmp_path / "linear.pt"))
    assert linear(images.double()).dtype == torch.float32 and not linear(images).requires_grad
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


@pytest.mark.parametrize(
    "network, found",
    [
        (Reshaped([-1]), "a tensor of shape (384,) for 2 images"),
        (Reshaped([2, 3, 64]), "a tensor of shape (2, 3, 64) for 2 images"),
        (Reshaped([1, 384]), "a tensor of shape (1, 384) for 2 images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), "a tensor of shape (2, 1) for 2 images"),
    ],
)
def test_features_are_one_row_an_image(network, found, tmp_path):
    with pytest.raises(UserError) as error:
        load(script(network, tmp_path / "features.pt"))
    assert f"features.pt gives {found}; one row of at least 2 features an image, (2, features)" in str(error.value)


def test_two_outputs_are_no_features():
    class Two(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(UserError, match="two gives a tuple for 2 images"):
        FeatureExtractor(Two(), "two", channels=3, image_size=8)


def test_an_extractor_for_other_images_is_refused_in_one_line(tmp_path):
    path = script(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), tmp_path / "grey.pt")
    assert load(path, channels=1).width == 144
    with pytest.raises(UserError) as error:
        load(path, channels=3)
    message = str(error.value)
    assert "\n" not in message and "does not take images of shape (batch, 3, 8, 8)" in message
    assert "expected input" in message  # what torch says of it


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_malicious(path: Path, folder: Path, form: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(folder)))
    else:
        torch.save({"weight": Malicious(folder)}, path, _use_new_zipfile_serialization=form == "torch.save")


every_form = pytest.mark.parametrize("form", ["pickle", "torch.save", "old torch.save"])


@every_form
def test_a_pickle_is_refused_and_not_run(form, tmp_path):
    path, made = tmp_path / "features.pt", tmp_path / "made"
    write_malicious(path, made, form)
    with pytest.raises(UserError) as error:
        load(str(path))
    assert re.match(r".*features\.pt is neither a TorchScript file nor one of weights \(.+\); give", str(error.value))
    assert "\n" not in str(error.value) and not made.exists()
    if form == "pickle":  # that it would have run
        pickle.loads(path.read_bytes())
        assert made.exists()


@pytest.mark.parametrize("content", [b"", b"not a file of torch", b"half a program", None])
def test_a_file_that_holds_neither_a_program_nor_known_weights_is_refused(content, tmp_path):
    path, said = tmp_path / "features.pt", "is neither a TorchScript file nor one of weights"
    if content is None:
        torch.save(nn.Linear(2, 2).state_dict(), path)
        said = r"holds weights of no network that can be told; give its name too, as in NAME:.*\(inception, "
    elif content.startswith(b"half"):
        whole = Path(script(nn.Flatten(), path)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load(str(path))
    assert "\n" not in str(error.value)


class Writes(nn.Module):
    """Puts bytes into a file, by operators that TorchScript has."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        mapped = torch.from_file(self.path, shared=True, size=8, dtype=torch.uint8)
        mapped.fill_(65)
        return images.flatten(1) + mapped.sum() * 0


class Saves(nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        torch.save(images, self.path)
        return images.flatten(1)


@pytest.mark.parametrize("program", [Writes, Saves])
@pytest.mark.parametrize("name", ["features.pt", "weights.pth", "inception"])
def test_a_program_runs_only_where_its_flag_says_so(program, name, tmp_path):
    """Whatever its file is called, it could write any file."""
    proof = tmp_path / "proof"
    path = script(program(str(proof)), tmp_path / name)
    with pytest.raises(
        UserError, match=r"is a TorchScript program, which can .*; give --trust_features true if"
    ) as error:
        load(path, trust_code=False)
    assert not proof.exists() and "\n" not in str(error.value)
    assert load(path).width == 192 and proof.is_file()


def test_a_traced_program_is_one_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Flatten(), torch.rand(2, 3, 8, 8)).save(str(tmp_path / "traced.pt"))
    with pytest.raises(UserError, match="is a TorchScript program"):
        load(str(tmp_path / "traced.pt"), trust_code=False)


@pytest.mark.nightly
def test_vgg16_sees_what_torch_fidelity_shows_it(tmp_path):
    """Weights of 530 MB, as they are drawn."""
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
    from torchvision.models import vgg16

    torch.manual_seed(0)
    torch.save(vgg16(weights=None).state_dict(), tmp_path / "vgg16.pth")
    theirs = FeatureExtractorVGG16("vgg", ["fc2_relu"], feature_extractor_weights_path=str(tmp_path / "vgg16.pth"))
    ours = load(str(tmp_path / "vgg16.pth"), image_size=32, trust_code=False)
    images = torch.rand(2, 3, 32, 32)
    expected = theirs((images * 255).round().to(torch.uint8))[0]
    torch.testing.assert_close(ours(images), expected)
    assert ours.width == 4096 and expected.std() > 0


def test_vgg16_without_its_dense_layers_is_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"does not hold the weights of VGG16 .*features.0.bias is missing"):
        load(str(tmp_path / "vgg16.pth"), trust_code=False)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"--features \S+/absent.pt is neither a file nor a known network; known are inception, "
    ):
        load(str(tmp_path / "absent.pt"))
    with pytest.raises(UserError, match="neither a file nor a known network"):
        load(str(tmp_path))


# --------------------------------------------------------------------------------------------- Inception


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Put Inception's weights into a place of their own: a place of this test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def test_inception_without_its_weights_says_what_was_tried(hub, monkeypatch):
    tried = []

    def no_network(url, path, **options):
        tried.append((url, path, options["hash_prefix"]))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError) as error:
        load("inception")
    (url, path, digest) = tried[0]
    assert url.startswith("https://") and path == str(hub) and digest == "6726825d"
    for part in (
        f"could not be downloaded from {url} (<urlopen error no route",
        f"put that file at {hub}",
        "--features",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_inception_sees_grey_as_colour_in_8_bits(hub, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options):
            """Stay as drawn."""

    hub.parent.mkdir(parents=True)
    torch.save({}, hub)
    torch.manual_seed(0)
    network = Bare("bare", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(hub))
    torch.save(network.state_dict(), hub)
    of_a_file = load(str(hub), channels=1, image_size=16, trust_code=False)
    extractor = load("inception", channels=1, image_size=16, trust_code=False)
    assert extractor.width == 2048
    image = torch.rand(1, 1, 16, 16) * 1.2 - 0.1
    expected = network((image.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1))[0]
    assert torch.equal(extractor(image), expected) and expected.std() > 0
    assert torch.equal(extractor(image.expand(-1, 3, -1, -1)), expected)
    assert torch.equal(of_a_file(image), expected)
    assert of_a_file.digest == extractor.digest
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _layer, _given, out: seen.append(out))
    logits = network(pixels)[1]
    outputs = extractor.outputs(image)
    assert outputs["spatial"].shape == (1, 2023)
    assert torch.equal(outputs["spatial"].view(17, 17, 7).permute(2, 0, 1), seen[0][0, :7])
    assert torch.equal(outputs["logits"], logits) and extractor.widths == {
        "features": 2048,
        "spatial": 2023,
        "logits": 1008,
    }


@every_form
def test_inception_weights_are_not_unpickled_freely(hub, form, tmp_path):
    hub.parent.mkdir(parents=True)
    write_malicious(hub, tmp_path / "made", form)
    with pytest.raises(UserError, match=r"does not hold the weights of FID's Inception .*; remove it"):
        load("inception")
    assert not (tmp_path / "made").exists()


def test_weights_of_another_network_are_no_inception(hub):
    hub.parent.mkdir(parents=True)
    torch.save(nn.Linear(2, 2).state_dict(), hub)
    with pytest.raises(UserError, match="does not hold the weights of FID's Inception"):
        load("inception")


def test_inception_sees_no_transparency(hub):
    with pytest.raises(UserError, match=r"the images have 4 channels; inception sees 1 \(repeated\) or 3"):
        load("inception", channels=4)


# --------------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digit_features(tmp_path_factory) -> Path:
    """Return what `python -m benchmarks.digit_classifier` writes, of fewer epochs."""
    path = tmp_path_factory.mktemp("digits") / "new" / "digits.pt"
    digit_classifier.main(["--out", str(path), "--epochs", "1"])
    return path


def digits(*, image_size: int, channels: int = 1, start: int = 0) -> Tensor:
    source = open_source("digits")
    places = range(start, start + 300)
    return torch.stack([source.tensor(place, image_size=image_size, channels=channels) for place in places])


def test_features_of_digits_tell_digits_from_noise_and_from_blur(digit_features):
    extractor = load(str(digit_features), channels=1, image_size=28)
    real = digits(image_size=28)
    others = digits(image_size=28, start=300)
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(others, 5, stride=1, padding=2)
    of_digits, of_noise, of_blurred = (
        fidelity(extractor(images), extractor(real)) for images in (others, noise, blurred)
    )
    assert of_noise["fid"] > 10 * of_digits["fid"] and of_noise["kid"] > 10 * of_digits["kid"]
    assert of_blurred["fid"] > 2 * of_digits["fid"]
    assert min(of_digits["precision"], of_digits["recall"]) > 0.5 > 0.1 > of_noise["recall"]


def test_features_of_digits_at_another_size_and_in_colour_are_much_the_same(digit_features):
    extractor = load(str(digit_features), channels=3, image_size=32)
    small, large = digits(image_size=28), digits(image_size=32, channels=3)
    assert extractor.width == extractor(large).shape[1] == digit_classifier.NUM_FEATURES
    noise = extractor(torch.rand(small.shape))
    assert fidelity(extractor(large), extractor(small))["fid"] < 0.1 * fidelity(noise, extractor(small))["fid"]


def test_the_digit_classifier_learns_and_says_how_well(digit_features, capsys, monkeypatch, tmp_path):
    few = {"train": range(400), "valid": range(9000, 9200)}
    loaded = {name: digit_classifier.load_digits(places) for name, places in few.items()}
    found = [digit_classifier.train(*loaded["train"], epochs=epochs) for epochs in (1, 8)]
    scores = [digit_classifier.accuracy(classifier, *loaded["valid"]) for classifier in found]
    assert scores[1] > 0.7 and scores[1] > scores[0] + 0.05
    few_of = {8000: "train", 2000: "valid"}
    monkeypatch.setattr(digit_classifier, "load_digits", lambda indices: loaded[few_of[len(indices)]])
    digit_classifier.main(["--out", str(tmp_path / "few.pt"), "--epochs", "8"])
    assert f"{scores[1]:.2%} of 2000 held-out digits are told right" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        digit_classifier.main(["--out", str(tmp_path / "none.pt"), "--epochs", "0"])
