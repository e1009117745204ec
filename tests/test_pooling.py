"""MEP pooling, with the arithmetic worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_rag.errors import InputError, StateMismatchError
from kalm_rag.states.pooling import MOST_RATIO, check_ratio, group_counts, group_ids, mean_groups, repool_factor


@pytest.mark.parametrize("ratio", [0, -1, True, False, 2.0, "4"], ids=repr)
def test_ratios_that_are_none(ratio: object) -> None:
    with pytest.raises(InputError, match="wanted a whole number >= 1"):
        check_ratio(ratio)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="wanted a whole number >= 1"):
        repool_factor(1, ratio)  # type: ignore[arg-type]


def test_a_ratio_beyond_any_model_is_refused() -> None:
    """2**70 ended in torch's own words, and 2**40 in an allocation of terabytes."""
    with pytest.raises(InputError, match=r"ratio is 1\.181e\+21; wanted at most 1048576"):
        check_ratio(2**70)
    assert check_ratio(MOST_RATIO) == MOST_RATIO


def test_a_ratio_beyond_the_passage_costs_no_padding() -> None:
    """A ratio of a million laid out a million rows per passage to average eight of them."""
    states = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[1.0] * 8, [1.0] * 5 + [0.0] * 3])
    pooled, total = mean_groups(states, counts, MOST_RATIO)
    assert total.tolist() == [[8.0], [5.0]]
    assert torch.allclose(pooled[:, 0], torch.stack([states[0].mean(0), states[1, :5].mean(0)]))
    assert group_ids(torch.tensor([[7, 8, 9]]), MOST_RATIO).shape == (1, 1, 128)


@pytest.mark.parametrize(("stored", "wanted", "factor"), [(1, None, 1), (4, None, 1), (4, 4, 1), (4, 16, 4), (1, 3, 3)])
def test_factor(stored: int, wanted: int | None, factor: int) -> None:
    assert repool_factor(stored, wanted) == factor


@pytest.mark.parametrize(("stored", "wanted", "nearest"), [(4, 2, 4), (4, 6, 4), (4, 11, 8), (3, 1, 3)])
def test_only_multiples_of_the_stored_ratio(stored: int, wanted: int, nearest: int) -> None:
    with pytest.raises(StateMismatchError, match=rf"only multiples of {stored} can be had. Ask for {nearest},"):
        repool_factor(stored, wanted)


def test_counts_by_hand() -> None:
    # 9 tokens at ratio 4 are groups of 4, 4, 1; 4 tokens are one full group; the rest is padding
    counts = group_counts(torch.tensor([9, 4, 1]), 4, 3)
    assert counts.tolist() == [[4, 4, 1], [4, 0, 0], [1, 0, 0]]
    assert counts.dtype is torch.float32


def test_weighted_mean_by_hand() -> None:
    # rows stand for 2, 2 and 1 tokens: (2 * 1 + 2 * 4) / 4 = 2.5, then 10 alone; second column (2 * 0 + 2 * 2) / 4 = 1
    states = torch.tensor([[[1.0, 0.0], [4.0, 2.0], [10.0, 3.0]]])
    pooled, counts = mean_groups(states, torch.tensor([[2.0, 2.0, 1.0]]), 2)
    assert pooled.tolist() == [[[2.5, 1.0], [10.0, 3.0]]]
    assert counts.tolist() == [[4.0, 1.0]]


def test_short_tail_weighs_by_its_tokens() -> None:
    # 5 tokens, ratio 4 -> rows of 4 and 1 tokens; one group: (4 * 1 + 1 * 6) / 5 = 2, not (1 + 6) / 2
    pooled, _ = mean_groups(torch.tensor([[[1.0], [6.0]]]), torch.tensor([[4.0, 1.0]]), 2)
    assert pooled.item() == pytest.approx(2.0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_padding_never_enters(garbage: float, factor: int) -> None:
    states = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    clean, _ = mean_groups(states.clone(), counts, factor)
    states[0, 3:] = garbage
    dirty, _ = mean_groups(states, counts, factor)
    assert torch.equal(clean, dirty)
    assert not clean[0, -(-3 // factor) :].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_means_are_float32(dtype: torch.dtype) -> None:
    # 2048 + 1 is not a float16: summed in half precision the mean of 3 x 2049 would be off
    pooled, _ = mean_groups(torch.ones(1, 3, 1, dtype=dtype), torch.tensor([[683.0, 683.0, 683.0]]), 3)
    assert pooled.dtype is torch.float32
    assert pooled.item() == 1.0


@settings(deadline=None, max_examples=60)
@given(tokens=st.lists(st.integers(1, 40), min_size=1, max_size=4), first=st.integers(1, 5), second=st.integers(1, 5))
def test_pooling_twice_is_pooling_once(tokens: list[int], first: int, second: int) -> None:
    """Means of nested groups nest: the states kept at one ratio give any multiple of it, as if pooled directly."""
    longest = max(tokens)
    lengths = torch.tensor(tokens)
    states = torch.randn(len(tokens), longest, 4, generator=torch.Generator().manual_seed(longest), dtype=torch.float64)
    ones = group_counts(lengths, 1, longest)
    direct, direct_counts = mean_groups(states, ones, first * second)
    once, counts = mean_groups(states, ones, first)
    assert torch.equal(counts, group_counts(lengths, first, once.shape[1]))
    twice, twice_counts = mean_groups(once, counts, second)
    width = direct.shape[1]
    assert torch.allclose(twice[:, :width], direct, atol=1e-5)
    assert torch.equal(twice_counts[:, :width], direct_counts)
    for index, length in enumerate(tokens):  # and both are the plain mean, computed slowly
        for group in range(-(-length // (first * second))):
            rows = states[index, group * first * second : min(length, (group + 1) * first * second)]
            assert torch.allclose(direct[index, group], rows.mean(0).float(), atol=1e-5)
