"""A quantizer of somebody else: the contract that its docstring shows, by import path, by name and as an object."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from scenarios import build_trainer, unfollowed_buffers, weights_of
from torch import nn

from vqdist import UserError
from vqdist.models.averaged import averaged_tensors
from vqdist.models.quantizers import QUANTIZERS, Quantized, Quantizer, VQQuantizer, build_quantizer


def example() -> type[Quantizer]:
    """Return the class of the example in the docstring of the contract."""
    text = textwrap.dedent(inspect.getdoc(Quantizer))
    code = text.partition("where it has parameters of these names:\n")[2].partition("In train mode")[0]
    names = {"torch": torch, "Quantizer": Quantizer, "Quantized": Quantized, "__name__": __name__}
    exec(textwrap.dedent(code), names)
    return names["Signs"]


Signs = example()


class Centres(Quantizer):
    """Codes that learn by gradient, and running means that follow, as a frozen parameter."""

    def __init__(self, dim: int, codebook_size: int = 8, scale: float = 1.0):
        super().__init__(dim, codebook_size)
        self.centres = nn.Parameter(scale * torch.randn(codebook_size, dim))
        self.means = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.register_buffer("uses", torch.zeros(codebook_size))

    def forward(self, features):
        distances = (features[:, None] - self.centres[:, :, None, None]).square().sum(dim=2)
        indices = distances.argmin(dim=1)
        return Quantized(self.decode_indices(indices), indices, distances.min(dim=1).values.mean())

    def decode_indices(self, indices):
        return self.centres[indices].permute(0, 3, 1, 2)


def check(quantizer: Quantizer, dim: int) -> None:
    features = torch.randn(2, dim, 3, 5)
    out = quantizer(features)
    assert out.quantized.shape == features.shape and out.indices.shape == (2, 3, 5) and out.aux_loss.shape == ()
    assert out.indices.dtype == torch.int64 and 0 <= out.indices.min() <= out.indices.max() < quantizer.codebook_size
    again = quantizer.eval()(features)
    torch.testing.assert_close(quantizer.decode_indices(again.indices), again.quantized)
    assert quantizer.num_levels == 1 and quantizer.scales is None


def test_the_example_of_the_docstring_works():
    quantizer = build_quantizer(f"{__name__}.Signs", dim=4, codebook_size=65536)  # it makes its own number of codes
    assert type(quantizer) is Signs and quantizer.codebook_size == 16
    check(quantizer, 4)
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantizer(features).quantized.sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))
    assert len(set(quantizer.decode_indices(torch.arange(16).view(1, 4, 4)).permute(0, 2, 3, 1).reshape(16, 4))) == 16


@pytest.mark.parametrize(
    "given, options, size, scaled",
    [
        (f"{__name__}.Centres", {}, 32, False),
        ({"class_path": f"{__name__}.Centres", "init_args": {"scale": 0.0}}, {}, 32, True),
        ({"class_path": f"{__name__}.Centres", "init_args": {"codebook_size": 5}}, {"scale": 0.0}, 5, True),
        ("centres", {"scale": 0.0}, 32, True),
        (Centres(4, 32), {}, 32, False),
    ],
)
def test_a_quantizer_of_somebody_else_is_built(given, options, size, scaled, monkeypatch):
    monkeypatch.setattr(QUANTIZERS, "_factories", dict(QUANTIZERS.items()))
    QUANTIZERS.add("centres")(Centres)
    quantizer = build_quantizer(given, dim=4, codebook_size=32, **options)
    assert type(quantizer) is Centres and quantizer.codebook_size == size
    assert bool(quantizer.centres.any()) is not scaled
    if not scaled:
        check(quantizer, 4)


def test_a_network_is_trained_with_it(tmp_path):
    path = f"{__name__}.Centres"
    for number, given in enumerate([path, {"class_path": path, "init_args": {"scale": 0.5}}]):
        trainer = build_trainer(
            tmp_path / str(number), quantizer=given, model={"codebook_size": 16}, num_train_steps=2
        )
        before = weights_of(trainer)["ema.quantizer.centres"]
        trainer.train()
        averaged = weights_of(trainer)["ema.quantizer.centres"]
        assert averaged.shape[0] == 16 and not torch.equal(before, averaged) and not unfollowed_buffers(trainer)
        trainer.close()
    with pytest.raises(UserError, match="takes features of 5 channels and there are 32"):
        build_trainer(tmp_path / "other", model={"quantizer": Centres(5)})


def test_its_own_number_of_codes_stands_where_none_is_given():
    assert build_quantizer(f"{__name__}.Centres", dim=4).codebook_size == 8


def test_a_specification_may_name_a_quantizer_of_the_library():
    spec = {"class_path": "vq", "init_args": {"codebook_dim": 3, "kmeans_init": False}}
    by_path = {**spec, "class_path": "vqdist.models.quantizers.vq.VQQuantizer"}
    for given in (spec, by_path):
        quantizer = build_quantizer(given, dim=4, codebook_size=16)
        assert type(quantizer) is VQQuantizer and quantizer.inner.codebook.shape == (16, 3)
        check(quantizer, 4)
    with pytest.raises(UserError, match="quantizer vq has no option 'codebook_dum'; nearest: codebook_dim"):
        build_quantizer({"class_path": "vq", "init_args": {"codebook_dum": 3}}, dim=4, codebook_size=16)


def no_size(dim: int) -> Quantizer:
    quantizer = Centres(dim)
    quantizer.codebook_size = None
    return quantizer


@pytest.mark.parametrize(
    "given, options, message",
    [
        (f"{__name__}.Centre", {}, "has no 'Centre'; nearest: Centres"),
        ("nowhere_at_all.Centres", {}, "there is no module 'nowhere_at_all'"),
        ("torch.nn.Linear", {}, "is no Quantizer; derive it from vqdist.models.quantizers.base.Quantizer"),
        (f"{__name__}.Centres", {"scael": 1.0}, "no argument 'scael'; nearest: scale"),
        (f"{__name__}.no_size", {}, "has codebook_size None; set it to an integer"),
        (Centres(6), {}, "takes features of 6 channels and there are 4"),
        (Centres(4), {"scale": 1.0}, "is built already, so it cannot take scale"),
    ],
)
def test_mistakes_are_one_line(given, options, message):
    with pytest.raises(UserError, match=message):
        build_quantizer(given, dim=4, codebook_size=32, **options)


def test_the_contract_is_abstract():
    class Half(Quantizer):
        def forward(self, features):
            return features

    with pytest.raises(TypeError, match="decode_indices"):
        Half(4, 8)


def test_by_default_what_learns_by_gradient_is_averaged():
    network = nn.ModuleDict({"quantizer": Centres(4), "other": nn.Linear(2, 2)})
    assert averaged_tensors(network).keys() == {"quantizer.centres", "other.weight", "other.bias"}
    assert not averaged_tensors(build_quantizer("vq", dim=4, codebook_size=8, codebook_dim=4))
