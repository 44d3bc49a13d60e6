"""Statistics of a set of images as a file: written and read, those of others read, and nothing unpickled."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from source_files import message_of
from torch import nn

from vqdist import UserError
from vqdist.backends.local import LocalBackend
from vqdist.evaluation.extractors import FeatureExtractor
from vqdist.evaluation.features import Features, Moments
from vqdist.evaluation.fidelity import fidelity
from vqdist.evaluation.references import Reference, ReferenceFile, features_in, reference_in


def features(rows: int, width: int = 6, *, seed: int = 0, mean: float = 0.0) -> Features:
    rng = torch.Generator().manual_seed(seed)
    values = [torch.randn(rows, size, generator=rng, dtype=torch.float64) + mean for size in (width, 4)]
    return Features(*values)


def written(folder: Path, seen: Features, keep: int = 100) -> ReferenceFile:
    Reference.of(seen, {"features": "inception"}).write(folder / "deep" / "ref.npz", keep)
    return ReferenceFile(folder / "deep" / "ref.npz")


class Means(nn.Module):
    """Six numbers of an image: mean and deviation of each colour."""

    def forward(self, images):
        return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


def extractor(size: int = 8) -> FeatureExtractor:
    return FeatureExtractor(Means(), "means", channels=3, image_size=size)


def test_what_is_written_is_read(tmp_path):
    seen, generated = features(30), features(20, seed=1, mean=0.5)
    reference = written(tmp_path, seen).reference(6, 4)
    assert torch.equal(reference.moments.mean, seen.features.mean(dim=0)) and reference.images == 30
    assert reference.protocol["features"] == "inception"
    assert fidelity(generated, reference) == pytest.approx(fidelity(generated, seen), rel=1e-9)
    assert os.listdir(tmp_path / "deep") == ["ref.npz"]


def test_features_are_kept_evenly_over_the_set(tmp_path):
    seen = Features(torch.arange(40.0).view(20, 2))
    kept = written(tmp_path, seen, keep=5).reference(2).features
    assert kept[:, 0].tolist() == [0, 8, 16, 24, 32]
    assert written(tmp_path, seen, keep=0).reference(2).features is None


def test_moments_alone_give_no_kid_and_no_precision(tmp_path):
    seen, generated = features(30), features(20, seed=1)
    numbers = fidelity(generated, written(tmp_path, seen, keep=0).reference(6, 4))
    assert numbers.keys() == {"fid", "sfid"}
    expected = fidelity(generated, seen)
    assert numbers == pytest.approx({name: expected[name] for name in numbers}, rel=1e-9)


@pytest.mark.parametrize("form", ["pytorch-fid", "torch-fidelity"])
def test_statistics_of_others(form, tmp_path):
    seen, generated = features(30).features, features(20, seed=1)
    moments = Moments.of(seen)
    statistics = {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
    path = tmp_path / ("a.npz" if form == "pytorch-fid" else "a.pt")
    if form == "pytorch-fid":
        np.savez(path, **statistics)
    else:
        torch.save(statistics, path)
    found = fidelity(generated, ReferenceFile(path).reference(6))
    assert found == pytest.approx({"fid": fidelity(generated, Features(seen))["fid"]}, rel=1e-9)


def adm_batch(path: Path, count: int = 9, **statistics) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, **statistics)
    return images


def test_images_of_the_adm_evaluator(tmp_path):
    images = adm_batch(tmp_path / "samples.npz")
    file, looks = ReferenceFile(tmp_path / "samples.npz"), extractor()
    assert file.image_size == [8, 8] and file.count == 9
    seen = features_in(file, looks, LocalBackend(device="cpu"), 4)
    expected = looks(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(seen.features, expected)


def test_an_adm_batch_gives_fid_by_its_statistics_and_recall_by_its_images(tmp_path):
    moments = Moments.of(features(30).features)
    adm_batch(tmp_path / "ref.npz", mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    looks, backend = extractor(), LocalBackend(device="cpu")
    reference = reference_in(ReferenceFile(tmp_path / "ref.npz"), looks, backend, 4)
    assert torch.equal(reference.moments.mean, moments.mean) and reference.features.shape == (9, 6)
    assert fidelity(features(12), reference).keys() == {"fid", "kid", "kid_std", "precision", "recall"}


class Danger:
    def __reduce__(self):
        return os.mkdir, ("made",)


def _pickled(path: Path) -> None:
    np.savez(path, mu=np.array([Danger()], dtype=object), sigma=np.eye(1))


def _other_width(path: Path) -> None:
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))


def _not_square(path: Path) -> None:
    np.savez(path, mu=np.zeros(6), sigma=np.zeros((6, 5)))


def _not_finite(path: Path) -> None:
    np.savez(path, mu=np.full(6, np.nan), sigma=np.eye(6))


def _words(path: Path) -> None:
    np.savez(path, mu=np.array(["a"] * 6), sigma=np.eye(6))


def _neither(path: Path) -> None:
    np.savez(path, weights=np.zeros(6))


def _float_images(path: Path) -> None:
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3)))


def _text(path: Path) -> None:
    path.write_text("mu: 0")


def _cut(path: Path) -> None:
    _other_width(path)
    path.write_bytes(path.read_bytes()[:-40])


def _huge(path: Path) -> None:
    """Write the head of an array that would take 2^60 bytes."""
    import io
    import zipfile

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (1 << 57,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", head.getvalue())
        archive.writestr("sigma.npy", head.getvalue())


REFUSED = {
    _pickled: "mu in .* is pickled, which is not read",
    _other_width: r"mu of shape \(5,\) and sigma of shape \(5, 5\), but the extractor gives 6 features",
    _not_square: r"sigma of shape \(6, 5\)",
    _not_finite: "mu in .* is not finite",
    _words: "mu in .* is of type <U1; numbers are expected",
    _neither: "holds weights; expected mu and sigma, features as feats .*, or images as arr_0",
    _float_images: r"arr_0 in .* is of type float64 and shape \(4, 8, 8, 3\); images are expected as uint8",
    _text: "neither an .npz nor the statistics of torch-fidelity",
    _cut: "neither an .npz nor the statistics of torch-fidelity",
    _huge: "says that it takes more than 64 GiB",
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_what_is_no_reference_is_one_line(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ref.npz")
    assert_refused(tmp_path / "ref.npz", REFUSED[write])
    assert not (tmp_path / "made").exists()


def test_a_pickle_named_as_torch_fidelitys_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"mu": Danger(), "sigma": torch.eye(6)}, tmp_path / "ref.pt")
    assert_refused(tmp_path / "ref.pt", "pickled objects are not read")
    assert not (tmp_path / "made").exists()


def assert_refused(path: Path, pattern: str) -> None:
    assert re.search(pattern, message_of(lambda: ReferenceFile(path).reference(6)))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        ReferenceFile(tmp_path / "none.npz")


def test_statistics_of_another_extractor_or_size_are_refused(tmp_path):
    looks = extractor()
    said = {"features": "a", "features_hash": "00", "image_size": [8, 8]}
    Reference.of(features(30), said).write(tmp_path / "other.npz", 10)
    assert "was made with a (hash 00), and --features is means" in message_of(
        ReferenceFile(tmp_path / "other.npz").check_made_by, looks, 8
    )
    said = {"features": "means", "features_hash": looks.digest, "image_size": [8, 8]}
    Reference.of(features(30), said).write(tmp_path / "own.npz", 10)
    ReferenceFile(tmp_path / "own.npz").check_made_by(looks, 8)
    assert "of images of [8, 8] pixels, and [16, 16] is the size" in message_of(
        ReferenceFile(tmp_path / "own.npz").check_made_by, looks, 16
    )


@pytest.mark.parametrize("keep", [1, 3])
def test_too_few_features_for_neighbours_are_refused(tmp_path, keep):
    reference = written(tmp_path, features(30), keep=keep).reference(6, 4)
    assert f"there are {keep} images" in message_of(fidelity, features(20, seed=1), reference)


def test_a_torn_archive_is_one_line(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(600), sigma=np.eye(600))
    content = (tmp_path / "a.npz").read_bytes()
    for place in range(60, len(content) - 4, max(1, len(content) // 40)):
        torn = bytearray(content)
        torn[place : place + 3] = b"\xff\x00\xff"
        (tmp_path / "torn.npz").write_bytes(bytes(torn))
        try:
            ReferenceFile(tmp_path / "torn.npz").reference(600)
        except UserError as error:
            assert "\n" not in str(error)


def _resaved(path: Path, **changed) -> ReferenceFile:
    """Write a file of statistics again, with these arrays in place of its own; None leaves one out."""
    with np.load(path) as file:
        arrays = {**dict(file), **changed}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return ReferenceFile(path)


def test_spatial_statistics_in_another_order_are_refused(tmp_path):
    path = written(tmp_path, features(30)).path
    with np.load(path) as file:
        assert str(file["order_s"]) == "row, column, channel"
    before = _resaved(path, order_s=None)  # as vqdist wrote it when its order was torch's
    said = message_of(before.reference, 6, 4)
    assert "in the order channel, row, column, and" in said and "make the file anew with `vqdist statistics`" in said
    assert before.reference(6).spatial is None  # of an extractor without spatial features
    assert "in the order column, row" in message_of(_resaved(path, order_s=np.array("column, row")).reference, 6, 4)
    adm = _resaved(path, order_s=None, protocol=None)  # whose files say neither
    assert adm.reference(6, 4).spatial is not None
    assert "pickled" in message_of(_resaved(path, order_s=np.array(None, dtype=object)).reference, 6, 4)


@pytest.mark.parametrize("form", [torch.bfloat16, torch.float16, torch.float64, "parameter"])
def test_tensors_of_any_precision_and_parameters_are_statistics(form, tmp_path):
    moments = Moments.of(features(30).features)
    mean, covariance = moments.mean, moments.covariance
    if form == "parameter":
        mean, covariance = nn.Parameter(mean), nn.Parameter(covariance)
    else:
        mean, covariance = mean.to(form), covariance.to(form)
    torch.save({"mu": mean, "sigma": covariance}, tmp_path / "a.pt")
    read = ReferenceFile(tmp_path / "a.pt").reference(6).moments
    assert torch.equal(read.mean, mean.detach().double()) and torch.equal(
        read.covariance, covariance.detach().double()
    )
    torch.save(covariance, tmp_path / "b.pt")  # features alone
    assert torch.equal(ReferenceFile(tmp_path / "b.pt").reference(6).features, covariance.detach().double())


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({"weight": torch.zeros(2, dtype=torch.bfloat16)}, "holds weight; expected mu and sigma"),
        (nn.Linear(2, 2).state_dict(keep_vars=True), "holds bias, weight; expected mu and sigma"),
        ({"mu": torch.eye(6)[0].to_sparse(), "sigma": torch.eye(6)}, "mu in .*torch.sparse_coo.*; give dense numbers"),
        (torch.eye(6).to_sparse(), "features in .*torch.sparse_coo.*; give dense numbers"),
        (
            nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16)),
            r"features of shape \(3, 5\), but the extractor gives 6",
        ),
    ],
)
def test_weights_of_a_model_are_no_statistics(content, pattern, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", pattern)
