"""From a spec string to a dataset of images that any process can open and look into at any index.

| spec | images |
| --- | --- |
| `DIR` | every image below a folder, of every format that Pillow opens, in any letter case and nesting; or one file |
| `digits` | the 10,000 MNIST test images that come with the package, 28 x 28 grey, with labels |
| `synthetic`, `synthetic:LENGTH` | 64 x 64 colour pictures computed from their index (100 if no length is given) |
| `torchvision:NAME[:SPLIT][?key=value&...]` | a class of `torchvision.datasets` |
| `wds:SHARDS` | samples of local or remote tar files, e.g. `wds:/data/train-{000..099}.tar` |
| `hf:NAME[:SPLIT][?key=value&...]` | a Hugging Face dataset: of the Hub, of a folder, or saved by `save_to_disk` |
| `my_data.MySource`, `{class_path: my_data.MySource, init_args: {...}}` | a `Source` of one's own, see there |

- Folders: hidden files and folders (a leading dot) are passed over; symbolic links are followed, and each folder is
  entered once. Classes are the first-level folders. A folder that is called like another spec is written `./digits`.
- `torchvision`: `SPLIT` is given to the class as `split` or `image_set`, or as `train` (`train` or `test`). `root` is
  the folder of the files; every other key goes to the class: `torchvision:EMNIST:test?split=letters&root=/data`. Files
  that are absent are downloaded, once.
- `wds`: braces as in the webdataset library, `*` and `?` as in a shell, or one folder of tar files. Positions must be
  addressable, so the tar headers are read once at the start, and remote shards are downloaded first. An entry `cls`
  is the label.
- `hf`: keys `config` (the dataset's configuration), `image` and `label` (columns, if they are not the first ones of
  these types). The split is `train` if none is given, or the only one.

Downloads of torchvision and wds lie under `VQDIST_DATA` (default `~/.cache/vqdist`), in `torchvision/` and
`wds/`.

Every file list is sorted, so each node sees the same order; `fingerprint` proves it without reading the images.

Legend: c channel, h w image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vqdist.data.sources.base import Source, checked_length
from vqdist.data.sources.digits import DigitsSource
from vqdist.data.sources.folder import FolderSource
from vqdist.data.sources.hugging_face import HuggingFaceSource
from vqdist.data.sources.synthetic import DummyDataset, SyntheticSource
from vqdist.data.sources.tensors import TensorSource
from vqdist.data.sources.torchvision_datasets import TorchvisionSource
from vqdist.data.sources.webdataset_shards import WebDatasetSource
from vqdist.data.specs import FORMS, check_spec
from vqdist.errors import UserError
from vqdist.parts import PartSpec, Spec, called
from vqdist.registries import SOURCES

__all__ = [
    "DigitsSource",
    "DummyDataset",
    "FolderSource",
    "HuggingFaceSource",
    "SOURCES",
    "Source",
    "SyntheticSource",
    "TensorSource",
    "TorchvisionSource",
    "WebDatasetSource",
    "folder_of",
    "not_empty",
    "open_source",
]


def open_source(
    spec: PartSpec | Mapping[str, Any] | os.PathLike, *, exts: Iterable[str] | str | None = None
) -> Source:
    """Open the images that a spec names (the forms are listed on top of this module).

    Args:
        spec: the spec; a path object is always a folder.
        exts: file name extensions to read in place of the usual ones, with or without the dot, in any letter case; for
            folders, `wds:` and sources that have the parameter.

    Raises:
        UserError: there is no such source, it is empty, or it cannot be opened.
    """
    if isinstance(spec, os.PathLike):
        return FolderSource(spec, exts=exts)
    if isinstance(spec, Mapping):
        return _build(dict(spec), exts)
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"the data source is {spec!r}; give {FORMS}")
    if spec.lstrip().startswith("{"):
        return _build(_read(spec), exts)
    kind, colon, rest = spec.partition(":")
    if kind not in SOURCES:
        return _open_path(spec, exts)
    if colon and not rest:
        raise UserError(f"the data source {spec!r} ends after its colon; give {FORMS}")
    if rest and not SOURCES.takes(kind, "spec"):
        raise UserError(f"the data source {kind!r} takes nothing after a colon; write {kind!r}, or give init_args")
    return _build(kind, exts, spec=spec)


def not_empty(source: Source) -> Source:
    """Return a source; raise `UserError` if it holds no images."""
    if checked_length(source) == 0:
        raise UserError(f"{source.spec!r} holds no images; choose another split or dataset")
    return source


def folder_of(given: Any) -> Path | None:
    """Return the folder of images that is given as a data source, or None where it is something else."""
    if isinstance(given, Mapping):
        arguments = given.get("init_args")
        given = arguments.get("folder") if isinstance(arguments, Mapping) else None
    if isinstance(given, FolderSource):
        return Path(given.folder)
    path = Path(given).expanduser() if given and isinstance(given, str | os.PathLike) else None
    return path if path is not None and path.is_dir() else None


def _build(given: PartSpec, exts: Iterable[str] | str | None, **context: Any) -> Source:
    if exts is not None:
        if not SOURCES.takes(Spec.of(given, SOURCES.kind).target, "exts"):
            said = context.get("spec", called(given))
            raise UserError(
                f"exts {exts!r} has no meaning for {said!r}, which is not made of image files; leave it out"
            )
        context["exts"] = exts
    return not_empty(SOURCES.build(given, **context))


def _read(spec: str) -> dict[str, Any]:
    """Return the dictionary that a command line gives as text."""
    try:
        return json.loads(spec)
    except (ValueError, RecursionError) as error:
        example = '{"class_path": "my_data.Source", "init_args": {}}'
        raise UserError(f"the data source {spec[:80]!r} is not JSON ({error}); give it as {example}") from error


def _open_path(spec: str, exts: Iterable[str] | str | None) -> Source:
    check_spec(spec)
    if os.path.exists(os.path.expanduser(spec)):
        return FolderSource(spec, exts=exts)
    return _open_import_path(spec, exts)


def _open_import_path(spec: str, exts: Iterable[str] | str | None) -> Source:
    try:
        SOURCES.factory(spec)
    except UserError as error:
        raise UserError(f"there is no folder {spec!r}, which would be taken first; {error}") from error
    return _build(spec, exts)
