"""Attention over scales equals one call with the mask of all tokens, and keeps no matrix of them."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from vqdist.models.multiscale import scale_lengths
from vqdist.models.scale_attention import FEW, ScaleAttention

SCALES = {
    "published": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "small": (1, 2, 4),
    "large first": (9, 10),
    "one": (3,),
    "one large": (12,),
}


def masked(q, k, v, lengths):
    level = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    number = q.shape[-2]
    sees = (level[:, None] >= level[None, :])[:number, :number]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)


def drawn(number: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, number, 8, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_it_equals_the_mask_of_all_tokens(scales):
    lengths = scale_lengths(scales)
    attend = ScaleAttention(lengths)
    for number in accumulate(lengths):  # of some scales, as sampling without a cache has them
        ours, theirs = drawn(number), drawn(number)
        found, _ = attend(*ours)
        expected = masked(*theirs, lengths)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        weight = torch.randn_like(found)
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_a_scale_alone_sees_all_cached_keys(scales):
    lengths = scale_lengths(scales)
    attend = ScaleAttention(lengths)
    q, k, v = drawn(sum(lengths))
    whole, _ = attend(q, k, v)
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        found, _ = attend(q[:, :, end - length : end], k[:, :, :end], v[:, :, :end])
        torch.testing.assert_close(found, whole[:, :, end - length : end], atol=1e-6, rtol=1e-5)


def test_no_matrix_of_all_tokens_is_kept():
    lengths = scale_lengths(SCALES["published"])
    number = sum(lengths)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda it: kept.append(it.shape) or it, lambda it: it):
        ScaleAttention(lengths)(*drawn(number))
    few = next(end for end, length in zip(accumulate(lengths), lengths, strict=True) if length >= FEW)
    assert kept and all(shape[-2:].numel() <= max(number * 8, few * few) for shape in kept if len(shape) > 1)


def test_dropout_is_of_training_alone():
    lengths = scale_lengths(SCALES["small"])
    attend, (q, k, v) = ScaleAttention(lengths, dropout=0.5), drawn(sum(lengths))
    torch.manual_seed(1)
    in_training, _ = attend(q, k, v)
    assert not torch.allclose(in_training, attend.eval()(q, k, v)[0])
    torch.testing.assert_close(attend(q, k, v)[0], masked(q, k, v, lengths), atol=1e-6, rtol=1e-5)
