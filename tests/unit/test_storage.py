"""Modules whose tensors share storage are saved, and loaded into modules that share or do not."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from scenarios import build_dvae, build_prior, build_vae, build_var, build_vq_ar
from torch import Tensor, nn

from vqdist.models.pretrained import load_model_of_any_type
from vqdist.storage import names_of_holders, save_module, with_own_storage


def flatten(module: nn.Module) -> None:
    """Make all parameters views of one buffer with room to spare, as ZeRO 1 and 2 do."""
    parameters = list(module.parameters())
    flat = torch.cat([*(parameter.detach().flatten() for parameter in parameters), torch.zeros(7)])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


@pytest.mark.parametrize("build", [build_vae, build_dvae, build_vq_ar, build_prior, build_var])
def test_weights_in_one_flat_buffer_are_saved(build, tmp_path):
    model = build()
    flatten(model)
    if getattr(model, "tokenizer", None) is not None:
        flatten(model.tokenizer)
    model.save_pretrained(tmp_path)
    loaded = load_model_of_any_type(tmp_path)
    expected, actual = model.saved_part().state_dict(), loaded.saved_part().state_dict()
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


class Tied(nn.Module):
    """One weight under two names, a part of it, and a bias beside."""

    def __init__(self, seed: int):
        super().__init__()
        weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        self.first.weight = self.second.weight = weight
        self.register_buffer("part", weight.detach()[:2])
        self.register_buffer("empty", torch.zeros(0))


@pytest.mark.parametrize("flat", [False, True])
def test_tied_tensors_are_saved_once_and_load_strictly(flat, tmp_path):
    model, other = Tied(1), Tied(2)
    if flat:  # ties between parameters stay, those to buffers are cut
        model.part = other.part = None
        flatten(model)
    path = tmp_path / "model.safetensors"
    save_module(model, path)
    assert load_model(other, path, strict=True) == (set(), [])
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    with safe_open(path, "pt") as file:
        assert "second.weight" in file.metadata() or "first.weight" in file.metadata()
    assert sum(tensor.numel() for tensor in load_file(path).values()) == 12 + 4


def test_a_tensor_that_no_other_covers_is_kept():
    """Views that alternate in memory, or overlap in part, hold numbers that no other holds."""
    base = torch.arange(12.0)
    views = {"even": base[::2], "odd": base[1:-2:2], "head": base[:8], "tail": base[4:], "middle": base[5:7]}
    assert names_of_holders(views) == {"middle": "tail"}
    assert names_of_holders({"even": base[::2], "odd": base[1:-2:2]}) == {}


def test_own_storage_keeps_every_name():
    base = torch.arange(6.0)
    tensors: dict[str, Tensor] = {"whole": base, "same": base, "part": base[2:4], "turned": base.view(2, 3).t()}
    own = with_own_storage(tensors)
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in own.values()}) == len(tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in own.values())
