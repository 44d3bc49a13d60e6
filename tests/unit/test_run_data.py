"""The data of a run: the split, images given to validate on, and that nothing random touches these."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenarios import IMAGE_SIZE, QUIET, build_ar_trainer, build_dvae_trainer, build_trainer
from torch.utils.data import Dataset, TensorDataset

from vqdist import UserError
from vqdist.backends.local import LocalBackend
from vqdist.trainers import data as data_module
from vqdist.trainers.config import TrainerConfig, build_config
from vqdist.trainers.data import RunData, open_images


def config_of(**options) -> TrainerConfig:
    return build_config(TrainerConfig, {**QUIET, "num_train_steps": 2, **options})


def data_of(dataset=None, valid_dataset=None, **options) -> RunData:
    config = config_of(**options)
    train, valid = open_images(config, 3, dataset, valid_dataset)
    return RunData(config, train, valid, own_valid=valid_dataset is not None or config.valid is not None)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Images of the left half white to train on, and five of a grey of their own to validate on."""
    for name, count in (("train", 12), ("valid", 5)):
        (tmp_path / name).mkdir()
        for index in range(count):
            pixels = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            pixels[:, : IMAGE_SIZE // 2] = 255 if name == "train" else 100 + index
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path / "train", tmp_path / "valid"


@pytest.mark.parametrize(
    ("world_size", "dist_timeout", "expected"), [(1, 10.0, 1800), (2, 10.0, 480), (2, 600.0, 1800), (2, 0.5, 60)]
)
def test_a_loader_that_hangs_is_given_up_before_the_other_ranks_give_up_this_one(world_size, dist_timeout, expected):
    backend = LocalBackend()
    backend.world_size = world_size
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "train_loader", lambda *_, **options: given.update(options))
        data_of(dist_timeout=dist_timeout).train_batches(backend, 0, labels=False)
    assert given["patience"] == expected


class AtRandom(Dataset):
    """A dataset of one's own that draws from torch's generator."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        return torch.rand(3, IMAGE_SIZE, IMAGE_SIZE)


def test_pictures_show_the_same_and_draw_nothing_from_the_run():
    data, before = data_of(AtRandom(), folder=None), torch.get_rng_state()
    assert torch.equal(data.shown(3), data.shown(3)) and torch.equal(torch.get_rng_state(), before)


class Mirroring(Dataset):
    """A dataset of one's own that augments by itself: every look at an image is another one."""

    def __init__(self):
        self.looks = 0

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        self.looks += 1
        return torch.full((3, IMAGE_SIZE, IMAGE_SIZE), 1 / (1 + self.looks))


def test_a_share_of_the_images_is_held_back():
    data = data_of(valid_frac=0.25)
    assert sorted([*data.split.train.tolist(), *data.split.valid.tolist()]) == list(range(64))
    assert len(data.split.valid) == 16 and data.fingerprint_of_all() == data.fingerprint()


