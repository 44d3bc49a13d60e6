"""Draws against the distributions they are drawn from, and their gradients against the published algorithms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqdist import sampling

DRAWS = 200_000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_image(shape: tuple[int, ...], seeds) -> Tensor:
    return sampling.gumbel_noise_per_image(shape, seeds)


def many_draws(source: str, per_draw: int = 1) -> Tensor:
    """Noise (draws, per_draw) of either source."""
    if source == "batch":
        return sampling.gumbel_noise((DRAWS, per_draw), generator=torch.Generator().manual_seed(7))
    return per_image((DRAWS // 50, per_draw), range(50)).flatten(0, 1)


both_sources = pytest.mark.parametrize("source", ["batch", "per image"])


# --------------------------------------------------------------------------------------------- Gumbel noise


@both_sources
def test_noise_has_the_moments_of_a_gumbel_distribution(source):
    noise = many_draws(source).double()
    variance = math.pi**2 / 6
    assert noise.mean().item() == pytest.approx(0.577216, abs=4 * math.sqrt(variance / DRAWS))
    assert noise.var().item() == pytest.approx(variance, rel=0.02)


@both_sources
def test_noise_has_the_cumulative_distribution_of_gumbel(source):
    """Kolmogorov and Smirnov's distance to exp(-exp(-x)); 2 exp(-2 n d^2) is its probability."""
    values = many_draws(source).double().flatten().sort().values
    expected = torch.exp(-torch.exp(-values))
    ranks = torch.arange(DRAWS + 1, dtype=torch.float64) / DRAWS
    distance = max((ranks[1:] - expected).max().item(), (expected - ranks[:-1]).max().item())
    assert 2 * math.exp(-2 * DRAWS * distance**2) > 1e-3


def chi_squared_probability(counts: Tensor, expected: Tensor) -> float:
    """Return how likely counts are that far from what is expected, or further."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@both_sources
def test_the_maximum_of_logits_and_noise_is_a_draw_from_their_softmax(source):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
    counts = (logits + many_draws(source, per_draw=6)).argmax(dim=-1).bincount(minlength=6).double()
    assert chi_squared_probability(counts, DRAWS * logits.double().softmax(-1)) > 1e-3
    assert chi_squared_probability(counts, DRAWS * (logits.double() / 0.95).softmax(-1)) < 1e-6  # it would be seen


def test_noise_of_an_image_depends_on_its_seed_only():
    shape = (3, 5, 7)
    alone = per_image(shape, [11])[0]
    assert torch.equal(per_image(shape, [4, 11, 9])[1], alone)
    assert torch.equal(per_image(shape, [11, 4])[0], alone)
    assert torch.equal(per_image(shape, iter([1, 2, 3, 4, 5, 6, 11]))[6], alone)
    assert not torch.equal(per_image(shape, [12])[0], alone)


def test_noise_of_images_is_independent_between_them_and_within():
    noise = per_image((1000,), range(60)).double()
    rows = torch.corrcoef(noise) - torch.eye(60)
    assert rows.abs().max() < 5 / math.sqrt(1000)
    neighbours = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1]
    assert neighbours.abs() < 4 / math.sqrt(60_000)


def test_noise_of_images_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    per_image((4,), [1, 2])
    assert torch.equal(torch.rand(3), expected)


def test_noise_of_a_batch_comes_from_the_generator_that_is_given():
    drawn = [sampling.gumbel_noise((5,), generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(3)
    assert torch.equal(sampling.gumbel_noise((5,)), drawn[0])


def test_the_noise_of_no_images_is_empty():
    noise = per_image((2, 3), [])
    assert noise.shape == (0, 2, 3) and noise.dtype == torch.float32


EXTREME = [0.0, 1e-45, 2**-24, 0.5, 1 - 2**-24]  # the least and the largest that torch's uniform draws can be


@both_sources
def test_extreme_uniform_draws_give_finite_noise(source, monkeypatch):
    uniform = torch.tensor(EXTREME)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform.clone())
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, **_: self.copy_(uniform))
    noise = sampling.gumbel_noise((5,)) if source == "batch" else per_image((5,), [0])[0]
    assert torch.isfinite(noise).all() and bool((noise.diff() >= 0).all())
    assert noise[3:].tolist() == pytest.approx([-math.log(math.log(2)), 24 * math.log(2)], rel=1e-6)
    logits = torch.full((5,), 1e4)
    for temperature in (1e-3, 1.0):
        weights = sampling.gumbel_softmax(logits, noise, temperature)
        assert torch.isfinite(weights).all() and weights.sum().item() == pytest.approx(1)


# --------------------------------------------------------------------------------------------- relaxed draws


def gumbel_softmax_and_torchs(hard: bool, temperature: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Value and gradient of ours and torch's, of the same noise."""
    results = []
    for theirs in (False, True):
        logits = normal(3, 4, 8).float().requires_grad_()
        torch.manual_seed(5)
        if theirs:
            weights = F.gumbel_softmax(logits, tau=temperature, hard=hard)
        else:
            noise = -torch.empty_like(logits.detach()).exponential_().log()
            weights = sampling.gumbel_softmax(logits, noise, temperature)
            weights = sampling.straight_through(weights) if hard else weights
        (weights * normal(3, 4, 8, seed=1)).sum().backward()
        results.append((weights.detach(), logits.grad))
    return tuple(results)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.9, 2.0])
