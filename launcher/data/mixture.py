"""The number of samples of each source in an epoch: by weights, by temperature, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor

from launcher.data.section import Mixing, Sources

_DIGITS = 12
"""Significant digits kept of a size's power: mathematical libraries differ in the last ones."""


def in_an_epoch(sizes: Sequence[int], given: Sources, mixing: Mixing | None) -> list[int]:
    """Return the number of samples of each source in an epoch, given the number that each source has.

    Without weights and temperature, all samples. Otherwise in the requested shares, exact but for rounding
    (largest remainder); `stopping_strategy` determines their total.
    """
    mixing = mixing or Mixing()
    weights = [source.weight for source in given.sources or ()]
    if mixing.temperature == 1 and not any(weights):
        return list(sizes)
    drawn = [
        Fraction(weight) if weight else Fraction(f"{size ** (1 / mixing.temperature):.{_DIGITS}g}")
        for weight, size in zip(weights, sizes, strict=True)
    ]
    shares = [one / sum(drawn) for one in drawn]
    ends = [size / share for size, share in zip(sizes, shares, strict=True)]
    total = floor(min(ends)) if mixing.stopping_strategy == "first_exhausted" else ceil(max(ends))
    counts = [floor(total * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - total * shares[k], k))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return [max(1, count) for count in counts]