def test_images_to_validate_on_are_taken_whole_and_as_they_are(folders):
    train, valid = folders
    data = data_of(folder=str(train), valid=str(valid), valid_frac=0.05, augment=True)
    assert data.split.train.tolist() == list(range(12)) and data.split.valid.tolist() == list(range(5))
    (batch, rest) = data.valid_batches(LocalBackend(), labels=False)
    whites = torch.cat([batch.item, rest.item])[:, 0]
    assert (whites[:, :, : IMAGE_SIZE // 2] > 0.3).all() and (whites[:, :, IMAGE_SIZE // 2 :] == 0).all()
    assert torch.equal(data.shown(3)[:, 0], whites[:3])
    # while those to train on are mirrored, some of them
    batches = data.train_batches(LocalBackend(), 0, labels=False)
    assert {float(image[0, 0, 0]) for _ in range(6) for image in next(batches).item} == {0.0, 1.0}


OWN = {"valid": "synthetic:40", "valid_frac": 0.05}


def test_a_limit_draws_the_same_images_every_time_and_for_any_number_of_ranks(folders):
    own = {"folder": str(folders[0]), **OWN, "valid_images": 9}
    first, again = data_of(**own), data_of(**own, seed=5)
    chosen = first.split.valid.tolist()
    assert torch.equal(first.split.valid, again.split.valid) and len(first.split.train) == 12
    assert chosen == sorted(set(chosen)) and len(chosen) == 9 and chosen != list(range(9))
    backend, shares = LocalBackend(), []
    backend.world_size = 2
    for backend.rank in (0, 1):
        shares += [batch.item for batch in first.valid_batches(backend, labels=False)]
    whole = torch.cat([batch.item for batch in first.valid_batches(LocalBackend(), labels=False)])
    found = {tuple(image.flatten()[:64].tolist()) for image in torch.cat(shares)}
    assert len(found) == 9 and found == {tuple(image.flatten()[:64].tolist()) for image in whole}
    assert len(data_of(**{**own, "valid_images": 41}).split.valid) == 40  # a limit, and no demand


@pytest.mark.parametrize("build", [build_trainer, build_dvae_trainer, build_ar_trainer])
def test_a_resumed_run_validates_on_the_same_images(tmp_path, build):
    def again(**changed):
        return build(tmp_path / "run", **{**OWN, "valid_images": 5, "num_train_steps": 1, **changed})

    again().train()
    again().close()
    for changed, said in (
        ({"valid": "synthetic:41"}, "data.valid: "),
        ({"valid": None, "valid_frac": 0.05}, "data.valid: .* -> None"),
        ({"valid_images": 6}, "trainer.valid_images: 5 -> 6"),
        ({"random_split_seed": 1}, "trainer.random_split_seed: 42 -> 1"),
    ):
        with pytest.raises(UserError, match=f"holds a run with another configuration .*{said}"):
            again(**changed)
    allowed = again(valid="synthetic:41", allow_config_change="data.valid")
    allowed.close()
    assert allowed.step == 1 and len(allowed.valid_dataset) == 41


def test_shards_are_validated_on(tmp_path):
    from io import BytesIO
    from tarfile import TarInfo
    from tarfile import open as open_tar

    for shard in range(2):
        with open_tar(tmp_path / f"valid-{shard}.tar", "w") as tar:
            for index in range(3):
                file = BytesIO()
                Image.new("RGB", (20, 20), (40 * index + shard, 0, 0)).save(file, "png")
                entry = TarInfo(f"{shard}_{index}.png")
                entry.size = file.tell()
                file.seek(0)
                tar.addfile(entry, file)
    given = {"valid": f"wds:{tmp_path}/valid-{{0..1}}.tar", "valid_frac": 0.05, "valid_images": 4}
    trainer = build_trainer(tmp_path / "run", **given, num_train_steps=1)
    assert len(trainer.split.train) == 64 and trainer.train()["images"] == 4


def test_a_run_from_before_the_images_to_validate_on_were_kept_is_resumed(tmp_path):
    path = tmp_path / "config.json"
    build_trainer(tmp_path, num_train_steps=1).train()
    config = json.loads(path.read_text())
    del config["data"]["valid"], config["trainer"]["valid_images"]
    path.write_text(json.dumps(config))
    assert build_trainer(tmp_path, num_train_steps=1).step == 1


def test_a_valid_folder_within_that_of_training_is_said(folders, tmp_path, capsys):
    train, valid = folders
    both = {"folder": str(train.parent), "valid": str(valid), "valid_frac": 0.05}
    build_trainer(train.parent.parent / "run", **both)
    assert f"warning: {valid} lies in {train.parent}, so images to validate on" in capsys.readouterr().err
    with pytest.raises(UserError, match="its pictures would be validated on; give another one"):
        build_trainer(valid / "run", folder=str(train), valid=str(valid), valid_frac=0.05)


def test_of_the_same_source_too_nothing_random_touches_what_is_validated_on(folders):
    data = data_of(folder=str(folders[0]), valid_frac=0.5, augment=True)
    images = torch.cat([batch.item for batch in data.valid_batches(LocalBackend(), labels=False)])
    assert len(images) == 6 and (images[:, :, :, : IMAGE_SIZE // 2] == 1).all()


def test_a_dataset_to_validate_on_keeps_the_augmentation_of_the_other_away(tmp_path):
    still = TensorDataset(torch.rand(6, 3, IMAGE_SIZE, IMAGE_SIZE))
    augmenting = Mirroring()
    trainer = build_dvae_trainer(
        tmp_path, folder=None, dataset=augmenting, valid_dataset=still, valid_frac=0.05, num_train_steps=2
    )
    assert trainer.train()["images"] == 6
    assert torch.equal(torch.cat(list(trainer.valid_batches())), still.tensors[0])
    shown = trainer.picture_images()
    assert len(shown) == 4 and torch.equal(shown, still.tensors[0][:4])
    assert augmenting.looks >= 8 and len(trainer.split.train) == 16


def test_the_command_validates_on_a_folder(folders, tmp_path):
    from vqdist.cli import main

    train, valid = folders
    options = "--image_size 16 --num_tokens 16 --num_layers 2 --hidden_dim 8 --emb_dim 8 --num_resnet_blocks 0"
    options += " --batch_size 4 --trainer.num_train_steps 1 --data.num_workers 0"
    command = ["train", "dvae", "--data", str(train), "--data.valid", str(valid), *options.split()]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert '"valid/images": 5' in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"valid": "synthetic:8", "valid_frac": 0.2}, "^valid_frac 0.2 does nothing, because images to validate on"),
        ({"valid": "synthetic:8", "random_split_seed": 1, "valid_frac": 0.05}, "^random_split_seed 1 does nothing"),
        ({"valid": "synthetic:8", "valid_frac": 0}, "^valid_frac 0 does nothing, because images to validate on"),
        ({"valid": "synthetic:8", "valid_frac": 0.05, "valid_images": 0}, "^valid_images 0 is not possible"),
        (
            {"valid": "synthetic:8", "valid_frac": 0.05, "valid_dataset": TensorDataset(torch.rand(6, 3, 16, 16))},
            "^valid synthetic:8 does",
        ),
        ({"valid": "no/such/folder", "valid_frac": 0.05}, "no/such/folder"),
        ({"batch_size": 65}, "^one optimizer step takes 65 images"),
    ],
)
def test_mistakes(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        build_trainer(tmp_path, **options)


def test_codes_are_validated_on_codes(tmp_path):
    from vqdist.data.codes import CodeDataset

    trainer = build_ar_trainer(tmp_path / "images", valid="synthetic:9", valid_frac=0.05, num_train_steps=1)
    assert trainer.train()["images"] == 9
    codes = CodeDataset.__new__(CodeDataset)
    with pytest.raises(UserError, match="codes are trained on, and images were given to validate on"):
        trainer._codes_to_validate_on(codes, TensorDataset(torch.rand(2, 3, 16, 16)))
