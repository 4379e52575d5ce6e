from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.training.data.order import Order

seeds = st.integers(0, 2**63)


@given(seed=seeds, num_items=st.integers(1, 3000), epoch=st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_every_epoch_is_a_permutation(seed: int, num_items: int, epoch: int) -> None:
    epoch_items = Order(seed, num_items).indices(epoch * num_items, num_items)
    assert np.array_equal(np.sort(epoch_items), np.arange(num_items))


@given(seed=seeds, num_items=st.integers(1, 500), start=st.integers(0, 2000), count=st.integers(0, 600))
@settings(max_examples=150, deadline=None)
def test_seeking_equals_iterating(seed: int, num_items: int, start: int, count: int) -> None:
    order = Order(seed, num_items)
    walked = order.indices(0, start + count)
    assert np.array_equal(order.indices(start, count), walked[start:])
    assert all(
        order.at(position) == walked[position] for position in range(start, min(start + count, start + 5))
    )


def test_the_order_is_a_fixed_function_of_the_seed() -> None:
    # Written down once: a change of these breaks the resuming of every run there is.
    assert Order(17, 10).indices(0, 20).tolist() == PINNED_SMALL
    assert Order(17, 1_000_003).indices(10**12, 4).tolist() == PINNED_LARGE


PINNED_SMALL = [5, 4, 6, 3, 8, 2, 1, 9, 7, 0, 8, 9, 7, 6, 2, 0, 5, 1, 3, 4]
PINNED_LARGE = [503685, 811184, 20992, 557208]


def test_epochs_and_seeds_differ() -> None:
    orders = [Order(seed, 1000).indices(epoch * 1000, 1000) for seed in range(5) for epoch in range(5)]
    for number, one in enumerate(orders):
        for other in orders[number + 1 :]:
            assert np.count_nonzero(one == other) < 15


def test_no_place_is_preferred() -> None:
    num_items, num_epochs = 16, 4000
    epochs = Order(3, num_items).indices(0, num_items * num_epochs).reshape(num_epochs, num_items)
    counts = np.stack([np.bincount(epochs[:, place], minlength=num_items) for place in range(num_items)])
    expected = num_epochs / num_items
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # (16 - 1)^2 degrees of freedom: 225, with a standard deviation of 21.
    assert chi_squared < 225 + 6 * 21


def test_without_shuffling_items_come_as_they_are() -> None:
    assert Order(5, 4, shuffle=False).indices(2, 6).tolist() == [2, 3, 0, 1, 2, 3]


def test_far_positions_cost_as_little_as_near_ones() -> None:
    order = Order(1, 7_000_000_000)
    assert 0 <= order.at(10**18) < 7_000_000_000


def test_an_order_needs_items() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        Order(1, 0)
