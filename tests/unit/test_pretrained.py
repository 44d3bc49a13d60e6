"""config.json and model.safetensors: which class they belong to, what is saved besides its arguments, and mistakes."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import hub_mixin
from huggingface_hub.errors import LocalEntryNotFoundError
from scenarios import build_dvae, build_prior, build_vae, build_var, build_vq_ar
from torch import Tensor

from vqdist import (
    VAR,
    DiscreteVAE,
    Prior,
    SimpleVQVAE,
    Tokenizer,
    UserError,
    VQGanVAE,
    VQImageAutoregressiveAutoencoder,
)
from vqdist.models import pretrained
from vqdist.models.autoregressive import SecondStage
from vqdist.models.pretrained import MODEL_TYPES, PretrainedModel, load_model_of_any_type


def build_simple_vqvae() -> SimpleVQVAE:
    torch.manual_seed(16)
    return SimpleVQVAE(v_patch_nums=(1, 2, 4))


BUILD = {
    "vqgan": build_vae,
    "dvae": build_dvae,
    "vq_ar": build_vq_ar,
    "simple_vqvae": build_simple_vqvae,
    "prior": build_prior,
    "var": build_var,
}
CLASSES = {
    "vqgan": VQGanVAE,
    "dvae": DiscreteVAE,
    "vq_ar": VQImageAutoregressiveAutoencoder,
    "simple_vqvae": SimpleVQVAE,
    "prior": Prior,
    "var": VAR,
}
OTHER = dict(zip(CLASSES, [*list(CLASSES)[1:], "vqgan"], strict=True))
every_type = pytest.mark.parametrize("model_type", MODEL_TYPES)


def save(built: str, folder: Path, *, without: tuple[str, ...] = (), **changes) -> Path:
    """Save a model for images of 16 pixels, with changes to its config.json and without some of its entries."""
    model = BUILD[built]()
    model.image_size = 16
    model.save_pretrained(folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if name not in without})
    )
    return folder


def pixels() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def reconstructs_as(model: PretrainedModel, other: PretrainedModel) -> bool:
    """Return whether two models make the same of equal images or, where they draw images, of equal randomness."""
    with torch.no_grad():
        if isinstance(model, SecondStage):
            return torch.equal(*(it.sample(2, generator=torch.Generator().manual_seed(4)) for it in (model, other)))
        return torch.equal(*(it.network.eval().reconstruct(pixels())[0] for it in (model, other)))


def classes_below(parent: type) -> list[type]:
    """All subclasses of subclasses that can be saved themselves: abstract ones name no type."""
    below = [*parent.__subclasses__(), *(cls for child in parent.__subclasses__() for cls in classes_below(child))]
    return [cls for cls in dict.fromkeys(below) if "model_type" in cls.__dict__]


# --------------------------------------------------------------------------------------------- types


def test_every_type_is_that_of_its_class():
    for model_type, (module, name) in MODEL_TYPES.items():
        model_class = getattr(importlib.import_module(module), name)
        assert model_class is CLASSES[model_type] and model_class.model_type == model_type
    ours = [cls for cls in classes_below(PretrainedModel) if cls.__module__.startswith("vqdist.")]
    assert {cls.__dict__["model_type"] for cls in ours} == MODEL_TYPES.keys()


@every_type
def test_the_type_is_written_and_finds_the_class(model_type, tmp_path):
    config = json.loads((save(model_type, tmp_path) / "config.json").read_text())
    assert (config["model_type"], config["image_size"]) == (model_type, 16)
    loaded = load_model_of_any_type(tmp_path)
    assert type(loaded) is CLASSES[model_type] and not loaded.training
    assert reconstructs_as(loaded, BUILD[model_type]())
    assert reconstructs_as(CLASSES[model_type].from_pretrained(tmp_path), loaded)


@every_type
def test_what_is_loaded_can_be_saved_again(model_type, tmp_path):
    save(model_type, tmp_path / "first")
    CLASSES[model_type].from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    first, again = ((tmp_path / folder / "config.json").read_text() for folder in ("first", "again"))
    assert json.loads(first) == json.loads(again)
    assert reconstructs_as(load_model_of_any_type(tmp_path / "again"), BUILD[model_type]())


def test_an_export_from_before_there_were_types_is_a_vqgan(tmp_path):
    save("vqgan", tmp_path, without=("model_type", "image_size"))
    assert type(load_model_of_any_type(tmp_path)) is VQGanVAE
    assert VQGanVAE.from_pretrained(tmp_path).image_size is None
    assert reconstructs_as(VQGanVAE.from_pretrained(tmp_path), build_vae())
    assert Tokenizer.from_pretrained(tmp_path, 16).num_codes == 16


@every_type
def test_the_wrong_class_is_one_line(model_type, tmp_path):
    save(OTHER[model_type], tmp_path)
    name = CLASSES[model_type].__name__
    message = rf"^{tmp_path} holds a model of type '{OTHER[model_type]}'; {name} loads '{model_type}'$"
    with pytest.raises(UserError, match=message):
        CLASSES[model_type].from_pretrained(tmp_path)


def test_an_export_from_before_there_were_types_is_no_discrete_vae(tmp_path):
    save("vqgan", tmp_path, without=("model_type",))
    with pytest.raises(UserError, match="holds a model of type 'vqgan'; DiscreteVAE loads 'dvae'$"):
        DiscreteVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("unknown", ["vae", 3, ["vqgan"]])
def test_an_unknown_type_is_one_line(unknown, tmp_path):
    save("vqgan", tmp_path, model_type=unknown)
    shown = repr(unknown).replace("[", r"\[").replace("]", r"\]")
    for load in (load_model_of_any_type, Tokenizer.from_pretrained):
        with pytest.raises(
            UserError, match=rf"^{tmp_path} holds a model of type {shown}; vqdist has vqgan, dvae, vq_"
        ):
            load(tmp_path)
    with pytest.raises(UserError, match=rf"holds a model of type {shown}; VQGanVAE loads 'vqgan'$"):
        VQGanVAE.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------- image size


@pytest.mark.parametrize("model_type", ["vqgan", "dvae", "vq_ar"])  # the others are of the size of their tokenizer
def test_the_image_size_that_is_given_replaces_the_saved_one(model_type, tmp_path):
    save(model_type, tmp_path / "first")
    loaded = CLASSES[model_type].from_pretrained(tmp_path / "first", image_size=32)
    assert loaded.image_size == 32 and Tokenizer(loaded).num_codes == 64
    loaded.save_pretrained(tmp_path / "again")
    assert load_model_of_any_type(tmp_path / "again").image_size == 32
    assert load_model_of_any_type(tmp_path / "first").image_size == 16


# --------------------------------------------------------------------------------------------- files


@every_type
def test_saved_files_can_be_read_by_whom_the_umask_lets(model_type, tmp_path):
    old = os.umask(0o027)
    try:
        BUILD[model_type]().save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def other_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    wider = {"hidden_dim": 32} if config["model_type"] in ("dvae", "simple_vqvae") else {"dim": 64}
    (folder / "config.json").write_text(json.dumps({**config, **wider}))


DAMAGES = [
    (lambda folder: (folder / "model.safetensors").unlink(), r"holds no model that can be loaded \(.*No such file"),
    (damage_weights, r"holds no model that can be loaded \(.*header"),
    (other_weights, r"holds no model that can be loaded \(.*size mismatch"),
    (
        lambda folder: (folder / "config.json").unlink(),
        r"has no config.json; expected a folder that save_pretrained wrote",
    ),
    (lambda folder: (folder / "config.json").write_text("{"), r"config.json is not valid JSON \("),
    (
        lambda folder: (folder / "config.json").write_text("[1]"),
        r"config.json holds a list; a JSON object is expected\)$",
    ),
]


@every_type
@pytest.mark.parametrize("damage, message", DAMAGES)
def test_a_damaged_export_is_one_line(model_type, damage, message, tmp_path):
    damage(save(model_type, tmp_path))
    for load in (CLASSES[model_type].from_pretrained, load_model_of_any_type):
        with pytest.raises(UserError, match=message) as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_model_of_any_type, DiscreteVAE.from_pretrained, Tokenizer.from_pretrained])
@pytest.mark.parametrize(
    "name, message",
    [
        (
            "absent",
            r"^no such run, export or file: absent; expected a run folder, ",
        ),
        ("runs/e/export", r"^no such run, export or file: runs/e/export; expected"),
        (
            "absent/export",
            r"^absent/export is no folder here, and no model of that name was found on the Hugging Face",
        ),
    ],
)
def test_nothing_to_load_is_one_line(load, name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load(name, local_files_only=True)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the list of requests to a Hub with the files of `tmp_path / revision`."""
    asked = []

    def download(repo_id, filename, *, revision=None, token=None, **_):
        asked.append((repo_id, filename, revision, token))
        path = tmp_path / (revision or "main") / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {filename}")
        return str(path)

    for module in (pretrained, hub_mixin):
        monkeypatch.setattr(module, "hf_hub_download", download)
    return asked


