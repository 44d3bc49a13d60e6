"""DINOv2 (arXiv 2304.07193) as FD-DINOv2 looks at images (arXiv 2306.04675): its vision transformer, and its files.

Tensors have the names of the published .pth files; those of a Hub repository's model.safetensors are renamed. A file
says its own size, as all sizes have heads of 64. Shapes: b batch, n tokens, d width, h heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.extractor_names import DINOV2_SIZES

HEAD, SIDE = 64, 224  # width of a head; pixels of the images that it sees
OFFSET = 0.1  # of the scale by which positions are stretched; the published weights are used with it

# names of Hub repositories, as regular expressions, and those of the published files
RENAMED = {
    r"^(dinov2\.)?embeddings\.(cls_token|mask_token)$": r"\2",
    r"^(dinov2\.)?embeddings\.position_embeddings$": "pos_embed",
    r"^(dinov2\.)?embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^(dinov2\.)?encoder\.layer\.(\d+)\.": r"blocks.\2.",
    r"^(dinov2\.)?layernorm\.": "norm.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"\.mlp\.weights_in\.": ".mlp.w12.",
    r"\.mlp\.weights_out\.": ".mlp.w3.",
}
PARTS = ("query", "key", "value")


class Scale(nn.Module):
    """A factor for each of d features."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention of tokens (b, n, d)."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (part h d) -> part b h n d", part=3, d=HEAD)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """The feed-forward part of tokens (b, n, d), of all sizes but the largest."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """That of the largest size."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and feed-forward part of tokens (b, n, d), each behind a norm."""

    def __init__(self, width: int, mlp: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width, eps=1e-6), Attention(width), Scale(width)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width, eps=1e-6), mlp, Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Normalised images (b, 3, height, width) -> the class token behind the last norm, (b, d).

    Args:
        width: d.
        depth: number of blocks.
        patch: side of a patch in pixels.
        positions: number of patches that positions were learnt for, a square.
        hidden: width within the feed-forward parts.
        gated: whether these are `SwiGLU`.
    """

    def __init__(self, *, width: int, depth: int, patch: int, positions: int, hidden: int, gated: bool):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + positions, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        mlp = SwiGLU if gated else Mlp
        self.blocks = nn.Sequential(*(Block(width, mlp(width, hidden)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)
        rows, columns = patches.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), rearrange(patches, "b d h w -> b (h w) d")], 1)
        return self.norm(self.blocks(tokens + self.positions(rows, columns)))[:, 0]

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the positions of the class token and of so many patches, (1, 1 + rows * columns, d)."""
        learnt = self.pos_embed[:, 1:]
        side = math.isqrt(learnt.shape[1])
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = rearrange(learnt, "1 (h w) d -> 1 d h w", h=side)
        scales = [(count + OFFSET) / side for count in (rows, columns)]
        stretched = F.interpolate(grid, scale_factor=scales, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], rearrange(stretched, "1 d h w -> 1 (h w) d")], dim=1)


def published_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the names of the published files, from those or from those of a Hub repository."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    for name in [name for name in found if f".attention.attention.{PARTS[0]}." in name]:
        parts = [name.replace(f".{PARTS[0]}.", f".{part}.") for part in PARTS]
        if all(part in found for part in parts):
            joined = torch.cat([found.pop(part) for part in parts])
            found[name.replace(f".attention.attention.{PARTS[0]}.", ".attn.qkv.")] = joined
    return found


def is_dinov2(weights: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is one of DINOv2, by either kind of names."""
    return "blocks.0.ls1.gamma" in (names := published_names(weights)) and "cls_token" in names


def load(weights: Mapping[str, Tensor], said: str, size: str | None = None) -> VisionTransformer:
    """Return the network that a state dict is of.

    Args:
        weights: with the names of the published files or of a Hub repository.
        said: the file, for messages.
        size: one of `DINOV2_SIZES` that it has to be; null for any.

    Raises:
        UserError: a tensor is missing, of another shape or too many; or the network is of another size.
    """
    tensors = published_names(weights)
    tensors.pop("mask_token", None)  # of training
    try:
        shape = _shape(tensors)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{said} does not hold the weights of DINOv2 ({error} is missing or of another shape)"
        ) from error
    found = (shape["width"], shape["depth"])
    if size is not None and (found != DINOV2_SIZES[size] or shape["patch"] != 14):
        width, depth = DINOV2_SIZES[size]
        raise UserError(
            f"{said} holds DINOv2 of width {found[0]}, {found[1]} blocks and patches of {shape['patch']} pixels; "
            f"dinov2_{size} has {width}, {depth} and 14"
        )
    with torch.device("meta"):  # neither memory nor random numbers for what is filled
        network = VisionTransformer(**shape)
    wanted = network.state_dict()
    wrong = [key for key, tensor in wanted.items() if getattr(tensors.get(key), "shape", None) != tensor.shape]
    wrong += sorted(tensors.keys() - wanted.keys())
    if wrong:
        raise UserError(
            f"{said} does not hold the weights of DINOv2 without registers ({wrong[0]} is missing, of another shape "
            "or too many)"
        )
    network.load_state_dict({key: tensors[key].float() for key in wanted}, assign=True)
    return network.requires_grad_(False)


def _shape(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the network that has such tensors."""
    width = tensors["cls_token"].shape[2]
    gated = "blocks.0.mlp.w12.weight" in tensors
    hidden = tensors["blocks.0.mlp.w3.weight"].shape[1] if gated else tensors["blocks.0.mlp.fc1.weight"].shape[0]
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name))
    positions = math.isqrt(tensors["pos_embed"].shape[1] - 1) ** 2
    patch = tensors["patch_embed.proj.weight"].shape[3]
    return {"width": width, "depth": depth, "patch": patch, "positions": positions, "hidden": hidden, "gated": gated}
