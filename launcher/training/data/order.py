"""The order of the data: a function of seed and epoch, O(1) per look-up.

Each epoch is a keyed permutation of the items: a Feistel network over the next power of two, walked until it
falls below the number of items. The mixer is plain 64-bit integer arithmetic, so that the order does not
depend on a library's version.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix(values: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64: uint64 -> uint64, every input bit reaching every output bit."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def permute(values: np.ndarray, keys: np.ndarray, num_items: int) -> np.ndarray:
    """Return a permutation of 0..num_items-1 for each key, applied to `values`; uint64 arrays of one
    shape."""
    bits = max(4, (num_items - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    round_keys = mix(keys + np.arange(NUM_ROUNDS, dtype=np.uint64)[:, None])
    result = values.copy()
    walking = np.arange(len(values))
    while len(walking):
        low, high = result[walking] & low_mask, result[walking] >> low_bits
        key_pairs = round_keys[:, walking].reshape(NUM_ROUNDS // 2, 2, -1)
        for low_key, high_key in key_pairs:
            low ^= mix(high ^ low_key) & low_mask
            high ^= mix(low ^ high_key) & high_mask
        result[walking] = (high << low_bits) | low
        walking = walking[result[walking] >= num_items]
    return result


class Order:
    """The item at each position of an endless sequence of epochs.

    A position counts items over all epochs and all ranks; nothing depends on the number of ranks.
    """

    def __init__(self, seed: int, num_items: int, shuffle: bool = True) -> None:
        if num_items < 1:
            raise ValueError(f"num_items = {num_items}: an order needs at least one item")
        self.seed = seed
        self.num_items = num_items
        self.shuffle = shuffle

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the item indices, int64 [count], of the positions start..start+count-1."""
        return self.places(np.arange(start, start + count))

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Return the item indices, int64 [n], of any positions, int64 [n]."""
        epochs, offsets = np.divmod(positions.astype(np.uint64), np.uint64(self.num_items))
        if self.shuffle:
            seed = mix(np.full(len(epochs), self.seed % 2**64, dtype=np.uint64))
            offsets = permute(offsets, mix(seed ^ epochs), self.num_items)
        return offsets.astype(np.int64)

    @property
    def num_in_epoch(self) -> int:
        """Return the positions of an epoch."""
        return self.num_items

    def at(self, position: int) -> int:
        """Return the item at one position."""
        return int(self.indices(position, 1)[0])


class MixedOrder(Order):
    """The order of items of several sources, mixed in shares; items are numbered source after source.

    An epoch has a fixed number of items from each source, shuffled together. Each source has its own endless
    order, in which every item comes once before any repeats, also across epochs.
    """

    def __init__(self, seed: int, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Mix sources. `sizes`: the number of items of each; `counts`: of those, the number in an epoch."""
        super().__init__(seed, sum(sizes))
        self.counts = np.array(counts, dtype=np.int64)
        self._epoch = Order(seed, int(self.counts.sum()))
        self._sources = [Order(seed_of(seed, number), size) for number, size in enumerate(sizes)]
        self._begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @property
    def num_in_epoch(self) -> int:
        return self._epoch.num_items

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the item indices, int64 [count], of the positions start..start+count-1."""
        epochs = np.arange(start, start + count, dtype=np.int64) // self.num_in_epoch
        slots = self._epoch.indices(start, count)
        ends = np.cumsum(self.counts)
        owners = np.searchsorted(ends, slots, side="right")
        results = np.empty(count, dtype=np.int64)
        for number in np.unique(owners).tolist():
            own = owners == number
            positions = epochs[own] * self.counts[number] + slots[own] - (ends - self.counts)[number]
            results[own] = self._sources[number].places(positions) + self._begins[number]
        return results


class Stretch(Order):
    """A part of the items, in their order: those of one source."""

    def __init__(self, num_items: int, begin: int) -> None:
        """Take the items from `begin` on; `num_items` is the number of all items."""
        super().__init__(0, num_items, shuffle=False)
        self.begin = begin

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the item indices, int64 [count], of the positions start..start+count-1 of the part."""
        return np.arange(self.begin + start, self.begin + start + count)


def seed_of(seed: int, number: int) -> int:
    """Return the seed of one source's or window's own order, so that equal sizes do not have equal orders."""
    return int(mix(np.array([seed % 2**64], dtype=np.uint64) + np.uint64(number + 1))[0])
