"""The weights that a run begins with: those of a published file, of an export, or of another run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vqdist import seeding
from vqdist.checkpoint import complete_steps
from vqdist.errors import UserError, an
from vqdist.export import RECORD, check_weights
from vqdist.files import read_json, sha256_of
from vqdist.locations import FILES, check_location, find_export
from vqdist.models.networks.maskgit import MaskGITDecoder
from vqdist.models.networks.vit import TiTokProxyDecoder
from vqdist.models.presets import preset_named
from vqdist.models.pretrained import FIRST_TYPE, class_of_type, is_of_another_project, load_model_of_any_type
from vqdist.models.published import file_of_weights, read_to_train
from vqdist.models.published.base import differences
from vqdist.models.published.critics import Critic, part_of_file
from vqdist.models.published.files import INDEX, checksum_of_weights
from vqdist.models.published.maskgit import decoder_arguments
from vqdist.models.tokenizer import Tokenizer
from vqdist.models.vqgan import VQGanVAE
from vqdist.parts import Spec, arguments_of, recorded, trusting
from vqdist.trainers.initial_optimizer import newest_checkpoint
from vqdist.trainers.vqgan_config import OF_LIST, STARTS, VQGanTrainerConfig

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
        record: `init_from` and `init_pixel_from` for the configuration of the run: `path` and `sha256` of the weights.
        note: one line on the discriminator where its weights are at random, or None.
        checkpoint: of the run that it begins from, whose optimizers' states may be taken over, or None.
    """

    model: VQGanVAE
    record: dict[str, Any]
    note: str | None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class _Source:
    """A tokenizer to begin from.

    Attributes:
        path: as it was given.
        file: with the weights.
        model: with these.
        critic: the weights of its discriminator, or None.
        part: specification of that, where `model` does not say it, or None.
        of_run: whether a run wrote it: then its losses were meant so.
        left_out: a line on a discriminator that vqdist has no network for, or None.
    """

    path: str
    file: Path
    model: VQGanVAE
    critic: Mapping[str, Tensor] | None
    part: Mapping[str, Any] | None
    of_run: bool
    left_out: str | None = None


def begin(given: Given, config: VQGanTrainerConfig) -> Begun:
    """Return the model that a run begins or goes on with; of a run with a checkpoint the weights are not read.

    Raises:
        UserError: there are no such weights, they are of another network than `given`, or the run began from others.
    """
    paths = {name: _path_in(config, name) for name in STARTS}
    if given is not None and not isinstance(given, (VQGanVAE, Mapping)):
        raise UserError(f"the model is {an(type(given).__name__)}; with init_from give a VQGanVAE, or leave it out")
    folder = Path(config.results_folder).expanduser()
    seeding.seed_everything(config.seed, "weights")  # of a discriminator at random
    if complete_steps(folder / "checkpoints") and (folder / "config.json").is_file():
        return _again(given, paths, folder, config.trust_code)
    path = cast(str, paths["init_from"])
    source = _read(path, config)
    record = {**_record(source), **_codes_of(source.model, config.image_size)}
    records: dict[str, Any] = {"init_from": record, "init_pixel_from": None}
    if paths["init_pixel_from"] is not None:
        target = _read(paths["init_pixel_from"], replace(config, family=None, peer_config=None))
        source, records["init_pixel_from"] = _second_stage(source, target), _record(target)
    model = given if isinstance(given, VQGanVAE) else _built(source, dict(given or {}))
    _fill(model, source)
    chosen = isinstance(given, VQGanVAE) or bool(given and {"discriminator", "discr_layers", "preset"} & given.keys())
    note = _fill_discriminator(model, source, chosen=chosen)
    return Begun(model, records, note, newest_checkpoint(path) if config.init_optimizer else None)


def _codes_of(model: VQGanVAE, image_size: Any) -> dict[str, Any]:
    """Return the fingerprint of all that makes the codes of images of this size, and the size."""
    return {"codes": Tokenizer(model, image_size).codes_fingerprint(), "image_size": image_size}


def _path_in(config: VQGanTrainerConfig, name: str) -> str | None:
    path = getattr(config, name)
    if path is None and name != "init_from":
        return None
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"{name} {path!r} is not possible; give a file, an export or a run")
    return path


def _record(source: _Source) -> dict[str, Any]:
    return {"path": source.path, "sha256": checksum_of_weights(source.file)}


def _again(given: Given, paths: Mapping[str, str | None], folder: Path, trust_code: bool) -> Begun:
    """Return the model of a run that has a checkpoint, by what its configuration says of it."""
    before = read_json(folder / "config.json")
    records = {name: _same(name, path, before.get("trainer") or {}, folder) for name, path in paths.items()}
    if isinstance(given, VQGanVAE):
        return Begun(given, records, None)
    said = _said(given or {})
    own = dict(before["model"])
    with trusting(trust_code):
        model_class = class_of_type(before.get("model_type") or FIRST_TYPE, folder)
        model = cast(VQGanVAE, model_class(**own | {name: said[name] for name in said if name in OF_TRAINING}))
    _refuse_others(said, model, own, str(folder))
    return Begun(model, records, None)


