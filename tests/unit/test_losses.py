"""Losses against formulas written out by hand, in every precision they can be given."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqdist import losses


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def logits(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("kind, power", [("l1", 1), ("l2", 2)])
def test_reconstruction_loss_is_the_mean_difference(kind, power):
    recon, image = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    expected = sum(abs(a - b) ** power for a, b in zip(recon.flatten().tolist(), image.flatten().tolist())) / 96
    assert losses.reconstruction_loss(recon, image, kind).item() == pytest.approx(expected, abs=1e-6)


def test_reconstruction_loss_names_an_unknown_kind():
    with pytest.raises(ValueError, match="'huber' is not known; expected 'l1', 'l2', 'smooth_l1' or 'both'"):
        losses.reconstruction_loss(torch.zeros(1), torch.zeros(1), "huber")


def test_smooth_l1_is_half_the_square_below_one_and_linear_above():
    recon, image = 3 * torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    distances = (recon - image).abs().flatten().tolist()
    assert min(distances) < 1 < max(distances)
    expected = sum(d * d / 2 if d < 1 else d - 0.5 for d in distances) / 96
    assert losses.reconstruction_loss(recon, image, "smooth_l1").item() == pytest.approx(expected, rel=1e-5)


# logits (b, n, v) whose KL is neither small nor at its largest, log v
SHAPE = (3, 5, 7)


def test_kl_to_uniform_is_its_formula():
    given = 2 * logits(*SHAPE)
    each = []
    for row in given.view(-1, 7).tolist():
        q = [math.exp(value) / sum(map(math.exp, row)) for value in row]
        each.append(sum(p * math.log(p / (1 / 7)) for p in q))
    assert losses.kl_to_uniform(given).item() == pytest.approx(sum(each) / 15)
    assert losses.kl_to_uniform(given, "dalle").item() == pytest.approx(sum(each))


def test_kl_to_uniform_goes_from_zero_to_the_logarithm_of_the_number_of_codes():
    assert losses.kl_to_uniform(torch.full(SHAPE, 3.0)).item() == pytest.approx(0, abs=1e-6)
    certain = torch.zeros(SHAPE).index_fill(-1, torch.tensor(2), 1e4).requires_grad_()
    loss = losses.kl_to_uniform(certain)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(7)) and torch.isfinite(certain.grad).all()


@pytest.mark.parametrize("repeats", [(4, 1, 1), (1, 9, 1)], ids=["images", "positions"])
def test_only_dalles_kl_grows_with_the_batch_and_the_image(repeats):
    one = logits(*SHAPE)
    many = one.repeat(repeats)
    assert torch.allclose(losses.kl_to_uniform(many), losses.kl_to_uniform(one))
    times = math.prod(repeats)
    assert torch.allclose(losses.kl_to_uniform(many, "dalle"), times * losses.kl_to_uniform(one, "dalle"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dalles_kl_is_that_of_its_code():
    given = logits(*SHAPE)
    log_q = given.log_softmax(dim=-1)
    log_uniform = torch.log(torch.tensor([1.0 / 7], dtype=torch.float64))
    expected = F.kl_div(log_uniform, log_q, None, None, "batchmean", log_target=True)
    assert torch.allclose(losses.kl_to_uniform(given, "dalle"), expected)


def test_kl_names_an_unknown_reduction():
    with pytest.raises(ValueError, match="'sum' is not known; expected 'mean' or 'dalle'"):
        losses.kl_to_uniform(torch.zeros(2), "sum")


@pytest.mark.parametrize("reduction", ["mean", "dalle"])
def test_kl_is_float32_under_autocast(reduction):
    given = logits(*SHAPE, dtype=torch.bfloat16)
    expected = losses.kl_to_uniform(given, reduction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.kl_to_uniform(given, reduction), expected)
    assert expected.dtype == torch.float32


def test_hinge_losses_match_their_formulas():
    real, fake = logits(3, 1, 2, 2), logits(3, 1, 2, 2)
    expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    assert torch.allclose(losses.hinge_discriminator_loss(real, fake), expected)
    assert torch.allclose(losses.hinge_generator_loss(fake), -fake.mean())


def test_bce_losses_match_their_formulas():
    real, fake = logits(3, 1, 2, 2), logits(3, 1, 2, 2)
    expected = (-torch.log(1 - torch.sigmoid(fake)) - torch.log(torch.sigmoid(real))).mean()
    assert torch.allclose(losses.bce_discriminator_loss(real, fake), expected)
    assert torch.allclose(losses.bce_generator_loss(fake), -torch.log(torch.sigmoid(fake)).mean())


def test_bce_losses_and_their_gradients_are_finite_for_extreme_logits():
    real, fake = torch.tensor([-1e4, 1e4], requires_grad=True), torch.tensor([1e4, -1e4], requires_grad=True)
    loss = losses.bce_discriminator_loss(real, fake) + losses.bce_generator_loss(fake)
    loss.backward()
    assert loss.item() == pytest.approx(1.5e4)
    assert torch.isfinite(real.grad).all() and torch.isfinite(fake.grad).all()


@pytest.mark.parametrize(
    "loss, inputs",
    [
        (losses.reconstruction_loss, 2),
        (lambda recon, image: losses.reconstruction_loss(recon, image, "l2"), 2),
        (lambda recon, image: losses.reconstruction_loss(recon, image, "smooth_l1"), 2),
        (losses.kl_to_uniform, 1),
        (lambda given: losses.kl_to_uniform(given, "dalle"), 1),
        (losses.hinge_discriminator_loss, 2),
        (losses.bce_discriminator_loss, 2),
        (losses.hinge_generator_loss, 1),
        (losses.bce_generator_loss, 1),
    ],
)
def test_gradients_and_precision(loss, inputs):
    assert torch.autograd.gradcheck(loss, [logits(2, 5) for _ in range(inputs)])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        given = [logits(2, 5, dtype=dtype) for _ in range(inputs)]
        value = loss(*given)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(*[tensor.float() for tensor in given]))
    assert loss(*[logits(2, 5) for _ in range(inputs)]).dtype == torch.float64


def test_mixed_precision_takes_the_more_precise():
    recon, image = torch.rand(4, dtype=torch.bfloat16), torch.rand(4, dtype=torch.float64)
    assert losses.reconstruction_loss(recon, image).dtype == torch.float64


class Square(nn.Module):
    """D(x) = scale * sum of x^2 over each 2x2 patch, so that d sum(D) / d x = 2 * scale * x."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, image):
        return 4 * self.scale * nn.functional.avg_pool2d(image.square(), 2).sum(1, keepdim=True)


