"""A family of published tokenizers: how its files are recognised, read and written."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.export_config import COUNTS, numbers_in
from vqdist.models.pretrained import PretrainedModel
from vqdist.models.published.files import (
    BadTensor,
    state_dict_in,
    without_prefix,
    without_wrappers,
    write_config_beside,
)
from vqdist.models.vqgan import VQGanVAE
from vqdist.sizes import image_size_of

FEW = 4  # names that a message lists


class Family(ABC):
    """The tokenizers of one project. A subclass is one file.

    Attributes:
        aliases: other names of it.
        title: the project, for messages.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str]
    blur: ClassVar[Mapping[str, Any]] = {}
    """Arguments of its discriminator, where that is `BlurDiscriminator`, which no tensor says."""
    called: str = ""
    """The name by which the user asked for it."""

    @abstractmethod
    def recognises(self, content: Any, config: Mapping[str, Any], path: Path) -> bool:
        """Return whether this is what a file of this family holds.

        Args:
            content: of the file: tensors and plain values in nested dictionaries.
            config: the project's configuration, empty where none was given.
            path: of the file, for messages.
        """

    @abstractmethod
    def read(self, content: Any, config: Mapping[str, Any], path: Path) -> PretrainedModel:
        """Return the model that a file holds, in eval mode; raise `UserError` if it is none of this family."""

    def assumed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that codes or images depend on, which no tensor says and the configuration does not say.

        They have the values that they were taken to have: the published ones.
        """
        return {}

    def doubt(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return the family by name where others have the same names of tensors, and nothing says which it is."""
        return {}

    def write(self, model: PretrainedModel, path: Path) -> None:
        """Write a model as a file of the project; raise `UserError` for one that the project has no form for."""
        raise UserError(f"files of {self.title} are read and not written")


