from __future__ import annotations

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.training.data.packing import gather_sums, one_each, pack


@given(data=st.data(), capacity=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_every_sample_is_in_one_pack_and_every_pack_fits(data: st.DataObject, capacity: int) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=200)), dtype=np.int64)
    packs = pack(lengths, capacity)
    assert np.array_equal(np.sort(packs.samples), np.arange(len(lengths)))
    sums = gather_sums(packs, lengths)
    assert len(sums) == len(packs.offsets) - 1
    assert np.all(sums <= capacity)
    assert np.all(np.diff(packs.offsets) > 0)
    members = [packs.samples[a:b].tolist() for a, b in zip(packs.offsets, packs.offsets[1:], strict=False)]
    assert all(pack_members == sorted(pack_members) for pack_members in members)
    assert [m[0] for m in members] == sorted(m[0] for m in members)


@given(data=st.data(), capacity=st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_no_pack_is_left_open_that_a_later_one_would_have_fitted_in(
    data: st.DataObject, capacity: int
) -> None:
    lengths = np.array(
        data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=200)), dtype=np.int64
    )
    sums = np.sort(gather_sums(pack(lengths, capacity), lengths))
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> int:
    """The textbook: one sample at a time into the fullest pack that has room. The number of packs."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    return len(rooms)


@pytest.mark.parametrize("spread", [0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("mean", [60, 180, 400])
def test_at_least_as_full_as_best_fit_decreasing(mean: int, spread: float) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(mean), spread, 5000).astype(int), 1, 1024)
    assert len(pack(lengths, 1024).offsets) - 1 <= 1.002 * best_fit_decreasing(lengths, 1024)


def test_the_lengths_alone_decide() -> None:
    lengths = np.random.default_rng(0).integers(1, 1024, 5000)
    first, second = pack(lengths, 1024), pack(lengths.astype(np.int32), 1024)
    assert np.array_equal(first.offsets, second.offsets)
    assert np.array_equal(first.samples, second.samples)


def test_fill() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.7, 20_000).astype(int), 1, 1024)
    packs = pack(lengths, 1024)
    assert lengths.sum() / ((len(packs.offsets) - 1) * 1024) > 0.99


def test_no_samples_no_packs() -> None:
    packs = pack(np.array([], dtype=np.int64), 8)
    assert packs.offsets.tolist() == [0]
    assert gather_sums(packs, np.array([], dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("lengths", [[9], [0, 3]])
def test_a_sample_that_fits_nowhere_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="between 1 and the capacity of 8"):
        pack(np.array(lengths), 8)


def test_one_each() -> None:
    packs = one_each(3)
    assert packs.samples.tolist() == [0, 1, 2]
    assert gather_sums(packs, np.array([5, 6, 7])).tolist() == [5, 6, 7]
