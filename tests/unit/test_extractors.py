"""Extractors that are known by name: their weights from files, their preprocessing, and DINOv2 by its formulas."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from source_files import message_of
from torch import Tensor, nn

from vqdist import UserError
from vqdist.evaluation import dinov2
from vqdist.evaluation.extractors import FeatureExtractor, load_extractor
from vqdist.evaluation.networks import KNOWN, Classifier, in_8_bits
from vqdist.extractor_names import CLASSIFIERS, DINOV2_SIZES, NAMES

WIDTH, BLOCKS, PATCHES = 128, 2, 9  # of a small DINOv2 with the published names


def small_dinov2(gated: bool = False) -> dict[str, Tensor]:
    """Return random weights with the names of a published DINOv2."""
    rng = torch.Generator().manual_seed(0)
    hidden = 24 if gated else 48
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + PATCHES, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for block in (f"blocks.{number}" for number in range(BLOCKS)):
        linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        linear |= {"mlp.w12": (2 * hidden, WIDTH), "mlp.w3": (WIDTH, hidden)} if gated else {}
        linear |= {} if gated else {"mlp.fc1": (hidden, WIDTH), "mlp.fc2": (WIDTH, hidden)}
        for name, shape in linear.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"{block}.{name}"] = (WIDTH,)
    return {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def by_formula(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Return the class token of normalised images, worked out head by head."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    patches = F.conv2d(pixels.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    grid = w["pos_embed"][0, 1:].T.reshape(1, WIDTH, 3, 3)
    scale = (16 + 0.1) / 3
    places = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")[0].flatten(1).T
    x = torch.cat(
        [w["cls_token"].expand(len(pixels), 1, -1) + w["pos_embed"][:, :1], patches.flatten(2).mT + places], 1
    )
    for block in (f"blocks.{number}." for number in range(BLOCKS)):
        normed = F.layer_norm(x, (WIDTH,), w[block + "norm1.weight"], w[block + "norm1.bias"], 1e-6)
        q, k, v = F.linear(normed, w[block + "attn.qkv.weight"], w[block + "attn.qkv.bias"]).split(WIDTH, dim=2)
        heads = []
        for places_of in (slice(0, 64), slice(64, 128)):
            scores = q[..., places_of] @ k[..., places_of].mT / math.sqrt(64)
            heads.append(scores.softmax(dim=-1) @ v[..., places_of])
        attended = F.linear(torch.cat(heads, -1), w[block + "attn.proj.weight"], w[block + "attn.proj.bias"])
        x = x + w[block + "ls1.gamma"] * attended
        normed = F.layer_norm(x, (WIDTH,), w[block + "norm2.weight"], w[block + "norm2.bias"], 1e-6)
        x = x + w[block + "ls2.gamma"] * feed_forward(w, block + "mlp.", normed)
    return F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"], 1e-6)[:, 0]


def feed_forward(w: dict[str, Tensor], mlp: str, x: Tensor) -> Tensor:
    if mlp + "w12.weight" in w:
        first, second = F.linear(x, w[mlp + "w12.weight"], w[mlp + "w12.bias"]).split(24, dim=-1)
        return F.linear(first * first.sigmoid() * second, w[mlp + "w3.weight"], w[mlp + "w3.bias"])
    middle = F.linear(x, w[mlp + "fc1.weight"], w[mlp + "fc1.bias"])
    middle = middle * 0.5 * (1 + torch.erf(middle / math.sqrt(2)))
    return F.linear(middle, w[mlp + "fc2.weight"], w[mlp + "fc2.bias"])


def pictures(count: int = 2, side: int = 40) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def load(spec: str, **options) -> FeatureExtractor:
    return load_extractor(spec, **{"channels": 3, "image_size": 40, **options})


def write(path: Path, weights: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)
    return str(path)


def of_the_hub(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same weights with the names of a Hub repository."""
    found = {}
    for name, tensor in weights.items():
        name = re.sub(r"^blocks\.(\d+)\.", r"encoder.layer.\1.", name)
        for old, new in {
            "cls_token": "embeddings.cls_token",
            "mask_token": "embeddings.mask_token",
            "pos_embed": "embeddings.position_embeddings",
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            ".attn.proj.": ".attention.output.dense.",
            ".ls1.gamma": ".layer_scale1.lambda1",
            ".ls2.gamma": ".layer_scale2.lambda1",
            ".mlp.w12": ".mlp.weights_in",
            ".mlp.w3": ".mlp.weights_out",
        }.items():
            name = name.replace(old, new)
        name = re.sub(r"^norm\.", "layernorm.", name)
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            found |= {name.replace(".attn.qkv.", f".attention.attention.{part}."): of for part, of in parts}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "swiglu"])
def test_dinov2_is_its_formulas(gated, tmp_path):
    weights = small_dinov2(gated)
    extractor = load(write(tmp_path / "dino.pth", weights))
    images = pictures()
    seen = torch.stack([resized_by_pillow(image) for image in in_8_bits(images)]) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = by_formula(weights, (seen - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(extractor(images).double(), expected, rtol=0.02, atol=0.02)  # some pixels are one off
    assert extractor.width == WIDTH and expected.std() > 0.01


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "swiglu"])
def test_dinov2_of_the_hub_is_that_of_the_published_file(gated, tmp_path):
    weights = small_dinov2(gated)
    published = load(write(tmp_path / "dino.pth", weights))
    hub = load(write(tmp_path / "model.safetensors", of_the_hub(weights)))
    assert torch.equal(hub(pictures()), published(pictures()))
    assert hub.digest == published.digest and hub.kind == published.kind == "dinov2_128"


