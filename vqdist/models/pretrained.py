"""Saving and loading weights for inference in the Hugging Face layout: config.json and model.safetensors."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqdist.classes import checked_names
from vqdist.errors import UserError
from vqdist.export import NUMBERS_BEGIN, NUMBERS_END, RECORD, check_weights
from vqdist.files import follow_umask, read_json, reason_of
from vqdist.locations import DISCRIMINATOR, FILES, check_location, config_of_folder, find_export, is_name_on_hub
from vqdist.models.export_config import check_config
from vqdist.models.mending import LIVE, mend_codebook
from vqdist.options import plain
from vqdist.parts import PATH, Registry, trusting
from vqdist.sizes import ImageSize, image_size_of, in_thousands, pixels
from vqdist.storage import save_module

M = TypeVar("M", bound="PretrainedModel")
H = TypeVar("H", bound=ModelHubMixin)  # in methods that the hub's mixin has, too

# model_type in config.json -> the class that it is an instance of
MODEL_TYPES = {
    "vqgan": ("vqdist.models.vqgan", "VQGanVAE"),
    "dvae": ("vqdist.models.dvae", "DiscreteVAE"),
    "vq_ar": ("vqdist.models.vq_ar", "VQImageAutoregressiveAutoencoder"),
    "simple_vqvae": ("vqdist.models.vqvae", "SimpleVQVAE"),
    "prior": ("vqdist.models.prior", "Prior"),
    "var": ("vqdist.models.var", "VAR"),
}
LOG = logging.getLogger(__name__)  # where nobody handles it, a warning is one line on stderr
FIRST_TYPE = "vqgan"  # of a config.json that names none: they were written before there were others


def _in_code(value: Any) -> str:
    """Return a value as JSON that neither ends a cell of a Markdown table nor the code in it."""
    return json.dumps(value, default=str).replace("|", "\\|").replace("`", "\\u0060")


def _is_of_network(error: Exception) -> bool:
    """Return whether an error says that the hub did not answer, or refused; the library has changed over time."""
    roots = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    of_client = not roots.isdisjoint({"httpx", "httpcore", "requests", "huggingface_hub"})
    return of_client or isinstance(error, ConnectionError | TimeoutError)


class PretrainedModel(PyTorchModelHubMixin):
    """Gives a model `save_pretrained(folder)`, `from_pretrained(folder or repository)` and `push_to_hub(repository)`.

    Attributes:
        model_type: which of `MODEL_TYPES` this is, or the import path of a class that is none of vqdist's; written to
            config.json.
        image_size: side in pixels of the images that the model was trained on, or (height, width) of images that are
            not square, or None if nobody said; written too.
        resample: filter with which images become of this size; written where it is not `bicubic`.
        class_names: of the classes that the model knows, or None where they have no names; written too.
        begun_from: source of the weights that training began from, or None: `path` (its name alone), `sha256`, and
            `codes`, the fingerprint of its codes of images of `image_size`; written too.
        buffers_are_live: whether the codebook is the one of training and no average of it; written too.
        said: names of the arguments that were given to the constructor, as against those that have their defaults.
        discriminator_file: weights of the discriminator beside the model in the folder that it was loaded from; a copy
            goes where the model is saved.
    """

    model_type: ClassVar[str]
    image_size: ImageSize | None = None
    resample: str = "bicubic"
    buffers_are_live: bool = True
    class_names: list[str] | None = None
    begun_from: dict[str, Any] | None = None
    said: frozenset[str] = frozenset()
    discriminator_file: Path | None = None

    if TYPE_CHECKING:  # an attribute or a property of each model

        @property
        def channels(self) -> int:
            """Channels of the images."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        of_torch = any(base.__module__.startswith("torch.distributed.") for base in cls.__bases__)  # `fully_shard`'s
        if "model_type" not in vars(cls) and cls.__module__.partition(".")[0] != "vqdist" and not of_torch:
            cls.model_type = f"{cls.__module__}.{cls.__qualname__}"  # of somebody else: found by its import path

    @classmethod
    def first_type(cls) -> str:
        """Return the type of the class of vqdist that this one derives from: older versions wrote that."""
        own = (base for base in cls.__mro__ if base.__module__.partition(".")[0] == "vqdist")
        return next((vars(base)["model_type"] for base in own if "model_type" in vars(base)), cls.model_type)

    def __new__(cls, *args: Any, **kwargs: Any):
        model = super().__new__(cls, *plain(args), **plain(kwargs))  # records them, and leaves out what JSON has not
        model.said = frozenset(kwargs)
        return model

    def in_brief(self, *facts: str) -> str:
        """Return one line for a prompt: the class, facts, image size and number of parameters."""
        count = sum(weight.numel() for weight in cast(nn.Module, self).parameters())
        size = [] if self.image_size is None else [pixels(self.image_size)]
        return f"{type(self).__name__}({', '.join([*facts, *size, f'{in_thousands(count)} parameters'])})"

    def check_all_read(self) -> None:
        """Raise `UserError` for arguments that were given and that training would not read."""

    def saved_part(self) -> nn.Module:
        """Return the module whose tensors are saved; their names begin at it."""
        return cast(nn.Module, self)  # every model is one

    def current_name(self, name: str) -> str:
        """Return the present name of a tensor of `saved_part` that an export of an earlier version calls so."""
        return name

    def configuration(self) -> dict[str, Any]:
        """Return the arguments that the model was built with, as config.json holds them."""
        return dict(cast("dict[str, Any]", self._hub_mixin_config or {}))

    def follow_before(self, written: Mapping[str, Any]) -> None:
        """Behave as the model did whose configuration this is, where a default has another meaning since then."""

    def _save_pretrained(self, save_directory: Path) -> None:
        path = save_directory / "model.safetensors"
        (save_directory / RECORD).unlink(missing_ok=True)  # of an export that stood there before
        save_module(self.saved_part(), path)
        follow_umask(path)
        facts: dict[str, Any] = {"model_type": self.model_type, "image_size": self.image_size}
        if self.class_names is not None:
            facts["class_names"] = self.class_names
        if self.resample != PretrainedModel.resample:
            facts["resample"] = self.resample
        if self.begun_from is not None:
            facts["begun_from"] = self.begun_from
        config = {**self.configuration(), **facts, **(LIVE if self.buffers_are_live else {})}
        (save_directory / "config.json").write_text(json.dumps(config, sort_keys=True, indent=2))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the README.md of an export: facts of the model, and how to load it.

        Args:
            *args: none.
            **kwargs: metadata of the hub, as `license`, which is the owner's to choose; none is there by default.
        """
        data = self._hub_mixin_info.model_card_data
        about = ModelCardData(**{**data.to_dict(), **kwargs})
        return ModelCard(f"---\n{about.to_yaml()}\n---\n\n{self._words_of_card()}")

    def _words_of_card(self) -> str:
        name = type(self).__name__
        facts = {"model_type": self.model_type, "image_size": self.image_size, **self.configuration()}
        rows = [f"| {fact} | `{_in_code(value)}` |" for fact, value in facts.items() if value is not None]
        own = type(self).__module__.partition(".")[0] == "vqdist"
        module = "vqdist" if own else type(self).__module__
        return "\n".join(
            [
                f"# {name}",
                "",
                "Weights and configuration of a model trained with vqdist. No licence is named here: the owner of the "
                "weights chooses one.",
                "",
                "```python",
                f"from {module} import {name}",
                "",
                f'model = {name}.from_pretrained("THIS REPOSITORY OR FOLDER")',
                "```",
                "",
                NUMBERS_BEGIN,
                NUMBERS_END,
                "",
                "| argument | value |",
                "| --- | --- |",
                *rows,
                "",
            ]
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the export to a repository `owner/name` of the Hugging Face Hub, which is made if need be.

        Args:
            repo_id: of the repository.
            **kwargs: of huggingface_hub's `push_to_hub` (`private`, `token`, `model_card_kwargs`, ...).

        Returns:
            The address of the commit.

        Raises:
            UserError: the hub cannot be reached, or refuses.
        """
        try:
            return super().push_to_hub(repo_id, **kwargs)
        except HFValidationError as error:
            raise UserError(f"{repo_id!r} cannot be the name of a repository ({reason_of(error)})") from error
        except Exception as error:
            if not _is_of_network(error):
                raise
            raise UserError(
                f"{repo_id} could not be uploaded to the Hugging Face Hub ({type(error).__name__}: "
                f"{reason_of(error)}); look at the network and at `hf auth login`, or keep save_pretrained(folder) "
                "and upload that later"
            ) from error

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        trust_code: bool | None = None,
        mend: bool = True,
        **kwargs: Any,
    ) -> M:
        """Return the model that a run, a folder of `save_pretrained` or a repository on the Hugging Face Hub holds.

        Args:
            pretrained_model_name_or_path: a run, a folder with config.json and model.safetensors, or `owner/name` on
                the hub.
            trust_code: whether config.json may name networks that do not come with vqdist, whose code is then run. By
                default it may not; networks that are passed as arguments take the place of those that it names.
            mend: take the codebook of a run's checkpoint where an older vqdist exported an average of it, and say so
                on stderr; false leaves it, for codes that were made with it.
            **kwargs: of huggingface_hub's `from_pretrained` (`revision`, `token`, ...), or arguments of the model that
                replace the saved ones.

        Returns:
            The model in eval mode, on the CPU unless `map_location` says otherwise.

        Raises:
            UserError: there is no such model, it is of another type, or it needs code that is not trusted.
        """
        path = find_export(pretrained_model_name_or_path)
        path = _fetched_of_another_project(pretrained_model_name_or_path, path, kwargs) or path
        if is_of_another_project(path):
            return cls._of_another_project(path, kwargs)
        check_location(pretrained_model_name_or_path, path)
        kwargs.setdefault("strict", True)
        name = str(path if path.is_dir() else pretrained_model_name_or_path)
        try:
            # the hub's mixin prints while it loads
            with contextlib.redirect_stdout(io.StringIO()), trusting(trust_code):
                model = super().from_pretrained(name, **kwargs)
        except UserError:
            raise
        except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            found = "holds no model that can be loaded"
            if not path.is_dir():  # TypeError: of a repository without config.json, the mixin has no arguments
                found = "is no folder here, and no model of that name was found on the Hugging Face Hub"
            raise UserError(f"{name} {found} ({' '.join(str(error).split()[:30])})") from error
        if mend and not model.buffers_are_live:
            model._mend_codebook(name)
        cast(nn.Module, model).eval()
        return model

    @classmethod
    def _of_another_project(cls: type[M], path: Path, kwargs: dict[str, Any]) -> M:
        model = read_of_another_project(path, kwargs)
        if not isinstance(model, cls):
            raise UserError(
                f"{path} holds a model of type {model.model_type!r}; {cls.__name__} loads {cls.model_type!r}"
            )
        return model

    def _mend_codebook(self, location: str) -> None:
        network = getattr(self, "network", None)  # of tokenizers; the others have no codebook
        mended = None if network is None else mend_codebook(network, location)
        if mended is None or mended.is_live:
            self.buffers_are_live = True
        if mended is not None and os.environ.get("RANK", "0") == "0":  # one line, however many processes load it
            LOG.warning(mended.message)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any):
        written = cls._config_of_this_type(model_id, kwargs)
        if written:
            folder = Path(model_id) if Path(model_id).is_dir() else _fetched(model_id, kwargs)
            # the hub's mixin has put what the file says into kwargs, beside what the caller gave in its place
            used = {key: value for key, value in written.items() if key not in kwargs or kwargs[key] == value}
            check_config(used, cls, folder)
        image_size = kwargs.get("image_size", written.get("image_size"))
        names = checked_names(written.get("class_names"), f"config.json of {model_id}")
        # about the model, no arguments of it
        facts = {"model_type", "image_size", "class_names", "resample", "begun_from", *LIVE}
        for name in facts - cls._hub_mixin_init_parameters.keys():
            kwargs.pop(name, None)
        model = super()._from_pretrained(model_id=model_id, **kwargs)
        model.class_names = names
        model.resample = str(written.get("resample", model.resample))
        begun = written.get("begun_from")
        model.begun_from = dict(begun) if isinstance(begun, Mapping) else None
        model.discriminator_file = _discriminator_beside(Path(model_id), written, kwargs)
        if written:  # no argument's default: where nobody said a size, it is asked for
            model.image_size = None if image_size is None else image_size_of(image_size)
        model.follow_before({**written, **{name: value for name, value in kwargs.items() if name in written}})
        model.buffers_are_live = LIVE.items() <= written.items()
        return model

    @classmethod
    def _config_of_this_type(cls, model_id: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """config.json, empty where it cannot be reached; `UserError` if it is of a model of another type."""
        written = _config_of(model_id, kwargs)
        found = written.get("model_type", FIRST_TYPE) if written else cls.model_type
        if found not in (cls.model_type, None if LIVE.items() <= written.items() else cls.first_type()):
            raise UserError(f"{model_id} holds a model of type {found!r}; {cls.__name__} loads {cls.model_type!r}")
        return written

    @classmethod
    def _load_as_safetensor(cls, model: H, model_file: str, map_location: str, strict: bool) -> H:
        tensors, filled = load_file(model_file, device=str(map_location)), cast(PretrainedModel, model)
        check_weights(Path(model_file))
        _fill(filled.saved_part(), {filled.current_name(name): tensor for name, tensor in tensors.items()}, strict)
        cast(nn.Module, model).to(map_location)
        return model

    @classmethod
    def _load_as_pickle(cls, model: H, model_file: str, map_location: str, strict: bool) -> H:
        raise UserError("the repository has no model.safetensors; pickled weights are not loaded")


HUB_OPTIONS = frozenset(["revision", "cache_dir", "token", "local_files_only"])
PUBLISHED = "vqdist.models.published"
"""The module that reads files of other projects; models need not know it."""


def is_of_another_project(path: Path) -> bool:
    """Return whether a path is a file, or a folder in the layout of another project."""
    if not path.is_dir():
        return path.is_file()
    return importlib.import_module(PUBLISHED).is_published(path)


def _fetched_of_another_project(given: str | Path, path: Path, kwargs: dict[str, Any]) -> Path | None:
    """Return the folder with a repository's files, where its config.json is of another project; else None.

    Options of the Hub are taken out of `kwargs` then: they have done their work.
    """
    if path.exists() or not is_name_on_hub(given, path):
        return None
    published = importlib.import_module(PUBLISHED)
    config = _config_of(str(given), kwargs)
    if not published.is_config_of_another_project(config):
        return None
    folder = published.fetched(lambda name: hf_hub_download(str(given), name, **_hub_options(kwargs)), str(given))
    for name in HUB_OPTIONS & kwargs.keys():
        del kwargs[name]
    return folder


def _fetched(model_id: str, kwargs: Mapping[str, Any]) -> Path:
    """Return the folder where the files of a repository lie; without weights its config.json is looked at alone."""
    with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return Path(hf_hub_download(model_id, "model.safetensors", **_hub_options(kwargs))).parent
    return Path(model_id)


def read_of_another_project(path: Path, kwargs: Mapping[str, Any]) -> PretrainedModel:
    """Return the model in a file of another project; see `vqdist.models.published.read_published`."""
    known = {"family", "peer_config"}
    for name in kwargs.keys() - known - {"mend"}:
        raise UserError(f"{path} is of another project, so it is loaded with family and peer_config only, not {name}")
    options = {name: value for name, value in kwargs.items() if name in known}
    return importlib.import_module(PUBLISHED).read_published(path, **options)


def load_model_of_any_type(
    name_or_path: str | Path, *, trust_code: bool | None = None, **kwargs: Any
) -> PretrainedModel:
    """Return the model of the class that config.json says; see `PretrainedModel.from_pretrained`."""
    path = find_export(name_or_path)
    path = _fetched_of_another_project(name_or_path, path, kwargs) or path
    if is_of_another_project(path):
        return read_of_another_project(path, kwargs)
    check_location(name_or_path, path)
    model_type = _config_of(str(path if path.is_dir() else name_or_path), kwargs).get("model_type", FIRST_TYPE)
    with trusting(trust_code):
        return class_of_type(model_type, name_or_path).from_pretrained(name_or_path, **kwargs)


def class_of_type(model_type: Any, found_in: str | Path) -> type[PretrainedModel]:
    """Return the class that config.json means: one of `MODEL_TYPES`, or of somebody else by its import path."""
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        module, name = MODEL_TYPES[model_type]
        return getattr(importlib.import_module(module), name)
    if isinstance(model_type, str) and PATH.fullmatch(model_type):
        return cast("type[PretrainedModel]", MODELS.factory(model_type))
    known = ", ".join(MODEL_TYPES)
    raise UserError(f"{found_in} holds a model of type {model_type!r}; vqdist has {known}")


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], strict: bool) -> None:
    """Give a module the tensors of a file, in which one that has two names in the module stands once.

    Raises:
        RuntimeError: `strict`, and a tensor is missing, is none of the module's, or has another shape.
    """
    held = module.state_dict()
    twins = {tensor.data_ptr(): tensors[name] for name, tensor in held.items() if name in tensors and tensor.numel()}
    shared = {name: twins[tensor.data_ptr()] for name, tensor in held.items() if tensor.data_ptr() in twins}
    module.load_state_dict({**shared, **tensors}, strict=strict)


def _discriminator_beside(folder: Path, written: Mapping[str, Any], used: Mapping[str, Any]) -> Path | None:
    """Return the file of the discriminator in a model's folder; None where the caller put another in its place."""
    path = folder / DISCRIMINATOR
    is_own = all(used.get(name) == written.get(name) for name in ("discriminator", "discr_layers"))
    return path if is_own and path.is_file() else None


def saved_beside(model_id: str, name: str, kwargs: Mapping[str, Any]) -> Path:
    """Return the folder of a second model within that of the first; of one on the Hub its files are fetched."""
    if Path(model_id).is_dir():
        return Path(model_id) / name
    files = [hf_hub_download(model_id, f"{name}/{file}", **_hub_options(kwargs)) for file in FILES]
    return Path(files[0]).parent


def _hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}


def _config_of(model_id: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a folder or repository; empty where a repository cannot be reached: loading it says so."""
    if Path(model_id).is_dir():
        return config_of_folder(Path(model_id))
    try:
        return read_json(Path(hf_hub_download(model_id, "config.json", **_hub_options(kwargs))))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return {}


MODELS: Registry[PretrainedModel] = Registry("model", PretrainedModel)
"""Models that config.json names by import path; those of vqdist are in `MODEL_TYPES`."""
