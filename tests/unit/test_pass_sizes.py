"""Passes of a balanced batch are as even as they can be, and hold at most twice a micro-batch."""

from __future__ import annotations

from itertools import accumulate, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.pass_sizes import MOST, pass_sizes


def largest(lengths: list[int], sizes: list[int]) -> int:
    """What the largest pass costs: its number of samples times the longest of them."""
    firsts = accumulate(sizes, initial=0)
    return max(size * lengths[first] for size, first in zip(sizes, firsts, strict=False))


@st.composite
def batches(draw: st.DrawFn, most_passes: int = 8, most_samples: int = 20) -> tuple[list[int], int]:
    num_passes, micro = draw(st.integers(1, most_passes)), draw(st.integers(1, most_samples))
    size = num_passes * micro
    lengths = draw(st.lists(st.integers(0, 300), min_size=size, max_size=size))
    return sorted(lengths, reverse=True), num_passes


@given(batches())
@settings(max_examples=300, deadline=None)
def test_every_sample_has_a_place_and_no_pass_costs_more_than_equal_ones(
    batch: tuple[list[int], int],
) -> None:
    lengths, num_passes = batch
    micro = len(lengths) // num_passes
    sizes = pass_sizes(lengths, num_passes)
    assert len(sizes) == num_passes and sum(sizes) == len(lengths)
    assert min(sizes) >= 1 and max(sizes) <= MOST * micro
    assert largest(lengths, sizes) <= largest(lengths, [micro] * num_passes)


@given(batches(most_passes=3, most_samples=5))
@settings(max_examples=100, deadline=None)
def test_no_other_sizes_are_better(batch: tuple[list[int], int]) -> None:
    lengths, num_passes = batch
    limit = MOST * len(lengths) // num_passes
    ends = combinations(range(1, len(lengths)), num_passes - 1)
    every = [
        [end - begin for begin, end in zip((0, *cut), (*cut, len(lengths)), strict=True)] for cut in ends
    ]
    best = min(largest(lengths, sizes) for sizes in every if max(sizes) <= limit)
    assert largest(lengths, pass_sizes(lengths, num_passes)) == best


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([40, 20, 20, 20], [1, 3]),  # 40 and 60, where two each would be 80 and 40
        ([8, 8, 8, 8], [2, 2]),
        ([9, 0, 0, 0, 0, 0], [1, 4, 1]),  # at most twice a micro-batch
    ],
)
def test_by_hand(lengths: list[int], sizes: list[int]) -> None:
    assert pass_sizes(lengths, len(sizes)) == sizes
