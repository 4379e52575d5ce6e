"""Metrics of an evaluation's rows in groups: by length, or by a kind that the task knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

NUM_ROWS = "num_rows"


def by_length(lengths: Sequence[int]) -> dict[str, list[int]]:
    """Return the indices of the rows in each group of lengths, shortest first; a group spans a power of two
    (`17 to 32`)."""
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault((max(int(length), 1) - 1).bit_length(), []).append(place)
    return {_name(1 << number): places for number, places in sorted(groups.items())}


def _name(longest: int) -> str:
    return f"{longest // 2 + 1} to {longest}" if longest > 2 else str(longest)


def measured(
    groups: Mapping[str, Sequence[int]], measure: Callable[[Sequence[int]], Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the metrics of `measure` for the indices of each group, followed by `num_rows`."""
    return {name: {**measure(places), NUM_ROWS: len(places)} for name, places in groups.items() if places}
