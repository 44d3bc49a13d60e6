"""Draws of codes from logits: each limit and the guidance against distributions written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vqdist import UserError
from vqdist.sampling import DrawOptions, draw, guide, keep_likely, uniform_per_image

PROBABILITIES = torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05])
LOGITS = PROBABILITIES.log() + 1.7  # any constant may be added
DRAWS = 100_000


def drawn_frequencies(options: DrawOptions) -> Tensor:
    """Return how often each of the five codes is drawn."""
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(3))
    codes = draw(LOGITS.expand(DRAWS, -1), uniform, options)
    assert codes.dtype == torch.int64 and codes.shape == (DRAWS,)
    return torch.bincount(codes, minlength=5) / DRAWS


# options -> the distribution that is drawn from, by hand
DISTRIBUTIONS = [
    ({}, [0.4, 0.05, 0.3, 0.2, 0.05]),
    ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0, 0]),
    ({"top_k": 4}, [0.4, 0.05, 0.3, 0.2, 0.05]),  # the two last ones tie
    ({"top_k": 100}, [0.4, 0.05, 0.3, 0.2, 0.05]),
    ({"top_p": 0.4}, [1, 0, 0, 0, 0]),
    ({"top_p": 0.6}, [4 / 7, 0, 3 / 7, 0, 0]),
    ({"top_p": 0.75}, [4 / 9, 0, 3 / 9, 2 / 9, 0]),
    ({"top_p": 1.0}, [0.4, 0.05, 0.3, 0.2, 0.05]),
    ({"min_p": 0.6}, [4 / 7, 0, 3 / 7, 0, 0]),  # 0.6 * 0.4 = 0.24
    ({"min_p": 0.4}, [4 / 9, 0, 3 / 9, 2 / 9, 0]),
    ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
    ({"top_k": 3, "min_p": 0.6}, [4 / 7, 0, 3 / 7, 0, 0]),
    ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
    # at temperature 1/2 probabilities are squared, after what is cut off was decided
    ({"temperature": 0.5}, [0.16 / 0.295, 0.0025 / 0.295, 0.09 / 0.295, 0.04 / 0.295, 0.0025 / 0.295]),
    ({"temperature": 0.5, "top_p": 0.75}, [16 / 29, 0, 9 / 29, 4 / 29, 0]),
    ({"temperature": 2.0, "min_p": 0.4}, [2 / (2 + 3**0.5 + 2**0.5), 0, 3**0.5 / (2 + 3**0.5 + 2**0.5), -1, 0]),
]


@pytest.mark.parametrize(("options", "expected"), DISTRIBUTIONS)
def test_draws_follow_the_distribution_written_by_hand(options, expected):
    expected = torch.tensor(expected)
    expected[expected < 0] = 1 - expected[expected >= 0].sum()
    found = drawn_frequencies(DrawOptions(**options))
    assert not found[expected == 0].any(), "a code that was cut off is drawn"
    kept = expected > 0
    chi_squared = float((DRAWS * (found - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_squared < 20  # of at most 4 degrees of freedom: once in 2,000 seeds, and the seed is fixed


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 2]),
        ({"top_p": 0.71}, [0, 2, 3]),
        ({"top_p": 1e-6}, [0]),
        ({"min_p": 0.51}, [0, 2]),
        ({"min_p": 0.1}, [0, 1, 2, 3, 4]),
        ({"top_k": 4, "top_p": 0.71, "min_p": 0.6}, [0, 2]),
    ],
)
def test_limits_mask_exactly(limit, kept):
    found = keep_likely(LOGITS, **limit)
    assert torch.isfinite(found).nonzero().flatten().tolist() == kept
    assert torch.equal(found[kept], LOGITS[kept])


def test_a_draw_is_where_the_cumulative_sum_passes_the_uniform_number():
    uniform = torch.tensor([0.0, 0.39, 0.41, 0.46, 0.74, 0.76, 0.94, 0.96, 0.9999999])
    codes = draw(LOGITS.expand(9, -1), uniform, DrawOptions())
    assert codes.tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4]


def test_the_largest_uniform_number_never_draws_an_impossible_code():
    logits = torch.tensor([1.0, -math.inf, 2.0, -math.inf, -math.inf])
    uniform = torch.tensor([1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), uniform, DrawOptions()).tolist() == [2, 2]


def test_draws_of_a_batch_are_those_of_each_item():
    logits = torch.randn(6, 7, 11, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(6, 7, generator=torch.Generator().manual_seed(1))
    options = DrawOptions(top_k=5, temperature=1.3)
    whole = draw(logits, uniform, options)
    for row in range(6):
        assert torch.equal(draw(logits[row], uniform[row], options), whole[row])


def test_guidance_is_its_formula():
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    assert guide(conditional, unconditional, 3.0).tolist() == [2.0, 8.0]


def test_uniform_numbers_belong_to_their_seed():
    rows = uniform_per_image(5, [3, 9, 3])
    assert rows.shape == (3, 5) and torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(uniform_per_image(5, [9])[0], rows[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is not possible; it must be at least 0"),
        ({"temperature": math.inf}, "temperature inf is not possible"),
        ({"top_k": 0}, "top_k 0 is not possible; it must be at least 1"),
        ({"top_p": 0.0}, "top_p 0.0 is not possible; it must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p 1.5 is not possible"),
        ({"cfg": -0.1}, "cfg -0.1 is not possible"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        DrawOptions(**options)
    assert message in str(error.value) and "\n" not in str(error.value)
