"""The weights that a run begins with: those of a published file, of an export, or of another run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqdist import seeding
from vqdist.checkpoint import complete_steps
from vqdist.errors import UserError, an
from vqdist.export import RECORD
from vqdist.files import read_json, sha256_of
from vqdist.locations import FILES, check_location, find_export
from vqdist.models.presets import preset_named
from vqdist.models.pretrained import FIRST_TYPE, class_of_type, is_of_another_project, load_model_of_any_type
from vqdist.models.published import file_of_weights, read_to_train
from vqdist.models.published.base import differences
from vqdist.models.vqgan import VQGanVAE
from vqdist.parts import Spec, arguments_of, recorded, trusting
from vqdist.trainers.vqgan_config import VQGanTrainerConfig

OF_PLAYERS = ("discriminator", "discr_layers", "discr_loss", "gen_loss", "use_hinge_loss", "use_gan")
OF_TRAINING = frozenset([*OF_PLAYERS, "l2_recon_loss", "perceptual", "terms", "use_vgg_and_gan", "vgg"])
"""Arguments of the model that say how it is trained: they need not be those of the weights."""
SWITCHES = ("use_gan", "use_vgg_and_gan")
PATCHGAN = {"class_path": "patchgan", "init_args": {}}
"""The discriminator of most published configurations, for networks that name none."""

Given = VQGanVAE | Mapping[str, Any] | None
"""A model that takes the weights over, or arguments of `VQGanVAE` over those of the weights."""


@dataclass(frozen=True)
class Begun:
    """A model with the weights that a run begins with.

    Attributes:
        model: on the CPU; of a run that is resumed the checkpoint has the weights.
        record: `path` and `sha256` of the weights, for the configuration of the run.
        note: one line on the discriminator where its weights are at random, or None.
    """

    model: VQGanVAE
    record: dict[str, Any]
    note: str | None


@dataclass(frozen=True)
class _Source:
    """A tokenizer to begin from.

    Attributes:
        path: as it was given.
        file: with the weights.
        model: with these.
        critic: the weights of its discriminator, or None.
        part: specification of that, where `model` does not say it.
        of_run: whether a run wrote it: then its losses were meant so.
    """

    path: str
    file: Path
    model: VQGanVAE
    critic: Mapping[str, Tensor] | None
    part: Mapping[str, Any]
    of_run: bool


def begin(given: Given, config: VQGanTrainerConfig) -> Begun:
    """Return the model that a run begins or goes on with; of a run with a checkpoint the weights are not read.

    Raises:
        UserError: there are no such weights, they are of another network than `given`, or the run began from others.
    """
    path = config.init_from
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"init_from {path!r} is not possible; give a file, an export or a run")
    if given is not None and not isinstance(given, (VQGanVAE, Mapping)):
        raise UserError(f"the model is {an(type(given).__name__)}; with init_from give a VQGanVAE, or leave it out")
    folder = Path(config.results_folder).expanduser()
    seeding.seed_everything(config.seed, "weights")  # of a discriminator at random
    if complete_steps(folder / "checkpoints") and (folder / "config.json").is_file():
        return _again(given, path, folder, config.trust_code)
    source = _read(path, config.trust_code)
    model = given if isinstance(given, VQGanVAE) else _built(source, dict(given or {}))
    _fill(model, source)
    chosen = isinstance(given, VQGanVAE) or bool(given and {"discriminator", "discr_layers", "preset"} & given.keys())
    note = _fill_discriminator(model, source, chosen=chosen)
    return Begun(model, {"path": path, "sha256": sha256_of(source.file)}, note)


def _again(given: Given, path: str, folder: Path, trust_code: bool) -> Begun:
    """Return the model of a run that has a checkpoint, by what its configuration says of it."""
    before = read_json(folder / "config.json")
    record = (before.get("trainer") or {}).get("init_from")
    if record is None:
        raise UserError(
            f"{folder} holds a run that did not begin from {path}; leave init_from out, or give another --out"
        )
    if path != record["path"] and _checksum(path) != record["sha256"]:
        raise UserError(
            f"{folder} holds a run that began from {record['path']} (SHA-256 {record['sha256'][:12]}), and init_from "
            f"is {path}; give that, or another run folder"
        )
    if isinstance(given, VQGanVAE):
        return Begun(given, record, None)
    said = _said(given or {})
    own = dict(before["model"])
    with trusting(trust_code):
        model_class = class_of_type(before.get("model_type") or FIRST_TYPE, folder)
        model = cast(VQGanVAE, model_class(**own | {name: said[name] for name in said if name in OF_TRAINING}))
    _refuse_others(said, model, own, str(folder))
    return Begun(model, record, None)


def _checksum(path: str) -> str | None:
    """Return the SHA-256 of the weights at a path; None where there are none now."""
    try:
        return sha256_of(_file_of(path))
    except (OSError, UserError):
        return None


def _file_of(path: str) -> Path:
    folder = find_export(path)
    return file_of_weights(folder) if is_of_another_project(folder) else folder / FILES[1]


def _read(path: str, trust_code: bool) -> _Source:
    folder = find_export(path)
    if not folder.exists():
        raise UserError(
            f"there is no {path} to begin from (init_from); give a published file, an export or a run (download a "
            "repository of the Hub first: hf download NAME --local-dir DIR)"
        )
    critic: Mapping[str, Tensor] | None = None
    part: Mapping[str, Any] = PATCHGAN
    if is_of_another_project(folder):
        model, found = read_to_train(folder)
        if found is not None:
            part, critic = found
    else:
        check_location(path, folder)
        model = load_model_of_any_type(folder, trust_code=trust_code)
        critic = _tensors(model.discriminator_file)
    if not isinstance(model, VQGanVAE):
        raise UserError(f"{path} holds a model of type {model.model_type!r}; init_from takes a 'vqgan'")
    return _Source(path, _file_of(path), model, critic, part, (folder / RECORD).is_file())


def _tensors(file: Path | None) -> dict[str, Tensor] | None:
    try:
        return None if file is None else load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove it to begin with a new discriminator") from error


def _built(source: _Source, given: dict[str, Any]) -> VQGanVAE:
    """Return a model of the network of a source, trained as `given` says, or else as the source was."""
    own, said = source.model.configuration(), _said(given)
    _refuse_others(said, source.model, own, source.path)
    own = {**own, **{name: value for name, value in said.items() if name in OF_TRAINING}}
    if not source.of_run or "discriminator" in said:  # a conversion has none, which is no choice of anybody's
        own = {name: value for name, value in own.items() if name not in SWITCHES or value or name in said}
    unread: set[str] = set()  # arguments of the source that what is given takes the place of
    if not all(own.get(name, True) for name in SWITCHES):
        unread |= {*OF_PLAYERS} - {"use_gan"}
    elif own.get("discriminator") is None and own.get("dim") is None:
        own["discriminator"] = dict(source.part)
    unread |= {"discr_layers"} if "discriminator" in said else set()
    unread |= {"l2_recon_loss", "perceptual"} if "terms" in said else set()
    model = type(source.model)(**{name: own[name] for name in own.keys() - (unread - said.keys())})
    model.image_size = source.model.image_size
    return model


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from the defaults, with the parts that a preset stands for."""
    defaults = {name: one.default for name, one in inspect.signature(VQGanVAE.__init__).parameters.items()}
    said = {name: value for name, value in given.items() if value != defaults.get(name)}
    preset = said.pop("preset", None)
    return said if preset is None else preset_named(preset).completed(said, with_gan="use_gan" not in said)


