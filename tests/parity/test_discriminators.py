"""Discriminators against the modules that they are of: logits, gradients, statistics."""

from __future__ import annotations

import pytest
import torch
from fixtures import gradient_norms, in_unit_range, largest, tensors, values, weights
from torch import nn

from vqdist import UserError, losses
from vqdist.models.networks import DISCRIMINATORS
from vqdist.models.networks.blur import Blur, BlurDiscriminator
from vqdist.models.networks.patchgan import PatchGAN


def gradients_of_hinge(network: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> float:
    loss = losses.hinge_discriminator_loss(network(real), network(fake)) / 2
    loss.backward()
    return loss.item()


def assert_norms(network: nn.Module, expected: dict[str, float]) -> None:
    found = gradient_norms(network)
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        assert found[name] == pytest.approx(norm, rel=1e-3, abs=1e-5), name


def patchgan(name: str, **options) -> PatchGAN:
    network = PatchGAN(8, **options)
    network.load_state_dict(weights(name))
    return network


@pytest.mark.parametrize(
    "name, options",
    [("nlayer_discriminator", {}), ("nlayer_discriminator_actnorm", {"layers": 2, "norm": "actnorm"})],
)
def test_patchgan_is_tamings(name, options):
    theirs, numbers = tensors(name), values(name)
    real, fake = (in_unit_range(theirs[f"in.{kind}"]) for kind in ("real", "fake"))
    network = patchgan(name, **options)
    assert largest(network.eval()(real), theirs["out.logits_eval_real"]) < 1e-5
    network.train()
    assert largest(network(real), theirs["out.logits_real"]) < 1e-5
    assert largest(network(fake), theirs["out.logits_fake"]) < 1e-5
    state = network.state_dict()
    after = {key.removeprefix("out.after_two_passes."): value for key, value in theirs.items() if "after_two" in key}
    assert after and all(largest(state[key], value) < 1e-5 for key, value in after.items())
    network = patchgan(name, **options)
    assert gradients_of_hinge(network, real, fake) == pytest.approx(numbers["hinge"], abs=1e-6)
    assert_norms(network, numbers["grad_norms_hinge"])
    network = patchgan(name, **options)
    vanilla = losses.bce_discriminator_loss(network(real), network(fake)) / 2
    assert vanilla.item() == pytest.approx(numbers["vanilla"], abs=1e-6)


def test_parts_of_a_batch_are_normalised_apart_in_one_forward():
    theirs = tensors("nlayer_discriminator")
    both = in_unit_range(torch.cat([theirs["in.real"], theirs["in.fake"]]))
    network = patchgan("nlayer_discriminator")
    expected = torch.cat([theirs["out.logits_real"], theirs["out.logits_fake"]])
    assert largest(network(both, parts=2), expected) < 1e-5
    assert largest(network(both), expected) > 1e-3
    assert int(network.main[3].num_batches_tracked) == 3 + int(
        weights("nlayer_discriminator")["main.3.num_batches_tracked"]
    )


def test_actnorm_begins_once_and_a_loaded_one_does_not_begin_again():
    network = PatchGAN(8, layers=1, norm="actnorm")
    assert int(network.main[3].initialized) == 0
    network.eval()(torch.rand(2, 3, 16, 16))
    assert int(network.main[3].initialized) == 0
    network.train()(torch.rand(4, 3, 16, 16))
    hidden = network.main[:4](2 * torch.rand(512, 3, 16, 16) - 1)
    assert hidden.mean().abs() < 0.2 and hidden.std().item() == pytest.approx(1, abs=0.2)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    again = PatchGAN(8, layers=1, norm="actnorm")
    again(torch.rand(2, 3, 16, 16))
    again.load_state_dict(state)
    again(torch.zeros(2, 3, 16, 16))
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_patchgan_begins_as_published():
    torch.manual_seed(0)
    network = PatchGAN()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [tuple(c.weight.shape[:2]) for c in convolutions] == [(64, 3), (128, 64), (256, 128), (512, 256), (1, 512)]
    assert [c.bias is not None for c in convolutions] == [True, False, False, False, True]
    assert all(c.weight.std().item() == pytest.approx(0.02, rel=0.1) for c in convolutions)
    assert network.main[3].weight.mean().item() == pytest.approx(1, abs=0.01)
    assert network.main[3].weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert network(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)  # of a receptive field of 70
    assert [m.out_channels for m in PatchGAN(4, layers=5).main if isinstance(m, nn.Conv2d)][:-1] == [
        4,
        8,
        16,
        32,
        32,
        32,
    ]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_gives_a_patch_and_a_smaller_one_none(layers):
    network = PatchGAN(4, layers=layers, norm="actnorm")
    size = network.min_image_size
    assert network(torch.rand(2, 3, size, size)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.rand(2, 3, size - 1, size - 1))


# 1d-tokenizer's


def test_the_blur_discriminator_is_1d_tokenizers():
    theirs, numbers = tensors("blur_discriminator"), values("blur_discriminator")
    network = BlurDiscriminator(32, stages=2)
    network.load_state_dict(weights("blur_discriminator"))
    real, fake = theirs["in.real"], theirs["in.fake"]  # in [0, 1]
    assert largest(network(real), theirs["out.logits_real"]) < 1e-5
    assert largest(network(fake), theirs["out.logits_fake"]) < 1e-5
    assert gradients_of_hinge(network, real, fake) == pytest.approx(numbers["hinge"], abs=1e-6)
    assert_norms(network, numbers["grad_norms"])


def test_the_blur_discriminators_widths_pool_and_range():
    network = BlurDiscriminator()
    assert [block[0].weight.shape[0] for block in network.blocks] == [128, 256, 512]
    small = BlurDiscriminator(32, stages=2, pool=None)
    assert small(torch.rand(1, 3, 24, 32)).shape == (1, 1, 6, 8) and small(torch.rand(1, 3, 4, 4)).shape == (
        1,
        1,
        1,
        1,
    )
    signed = BlurDiscriminator(32, stages=2, pool=None, zero_mean=True)
    signed.load_state_dict(small.state_dict())
    image = torch.rand(1, 3, 16, 16)
    assert largest(signed(image), small(2 * image - 1)) == 0


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("side", [5, 6, 9])
def test_the_blur_is_a_binomial_filter_of_every_second_pixel(size, side):
    line = {3: [1, 2, 1], 4: [1, 3, 3, 1], 5: [1, 4, 6, 4, 1]}[size]
    x = torch.rand(1, 2, side, side)
    blurred = Blur(size)(x)
    half = -(-side // 2)
    assert blurred.shape == (1, 2, half, half)
    total = (half - 1) * 2 + size - side
    for i in range(half):
        for j in range(half):
            value = 0.0
            for a in range(size):
                for b in range(size):
                    y, z = 2 * i + a - total // 2, 2 * j + b - total // 2
                    value += line[a] * line[b] * x[0, 1, y, z].item() if 0 <= y < side and 0 <= z < side else 0
            assert blurred[0, 1, i, j].item() == pytest.approx(value / sum(line) ** 2, abs=1e-6)


def test_discriminators_have_names_and_refuse_what_cannot_be():
    assert {"patch", "patchgan", "blur"} <= set(DISCRIMINATORS)
    built = DISCRIMINATORS.build({"class_path": "patchgan", "init_args": {"width": 8, "norm": "actnorm"}}, channels=1)
    assert built.main[0].weight.shape == (8, 1, 4, 4)
    for spec, message in (
        ({"class_path": "patchgan", "init_args": {"norm": "group"}}, "norm 'group' .* choose one of batch, actnorm"),
        ({"class_path": "patchgan", "init_args": {"layers": 0}}, "layers 0 .* at least 1"),
        ({"class_path": "blur", "init_args": {"width": 48}}, "multiple of 32"),
        ({"class_path": "blur", "init_args": {"blur_kernel_size": 6}}, "give 3, 4 or 5"),
    ):
        with pytest.raises(UserError, match=message):
            DISCRIMINATORS.build(spec, channels=3)