class NetworkFamily(Family):
    """A family whose models are a `VQGanVAE`, and whose files differ in the names of tensors.

    Names of tensors are those of the network, `encoder...`, `quantizer...`, `decoder...` here, and the project's own
    there.

    Attributes:
        keys: of a checkpoint's dictionary below which the weights may lie, the best first.
        prefixes: of names below which the tokenizer may lie in a larger model.
        ignored: what else its files may hold, as a pattern of names.
        is_folder: whether a model is a folder, with the configuration in it.
    """

    is_folder: ClassVar[bool] = False
    keys: ClassVar[tuple[str, ...]] = ("model_ema", "ema", "state_dict", "model", "module")
    prefixes: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[str] = r"(?!)"

    @abstractmethod
    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """Return whether these names, or this configuration, are of this family."""

    @abstractmethod
    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `VQGanVAE` by the shapes of tensors, and by the project's configuration over them.

        Raises:
            KeyError: a tensor is missing without which nobody can tell.
        """

    @abstractmethod
    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the project's tensors under our names."""

    @abstractmethod
    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our tensors under the project's names."""

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        """Return the side of the images in pixels that the model is for, if anything says it."""
        return None

    def weights(self, content: Any, path: Path) -> dict[str, Tensor]:
        """Return the tokenizer's tensors in what a file holds, without what is ignored."""
        tensors = without_wrappers(state_dict_in(content, self.keys, path))
        tensors = without_wrappers(without_prefix(tensors, *self.prefixes))
        return {name: one for name, one in tensors.items() if not re.match(self.ignored, name)}

    def check_writable(self, model: VQGanVAE) -> None:
        """Raise `UserError` for a model that the project has no form for."""

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the configuration that the project's own code builds this model from.

        Args:
            model: which `check_writable` let pass.
            tensors: of it, by the project's names.
        """
        raise NotImplementedError

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        """Write the project's tensors as one of its files."""
        torch.save(tensors, path)

    def recognises(self, content: Any, config: Mapping[str, Any], path: Path) -> bool:
        try:
            return self.fits(self.weights(content, path), config)
        except BadTensor:
            raise
        except UserError:  # it holds no tensors by name
            return False

    def read(self, content: Any, config: Mapping[str, Any], path: Path) -> VQGanVAE:
        """Return the model; raise `UserError` that names tensors as the project does if they are not its own."""
        tensors = self.weights(content, path)
        arguments, size = self._possible_arguments(tensors, config, path)
        with torch.device("meta"):  # sizes that the file does not have take no memory
            expected = self.theirs(network_tensors(VQGanVAE(**arguments, use_vgg_and_gan=False)))
        _check(tensors, expected, path, self.title)
        model = VQGanVAE(**arguments, use_vgg_and_gan=False)
        model.network.load_state_dict(self.ours({name: tensors[name] for name in expected}))
        model.image_size = None if size is None else image_size_of(size)
        return model.eval()

    def _possible_arguments(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
    ) -> tuple[dict[str, Any], Any]:
        """Return `arguments` and `image_size`; raise `UserError` for shapes or options that are not the project's."""
        try:
            arguments = self.arguments(tensors, config)
            size = self.image_size(arguments, config)
        except KeyError as error:
            raise UserError(f"{path} lacks {error.args[0]}, so it is no tokenizer of {self.title}") from error
        except UserError:
            raise
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
            whose = (
                "a shape of its tensors, or an option of its configuration," if config else "a shape of its tensors"
            )
            raise UserError(f"{path}: {whose} is none of {self.title} ({error})") from error
        _check_counts(arguments, len(tensors), path)
        return arguments, size

    def write(self, model: PretrainedModel, path: Path) -> None:
        if not isinstance(model, VQGanVAE):
            raise UserError(f"a model of type {model.model_type!r} has no form in {self.title}; expected a VQGanVAE")
        self.check_writable(model)
        tensors = {name: one.detach().cpu().clone() for name, one in self.theirs(network_tensors(model)).items()}
        config = self.peer_config(model, tensors)
        self._check_form(model, tensors, config)
        if not self.is_folder:
            write_config_beside(path, config)
        self.save(tensors, model, path)

    def _check_form(self, model: VQGanVAE, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Raise `UserError` unless the project's code would build this network from its configuration."""
        with torch.device("meta"):
            twin = VQGanVAE(**self.arguments(tensors, config), use_vgg_and_gan=False)
        problem = differences(tensors, self.theirs(network_tensors(twin)))
        parts = ("encoder", "quantizer", *(("decoder",) if twin.network.last_layer is not None else ()))
        pairs = [(part, _traits(model, part), _traits(twin, part)) for part in parts]
        others = [
            f"has {part} {ours or 'plain'} and not {theirs or 'plain'}"
            for part, ours, theirs in pairs
            if ours != theirs
        ]
        if problem or others:
            said = problem or " and ".join(others)
            raise UserError(f"this model has no form in {self.title}, whose network differs: it {said}")


def _traits(model: VQGanVAE, part: str) -> str:
    return str(getattr(getattr(model.network, part), "traits", ""))


def network_tensors(model: VQGanVAE) -> dict[str, Tensor]:
    """Return the tensors of encoder, quantizer and decoder by name."""
    return dict(model.network.state_dict())


def _check_counts(arguments: Mapping[str, Any], tensors: int, path: Path) -> None:
    """Raise `UserError` for more blocks than a file has tensors, before the first of them is built."""
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            _check_counts(value, tensors, path)
        elif key in COUNTS and any(number > tensors for number in numbers_in(value)):
            raise UserError(f"{path} has {tensors} tensors, too few for {key} {value!r}; correct --peer_config")


def _check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, title: str) -> None:
    said = differences(found, expected)
    if said:
        raise UserError(f"{path} {said}, as a tokenizer of {title}; give its --peer_config, or --family")


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return in words which tensors are missing, too many, or of another shape, by name; empty where none is."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [
        f"{name} {_shape(found[name])} and not {_shape(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if found[name].shape != expected[name].shape
    ]
    problems = [("lacks", missing), ("has besides", extra), ("has in another shape", other)]
    return " and ".join(f"{what} {_few(names)}" for what, names in problems if names)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "0-d"


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + rest