def test_relaxed_draws_are_torchs_of_the_same_noise(hard, temperature):
    ours, theirs = gumbel_softmax_and_torchs(hard, temperature)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_a_cold_draw_is_one_hot_and_a_hot_one_is_even():
    logits, noise = normal(20, 8), normal(20, 8, seed=1)
    cold, hot = (sampling.gumbel_softmax(logits, noise, temperature) for temperature in (1e-5, 1e4))
    assert torch.allclose(cold, F.one_hot((logits + noise).argmax(-1), 8).double(), atol=1e-3)
    assert torch.allclose(hot, torch.full_like(hot, 1 / 8), atol=1e-3)


def test_straight_through_is_one_hot_with_the_gradient_of_the_soft_draw():
    logits, upstream = normal(50, 16).float().requires_grad_(), normal(50, 16, seed=1).float()
    soft = logits.softmax(dim=-1)
    hard = sampling.straight_through(soft)
    assert torch.equal(hard, F.one_hot(logits.argmax(dim=-1), 16).float())
    gradients = [torch.autograd.grad((w * upstream).sum(), logits, retain_graph=True)[0] for w in (hard, soft)]
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_straight_through_chooses_one_of_equals():
    assert sampling.straight_through(torch.full((3, 4), 0.25)).sum(dim=-1).tolist() == [1, 1, 1]


# --------------------------------------------------------------------------------------------- ReinMax


