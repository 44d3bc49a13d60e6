"""The names of extractors, and how a user's `--features` is read. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from vqdist.errors import UserError

INCEPTION, CLEAN, VGG16, DINOV2 = "inception", "inception_clean", "vgg16", "dinov2"
# torchvision's networks, and the layer of each that gives classes
CLASSIFIERS = {
    "inception_v3": "fc",
    "resnet50": "fc",
    "convnext_tiny": "classifier.2",
    "convnext_small": "classifier.2",
    "convnext_base": "classifier.2",
    "convnext_large": "classifier.2",
    "vit_b_16": "heads.head",
    "vit_l_16": "heads.head",
}
DINOV2_SIZES = {"vits14": (384, 12), "vitb14": (768, 12), "vitl14": (1024, 24), "vitg14": (1536, 40)}
"""Width and number of blocks of the published networks, which have patches of 14 pixels."""

NAMES = (INCEPTION, CLEAN, VGG16, DINOV2, *(f"{DINOV2}_{size}" for size in DINOV2_SIZES), *CLASSIFIERS)
LISTED = ", ".join(NAMES)


def name_and_file(spec: str) -> tuple[str | None, Path | None]:
    """Return the name of a network and the file with its weights, of which one may be left out.

    Raises:
        UserError: the file is none, or there is no such network.
    """
    name, _, file = spec.partition(":")
    if name not in NAMES:
        name, file = "", spec
    path = Path(file).expanduser() if file else None
    if path is not None and not path.is_file():
        found = f"{spec} names {path}, which is no file" if name else f"{spec} is neither a file nor a known network"
        raise UserError(f"--features {found}; known are {LISTED}, each also with its weights as in {VGG16}:FILE")
    return name or None, path
