"""From a spec string to a dataset of images that any process can open and look into at any index.

| spec | images |
| --- | --- |
| `DIR` | every jpg jpeg png webp bmp tif tiff gif below a folder, in any letter case and nesting |
| `digits` | the 10,000 MNIST test images that come with the package, 28 x 28 grey, with labels |
| `synthetic`, `synthetic:LENGTH` | 64 x 64 colour pictures computed from their index (100 if no length is given) |
| `torchvision:NAME[:SPLIT][?key=value&...]` | a class of `torchvision.datasets` |
| `wds:SHARDS` | samples of local or remote tar files, e.g. `wds:/data/train-{000..099}.tar` |
| `hf:NAME[:SPLIT][?key=value&...]` | a Hugging Face dataset: of the Hub, of a folder, or saved by `save_to_disk` |

- Folders: hidden files and folders (a leading dot) are passed over; symbolic links are followed, except back to a
  folder that encloses them. A folder that is called like another spec is written `./digits`.
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

import difflib
import os
from collections.abc import Callable, Iterable

from vqdist.data.sources.base import FORMS, Source, absolute_path
from vqdist.data.sources.digits import DigitsSource
from vqdist.data.sources.folder import FolderSource
from vqdist.data.sources.hugging_face import HuggingFaceSource
from vqdist.data.sources.synthetic import DummyDataset, SyntheticSource
from vqdist.data.sources.tensors import TensorSource
from vqdist.data.sources.torchvision_datasets import TorchvisionSource
from vqdist.data.sources.webdataset_shards import WebDatasetSource
from vqdist.errors import UserError

__all__ = [
    "DigitsSource",
    "DummyDataset",
    "FolderSource",
    "HuggingFaceSource",
    "Source",
    "SyntheticSource",
    "TensorSource",
    "TorchvisionSource",
    "WebDatasetSource",
    "open_source",
]

OPENERS: dict[str, Callable[[str], Source]] = {
    "digits": DigitsSource,
    "synthetic": SyntheticSource,
    "torchvision": TorchvisionSource,
    "wds": WebDatasetSource,
    "hf": HuggingFaceSource,
}


def open_source(spec: str | os.PathLike, *, exts: Iterable[str] | str | None = None) -> Source:
    """Open the images that a spec names (the forms are listed on top of this module).

    Args:
        spec: the spec; a path object is always a folder.
        exts: file name extensions to read in place of the usual ones, with or without the dot, in any letter case; for
            folders and `wds:` only.

    Raises:
        UserError: there is no such source, it is empty, or it cannot be opened.
    """
    if isinstance(spec, os.PathLike):
        return FolderSource(spec, exts=exts)
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"the data source is {spec!r}; give {FORMS}")
    kind, colon, rest = spec.partition(":")
    if kind not in OPENERS:
        return _open_path(spec, exts)
    if colon and not rest:
        raise UserError(f"the data source {spec!r} ends after its colon; give {FORMS}")
    if kind == "wds":
        return WebDatasetSource(spec, exts=exts)
    if exts is not None:
        raise UserError(f"exts {exts!r} has no meaning for {spec!r}, which is not made of image files; leave it out")
    source = OPENERS[kind](spec)
    if len(source) == 0:
        raise UserError(f"{spec!r} holds no images; choose another split or dataset")
    return source


def _open_path(spec: str, exts: Iterable[str] | str | None) -> Source:
    if os.path.exists(os.path.expanduser(spec)):
        return FolderSource(spec, exts=exts)
    if "://" in spec or spec.lower().endswith(".tar"):
        raise UserError(f"{spec} is not a folder; tar files, local or remote, are given as `wds:{spec}`")
    if "/" in spec or spec.startswith((".", "~")):
        raise UserError(f"no such folder: {absolute_path(spec)}; check the path, or give {FORMS}")
    near = difflib.get_close_matches(spec.partition(":")[0].lower(), OPENERS, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise UserError(f"no folder and no data source is called {spec!r}; {hint}Give {FORMS}")