def test_gradient_penalty_matches_its_formula_and_reaches_the_weights():
    discriminator, image = Square(), torch.rand(3, 2, 4, 4, dtype=torch.float64)
    penalty = losses.gradient_penalty(discriminator, image, weight=5.0)
    norms = 2 * 0.7 * image.flatten(1).norm(dim=1)
    assert torch.allclose(penalty, 5 * (norms - 1).square().mean())
    penalty.backward()
    by_hand = 5 * (2 * (norms - 1) * norms / 0.7).mean()
    assert torch.allclose(discriminator.scale.grad, by_hand)


def test_gradient_penalty_is_the_mean_over_images_and_leaves_the_image_alone():
    discriminator = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.LeakyReLU(0.1), nn.Conv2d(8, 1, 3))
    image = torch.rand(4, 3, 8, 8, requires_grad=True)
    penalty = losses.gradient_penalty(discriminator, image)
    each = [losses.gradient_penalty(discriminator, one) for one in image.split(1)]
    assert torch.allclose(penalty, torch.stack(each).mean(), atol=1e-6)
    penalty.backward()
    assert image.grad is None
    assert all(parameter.grad is not None for parameter in discriminator[:1].parameters() if parameter.ndim > 1)


def test_gradient_penalty_is_float32_under_autocast():
    discriminator = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 1, 3))
    image = torch.rand(2, 3, 8, 8)
    expected = losses.gradient_penalty(discriminator, image)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(losses.gradient_penalty(discriminator, image), expected)


def test_gradient_penalty_of_a_flat_discriminator_is_its_weight():
    discriminator = nn.Conv2d(3, 1, 1)
    nn.init.zeros_(discriminator.weight)
    penalty = losses.gradient_penalty(discriminator, torch.rand(2, 3, 4, 4))
    penalty.backward()
    assert penalty.item() == 10
    assert torch.isfinite(discriminator.weight.grad).all()


def test_adaptive_weight_is_the_clamped_ratio_of_norms():
    reference, adversarial = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 0.5])
    weight = losses.adaptive_weight(reference, adversarial)
    assert weight.item() == pytest.approx(10)
    assert weight.ndim == 0 and not weight.requires_grad
    assert losses.adaptive_weight(reference, adversarial, max_weight=2.0).item() == 2
    assert losses.adaptive_weight(reference, torch.zeros(2)).item() == 1e4
    assert losses.adaptive_weight(reference, torch.zeros(2), eps=0.1).item() == pytest.approx(50)
    assert losses.adaptive_weight(reference.bfloat16(), adversarial.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 5), "padding": (0, 2), "stride": 2, "dilation": (2, 1), "groups": 2},
    ],
)
def test_weight_through_the_cut_equals_autograd_through_the_layer(options):
    layer = nn.Conv2d(6, 4, **options)
    hidden, target = torch.randn(2, 6, 9, 9), torch.randn(1)
    judge = nn.Conv2d(4, 1, 2)
    recon = layer(hidden)
    parts = [(recon - target).abs().mean(), -judge(recon).square().mean()]
    expected = [torch.autograd.grad(part, layer.weight, retain_graph=True)[0] for part in parts]

    cut = recon.detach().requires_grad_()
    parts = [(cut - target).abs().mean(), -judge(cut).square().mean()]
    output_grads = [torch.autograd.grad(part, cut)[0] for part in parts]
    conv = {key: value for key, value in options.items() if key != "kernel_size"}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # changes nothing
        grads = losses.last_layer_grads(hidden, layer.weight.shape, *output_grads, **conv)

    assert grads.shape == (2, layer.weight.numel())
    assert torch.allclose(grads, torch.stack([grad.flatten() for grad in expected]), atol=1e-6)
    assert torch.allclose(losses.adaptive_weight(*grads), expected[0].norm() / expected[1].norm(), rtol=1e-5)
