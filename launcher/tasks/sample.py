"""A sample of a task: a row after encoding, and the random numbers that a step draws for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

IGNORE = -100
"""The target of a position without loss."""


class Encoded(NamedTuple):
    """A sample's arrays by name, each with one entry per position or of any shape that `collate`
    understands."""

    arrays: dict[str, np.ndarray]
    num_supervised: int
    """The supervised tokens, or 1 where the sample as a whole has one target."""
    length: int
    """The positions that it takes up in a pass; for text, its tokens."""
    cut: bool | str = False
    """Whether it was cut to max_length, or a description of what was left out of the row."""


class Drawn(NamedTuple):
    """A model's input for a sample as a picture for people, with its target."""

    picture: np.ndarray
    """uint8 [height, width, 3]."""
    text: str
    """The target in words."""


class Sample(dict[str, "np.ndarray"]):
    """One sample's arrays by name.

    `id` is its row number in the source, `window` its number among the samples of that row, `length` the
    positions that it takes up. A `weight` of 0 marks a padding sample, which only keeps shapes equal among
    ranks: `collate` must not supervise any of it. `partner` is another sample of its step, for a task that
    mixes them.
    """

    __slots__ = ("id", "length", "partner", "weight", "window")

    def __init__(
        self, arrays: Mapping[str, np.ndarray], id: int, length: int, weight: int = 1, window: int = 0
    ) -> None:
        super().__init__(arrays)
        self.id = id
        self.length = length
        self.weight = weight
        self.window = window
        self.partner: Sample | None = None

    def as_filler(self) -> Sample:
        """Return the same arrays with weight 0."""
        return Sample(self, self.id, self.length, 0, self.window)


def virtual_ids(number: int) -> np.ndarray:
    """Return the ids of prompt tuning's virtual tokens, int32 [number]: -1 for the first, -2 for the second.

    No vocabulary has negative ids, so that nothing takes them for words: the model's input embeddings give them
    their learned vectors.
    """
    return -np.arange(1, number + 1, dtype=np.int32)


def sample_at(sample: Sample, positions: np.ndarray) -> Sample:
    """Return the sample with only these positions, int [n]. Arrays of another length than the sample's stay
    unchanged."""
    arrays = {
        name: array[positions] if len(array) == sample.length else array for name, array in sample.items()
    }
    return Sample(arrays, sample.id, len(positions), sample.weight, sample.window)


def ends_of(num_positions: int, length: int) -> np.ndarray:
    """Return the first positions and the last one, int [n]: `length` of them, or all if there are fewer."""
    return np.r_[: min(length, num_positions) - 1, num_positions - 1]


@dataclass(frozen=True)
class Draws:
    """Random numbers for a sample that depend only on the run's seed, the step and the sample: equal on any
    number of ranks, and after a resume."""

    seed: int
    step: int
    training: bool = False
    """Whether the samples are for training, not for evaluation."""

    def of(self, sample: Sample) -> np.random.Generator:
        """Return this sample's own generator."""
        return np.random.default_rng((self.seed, self.step, sample.id, sample.window))
