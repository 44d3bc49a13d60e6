"""Facts of a saved model: what it is, its size by part, its codes, its hash, published numbers and licence."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from vqdist import protocol
from vqdist.errors import UserError
from vqdist.export import MODEL_CARD, RECORD
from vqdist.files import METRICS, read_json, read_small
from vqdist.locations import FILES, find_export
from vqdist.sizes import ImageSize, sides_of

if TYPE_CHECKING:
    from torch import nn

    from vqdist.models.pretrained import PretrainedModel
    from vqdist.models.tokenizer import Tokenizer, TokenizerModel
    from vqdist.models.vqgan import VQGanVAE

LARGEST_CARD = 2**20  # bytes
FIRST_PARTS = ("encoder", "quantizer", "decoder")


class Found(NamedTuple):
    """A model, and where it was found.

    Attributes:
        model: in eval mode.
        path: as it was given.
        kind: `run`, `export`, or `file` of another project.
        family: of such a file, by name.
    """

    model: PretrainedModel
    path: Path
    kind: str
    family: str | None = None


def find(name_or_path: str, *, trust_code: bool | None = None, **options: Any) -> Found:
    """Load what a path, or a name on the Hub, is of.

    Args:
        name_or_path: a run, an export, a file or folder of another project, or owner/name on the Hub.
        trust_code: see `PretrainedModel.from_pretrained`.
        **options: `family` and `peer_config` of a file of another project; None where they are not given.

    Raises:
        UserError: it is none of these, or cannot be loaded.
    """
    from vqdist.models.pretrained import is_of_another_project, load_model_of_any_type
    from vqdist.models.published import read_file

    path, export = Path(name_or_path).expanduser(), find_export(name_or_path)
    if is_of_another_project(export):
        read = read_file(export, **options)
        return Found(read.model, path, "file", read.family)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"--{given[0]} is for files of other projects, and {path} is none; leave it out")
    kind = "run" if (path / METRICS).is_file() else "export"
    return Found(load_model_of_any_type(name_or_path, trust_code=trust_code), path, kind)


def tokenizer_of(found: Found, image_size: ImageSize | None) -> Tokenizer | None:
    """Return the tokenizer that a model is, or None of a model of codes.

    Raises:
        UserError: nothing says the size of its images, or `image_size` is none that it takes.
    """
    from vqdist.models.tokenizer import Tokenizer, TokenizerNetwork

    if not isinstance(getattr(found.model, "network", None), TokenizerNetwork):
        return None
    return Tokenizer(cast("TokenizerModel", found.model), image_size)


def facts_of(found: Found, image_size: ImageSize | None = None) -> dict[str, Any]:
    """Return what can be said of a model, as JSON holds it; what is unknown is left out.

    Args:
        found: the model.
        image_size: of a tokenizer that does not say the size of its images.
    """
    model = found.model
    size = model.image_size if image_size is None else image_size
    facts: dict[str, Any] = {"path": str(found.path), "kind": found.kind, "family": found.family}
    facts |= {"class": type(model).__name__, "model_type": model.model_type, **_progress(found)}
    facts |= {"image_size": None if size is None else list(sides_of(size)), "channels": model.channels}
    facts |= {"resample": model.resample, "parameters": parameters_of(model)}
    facts |= _facts_of_codes(found, size)
    facts |= {"begun_from": (model.begun_from or {}).get("path"), **_published(found)}
    facts |= {"licence": licence_of(found)}
    evaluated = protocol.last_of(found.path) if found.kind == "run" else None
    facts |= {} if evaluated is None else {"evaluation": evaluated}
    return {name: value for name, value in facts.items() if value is not None}


def parameters_of(model: PretrainedModel) -> dict[str, dict[str, int]]:
    """Return for each part of a model how many numbers it learns, and how many it holds in buffers.

    Parts are the children of a tokenizer's network, those of any other model, and its discriminator.
    """
    root = cast("nn.Module", getattr(model, "network", model))
    found: dict[str, Counter[str]] = {}
    named = [("parameters", root.named_parameters()), ("buffers", root.named_buffers())]
    critic = getattr(model, "discriminator", None)
    for kind, tensors in named:
        for name, tensor in tensors:
            part = name.partition(".")[0] if "." in name else "other"
            found.setdefault(part, Counter())[kind] += tensor.numel()
    if critic is not None:
        found["discriminator"] = Counter(parameters=sum(weight.numel() for weight in critic.parameters()))
    order = sorted(found, key=lambda part: (*FIRST_PARTS, part).index(part))  # the rest stays as it is
    return {
        part: {kind: found[part][kind] for kind in ("parameters", "buffers") if found[part][kind]} for part in order
    }


def _progress(found: Found) -> dict[str, Any]:
    """Return the step of an export, and of a run also the step at which it ends."""
    export = find_export(found.path)
    record = read_json(export / RECORD) if (export / RECORD).is_file() else {}
    written = found.path / "config.json"
    trainer = read_json(written).get("trainer", {}) if found.kind == "run" and written.is_file() else {}
    return {"step": record.get("step"), "steps": trainer.get("num_train_steps"), "epochs": trainer.get("epochs")}


def _facts_of_codes(found: Found, size: ImageSize | None) -> dict[str, Any]:
    """Return the codes of an image, and the hashes of the tokenizer that makes them."""
    from vqdist.models.autoregressive import AutoregressiveModel

    model, told = found.model, {}
    if isinstance(model, AutoregressiveModel):
        classes = model.num_classes or None
        told = {"classes": classes, "codes": {"positions": model.num_codes, "codebook_size": model.codebook_size}}
    held = model.tokenizer if isinstance(model, AutoregressiveModel) else None
    tokenizer = held or (tokenizer_of(found, size) if size is not None else None)
    if tokenizer is None:
        return told
    levels, codebook = tokenizer.num_levels, tokenizer.codebook_size
    codes = {"shape": list(tokenizer.code_shape), "positions": tokenizer.num_codes, "levels": levels}
    codes |= {"codebook_size": codebook, "bits": round(tokenizer.num_codes * levels * math.log2(codebook), 1)}
    if tokenizer.network.scales is not None:
        codes["scales"] = list(tokenizer.network.scales)
    hashes = {"tokenizer_hash": tokenizer.fingerprint(), "codes_hash": tokenizer.codes_fingerprint()}
    return {**told, "codes": codes, **hashes}


def _published(found: Found) -> dict[str, Any]:
    """Return the published configuration that a model has the shapes of; of several the first that its codes fit.

    Weights of any other training may have them, too: no hash of the published ones is known.
    """
    from vqdist.models.presets import PRESETS
    from vqdist.models.published import presets_like

    names = presets_like(found.model, found.family)
    side = max(sides_of(found.model.image_size or 0))
    names = [name for name in names if PRESETS[name].image_size == side] or names
    if not names or not _is_built_like(cast("VQGanVAE", found.model), names[0]):
        return {}
    preset = PRESETS[names[0]]
    facts = {"name": names[0], "source": preset.source, "numbers": preset.numbers, "licence": preset.licence}
    return {"shapes_of_preset": facts}


def _is_built_like(model: VQGanVAE, name: str) -> bool:
    """Return whether a model of the same shapes is also of the same kind, as its codes are."""
    import torch

    from vqdist.models.vqgan import VQGanVAE

    with torch.device("meta"):
        twin = VQGanVAE.preset(name, use_vgg_and_gan=False)
    kinds = [
        [
            (type(part), getattr(part, "traits", ""))
            for part in (one.network.encoder, one.quantizer, one.network.decoder)
        ]
        for one in (model, twin)
    ]
    return kinds[0] == kinds[1]


def licence_of(found: Found) -> str:
    """Return what is known of the terms of the weights."""
    if found.kind == "file":
        return "nothing in the file names one; see the project that it is of"
    card = find_export(found.path) / MODEL_CARD
    named = _licence_in(card) if card.is_file() else None
    return named or "none named; the owner of the weights chooses one, in the head of export/README.md"


def _licence_in(card: Path) -> str | None:
    """Return the licence that the head of a model card names, or None."""
    from huggingface_hub import ModelCard

    try:
        named = ModelCard(read_small(card, LARGEST_CARD).decode("utf-8")).data.to_dict().get("license")
    except Exception:  # of the library that reads the head, which a person may have edited
        return None
    return None if named is None else str(named)


def check_kept(name_or_path: str) -> None:
    """Raise `UserError` where there is neither a file, a folder with a model, nor a name on the Hub; without torch."""
    from vqdist.locations import check_given

    path = Path(name_or_path).expanduser()
    if (path / METRICS).is_file() and not all((find_export(path) / name).is_file() for name in FILES):
        raise UserError(f"{path} has no export/ yet; train it to its first checkpoint")
    check_given(name_or_path)
