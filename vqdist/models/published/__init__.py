"""Tokenizers of other projects: their files become models of vqdist's, and models become such files.

`base` says what a family is, and each further file has one project's. `files` reads without running any code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from vqdist.errors import UserError
from vqdist.files import read_json
from vqdist.models.mending import LIVE
from vqdist.models.presets import PRESETS
from vqdist.models.pretrained import PretrainedModel
from vqdist.models.published.base import Family, NetworkFamily, network_tensors
from vqdist.models.published.critics import Critic, critic_in
from vqdist.models.published.files import CONFIG, INDEX, read_config, read_content, shards_of
from vqdist.models.vqgan import VQGanVAE
from vqdist.names import unknown
from vqdist.registries import FAMILIES

__all__ = [
    "FAMILIES",
    "Family",
    "family_named",
    "file_of_weights",
    "is_published",
    "presets_like",
    "read_file",
    "read_published",
    "read_to_train",
    "write_published",
]

LOG = logging.getLogger(__name__)
WHOLE = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")
WEIGHTS = (*WHOLE, *(f"{name}{INDEX}" for name in WHOLE))
OWN_WEIGHTS = "model.safetensors"
FOREIGN_KEYS = {"_class_name", "vq_config"}
OWN_KEYS = {"dim", "image_size", "layers", "lookup_free_quantization"}
"""Options in the exports of the first version, which said no type."""
FOREIGN_TYPES = ("chameleon", "chameleon_vqgan", "janus", "janus_vqgan", "janus_vqmodel")


def read_published(
    path: str | Path,
    family: str | None = None,
    peer_config: str | Path | Mapping[str, Any] | None = None,
) -> PretrainedModel:
    """Return the tokenizer of another project's file, in eval mode; its images are in [0, 1] as all of vqdist's.

    Args:
        path: a checkpoint (.ckpt, .pt, .pth, .bin), a safetensors file, or a folder with config.json and weights.
        family: see `FAMILIES`; by default told by the names of the tensors.
        peer_config: the project's own configuration: a file (YAML, JSON) or its content; it stands over the shapes of
            the tensors.

    Raises:
        UserError: the file cannot be read without running code, is of no known family, or lacks a tensor.
    """
    return read_to_train(path, family, peer_config)[0]


def read_to_train(
    path: str | Path,
    family: str | None = None,
    peer_config: str | Path | Mapping[str, Any] | None = None,
) -> tuple[PretrainedModel, Critic | str | None]:
    """Return the tokenizer of another project's file, and the discriminator that it holds; see `read_file`."""
    found = read_file(path, family, peer_config)
    return found.model, found.critic


class Read(NamedTuple):
    """All that a file of another project holds.

    Attributes:
        model: the tokenizer, in eval mode.
        critic: the discriminator; None where there is none, and a line on it where vqdist has no such network.
        family: of the file, by name.
    """

    model: PretrainedModel
    critic: Critic | str | None
    family: str


def read_file(
    path: str | Path,
    family: str | None = None,
    peer_config: str | Path | Mapping[str, Any] | None = None,
) -> Read:
    """Return what a file of another project holds; arguments and errors are those of `read_published`."""
    file, config = _located(Path(path).expanduser())
    if isinstance(peer_config, Mapping):
        config = dict(peer_config)
    elif peer_config is not None:
        config = read_config(Path(peer_config).expanduser())
    content = read_content(file)
    chosen = _recognised(content, config, file) if family is None else family_named(family)
    model = chosen.read(content, config, file)
    name = next(name for name in FAMILIES.names() if FAMILIES[name] is type(chosen))
    taken = chosen.assumed(config) | (chosen.doubt(config) if family is None else {})
    if taken and os.environ.get("RANK", "0") == "0" and not presets_like(model, name):
        said = ", ".join(f"{name} {value}" for name, value in taken.items())
        LOG.warning(f"{file}: no tensor and no configuration says {said}, which is assumed; else give --peer_config")
    return Read(model, critic_in(content, file, chosen.blur), name)