def resized_by_pillow(pixels: Tensor) -> Tensor:
    picture = Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())
    resized = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)).copy()
    return torch.from_numpy(resized).permute(2, 0, 1).float()


@pytest.mark.parametrize("side", [40, 224, 300])
def test_images_for_dinov2_are_resized_as_pillow_does(side, tmp_path):
    """Even noise, whose resize leaves the range between both passes."""
    extractor, seen = load(write(tmp_path / "dino.pth", small_dinov2())), []
    extractor.network.normalised.register_forward_hook(lambda _layer, given, _out: seen.append(given[0]))
    images = pictures(1, side)
    extractor(images)
    assert (seen[0][0] - resized_by_pillow(in_8_bits(images)[0])).abs().max() <= 1


@pytest.mark.parametrize("size, parameters", [("vits14", 22_056_576), ("vitb14", 86_580_480), ("vitl14", 304_368_640)])
def test_published_sizes_have_the_published_number_of_parameters(size, parameters):
    width, depth = DINOV2_SIZES[size]
    with torch.device("meta"):
        network = dinov2.VisionTransformer(
            width=width, depth=depth, patch=14, positions=37**2, hidden=4 * width, gated=False
        )
    assert sum(weight.numel() for weight in network.parameters()) + width == parameters  # and the mask token
    assert width % dinov2.HEAD == 0


def _without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if key != name}


BROKEN = {
    "missing": (lambda w: _without(w, "blocks.1.attn.proj.bias"), r"blocks\.1\.attn\.proj\.bias is missing"),
    "registers": (lambda w: {**w, "register_tokens": torch.zeros(1, 4, WIDTH)}, "register_tokens is .*too many"),
    "misshaped": (lambda w: {**w, "norm.weight": torch.zeros(3)}, r"norm\.weight is missing, of another shape"),
    "no patches": (lambda w: _without(w, "patch_embed.proj.weight"), r"patch_embed\.proj\.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_weights_than_dinov2s_are_one_line(case, tmp_path):
    change, pattern = BROKEN[case]
    said = message_of(load, write(tmp_path / "dino.pth", change(small_dinov2())))
    assert re.search(pattern, said) and "\n" not in said and "dino.pth does not hold" in said


def test_a_name_wants_its_size(tmp_path):
    path = write(tmp_path / "dino.pth", small_dinov2())
    for name, size in (("dinov2", "1024, 24"), ("dinov2_vits14", "384, 12")):
        said = message_of(load, f"{name}:{path}")
        assert "holds DINOv2 of width 128, 2 blocks" in said and size in said


def test_every_name_has_a_network():
    assert tuple(KNOWN) == NAMES


def test_dinov2_without_a_file_says_which(tmp_path):
    assert "dinov2:FILE, the published dinov2_vitl14_pretrain.pth" in message_of(load, "dinov2")
    assert "dinov2_vits14_pretrain.pth" in message_of(load, "dinov2_vits14")
    assert f"dinov2:{tmp_path}/none.pth names {tmp_path}/none.pth, which is no file" in message_of(
        load, f"dinov2:{tmp_path}/none.pth"
    )


# ------------------------------------------------------------------------------------------- torchvision's


def test_a_classifier_gives_what_its_last_layer_sees(tmp_path):
    from torchvision.models import resnet50

    torch.manual_seed(0)
    network = resnet50(weights=None).eval()
    state = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    extractor = load(f"resnet50:{write(tmp_path / 'resnet50.safetensors', state)}")
    images = pictures()
    resized = F.interpolate((images * 255).round(), size=(224, 224), mode="bilinear", antialias=True) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = network((resized - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(network.fc(extractor(images)), logits, rtol=1e-3, atol=1e-4)
    assert extractor.width == 2048 and extractor.kind == "resnet50"


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name not in ("convnext_large", "vit_l_16")])
def test_each_classifier_takes_its_state_dict(name):
    from torchvision.models import get_model

    options = {"init_weights": False} if name == "inception_v3" else {}
    with torch.device("meta"):
        whole = get_model(name, weights=None, **options).state_dict()
    built = KNOWN[name].build(
        name, {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in whole.items()}, name
    )
    assert isinstance(built, Classifier) and built.side in (224, 299)
    assert not any(weight.requires_grad or weight.is_meta for weight in built.parameters())
    assert not built.training or built.eval()


def test_a_classifier_with_a_tensor_missing_is_one_line(tmp_path):
    path = write(tmp_path / "a.pth", {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    assert "does not hold the weights of resnet50 (bn1.weight is missing or of another shape)" in message_of(
        load, f"resnet50:{path}"
    )
    assert "give its name too, as in NAME:" in message_of(load, path)


def test_a_program_is_none_by_a_name_either(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(nn.Flatten()).save(str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="is a program and no weights; give .*a.pt alone"):
        load(f"vgg16:{tmp_path}/a.pt")
    with pytest.raises(UserError, match="is a TorchScript program"):
        load(f"{tmp_path}/a.pt")