def _refuse_others(said: Mapping[str, Any], model: VQGanVAE, own: Mapping[str, Any], path: str) -> None:
    """Raise `UserError` for an argument of the network that the weights are not of."""
    facts = {name: getattr(model, name) for name in ("codebook_size", "channels", "layers")}
    defaults = {name: one.default for name, one in inspect.signature(VQGanVAE.__init__).parameters.items()}
    for name, value in said.items():
        found = facts.get(name, own.get(name, defaults.get(name)))
        if name not in OF_TRAINING and not _agrees(name, value, found):
            raise UserError(
                f"{name} {_shown(value)} is given, and {path} has {_shown(found)}; leave it out: init_from says it"
            )


def _agrees(name: str, given: Any, found: Any) -> bool:
    """Return whether what is given of an argument holds for a model that was built with `found`."""
    if name in VQGanVAE.part_options and isinstance(given, (str, Mapping)) and isinstance(found, (str, Mapping)):
        wanted, there = Spec.of(given, name), Spec.of(found, name)
        factory = VQGanVAE.part_options[name].factory(wanted.target)
        known = {one.name: one.default for one in arguments_of(factory)} | dict(there.init_args)
        return wanted.target == there.target and all(
            _plain(known.get(key)) == _plain(value) for key, value in wanted.init_args.items()
        )
    if isinstance(given, Mapping) and isinstance(found, Mapping):
        return all(key in found and _plain(found[key]) == _plain(value) for key, value in given.items())
    return bool(_plain(given) == _plain(found))


def _shown(value: Any) -> str:
    if value is None:
        return "the default"
    return repr(value if isinstance(value, (int, float, str)) else recorded(value))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fill(model: VQGanVAE, source: _Source) -> None:
    found, expected = source.model.network.state_dict(), model.network.state_dict()
    problem = differences(found, expected)
    if problem:
        raise UserError(
            f"{source.path} {problem}, compared with the model; give the network that it is of, or no model"
        )
    model.network.load_state_dict(found)


def _fill_discriminator(model: VQGanVAE, source: _Source, *, chosen: bool) -> str | None:
    """Give the discriminator its weights, and return None; or a line on why they are at random."""
    if model.discriminator is None:
        return None
    if source.critic is None:
        return f"{source.path} holds no discriminator that vqdist reads: a new one begins at random"
    problem = differences(source.critic, model.discriminator.state_dict())
    if problem and not chosen:
        raise UserError(f"the discriminator of {source.path} {problem}; give another one, or --model.use_gan false")
    if problem:
        return f"the discriminator begins at random: that of {source.path} {problem}"
    model.discriminator.load_state_dict(source.critic)
    return None