def file_of_weights(path: str | Path) -> Path:
    """Return the file with the weights, of a file or a folder of another project."""
    return _located(Path(path).expanduser())[0]


def presets_like(model: PretrainedModel, family: str | None = None) -> list[str]:
    """Return the published configurations whose tensors have the names and shapes of a model's.

    Args:
        model: of any type; without a discriminator where it is a `VQGanVAE`.
        family: of the files with their weights, by name; by default any.
    """
    shapes = _shapes_of(model) if isinstance(model, VQGanVAE) else {}
    found = []
    for name, preset in PRESETS.items():
        codes = preset.quantizer["init_args"].get("codebook_size"), getattr(model, "codebook_size", None)
        if family in (None, preset.family) and codes[0] == codes[1] and shapes:
            parts: dict[str, Any] = {part: getattr(preset, part) for part in ("encoder", "decoder", "quantizer")}
            with torch.device("meta"):
                twin = VQGanVAE(**parts, use_vgg_and_gan=False)
            if _shapes_of(twin) == shapes:
                found.append(name)
    return found


def _shapes_of(model: VQGanVAE) -> dict[str, torch.Size]:
    return {name: one.shape for name, one in model.network.state_dict().items()}


def write_published(model: PretrainedModel, family: str, path: str | Path) -> None:
    """Write a model in another project's form, with equal tensors, and the configuration that its code builds it from.

    That is YAML in `FILE.yaml` beside the file, and config.json in a folder.

    Args:
        model: a tokenizer whose network that project has, too.
        family: see `FAMILIES`.
        path: of the file; of diffusers' form a folder.

    Raises:
        UserError: the project has no form for this model.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    family_named(family).write(model, path)


def family_named(name: str) -> Family:
    """Return the family of a name or of one of its aliases; raise `UserError` if there is none."""
    for known, factory in FAMILIES.items():
        if name == known or name in getattr(factory, "aliases", ()):
            family = factory()
            family.called = name
            return family
    raise unknown("family", name, FAMILIES)


def is_published(path: str | Path) -> bool:
    """Return whether a path is a file, or a folder with weights that vqdist did not write."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path.is_file()
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        return False
    if found[0].name != OWN_WEIGHTS:
        return True
    try:
        config = read_json(path / "config.json")
    except UserError:  # an export that is damaged: whoever loads it says so
        return False
    if config.keys() & FOREIGN_KEYS or config.get("model_type") in FOREIGN_TYPES:
        return True
    return _is_unsaid(config) and not _holds_own_names(found[0])


def _is_unsaid(config: Mapping[str, Any]) -> bool:
    return "model_type" not in config and not (config.keys() & LIVE.keys())


def is_config_of_another_project(config: Mapping[str, Any]) -> bool:
    """Return whether the config.json of a repository is of another project: the first exports had none of its keys."""
    said = bool(config.keys() & FOREIGN_KEYS) or config.get("model_type") in FOREIGN_TYPES
    return said or (_is_unsaid(config) and bool(config) and not (config.keys() & OWN_KEYS))


def fetched(download: Callable[[str], str], name: str) -> Path:
    """Return the folder with the weights and the configuration of a repository, which are fetched.

    Args:
        download: gives the path of a file of the repository.
        name: of the repository, for messages.

    Of several files those are fetched that hold something of the tokenizer.

    Raises:
        UserError: there are no weights by any of the names in `WEIGHTS`, or a file cannot be fetched.
    """
    folder = _download(download, "config.json", name).parent
    for weights in WEIGHTS:
        try:
            path = _download(download, weights, name)
        except EntryNotFoundError:
            continue
        for shard in shards_of(path) if weights.endswith(INDEX) else ():
            try:
                _download(download, shard.name, name)
            except EntryNotFoundError as error:
                raise UserError(f"{name} lacks {shard.name}, which its {weights} names; give a whole one") from error
        return folder
    raise UserError(f"{name} has none of {', '.join(WHOLE)}; give a repository with a tokenizer's weights")