def _same(name: str, path: str | None, trainer: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Return what a run recorded of the weights that it began with; raise `UserError` if the path has others."""
    record = trainer.get(name)
    if path is None and record is None:
        return None
    if record is None:
        raise UserError(
            f"{folder} holds a run that did not begin from {path}; leave {name} out, or give another --out"
        )
    found = None if path is None else _record_of(path, record)
    if found is None:
        raise UserError(
            f"{folder} holds a run that began from {record['path']} (SHA-256 {record['sha256'][:12]}), and {name} "
            f"is {'not given' if path is None else path}; give that, or another run folder"
        )
    return found


def _record_of(path: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of the weights at a path if they are those of `record`, else None.

    The path of the record is believed, where nothing has to be there any more. Of weights in several files the list of
    them alone was recorded once: then the checksum of all takes its place, see `VQGanTrainerConfig.follow_before`.
    """
    is_same_path = path == record["path"]
    try:
        file = _file_of(path)
        if file.name.endswith(INDEX) and sha256_of(file) == record["sha256"]:
            return {**record, "sha256": checksum_of_weights(file), OF_LIST: record["sha256"]}
        is_same = is_same_path or checksum_of_weights(file) == record["sha256"]
    except (OSError, UserError):
        is_same = is_same_path
    return record if is_same else None


def _file_of(path: str) -> Path:
    folder = find_export(path)
    return file_of_weights(folder) if is_of_another_project(folder) else folder / FILES[1]


def _read(path: str, config: VQGanTrainerConfig) -> _Source:
    folder = find_export(path)
    if not folder.exists():
        raise UserError(
            f"there is no {path} to begin from (init_from); give a published file, an export or a run (download a "
            "repository of the Hub first: hf download NAME --local-dir DIR)"
        )
    critic: Mapping[str, Tensor] | None = None
    part: Mapping[str, Any] | None = None
    left_out: str | None = None
    if is_of_another_project(folder):
        model, found = read_to_train(folder, config.family, config.peer_config)
        if isinstance(found, Critic):
            part, critic = found
        else:
            left_out = found
    else:
        check_location(path, folder)
        for name in ("family", "peer_config"):
            if getattr(config, name) is not None:
                raise UserError(f"{name} is for files of other projects, and {path} is of vqdist; leave it out")
        model = load_model_of_any_type(folder, trust_code=config.trust_code)
        critic = _tensors(model.discriminator_file)
        part = part_of_file(model.discriminator_file)
    if not isinstance(model, VQGanVAE):
        raise UserError(f"{path} holds a model of type {model.model_type!r}; init_from takes a 'vqgan'")
    return _Source(path, _file_of(path), model, critic, part, (folder / RECORD).is_file(), left_out)


def _second_stage(first: _Source, target: _Source) -> _Source:
    """Return the first stage of a TiTok with the codes' vectors and the decoder of the tokenizer that it predicts.

    Raises:
        UserError: `first` is no first stage, or `target` is no tokenizer whose codes it can be that predicts.
    """
    decoder = first.model.network.decoder
    if not isinstance(decoder, TiTokProxyDecoder) or decoder.makes_images:
        raise UserError(f"init_pixel_from is for a TiTok of the first stage, and {first.path} is none; leave it out")
    found = target.model.network
    vectors = getattr(getattr(found.quantizer, "embedding", None), "weight", None)
    if not isinstance(found.decoder, MaskGITDecoder) or vectors is None:
        kinds = f"{type(found.quantizer).__name__} and {type(found.decoder).__name__}"
        raise UserError(
            f"{target.path} (init_pixel_from) has {kinds}; expected a MaskGIT-VQGAN: gradient_vq and decoder maskgit"
        )
    if len(vectors) != decoder.proxy_codebook_size:
        raise UserError(
            f"{target.path} (init_pixel_from) has {len(vectors)} codes, and {first.path} predicts "
            f"{decoder.proxy_codebook_size}; give the tokenizer that it was trained with"
        )
    pixel = {name.replace("last_layer.", "conv_out."): one for name, one in found.decoder.state_dict().items()}
    config = {name: value for name, value in first.model.configuration().items() if name not in ("terms", *SWITCHES)}
    spec = Spec.of(config["decoder"], "decoder")
    part = {"class_path": spec.target, "init_args": {**spec.init_args, "pixel": decoder_arguments(pixel)}}
    model = type(first.model)(**{**config, "decoder": part, "use_vgg_and_gan": False})
    model.image_size = first.model.image_size
    tensors = {**first.model.network.state_dict(), "decoder.pixel_embedding.weight": vectors.detach()}
    tensors |= {f"decoder.pixel_decoder.{name}": one for name, one in found.decoder.state_dict().items()}
    model.network.load_state_dict(tensors)
    return replace(first, model=model, of_run=False)


def _tensors(file: Path | None) -> dict[str, Tensor] | None:
    try:
        if file is None:
            return None
        tensors = load_file(file)
        check_weights(file)
        return tensors
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
    elif not source.model.network.makes_images and "discriminator" not in said:
        own["use_gan"] = False
    elif own.get("discriminator") is None and (source.part is not None or own.get("dim") is None):
        own["discriminator"] = dict(source.part or PATCHGAN)
        unread |= {"discr_layers"}
    unread |= {"discr_layers"} if "discriminator" in said else set()
    unread |= {"l2_recon_loss", "perceptual"} if "terms" in said else set()
    model = type(source.model)(**{name: own[name] for name in own.keys() - (unread - said.keys())})
    model.image_size = source.model.image_size
    model.follow_before(own)  # which may say less than a configuration does now
    return model


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are given, with the parts that a preset stands for; None says nothing."""
    said = {name: value for name, value in given.items() if value is not None}
    preset = said.pop("preset", None)
    return (
        said
        if preset is None
        else preset_named(preset).completed(said, with_gan=all(said.get(switch, True) for switch in SWITCHES))
    )


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
        return f"{source.left_out or f'{source.path} holds no discriminator'}; a new one begins at random"
    problem = differences(source.critic, model.discriminator.state_dict())
    if problem and not chosen:
        raise UserError(f"the discriminator of {source.path} {problem}; give another one, or --model.use_gan false")
    if problem:
        return f"the discriminator begins at random: that of {source.path} {problem}"
    model.discriminator.load_state_dict(source.critic)
    return None