def reinmax_by_the_paper(theta: Tensor, noise: Tensor, tau: float) -> Tensor:
    """arXiv 2304.08612, algorithm 2."""
    pi_0 = theta.softmax(-1)
    b = F.one_hot((theta + noise).argmax(-1), theta.shape[-1]).to(theta.dtype)  # the draw, by the Gumbel maximum
    pi_1 = (b + (theta / tau).softmax(-1)) / 2
    pi_1 = ((pi_1.log() - theta).detach() + theta).softmax(-1)
    pi_2 = 2 * pi_1 - 0.5 * pi_0
    return pi_2 - pi_2.detach() + b


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
def test_reinmax_is_the_papers_algorithm(tau):
    noise = sampling.gumbel_noise((40, 6), generator=torch.Generator().manual_seed(2)).double()
    upstream = normal(40, 6, seed=1)
    values, gradients = [], []
    for function in (sampling.reinmax, reinmax_by_the_paper):
        theta = normal(40, 6).requires_grad_()
        value = function(theta, noise, tau)
        (value * upstream).sum().backward()
        values.append(value)
        gradients.append(theta.grad)
    one_hot = F.one_hot((normal(40, 6) + noise).argmax(-1), 6).double()
    assert torch.equal(values[0], one_hot) and torch.allclose(values[1], one_hot)
    assert torch.allclose(*gradients, atol=1e-12) and gradients[0].abs().sum() > 1


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_reinmax_of_large_logits_has_a_finite_gradient(scale, tau):
    logits = (scale * normal(30, 6)).float()
    logits[0] = torch.tensor([scale, -scale, 0, 0, 0, 0])
    logits.requires_grad_()
    noise = sampling.gumbel_noise((30, 6), generator=torch.Generator().manual_seed(2))
    noise[1] += F.one_hot(logits[1].argmin(), 6) * 3 * scale  # a draw that is as good as impossible
    value = sampling.reinmax(logits, noise, tau)
    (value * normal(30, 6, seed=1)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(value, F.one_hot((logits + noise).argmax(-1), 6).float())


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_reinmax_of_large_logits_is_as_exact_as_that_of_small_ones(scale):
    """Logits that differ little but are large themselves."""
    theta, upstream = (scale + normal(30, 6)).float(), normal(30, 6, seed=1)
    noise = sampling.gumbel_noise((30, 6), generator=torch.Generator().manual_seed(2))
    gradients = []
    for logits, function in ((theta.clone(), sampling.reinmax), (theta.double(), reinmax_by_the_paper)):
        logits.requires_grad_()
        value = function(logits, noise.to(logits.dtype), 1.0)
        (value * upstream.to(logits.dtype)).sum().backward()
        gradients.append(logits.grad.double())
    assert torch.allclose(*gradients, atol=1e-6)


EVERY_DRAW = torch.eye(5, dtype=torch.float64)
PROBLEMS = 40


def decoder_loss(problem: int, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the squared error of a small random decoder of draws (n, 5), as (n,)."""
    codebook, last = normal(5, 16, seed=problem), normal(16, 3, seed=100 + problem) / 4
    target = normal(3, seed=200 + problem)
    return lambda draws: (activation(draws @ codebook) @ last - target).square().sum(-1)


def biases(problem: int, activation: Callable[[Tensor], Tensor]) -> list[float]:
    """Return how far the expected gradients of ReinMax and straight-through are from the exact one, relative to it.

    Exact and ReinMax: the sum over all draws of probability times loss, each draw made certain by its noise.
    """
    theta, loss = normal(5, seed=300 + problem), decoder_loss(problem, activation)
    noise = many_draws("batch", per_draw=5)[:20_000].double()

    def gradient(expected_loss: Callable[[Tensor], Tensor]) -> Tensor:
        logits = theta.clone().requires_grad_()
        expected_loss(logits).backward()
        return logits.grad

    exact = gradient(lambda logits: logits.softmax(-1) @ loss(EVERY_DRAW))
    reinmax = gradient(
        lambda logits: theta.softmax(-1) @ loss(sampling.reinmax(logits.expand(5, 5), 100 * EVERY_DRAW, 1.0))
    )
    straight_through = gradient(
        lambda logits: loss(
            sampling.straight_through(sampling.gumbel_softmax(logits.expand_as(noise), noise, 1.0))
        ).mean()
    )
    return [float((estimate - exact).norm() / exact.norm()) for estimate in (reinmax, straight_through)]


def test_reinmax_is_exact_where_the_loss_is_quadratic():
    """Heun's method integrates a linear gradient without error."""
    reinmax, straight_through = zip(*(biases(problem, lambda x: x) for problem in range(PROBLEMS)))
    assert max(reinmax) < 1e-12
    assert sum(straight_through) > 0.3 * PROBLEMS


@pytest.mark.parametrize("activation", [F.relu, F.softplus])
def test_reinmax_is_less_biased_than_straight_through(activation):
    """On average: there are losses, of high powers for example, where one or the other is nearer."""
    mean = torch.tensor([biases(problem, activation) for problem in range(PROBLEMS)]).mean(dim=0)
    assert mean[0] < 0.9 * mean[1]


# --------------------------------------------------------------------------------------------- precision


FUNCTIONS = {
    "gumbel_softmax": lambda logits, noise: sampling.gumbel_softmax(logits, noise, 0.7),
    "straight_through": lambda logits, noise: sampling.straight_through(sampling.gumbel_softmax(logits, noise, 0.7)),
    "reinmax": lambda logits, noise: sampling.reinmax(logits, noise, 0.7),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_draws_are_computed_in_float32_at_least(function):
    noise = sampling.gumbel_noise((4, 9), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = normal(4, 9).to(dtype)
        expected = function(logits.float(), noise)
        assert expected.dtype == torch.float32 and torch.equal(function(logits, noise), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(logits, noise), expected)
    assert function(normal(4, 9), noise).dtype == torch.float64


def test_the_gradient_of_a_soft_draw_is_that_of_its_value():
    noise = normal(3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda x: sampling.gumbel_softmax(x, noise, 0.7), normal(3, 5).requires_grad_())
