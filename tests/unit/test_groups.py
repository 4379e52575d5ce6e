"""Rows in groups of like lengths: every row is in one group, and each group is measured alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launcher.tasks.groups import by_length, measured


def test_groups_of_twice_the_length() -> None:
    assert by_length([1, 2, 3, 4, 5, 8, 9, 0]) == {
        "1": [0, 7], "2": [1], "3 to 4": [2, 3], "5 to 8": [4, 5], "9 to 16": [6],
    }  # fmt: skip
    assert by_length([]) == {}


@given(st.lists(st.integers(0, 100_000)))
def test_every_row_is_in_the_group_that_its_name_says(lengths: list[int]) -> None:
    groups = by_length(lengths)
    assert sorted(place for places in groups.values() for place in places) == list(range(len(lengths)))
    for name, places in groups.items():
        low, _, high = name.partition(" to ")
        for place in places:
            assert int(low) <= max(1, lengths[place]) <= int(high or low)


def test_a_group_without_rows_is_not_measured() -> None:
    found = measured({"a": [0, 2], "b": []}, lambda places: {"sum": float(sum(places))})
    assert found == {"a": {"sum": 2.0, "num_rows": 2}}