@every_type
def test_a_repository_says_of_which_class_it_is(model_type, hub, tmp_path):
    save(model_type, tmp_path / "main")
    save(OTHER[model_type], tmp_path / "v1")
    assert type(load_model_of_any_type("someone/tokenizer")) is CLASSES[model_type]
    if not issubclass(CLASSES[model_type], SecondStage):
        assert Tokenizer.from_pretrained("someone/tokenizer").image_size == 16
    assert {(repo, revision) for repo, _, revision, _ in hub} == {("someone/tokenizer", None)}
    hub.clear()
    other = load_model_of_any_type("someone/tokenizer", revision="v1", token="secret")
    assert type(other) is CLASSES[OTHER[model_type]] and reconstructs_as(other, BUILD[OTHER[model_type]]())
    assert {(revision, token) for _, _, revision, token in hub} == {("v1", "secret")}
    with pytest.raises(UserError, match=r"^someone/tokenizer holds a model of type"):
        CLASSES[OTHER[model_type]].from_pretrained("someone/tokenizer")


def test_a_repository_that_cannot_be_reached_is_one_line(hub):
    for load in (*(cls.from_pretrained for cls in CLASSES.values()), load_model_of_any_type):
        with pytest.raises(UserError, match="no model of that name was found on the Hugging Face Hub") as error:
            load("someone/tokenizer")
        assert "\n" not in str(error.value)


def test_a_repository_with_pickled_weights_only_is_refused(hub, tmp_path):
    save("dvae", tmp_path / "main")
    (tmp_path / "main" / "model.safetensors").rename(tmp_path / "main" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^the repository has no model.safetensors; pickled weights are not loaded$"):
        load_model_of_any_type("someone/tokenizer")
