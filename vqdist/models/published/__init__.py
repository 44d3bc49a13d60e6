"""Tokenizers of other projects: their files become models of vqdist's, and models become such files.

`base` says what a family is, and each further file has one project's. `files` reads without running any code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vqdist.errors import UserError
from vqdist.files import read_json
from vqdist.models.mending import LIVE
from vqdist.models.pretrained import PretrainedModel
from vqdist.models.published.base import Family, NetworkFamily, network_tensors
from vqdist.models.published.critics import Critic, critic_in
from vqdist.models.published.files import read_config, read_content
from vqdist.models.vqgan import VQGanVAE
from vqdist.names import unknown
from vqdist.registries import FAMILIES

__all__ = [
    "FAMILIES",
    "Family",
    "family_named",
    "file_of_weights",
    "is_published",
    "read_published",
    "read_to_train",
    "write_published",
]

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")
OWN_WEIGHTS = "model.safetensors"
FOREIGN_KEYS = {"_class_name", "vq_config"}
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
    file, config = _located(Path(path).expanduser())
    if isinstance(peer_config, Mapping):
        config = dict(peer_config)
    elif peer_config is not None:
        config = read_config(Path(peer_config).expanduser())
    return _read(read_content(file), config, file, family)


def read_to_train(path: str | Path) -> tuple[PretrainedModel, Critic | None]:
    """Return the tokenizer of another project's file, and the discriminator that it holds, if any."""
    file, config = _located(Path(path).expanduser())
    content = read_content(file)
    return _read(content, config, file, None), critic_in(content)


def file_of_weights(path: str | Path) -> Path:
    """Return the file with the weights, of a file or a folder of another project."""
    return _located(Path(path).expanduser())[0]


def _read(content: Any, config: dict[str, Any], file: Path, family: str | None) -> PretrainedModel:
    chosen = _recognised(content, config, file) if family is None else family_named(family)
    return chosen.read(content, config, file)


def write_published(model: PretrainedModel, family: str, path: str | Path) -> None:
    """Write a model in another project's form, with equal tensors.

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
            return factory()
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
    return "model_type" not in config and not (config.keys() & LIVE.keys()) and not _holds_own_names(found[0])


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
        return path, _config_beside(path) if path.name in WEIGHTS else {}
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} has none of {', '.join(WEIGHTS)}; give the file with the weights")
    return found[0], _config_beside(found[0])


def _config_beside(weights: Path) -> dict[str, Any]:
    """Return config.json beside a file, empty where there is none; raise `UserError` for one that is damaged."""
    path = weights.with_name("config.json")
    return read_json(path) if path.is_file() else {}


def _recognised(content: Any, config: Mapping[str, Any], path: Path) -> Family:
    """Return the family whose tensors a file holds, the most special first."""
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