def _download(download: Callable[[str], str], file: str, name: str) -> Path:
    """Return the path of a file of a repository; raise `UserError` if it cannot be fetched, though it may be there.

    Raises:
        EntryNotFoundError: there is no such file, or offline none on this machine.
    """
    try:
        return Path(download(file))
    except Exception as error:  # of whatever library fetches
        offline = error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled)
        if isinstance(error, EntryNotFoundError) and (offline or not isinstance(error, LocalEntryNotFoundError)):
            raise
        raise UserError(
            f"{file} of {name} cannot be fetched ({' '.join(str(error.__cause__ or error).split())[:200]}); try again"
        ) from error


def _said_project(config: Mapping[str, Any]) -> str | None:
    """Return the family that a config.json of Hugging Face's libraries is of; raise `UserError` for another model."""
    kind, model_type = config.get("_class_name"), str(config.get("model_type"))
    if kind is not None and kind != "VQModel":
        raise UserError(f"config.json is of {kind!r}, and of diffusers' models only VQModel can be read")
    if kind is not None:
        return "diffusers_vqmodel"
    return next((name for name in ("chameleon", "janus") if model_type.startswith(name)), None)


def _config_in(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "config.json")
    except UserError:  # whoever loads the folder says so
        return {}


def _holds_own_names(path: Path) -> bool:
    """Return whether the tensors of a file have the names of the first exports, which said no type."""
    try:
        with safe_open(path, "pt") as file:
            return not any(name.startswith("encoder.") for name in file.keys())
    except (OSError, SafetensorError):
        return True


def _located(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file with the weights, and the configuration beside it where it has a name of the Hub's."""
    if not path.is_dir():
        return path, _config_beside(path)
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} has none of {', '.join(WEIGHTS)}; give the file with the weights")
    return found[0], _config_beside(found[0])


def _config_beside(weights: Path) -> dict[str, Any]:
    """Return the configuration beside a file, empty where there is none; raise `UserError` for one that is damaged.

    It is `config.json` where the file has a name of the Hub's, else what `write_published` wrote.
    """
    own = weights.with_name(weights.name + CONFIG)
    path = weights.with_name("config.json") if weights.name in WEIGHTS else own
    return read_config(path) if path.is_file() else {}


def _recognised(content: Any, config: Mapping[str, Any], path: Path) -> Family:
    """Return the family that a configuration names, or else whose tensors a file holds, the most special first."""
    said = config.get("family")
    if isinstance(said, str) and any(said in (name, *getattr(FAMILIES[name], "aliases", ())) for name in FAMILIES):
        return family_named(said)
    of_library = _said_project(config)
    if of_library is not None:
        family = family_named(of_library)
        if not family.recognises(content, config, path):
            raise UserError(f"{path} lacks the tensors of {family.title}, of which its config.json is")
        return family
    for name in reversed(FAMILIES.names()):
        family = FAMILIES[name]()
        if family.recognises(content, config, path):
            return family
    held = ", ".join(sorted(map(str, content))[:5]) if isinstance(content, Mapping) else type(content).__name__
    raise UserError(
        f"{path} holds {held or 'nothing'}, which is of no known family; give --family, one of "
        f"{', '.join(FAMILIES.names())}"
    )


def published_names(model: VQGanVAE, family: str) -> dict[str, list[int]]:
    """Return name and shape of every tensor that a file of the family holds of a model, on any device."""
    chosen = family_named(family)
    if not isinstance(chosen, NetworkFamily):
        raise UserError(f"files of {chosen.title} are read and not written")
    return {name: list(one.shape) for name, one in chosen.theirs(network_tensors(model)).items()}
