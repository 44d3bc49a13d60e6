"""One of two ranks gets no images: both end with a checkpoint of the last step, and say why."""

from __future__ import annotations

import pytest
from launching import ROOT, torchrun

WORKER = str(ROOT / "tests" / "workers" / "data_worker.py")


def ends(folder, kind) -> list[str]:
    torchrun([WORKER, str(folder), kind], timeout=120)
    return [(folder / f"{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.distributed
def test_a_rank_whose_storage_fails_ends_both_with_a_checkpoint(tmp_path):
    first, second = ends(tmp_path, "fails")
    assert first.startswith("[3] True rank 1 has no images to train on: cannot read the image Failing[")
    assert "; step 3 is saved in " in first
    assert second.startswith("[3] True cannot read the image Failing[") and "; step 3 is saved in " in second


@pytest.mark.distributed
def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    first, second = ends(tmp_path, "fails first")
    assert first.startswith("[] True rank 1 has no images to train on: cannot read the image Failing[")
    assert second.startswith("[] True cannot read the image Failing[")


@pytest.mark.distributed
def test_a_rank_that_cannot_read_a_validation_ends_both_with_a_checkpoint(tmp_path):
    first, second = ends(tmp_path, "fails in a validation")
    assert first.startswith(
        "[2] True rank 1 has no images to validate on: cannot read the image FailingToValidate[15]"
    )
    assert second.startswith("[2] True cannot read the image FailingToValidate[15]")
    assert all("; step 2 is saved in " in end for end in (first, second))


@pytest.mark.distributed
def test_a_signal_while_one_rank_waits_for_images_saves_the_step(tmp_path):
    for end in ends(tmp_path, "hangs"):
        assert end.startswith("[3] True stopped by SIGTERM after step 3, which is saved")
