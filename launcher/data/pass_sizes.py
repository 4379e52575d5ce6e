"""Sizes of the passes of a global batch, if short samples may share a pass with more of them than long ones."""

from __future__ import annotations

from collections.abc import Sequence

MOST = 2
"""The most samples of such a pass, in micro-batches: what a pass needs for each sample stays within twice what
was planned."""


def pass_sizes(descending: Sequence[int], num_passes: int) -> list[int]:
    """Return the number of samples of each pass, so that the largest pass is as small as it can be.

    A pass costs its number of samples times the longest of them, as it is padded. descending: the lengths of
    all samples, longest first, a multiple of `num_passes`; each pass takes the next of them.
    """
    size = len(descending) // num_passes
    limit, low = MOST * size, max(1, descending[0])
    high = low * size
    while low < high:  # `high` is always enough: passes of equal size
        middle = (low + high) // 2
        if sum(_sizes(descending, num_passes, middle, limit)) == len(descending):
            high = middle
        else:
            low = middle + 1
    return _sizes(descending, num_passes, high, limit)


def _sizes(descending: Sequence[int], num_passes: int, cost: int, limit: int) -> list[int]:
    """Return the numbers of samples of passes of at most `cost`, at least one each; the last samples are left
    over if the passes cannot hold all."""
    sizes: list[int] = []
    begin = 0
    for left in range(num_passes - 1, -1, -1):
        sizes.append(min(cost // max(1, descending[begin]), limit, len(descending) - begin - left))
        begin += sizes[-1]
    return sizes
