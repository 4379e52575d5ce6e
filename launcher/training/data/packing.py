"""Packing: several samples into one row of fixed capacity, best fit in decreasing order of length.

Samples of equal length are interchangeable, so they are placed a whole class at a time: the work grows with the number
of different lengths and fill levels, not with the number of samples. The result follows from the lengths alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Packs(NamedTuple):
    """Pack p holds samples[offsets[p]:offsets[p+1]], in ascending order; packs are in the order of their first sample."""

    offsets: np.ndarray
    """int64 [num_packs + 1]"""
    samples: np.ndarray
    """int64 [num_samples]"""


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Put every sample into exactly one pack of at most `capacity` tokens. Raises ValueError for a sample that fits in none."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths must be between 1 and the capacity of {capacity}, not {lengths.min()} to {lengths.max()}")
    by_length = np.argsort(-lengths, kind="stable")
    descending = lengths[by_length]
    starts = np.flatnonzero(np.diff(descending, prepend=0))
    space = _Space(capacity)
    assigned = [
        space.place(int(descending[start]), int(end - start)) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True)
    ]
    packs = np.empty(len(lengths), dtype=np.int64)
    packs[by_length] = np.concatenate(assigned) if assigned else np.empty(0, dtype=np.int64)
    return _in_order(packs, space.num_packs)


class _Space:
    """The open packs by how many tokens still fit."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_packs = 0
        self.open: dict[int, list[np.ndarray]] = {}
        self.mask = 0
        """Bit s is set where some pack has room for exactly s tokens."""

    def place(self, length: int, count: int) -> np.ndarray:
        """The packs, int64 [count], of `count` samples of one length: always the fullest pack that has room."""
        placed: list[np.ndarray] = []
        while count:
            above = self.mask >> length
            if above:
                room = length + (above & -above).bit_length() - 1
                waiting = self.open.pop(room)
                packs = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
                self.mask ^= 1 << room
            else:
                room = self.capacity
                new = -(-count // (room // length))
                packs = np.arange(self.num_packs, self.num_packs + new)
                self.num_packs += new
            each = room // length
            filled = min(count // each, len(packs))
            placed.append(np.repeat(packs[:filled], each))
            self._keep(packs[:filled], room - each * length)
            count -= filled * each
            rest = packs[filled:]
            if count and len(rest):
                placed.append(np.repeat(rest[:1], count))
                self._keep(rest[:1], room - count * length)
                count, rest = 0, rest[1:]
            self._keep(rest, room)
        return np.concatenate(placed)

    def _keep(self, packs: np.ndarray, room: int) -> None:
        if len(packs) and room:
            self.open.setdefault(room, []).append(packs)
            self.mask |= 1 << room


def _in_order(packs: np.ndarray, num_packs: int) -> Packs:
    """Renumber packs by their first sample and list each pack's samples in ascending order."""
    first = np.full(num_packs, len(packs), dtype=np.int64)
    np.minimum.at(first, packs, np.arange(len(packs)))
    rank = np.empty(num_packs, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(num_packs)
    packs = rank[packs]
    offsets = np.zeros(num_packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(packs, minlength=num_packs), out=offsets[1:])
    return Packs(offsets, np.argsort(packs, kind="stable").astype(np.int64))


def one_each(num_samples: int) -> Packs:
    """No packing: every sample is an item of its own."""
    return Packs(np.arange(num_samples + 1, dtype=np.int64), np.arange(num_samples, dtype=np.int64))


def gather_sums(packs: Packs, values: np.ndarray) -> np.ndarray:
    """The sum of a value per sample over each pack, int64 [num_packs]."""
    return np.add.reduceat(values[packs.samples], packs.offsets[:-1]) if len(packs.samples) else np.zeros(0, dtype=np.int64)
